// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"ccload/internal/kerneltest"
	"ccload/structops"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// parseObject parses an object below bpf/.
func parseObject[T any](t *testing.T, file string, parse func([]byte) (T, error)) T {
	t.Helper()
	b, err := os.ReadFile("../bpf/" + file)
	if err != nil {
		t.Fatal(err)
	}
	spec, err := parse(b)
	if err != nil {
		t.Fatal(err)
	}
	return spec
}

func gentle(t *testing.T) *structops.Extension {
	return parseObject(t, "examples/gentle.bpf.o", structops.ParseExtension)
}

// registerAs registers an algorithm of the catalogue.
func registerAs(t *testing.T, file, name string) *Registration {
	t.Helper()
	r, err := Register(parseObject(t, file, structops.Parse), Options{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		var gone *NotFoundError
		if _, err := Unregister(name, UnregisterOptions{}); err != nil && !errors.As(err, &gone) {
			t.Error(err)
		}
	})
	return r
}

// extend extends, or skips the test where the kernel does not let functions be
// replaced.
func extend(t *testing.T, name string, e *structops.Extension, how structops.How) *Extended {
	t.Helper()
	x, err := Extend(name, "backoff", e, how)
	var forbidden *structops.PermissionError
	if how == structops.Freplace && errors.As(err, &forbidden) && len(forbidden.Missing) == 0 {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// function is what Lookup tells of a function.
func function(t *testing.T, name, function string) Policy {
	t.Helper()
	d, warnings, err := Lookup(name)
	if err != nil || len(warnings) > 0 {
		t.Fatal(err, warnings)
	}
	i := slices.IndexFunc(d.Functions, func(p Policy) bool { return p.Name == function })
	if i < 0 {
		t.Fatalf("%s has no function %q: %+v", name, function, d.Functions)
	}
	return d.Functions[i]
}

// pinned are the files below the pins of extensions.
func pinned(t *testing.T) (files []string) {
	t.Helper()
	for _, p := range places() {
		files = append(files, p.path)
	}
	if _, err := os.Stat(extendDir); (err == nil) != (len(files) > 0) {
		t.Errorf("%d pins, and their directory: %v", len(files), err)
	}
	return files
}

func TestExtend(t *testing.T) {
	for _, c := range []struct {
		how           structops.How
		file, program string
		members       []string
	}{
		{structops.TailCall, "cubic.bpf.o", "backoff_slot", []string{"ssthresh"}},
		{structops.Freplace, "cubic.bpf.o", "gentle_backoff", []string{"ssthresh"}},
		{structops.Freplace, "dctcp.bpf.o", "gentle_backoff", []string{"cwnd_event", "set_state"}},
	} {
		t.Run(string(c.how)+" "+c.file, func(t *testing.T) {
			kerneltest.Privileged(t)
			const name = "ccr.ext"
			r := registerAs(t, c.file, name)
			if f := function(t, name, "backoff"); f.Extended != nil || f.Signature != "__u32 backoff(__u32 cwnd)" || !slices.Equal(f.Copies, c.members) {
				t.Errorf("before: %+v", f)
			}
			x := extend(t, name, gentle(t), c.how)
			if x.How != c.how || x.Program != c.program || !slices.Equal(x.Members, c.members) || len(x.Warnings) > 0 {
				t.Errorf("extended: %+v", x)
			}
			if f := function(t, name, "backoff"); f.Extended == nil || f.Extended.Program != c.program || !slices.Equal(f.Extended.Members, c.members) {
				t.Errorf("after: %+v", f.Extended)
			}
			if n := len(pinned(t)); n != len(c.members) {
				t.Errorf("%d pins", n)
			}
			for _, file := range append(pinned(t), extendDir, filepath.Dir(pinned(t)[0])) {
				if st, err := os.Stat(file); err != nil || st.Mode().Perm()&0o077 != 0 {
					t.Errorf("%s: %v, %v", file, st.Mode(), err)
				}
			}
			var twice *ExtendedError
			if _, err := Extend(name, "backoff", gentle(t), ""); !errors.As(err, &twice) || twice.Program != c.program {
				t.Errorf("a second one: %v", err)
			}
			if _, err := Unextend(name, "backoff"); err != nil {
				t.Error(err)
			}
			if f := function(t, name, "backoff"); f.Extended != nil || len(pinned(t)) > 0 {
				t.Errorf("removed, and there is %+v, %q", f.Extended, pinned(t))
			}
			var not *NotExtendedError
			if _, err := Unextend(name, "backoff"); !errors.As(err, &not) {
				t.Errorf("removed twice: %v", err)
			}
			// Unregistering takes it along, whatever was extended how often.
			extend(t, name, gentle(t), c.how)
			if u, err := Unregister(name, UnregisterOptions{}); err != nil || len(u.Warnings) > 0 || !slices.Equal(u.Pins, []string{r.Pin}) {
				t.Errorf("unregistered: %+v, %v", u, err)
			}
			if left := pinned(t); len(left) > 0 {
				t.Errorf("left: %q", left)
			}
		})
	}
}

// By itself it takes the better way that there is.
func TestExtendChooses(t *testing.T) {
	kerneltest.Privileged(t)
	registerAs(t, "cubic.bpf.o", "ccr_ext")
	x := extend(t, "ccr_ext", gentle(t), "")
	if (x.How == structops.TailCall) != (x.Instead != "") {
		t.Errorf("%+v", x)
	}
	t.Logf("%s %s", x.How, x.Instead)
}

func TestExtendErrors(t *testing.T) {
	kerneltest.Privileged(t)
	registerAs(t, "cubic.bpf.o", "ccr_ext")
	registerAs(t, "dctcp.bpf.o", "ccr_ext2")
	for _, c := range []struct {
		name, function string
		how            structops.How
		want           string
	}{
		{"reno", "backoff", "", "not a BPF congestion control"},
		{"ccr_extt", "backoff", "", `did you mean "ccr_ext"?`},
		{"ccr_ext", "bakoff", "", `did you mean "backoff"?`},
		{"ccr_ext", "../backoff", "", "none of that name"},
		{"ccr_ext", "cubic_root", "", "the object has no program for cubic_root, but for backoff (freplace), backoff (tail-call)"},
		{"ccr_ext", "cubic_root", structops.Freplace, "cubic_root (freplace)"},
		{"ccr_ext2", "backoff", structops.TailCall, `no slot for "backoff", only a function`},
		{"ccr_ext2", "reduce", "", "the object has no program for reduce"},
	} {
		_, err := Extend(c.name, c.function, gentle(t), c.how)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s %s: %v", c.name, c.function, err)
		}
		if left := pinned(t); len(left) > 0 {
			t.Fatalf("%s %s: left: %q", c.name, c.function, left)
		}
	}
}

// What a process leaves that dies half-way is gone after the next call.
func TestExtendSwept(t *testing.T) {
	for name, c := range map[string]struct {
		file string
		how  structops.How
		half func(*testing.T, *Registration)
	}{
		"empty slot": {"cubic.bpf.o", structops.TailCall, func(t *testing.T, _ *Registration) {
			m, err := ebpf.LoadPinnedMap(pinned(t)[0], nil)
			if err == nil {
				err = m.Delete(uint32(0))
				m.Close()
			}
			if err != nil {
				t.Fatal(err)
			}
		}},
		"one copy of two": {"dctcp.bpf.o", structops.Freplace, func(t *testing.T, _ *Registration) {
			if err := structops.Detach(pinned(t)[1]); err != nil {
				t.Fatal(err)
			}
		}},
		"unregistered": {"cubic.bpf.o", structops.TailCall, func(t *testing.T, r *Registration) {
			info, err := structops.Inspect(r.MapID)
			if err == nil {
				err = structops.Unregister(info)
			}
			if err != nil {
				t.Fatal(err)
			}
			os.Remove(r.Pin)
			os.Remove(pinDir)
		}},
		"empty directories": {"cubic.bpf.o", structops.TailCall, func(t *testing.T, _ *Registration) {
			dir := filepath.Dir(pinned(t)[0])
			if err := structops.Detach(pinned(t)[0]); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat(dir); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			kerneltest.Privileged(t)
			r := registerAs(t, c.file, "ccr_ext")
			extend(t, "ccr_ext", gentle(t), c.how)
			c.half(t, r)
			if _, err := Recover(); err != nil {
				t.Fatal(err)
			}
			if _, err := Unextend("ccr_ext", "backoff"); err == nil {
				t.Error("it was still there")
			}
			if left := pinned(t); len(left) > 0 {
				t.Errorf("left: %q", left)
			}
		})
	}
}

// load loads an algorithm of the catalogue to take the place of one with that name.
func load(t *testing.T, file, name string) (*structops.Object, *structops.Info) {
	t.Helper()
	spec := parseObject(t, file, structops.Parse)
	spec.Ops[0].Name = name
	o, err := spec.Load()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { o.Close() })
	i, err := o.Info("")
	if err != nil {
		t.Fatal(err)
	}
	return o, i
}

