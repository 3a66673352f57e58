// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"ccload/internal/kerneltest"
	"ccload/structops"

	"github.com/cilium/ebpf"
)

// holds is what the kernel has in use.
type holds struct {
	Maps, Programs int
	Memory         int // KiB that it cannot reclaim
}

func holding(t *testing.T) (h holds) {
	t.Helper()
	runtime.GC() // the library unmaps the variables of programs that are closed only then
	for id := ebpf.MapID(0); ; h.Maps++ {
		next, err := ebpf.MapGetNextID(id)
		if errors.Is(err, os.ErrNotExist) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		id = next
	}
	for id := ebpf.ProgramID(0); ; h.Programs++ {
		next, err := ebpf.ProgramGetNextID(id)
		if errors.Is(err, os.ErrNotExist) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		id = next
	}
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var kib int
		switch what, rest, _ := strings.Cut(lines.Text(), ":"); what {
		case "SUnreclaim", "Percpu", "VmallocUsed":
			fmt.Sscan(rest, &kib)
			h.Memory += kib
		}
	}
	return h
}

// Connections send while the code under their name is replaced again and again,
// every other time with them: none is reset, no byte is lost or changed, and what the
// kernel holds does not grow.
//
// It is a part of the whole size, which takes minutes, unless CCLOAD_LONG is 1.
func TestReplaceLoad(t *testing.T) {
	kerneltest.Privileged(t)
	connections, replacements := 200, 60
	if os.Getenv("CCLOAD_LONG") == "1" {
		connections, replacements = 1000, 1000
	}
	const (
		name   = "ccr_load"
		pause  = 200 * time.Millisecond // of a connection, between two blocks
		block  = 8 << 10                // bytes
		before = 12                     // replacements until the kernel is looked at first; as many are not migrated yet as at the end
		spare  = 8                      // maps and programs that others may make meanwhile
		growth = 16 << 10               // KiB that the kernel may hold more, whatever else the machine does
	)
	was, ns := serving(t, name, parseObject(t, "cubic.bpf.o", structops.Parse), Options{Allow: true})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var sent, received atomic.Int64
	results := make(chan error, connections)
	for i := range connections {
		p := opened(t, ns)
		p.l.Close()
		hashes := [2]hash.Hash{sha256.New(), sha256.New()}
		errs := make(chan error, 2)
		go func() {
			data, random := make([]byte, block), rand.NewChaCha8([32]byte{byte(i), byte(i >> 8)})
			var err error
			for wait := time.Duration(i) * pause / time.Duration(connections); err == nil && ctx.Err() == nil; wait = pause {
				time.Sleep(wait)
				random.Read(data)
				_, err = io.MultiWriter(p.c, hashes[0]).Write(data)
				sent.Add(block)
			}
			errs <- errors.Join(err, p.c.CloseWrite())
		}()
		go func() {
			n, err := io.Copy(hashes[1], p.s)
			received.Add(n)
			errs <- err
		}()
		go func() { results <- errors.Join(<-errs, <-errs, same(hashes)) }()
	}

	objects := []*structops.Spec{reno(t), parseObject(t, "cubic.bpf.o", structops.Parse)}
	var first holds
	var moved, kept int
	begun := time.Now()
	for i := range before + replacements {
		if i == before {
			time.Sleep(2 * time.Second) // what went with the others is gone
			first = holding(t)
		}
		r, err := Replace(name, objects[i%2], ReplaceOptions{Migrate: i/2%2 == 1})
		if err != nil {
			t.Fatal(err)
		}
		if r.Before != was.MapID || len(r.Namespaces) != 1 {
			t.Fatalf("replacement %d: %+v", i, r)
		}
		was.MapID = r.MapID
		if m := r.Migrated; m != nil {
			if moved, kept = moved+m.Moved, kept+m.Kept; m.Matched != 2*connections || m.Moved+m.Kept != m.Matched || m.Window > 0 {
				t.Fatalf("replacement %d: %+v", i, *m)
			}
		}
	}
	took := time.Since(begun)
	var now holds
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		now = holding(t)
		settled := now.Maps <= first.Maps+spare && now.Programs <= first.Programs+spare && now.Memory <= first.Memory+growth
		if settled || time.Now().After(deadline) {
			if !settled {
				t.Errorf("the kernel held %+v, and holds %+v", first, now)
			}
			break
		}
	}
	cancel()
	for range connections {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	if sent.Load() == 0 || sent.Load() != received.Load() {
		t.Errorf("%d bytes were sent, %d received", sent.Load(), received.Load())
	}
	t.Logf("%d connections, %d replacements in %.1f s, %d moves (%d kept), %d MB sent and received; the kernel held %+v, then %+v",
		connections, before+replacements, took.Seconds(), moved, kept, sent.Load()/1e6, first, now)
}

// same says whether what was received is what was sent.
func same(hashes [2]hash.Hash) error {
	if !bytes.Equal(hashes[0].Sum(nil), hashes[1].Sum(nil)) {
		return errors.New("what arrived is not what was sent")
	}
	return nil
}
