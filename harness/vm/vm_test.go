// SPDX-License-Identifier: Apache-2.0

package vm_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ccload/harness"
	"ccload/harness/trace"
	"ccload/harness/vm"
	"ccload/internal/vmtest"
)

func TestMain(m *testing.M) {
	if vm.Inside() {
		vm.Init(nil, inGuest)
	}
	status := m.Run()
	if built.path != "" {
		os.RemoveAll(filepath.Dir(built.path))
	}
	os.Exit(status)
}

const experimentFile = "/experiment.json"

// inGuest is what the tests run inside.
func inGuest(args []string, stdout, stderr io.Writer) int {
	switch args[0] {
	case "uname":
		var u unix.Utsname
		unix.Uname(&u)
		fmt.Fprintln(stdout, unix.ByteSliceToString(u.Release[:]))
		fmt.Fprint(stderr, strings.Join(args[1:], ","))
		return 7
	case "big":
		stdout.Write(pattern(3 << 20))
	case "panic":
		os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0)
	case "memory":
		for hog := [][]byte{}; ; {
			b := make([]byte, 16<<20)
			for i := 0; i < len(b); i += 4096 {
				b[i] = 1
			}
			hog = append(hog, b)
		}
	case "sleep":
		fmt.Fprintln(stdout, "asleep")
		select {}
	case "wait":
		fmt.Fprintln(stdout, "waiting")
		for {
			unix.RawSyscall(unix.SYS_GETPID, 0, 0, 0)
		}
	case "run":
		var e trace.Experiment
		b, err := os.ReadFile(experimentFile)
		if err == nil {
			err = json.Unmarshal(b, &e)
		}
		if err == nil {
			results := &vm.Results{}
			_, err = harness.Run(context.Background(), e, harness.Options{Sink: results, Progress: results.Progress})
		}
		if err != nil {
			fmt.Fprintln(stderr, err)
			return 1
		}
	}
	return 0
}

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + i>>8)
	}
	return b
}

// program is this test program, as a guest can run it; it is built once.
func program(t *testing.T) string {
	built.Do(func() {
		b, err := os.ReadFile(vmtest.Test(t, "ccload/harness/vm"))
		if err != nil {
			t.Fatal(err)
		}
		dir, err := os.MkdirTemp("", "vm-test-")
		if err != nil {
			t.Fatal(err)
		}
		built.path = filepath.Join(dir, "vm.test")
		if err := os.WriteFile(built.path, b, 0o755); err != nil {
			t.Fatal(err)
		}
	})
	if built.path == "" {
		t.Fatal("the test program could not be built")
	}
	return built.path
}

var built struct {
	sync.Once
	path string
}

// newGuest is one with this test program as its init.
func newGuest(t *testing.T, args ...string) *vm.Guest {
	t.Helper()
	return &vm.Guest{Kernel: vmtest.Kernel(t, "debian-6.12"), Binary: program(t), Args: args}
}

func TestRun(t *testing.T) {
	var out, errs, console bytes.Buffer
	g := newGuest(t, "uname", "a b", "c")
	status, err := g.Run(t.Context(), &out, &errs, &console)
	if err != nil || status != 7 || out.String() != g.Kernel.Release+"\n" || errs.String() != "a b,c" {
		t.Errorf("status %d, %v, %q, %q\n%s", status, err, out.String(), errs.String(), console.String())
	}
}

func TestOutput(t *testing.T) {
	var out bytes.Buffer
	status, err := newGuest(t, "big").Run(t.Context(), &out, io.Discard, nil)
	if err != nil || status != 0 || !bytes.Equal(out.Bytes(), pattern(3<<20)) {
		t.Errorf("status %d, %v, %d bytes", status, err, out.Len())
	}
}

// However a guest fails, it ends, and the error says why.
func TestFailures(t *testing.T) {
	for _, c := range []struct {
		do, why, log string
		guest        func(*vm.Guest)
	}{
		{do: "panic", why: "the kernel panicked", log: "sysrq triggered crash"},
		{do: "memory", why: "out of memory", log: "deadlocked on memory"},
		{do: "sleep", why: "it took too long", log: "not done after 5s", guest: func(g *vm.Guest) { g.Limit = 5 * time.Second }},
	} {
		t.Run(c.do, func(t *testing.T) {
			t.Parallel()
			g := newGuest(t, c.do)
			if c.guest != nil {
				c.guest(g)
			}
			_, err := g.Run(t.Context(), io.Discard, io.Discard, nil)
			crash, ok := errors.AsType[*vm.CrashError](err)
			if !ok || !strings.Contains(crash.Why, c.why) || !strings.Contains(crash.Log, c.log) {
				t.Errorf("got %v", err)
			}
		})
	}
}

// watched cancels a context, or does something else, when the guest has written.
type watched struct{ then func() }

func (w watched) Write(p []byte) (int, error) { w.then(); return len(p), nil }