// update puts it in the place of what is registered.
func update(t *testing.T, r *Registration, o *structops.Object) {
	t.Helper()
	l, err := structops.OpenPinned(r.Pin)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := l.Update(o, ""); err != nil {
		t.Fatal(err)
	}
}

// sweptTo is what is pinned when Recover has left no more than n, or does
// not any more.
func sweptTo(t *testing.T, n int) []string {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); len(pinned(t)) > n && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if _, err := Recover(); err != nil {
			t.Fatal(err)
		}
	}
	return pinned(t)
}

// Connections that still run code that was replaced are extended, too, until they
// are over; if the extension does not fit there, a warning says so.
func TestExtendPredecessors(t *testing.T) {
	for file, want := range map[string]struct{ pins, warnings int }{"cubic.bpf.o": {2, 0}, "reno.bpf.o": {1, 1}} {
		t.Run(file, func(t *testing.T) {
			kerneltest.Privileged(t)
			const name = "ccr_before"
			r := registerAs(t, file, name)
			if r.LinkID == 0 {
				t.Skip("this kernel has no links")
			}
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { unix.Close(fd) }()
			if err := unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, name); err != nil {
				t.Fatal(err)
			}
			o, _ := load(t, "cubic.bpf.o", name)
			update(t, r, o)
			x := extend(t, name, gentle(t), structops.TailCall)
			if got := sweptTo(t, want.pins); len(got) != want.pins || len(x.Warnings) != want.warnings {
				t.Errorf("%q, %q", got, x.Warnings)
			}
			unix.Close(fd)
			fd = -1
			if got := sweptTo(t, 1); len(got) != 1 {
				t.Errorf("after the last connection: %q", got)
			}
		})
	}
}

