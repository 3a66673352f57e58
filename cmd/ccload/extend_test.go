// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"ccload/harness"
	"ccload/harness/trace"
	"ccload/internal/kerneltest"
	"ccload/registry"
	"ccload/structops"

	"golang.org/x/sys/unix"
)

// On one connection the share of the window that is kept after a loss is first the
// algorithm's, then the extension's, and then the algorithm's again.
func TestExtendLive(t *testing.T) {
	for _, c := range []struct {
		alg, how string
		own      float64
	}{
		{"bpf_cubic", "tail-call", 0.7},
		{"bpf_cubic", "freplace", 0.7},
		{"bpf_dctcp", "freplace", 0.5},
	} {
		t.Run(c.alg+" "+c.how, func(t *testing.T) {
			kerneltest.Privileged(t)
			ccload := func(args ...string) (talk string, ok bool) {
				var out strings.Builder
				status := run(t.Context(), args, nil, &out, &out)
				return out.String(), status == exitDone
			}
			const name = "cct_live"
			if talk, ok := ccload("register", c.alg, "--as", name); !ok {
				t.Fatal(talk)
			}
			defer ccload("unregister", name)
			extend := []string{"extend", name, "backoff", "../../bpf/examples/gentle.bpf.o", "--how", c.how}
			remove := []string{"extend", name, "--remove", "backoff"}
			if talk, ok := ccload(extend...); !ok && c.how == "freplace" && strings.Contains(talk, "the process has all required capabilities") {
				t.Skip(talk)
			} else if !ok {
				t.Fatal(talk)
			}
			if talk, ok := ccload(remove...); !ok {
				t.Fatal(talk)
			}

			const phase, phases, settle = 3, 3, 0.5 // s
			steps := [][]string{extend, remove}
			dir := filepath.Join(t.TempDir(), "run")
			_, err := harness.Run(t.Context(), trace.Experiment{
				Duration: phase * phases, PerAck: true, Seed: 1, Flows: []trace.Flow{{CC: name}},
				Link: trace.Link{Kind: "userspace", Rate: 20e6, RTT: 0.04, Buffer: 200, ECN: 1000, Loss: trace.Loss{Every: 300}},
			}, harness.Options{Dir: dir, Progress: func(elapsed, _ time.Duration) {
				if done := phases - 1 - len(steps); len(steps) > 0 && elapsed.Seconds() > float64(phase*(done+1)) {
					if talk, ok := ccload(steps[0]...); !ok {
						t.Error(talk)
					}
					steps = steps[1:]
				}
			}})
			if err != nil {
				t.Fatal(err)
			}
			r, err := trace.Open(dir)
			if err != nil {
				t.Fatal(err)
			}
			var kept [phases][]float64
			var last trace.Sample
			for _, s := range r.Samples {
				if s.Source != trace.Ack {
					continue
				}
				in, since := math.Modf(s.Time / phase)
				if s.CAState == trace.CARecovery && last.CAState < trace.CARecovery && since*phase > settle && in < phases && last.Cwnd > 10 {
					kept[int(in)] = append(kept[int(in)], float64(s.Ssthresh)/float64(last.Cwnd))
				}
				last = s
			}
			for i, want := range []float64{c.own, 0.85, c.own} {
				slices.Sort(kept[i])
				if n := len(kept[i]); n < 3 || math.Abs(kept[i][n/2]-want) > 0.04 {
					t.Errorf("phase %d: of the windows is kept %.3f, want %g", i, kept[i], want)
				}
			}
		})
	}
}

// However an extend or a removal is killed, afterwards the function is extended in
// all of its copies or in none, and nothing else is left.
func TestExtendKilled(t *testing.T) {
	kerneltest.Privileged(t)
	const name, example = "cct_killed", "../../bpf/examples/gentle.bpf.o"
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	command := func(args []string) *exec.Cmd {
		return &exec.Cmd{Path: self, Args: append([]string{"ccload"}, args...)}
	}
	ccload := func(args ...string) error { return command(args).Run() }
	alg := "bpf_dctcp" // two copies
	for {
		if err := ccload("register", alg, "--as", name); err != nil {
			t.Fatal(err)
		}
		defer ccload("unregister", name)
		if ccload("extend", name, "backoff", example) == nil {
			break
		}
		// Where functions cannot be replaced there is one slot.
		if alg == "bpf_cubic" {
			t.Fatal("it cannot be extended")
		}
		if err := ccload("unregister", name); err != nil {
			t.Fatal(err)
		}
		alg = "bpf_cubic"
	}
	extended := func() bool {
		t.Helper()
		d, _, err := registry.Lookup(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range d.Functions {
			if f.Name == "backoff" && f.Extended != nil {
				if !slices.Equal(f.Extended.Members, f.Copies) {
					t.Errorf("extended in %q of %q", f.Extended.Members, f.Copies)
				}
				return true
			}
		}
		return false
	}
	verbs := map[bool][]string{true: {"extend", name, "backoff", example}, false: {"extend", name, "--remove", "backoff"}}
	bring := func(want bool) {
		t.Helper()
		if extended() != want {
			if err := ccload(verbs[want]...); err != nil {
				t.Fatal(err)
			}
		}
	}
	counts := map[bool]int{}
	for _, verb := range []bool{true, false} {
		bring(!verb)
		begin := time.Now()
		bring(verb)
		whole := time.Since(begin)
		for n := range 20 {
			bring(!verb)
			cmd := command(verbs[verb])
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(whole * time.Duration(n) / 20)
			cmd.Process.Kill()
			cmd.Wait()
			// The next one sweeps, whatever it does.
			ccload("extend", name, "--remove", "no_such_function")
			if extended() == verb {
				counts[verb]++
			}
		}
	}
	t.Logf("of 20 that were killed had extended: %d, had removed: %d", counts[true], counts[false])
}

// The doctor says of freplace what an extension meets.
func TestExtendDoctor(t *testing.T) {
	kerneltest.Privileged(t)
	targets, done, err := extensionTargets()
	defer done()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile("../../bpf/examples/gentle.bpf.o")
	if err != nil {
		t.Fatal(err)
	}
	e, err := structops.ParseExtension(b)
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(targets, func(i *structops.Info) bool { return i.Name == "bpf_cubic" })
	x, _, err := e.Load(targets[i], "backoff", structops.Freplace)
	if err == nil {
		x.Close()
	}
	found := tryFreplace()
	if (found == nil) != (err == nil) || found != nil && !errors.Is(found, unix.EPERM) {
		t.Errorf("the doctor: %v; an extension: %v", found, err)
	}
	t.Log(found)
}