// children are the processes that this one has started and that still run.
func children(t *testing.T) (pids []int) {
	t.Helper()
	tasks, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range tasks {
		b, _ := os.ReadFile(f)
		for p := range strings.FieldsSeq(string(b)) {
			pid, err := strconv.Atoi(p)
			if err != nil {
				t.Fatal(err)
			}
			pids = append(pids, pid)
		}
	}
	return pids
}

func TestCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	_, err := newGuest(t, "wait").Run(ctx, watched{cancel}, io.Discard, nil)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if pids := children(t); len(pids) != 0 {
		t.Errorf("processes %v are still there", pids)
	}
}

func TestKilled(t *testing.T) {
	_, err := newGuest(t, "wait").Run(t.Context(), watched{func() {
		for _, pid := range children(t) {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}}, io.Discard, nil)
	if crash, ok := errors.AsType[*vm.CrashError](err); !ok || !strings.Contains(crash.Why, "signal: killed") {
		t.Errorf("got %v", err)
	}
}

// A guest that gives no sign of life is ended, whatever keeps it.
func TestHangs(t *testing.T) {
	g := newGuest(t, "wait")
	g.Patience = 15 * time.Second // and a boot may take no longer
	_, err := g.Run(t.Context(), watched{func() {
		for _, pid := range children(t) {
			syscall.Kill(pid, syscall.SIGSTOP)
		}
	}}, io.Discard, nil)
	if crash, ok := errors.AsType[*vm.CrashError](err); !ok || crash.Why != "it hangs: no sign of life for 15s" {
		t.Errorf("got %v", err)
	}
	if pids := children(t); len(pids) != 0 {
		t.Errorf("processes %v are still there", pids)
	}
}

// experiment is one for the guest, on cubic.
func experiment(t *testing.T, loss float64, seed uint64) (*vm.Guest, trace.Experiment) {
	t.Helper()
	e, err := harness.Defaults(trace.Experiment{
		Name: "test", Duration: 2, Seed: seed, PerAck: true, Flows: []trace.Flow{{CC: "cubic"}, {CC: "reno", Start: 0.5}},
		Link: trace.Link{Kind: "userspace", Rate: 10e6, RTT: 0.02, BufferBDP: 1, Loss: trace.Loss{Probability: loss}},
	})
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	g := newGuest(t, "run")
	g.Modules, g.Files, g.Seed = []string{"tun", "inet_diag", "tcp_diag"}, map[string][]byte{experimentFile: b}, uint32(seed)
	return g, e
}

// sums are of what a run leaves behind.
type sums struct{ samples, link [32]byte }

func measure(t *testing.T, seed uint64) (s sums) {
	t.Helper()
	g, e := experiment(t, 0.005, seed)
	dir := filepath.Join(t.TempDir(), "result")
	r, err := g.Experiment(t.Context(), e, harness.Options{Dir: dir}, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	if !r.VirtualTime || r.Kernel != g.Kernel.Release || r.Dir != dir || r.Sampling.Ack < 300 || r.Bottleneck.Losses == 0 {
		t.Errorf("%+v", r)
	}
	if _, err := trace.Open(dir); err != nil {
		t.Error(err)
	}
	for _, f := range []struct {
		name string
		sum  *[32]byte
	}{{"samples.parquet", &s.samples}, {"link.parquet", &s.link}} {
		b, err := os.ReadFile(filepath.Join(dir, f.name))
		if err != nil {
			t.Fatal(err)
		}
		*f.sum = sha256.Sum256(b)
	}
	return s
}

// newCache gives the test a cache of its own, in which there are only the kernels.
func newCache(t *testing.T) (dir string) {
	t.Helper()
	program(t) // is built with the old one
	kernels := vm.CacheDir()
	top := t.TempDir()
	dir = filepath.Join(top, "ccload")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(kernels, filepath.Join(dir, "kernels")); err != nil {
		t.Fatal(err)
	}
	t.Setenv("XDG_CACHE_HOME", top)
	return dir
}

// The same binary, kernel, experiment and seed give the same bytes, however busy
// the host is, also while it boots; another seed gives others.
func TestDeterminism(t *testing.T) {
	quiet := measure(t, 1)
	newCache(t)
	stop := make(chan struct{})
	for range 4 {
		go func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
			}
		}()
	}
	// Several guests at once are more than the host has processors for, too.
	const guests = 5
	busy := make([]sums, guests)
	t.Run("busy", func(t *testing.T) {
		for i := range busy {
			t.Run(strconv.Itoa(i), func(t *testing.T) {
				t.Parallel()
				busy[i] = measure(t, uint64(1+i/(guests-1))) // the last has another seed
			})
		}
	})
	close(stop)
	for _, b := range busy[:guests-1] {
		if b != quiet {
			t.Errorf("the same seed gave other bytes on a busy host: %x, before %x", b, quiet)
		}
	}
	if other := busy[guests-1]; other.samples == quiet.samples || other.link == quiet.link {
		t.Error("another seed gave the same bytes")
	}
}

