// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"ccload/internal/kerneltest"
	"ccload/structops"
)

// Of many processes that want the same of one name one gets it, and the others say
// why not; whatever they do at once, nothing is left half done.
func TestManyAtOnce(t *testing.T) {
	kerneltest.Privileged(t)
	const name, processes = "cct_m", 16
	before, err := kerneltest.Take()
	if err != nil {
		t.Fatal(err)
	}
	// all runs a command in each process at once, and says what each that failed said.
	all := func(args func(n int) []string) (failures []string) {
		var mu sync.Mutex
		var wg sync.WaitGroup
		start := make(chan struct{})
		for n := range processes {
			cmd := subject(t, args(n)...)
			wg.Go(func() {
				<-start
				if out, err := cmd.CombinedOutput(); err != nil {
					mu.Lock()
					failures = append(failures, string(out))
					mu.Unlock()
				}
			})
		}
		close(start)
		wg.Wait()
		return failures
	}
	for range 5 {
		for _, c := range []struct {
			args []string
			says string
		}{
			{[]string{"register", "bpf_reno", "--as", name}, "the name is taken"},
			{[]string{"unregister", name}, "no congestion control of that name"},
		} {
			failures := all(func(int) []string { return c.args })
			if len(failures) != processes-1 {
				t.Errorf("%q: %d of %d failed", c.args, len(failures), processes)
			}
			for _, f := range failures {
				if !strings.Contains(f, c.says) {
					t.Errorf("%q: one said %s", c.args, f)
				}
			}
		}
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 5 {
		all(func(n int) []string {
			return [][]string{
				{"register", "bpf_cubic", "--as", name},
				{"unregister", name},
				{"replace", name, "bpf_cubic", "--set", "c=0.5"},
				{"set", name, fmt.Sprintf("beta=0.%d", 60+n)},
				{"list"},
			}[rnd.IntN(5)]
		})
		live, err := structops.Live()
		if err != nil {
			t.Fatal(err)
		}
		registered := 0
		for _, i := range live {
			if i.Name == name && i.Registered() {
				registered++
			}
		}
		if registered > 1 {
			t.Fatalf("%d are registered under one name", registered)
		}
	}
	subject(t, "unregister", name).Run() // which may not be there
	if err := before.Check(); err != nil {
		t.Error(err)
	}
}