// What extends a congestion control goes into the code that takes its place, before
// that is registered.
func TestCarryExtensions(t *testing.T) {
	for _, c := range []struct {
		how  structops.How
		file string
	}{
		{structops.TailCall, "cubic.bpf.o"},
		{structops.Freplace, "dctcp.bpf.o"},
	} {
		t.Run(string(c.how), func(t *testing.T) {
			kerneltest.Privileged(t)
			const name = "ccr_carry"
			r := registerAs(t, c.file, name)
			extend(t, name, gentle(t), c.how)
			before := pinned(t)
			from, err := structops.Inspect(r.MapID)
			if err != nil {
				t.Fatal(err)
			}
			_, other := load(t, "reno.bpf.o", name)
			if _, err := carryExtensions(from, other); !errors.Is(err, structops.ErrPolicy) || !slices.Equal(pinned(t), before) {
				t.Errorf("into code without the function: %v, %q", err, pinned(t))
			}

			o, to := load(t, c.file, name)
			undo, err := carryExtensions(from, to)
			if err != nil || len(pinned(t)) != 2*len(before) {
				t.Fatalf("%v, %q", err, pinned(t))
			}
			if err := undo(); err != nil || !slices.Equal(pinned(t), before) {
				t.Errorf("undone: %v, %q", err, pinned(t))
			}
			if r.LinkID == 0 {
				return
			}
			if _, err := carryExtensions(from, to); err != nil {
				t.Fatal(err)
			}
			update(t, r, o)
			// No connection runs the old code; what extends it goes the next time.
			if got := sweptTo(t, len(before)); len(got) != len(before) {
				t.Errorf("pins: %q", got)
			}
			if f := function(t, name, "backoff"); f.Extended == nil || f.Extended.How != c.how {
				t.Errorf("after the replacement: %+v", f)
			}
		})
	}
}

// Of several that extend one function at the same time exactly one succeeds.
func TestExtendRace(t *testing.T) {
	kerneltest.Privileged(t)
	const name, n = "ccr_ext", 4
	registerAs(t, "cubic.bpf.o", name)
	errs := make(chan error, n)
	for range n {
		e := gentle(t)
		go func() {
			_, err := Extend(name, "backoff", e, structops.TailCall)
			errs <- err
		}()
	}
	var won int
	for range n {
		err := <-errs
		switch twice := (*ExtendedError)(nil); {
		case err == nil:
			won++
		case !errors.As(err, &twice):
			t.Error(err)
		}
	}
	if f := function(t, name, "backoff"); won != 1 || f.Extended == nil {
		t.Errorf("%d succeeded: %+v", won, f.Extended)
	}
}

// Whatever way the kernel has to replace code, what extends it stays.
func TestExtendReplaced(t *testing.T) {
	for _, c := range []struct {
		how  structops.How
		file string
	}{
		{structops.TailCall, "cubic.bpf.o"},
		{structops.Freplace, "dctcp.bpf.o"},
	} {
		t.Run(string(c.how), func(t *testing.T) {
			kerneltest.Privileged(t)
			const name = "ccr_replaced"
			registerAs(t, c.file, name)
			before := extend(t, name, gentle(t), c.how)
			for range 2 {
				r, err := Replace(name, parseObject(t, c.file, structops.Parse), ReplaceOptions{})
				if err != nil {
					t.Fatal(err)
				}
				if got := sweptTo(t, len(before.Members)); len(got) != len(before.Members) {
					t.Errorf("pins: %q", got)
				}
				if x := function(t, name, "backoff").Extended; x == nil || x.Program != before.Program || !slices.Equal(x.Members, before.Members) {
					t.Errorf("%+v, was %+v", x, before.Extension)
				}
				t.Log(r.Warnings)
			}
			if _, err := Replace(name, reno(t), ReplaceOptions{}); !errors.Is(err, structops.ErrPolicy) {
				t.Errorf("by code that the extension does not fit: %v", err)
			}
			if x := function(t, name, "backoff").Extended; x == nil {
				t.Error("the refused replacement took the extension away")
			}
			if _, err := Unextend(name, "backoff"); err != nil || len(pinned(t)) > 0 {
				t.Errorf("%v, %q", err, pinned(t))
			}
		})
	}
}