// A damaged state of a guest is made anew, and where QEMU cannot take one the guest
// boots.
func TestState(t *testing.T) {
	cache := newCache(t)
	before := measure(t, 1)
	states := func() []string {
		files, err := filepath.Glob(filepath.Join(cache, "guests/[^.]*"))
		if err != nil {
			t.Fatal(err)
		}
		return files
	}
	files := states()
	if len(files) != 1 {
		t.Fatalf("the cache has %q", files)
	}
	whole, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	damaged := bytes.Clone(whole)
	damaged[len(damaged)/2]++
	for what, b := range map[string][]byte{"damaged": damaged, "truncated": whole[:len(whole)/2], "empty": nil} {
		if err := os.WriteFile(files[0], b, 0o600); err != nil {
			t.Fatal(err)
		}
		if after := measure(t, 1); after != before {
			t.Errorf("%s: it gave %x, before %x", what, after, before)
		}
		if b, err := os.ReadFile(files[0]); err != nil || len(b) != len(whole) {
			t.Errorf("%s: the cache has %d bytes, before %d, %v", what, len(b), len(whole), err)
		}
	}

	// One that others could have written is refused, and stays for its owner to look at.
	for _, path := range []string{files[0], filepath.Dir(files[0])} {
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		os.Chmod(path, st.Mode().Perm()|0o022)
		g, e := experiment(t, 0, 1)
		_, err = g.Experiment(t.Context(), e, harness.Options{Dir: filepath.Join(t.TempDir(), "result")}, io.Discard)
		if refused, ok := errors.AsType[*vm.UntrustedError](err); !ok || refused.Path != path {
			t.Errorf("writable %s: %v", path, err)
		}
		os.Chmod(path, st.Mode().Perm())
	}

	real, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	script := fmt.Sprintf("#!/bin/sh\ncase \"$*\" in *i6300esb*) echo no such device >&2; exit 1;; esac\nexec %s \"$@\"\n", real)
	if err := os.WriteFile(filepath.Join(bin, "qemu-system-x86_64"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	g, e := experiment(t, 0, 1)
	r, err := g.Experiment(t.Context(), e, harness.Options{Dir: filepath.Join(t.TempDir(), "result")}, io.Discard)
	if err != nil || r.Incomplete || r.Kernel != g.Kernel.Release || r.Sampling.Ack < 300 {
		t.Errorf("without a state: %+v, %v", r, err)
	}
	if now := states(); len(now) != 1 {
		t.Errorf("without a state the cache has %q", now)
	}
}

// What was measured until a guest was ended is kept, and marked.
func TestIncomplete(t *testing.T) {
	g, e := experiment(t, 0, 1)
	dir := filepath.Join(t.TempDir(), "result")
	ctx, cancel := context.WithCancel(t.Context())
	r, err := g.Experiment(ctx, e, harness.Options{Dir: dir, Progress: func(elapsed, _ time.Duration) {
		if elapsed > time.Second {
			cancel()
		}
	}}, io.Discard)
	if !errors.Is(err, context.Canceled) || r == nil || !r.Incomplete {
		t.Fatalf("got %+v, %v", r, err)
	}
	res, err := trace.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if !res.Run.Incomplete || len(res.Samples) < 100 || len(res.Links) < 100 {
		t.Errorf("%d samples, %d states of the link, %+v", len(res.Samples), len(res.Links), res.Run)
	}
	if last := res.Samples[len(res.Samples)-1].Time; last < 0.9 || last > 1.9 {
		t.Errorf("the samples end at %g s", last)
	}
}

// A guest that did not come as far as to measure leaves no directory to remove before
// the next try.
func TestNothingMeasured(t *testing.T) {
	g, e := experiment(t, 0, 1)
	g.Patience = time.Millisecond
	top := t.TempDir()
	r, err := g.Experiment(t.Context(), e, harness.Options{Dir: filepath.Join(top, "a", "result")}, io.Discard)
	if _, crashed := errors.AsType[*vm.CrashError](err); !crashed || r != nil {
		t.Errorf("got %+v, %v", r, err)
	}
	if left, err := os.ReadDir(top); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestBadBinary(t *testing.T) {
	g := newGuest(t)
	dynamic := filepath.Join(t.TempDir(), "dynamic")
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Skip(err)
	}
	b, err := os.ReadFile(sh)
	if err != nil {
		t.Fatal(err)
	}
	os.WriteFile(dynamic, b, 0o755)
	g.Binary = dynamic
	if _, err := g.Run(t.Context(), io.Discard, io.Discard, nil); err == nil || !strings.Contains(err.Error(), "not static") {
		t.Errorf("got %v", err)
	}
}

func TestNoQEMU(t *testing.T) {
	g := newGuest(t, "uname")
	t.Setenv("PATH", t.TempDir())
	if _, err := g.Run(t.Context(), io.Discard, io.Discard, nil); !errors.Is(err, vm.ErrNoQEMU) {
		t.Errorf("got %v", err)
	}
}
