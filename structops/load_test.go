// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"ccload/internal/fault"
	"ccload/internal/kerneltest"
	"ccload/internal/netns"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

func init() {
	kerneltest.More = func() ([]string, error) {
		live, err := Live()
		return []string{fmt.Sprintf("%d congestion controls in BPF", len(live))}, err
	}
}

func registered(t testing.TB, name string) bool {
	t.Helper()
	b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_available_congestion_control")
	if err != nil {
		t.Fatal(err)
	}
	return slices.Contains(strings.Fields(string(b)), name)
}

// gone waits until a name is not registered: a closed link unregisters in the
// background.
func gone(t testing.TB, name string) {
	t.Helper()
	if err := waitGone(name); err != nil {
		t.Errorf("%s: %v", name, err)
	}
}

func mustLoad(t testing.TB, s *Spec, mapNames ...string) *Object {
	t.Helper()
	o, err := s.Load(mapNames...)
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() { o.Close() })
	return o
}

func mustAttach(t testing.TB, o *Object, mapName string) *Link {
	t.Helper()
	l, err := o.Attach(mapName)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func mustInspect(t testing.TB, id uint32) *Info {
	t.Helper()
	i, err := Inspect(id)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// member gives the program in a member of a live map.
func member(i *Info, name string) *Member {
	for n := range i.Members {
		if i.Members[n].Member == name {
			return &i.Members[n]
		}
	}
	return &Member{}
}

// socket opens a TCP socket that runs a congestion control.
func socket(t testing.TB, name string) (closeIt func()) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, name); err != nil {
		unix.Close(fd)
		t.Fatal(err)
	}
	return func() { unix.Close(fd) }
}

func hasLinks(t testing.TB) bool {
	t.Helper()
	l, err := kernelLayout()
	if err != nil {
		t.Fatal(err)
	}
	return l.links
}

func TestRegister(t *testing.T) {
	kerneltest.Privileged(t)
	s := mustParse(t, "basic")
	s.Ops[0].Name = "so_test.basic"
	if err := s.Set("p_u8", 7); err != nil {
		t.Fatal(err)
	}
	o := mustLoad(t, s)
	if registered(t, "so_test.basic") {
		t.Fatal("it is registered already when loaded")
	}
	l := mustAttach(t, o, "")
	o.Close()
	if !registered(t, "so_test.basic") {
		t.Fatal("it is not registered")
	}
	if (l.LinkID() != 0) != hasLinks(t) {
		t.Errorf("link %d", l.LinkID())
	}
	i := mustInspect(t, l.MapID())
	if i.Name != "so_test.basic" || i.Map != "so_basic" || i.MapID != l.MapID() || i.LinkID != l.LinkID() || i.Flags != 1 || !i.Registered() {
		t.Errorf("info: %+v", *i)
	}
	for m, p := range s.Ops[0].Programs {
		if got := member(i, m); got.Program != p || got.ID == 0 || got.Jited == 0 || got.Verified == 0 || len(got.Tag) != 16 {
			t.Errorf("member %s: %+v", m, *got)
		}
	}
	// What is live is what was set, of the same types as in the object.
	if got, want := fmt.Sprint(i.Params), fmt.Sprint(s.Params()); got != want || !strings.Contains(got, "{p_u8 __u8 7 false}") {
		t.Errorf("parameters:\ngot  %s\nwant %s", got, want)
	}
	live, err := Live()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(live, func(j *Info) bool { return fmt.Sprint(plain(i)) == fmt.Sprint(plain(j)) }) {
		t.Errorf("not among the live ones: %+v", *i)
	}
	if err := errors.Join(l.Close(), l.Close()); err != nil {
		t.Error(err)
	}
	gone(t, "so_test.basic")
}

// Each of two maps has its own program in the one member, and one program may
// stand in two members.
func TestTwoMaps(t *testing.T) {
	kerneltest.Privileged(t)
	for range 3 { // a wrong one would come by chance
		o := mustLoad(t, mustParse(t, "several"))
		for _, c := range []struct{ m, ssthresh, undo, init string }{
			{"so_one", "so_first", "so_a_name_that_the_kernel_cuts", "so_init"},
			{"so_two", "so_second", "so_second", ""},
			{"so_plain", "so_first", "so_second", ""},
		} {
			i := mustInspect(t, mustAttach(t, o, c.m).MapID())
			if !i.Registered() || !registered(t, c.m) {
				t.Errorf("%s is not registered", c.m)
			}
			if s, u := member(i, "ssthresh"), member(i, "undo_cwnd"); s.Program != c.ssthresh || u.Program != c.undo || s.ID == u.ID {
				t.Errorf("%s: %+v, %+v", c.m, *s, *u)
			}
			if p := member(i, "init").Program; p != c.init {
				t.Errorf("%s: init is %q", c.m, p)
			}
			if want := c.m != "so_plain" && hasLinks(t); (i.LinkID != 0) != want {
				t.Errorf("%s: link %d", c.m, i.LinkID)
			}
		}
		if registered(t, "so_spare") {
			t.Error("an optional one is registered")
		}
		// The cleanups come too late for the next round.
		for _, name := range []string{"so_one", "so_two", "so_plain"} {
			unregisterByName(t, name)
		}
		o.Close()
	}
}

func unregisterByName(t testing.TB, name string) {
	t.Helper()
	live, err := Live()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range live {
		if i.Name == name && i.Registered() {
			err := Unregister(i)
			var held *HeldError
			if errors.As(err, &held) {
				t.Skipf("this kernel cannot detach links: %v", err)
			}
			if err != nil {
				t.Error(err)
			}
		}
	}
	if registered(t, name) {
		t.Errorf("%s is still registered", name)
	}
}

// A spec can be loaded again, with other values, and earlier loads keep theirs.
func TestLoadTwice(t *testing.T) {
	kerneltest.Privileged(t)
	s := mustParse(t, "basic")
	var links []*Link
	for n, name := range []string{"so_first", "so_second"} {
		s.Ops[0].Name = name
		if err := s.Set("p_u32", n); err != nil {
			t.Fatal(err)
		}
		links = append(links, mustAttach(t, mustLoad(t, s), ""))
	}
	for n, l := range links {
		i := mustInspect(t, l.MapID())
		for _, p := range i.Params {
			if p.Name == "p_u32" && p.Value != uint64(n) {
				t.Errorf("%s: %v", i.Name, p)
			}
		}
	}
}

func TestOptional(t *testing.T) {
	kerneltest.Privileged(t)
	o := mustLoad(t, mustParse(t, "several"), "so_spare")
	l := mustAttach(t, o, "so_spare")
	if !registered(t, "so_spare") || l.LinkID() != 0 {
		t.Error("not registered as it should be")
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if registered(t, "so_spare") {
		t.Error("still there")
	}
	if _, err := o.Attach("so_one"); !errors.Is(err, ErrNotFound) {
		t.Errorf("attach of what was not loaded: %v", err)
	}
}

func TestFlavour(t *testing.T) {
	kerneltest.Privileged(t)
	s := mustParse(t, "flavour")
	i := mustInspect(t, mustAttach(t, mustLoad(t, s), "").MapID())
	if i.Name != "so_flavour" || len(i.Members) != 3 {
		t.Errorf("info: %+v", *i)
	}
	_, err := s.Load("so_unknown")
	if !errors.Is(err, ErrKernel) || !strings.Contains(err.Error(), `"new_func"`) {
		t.Errorf("a member that the kernel has not: %v", err)
	}
}

// Programs in a map of programs are loaded with it.
func TestTailCall(t *testing.T) {
	kerneltest.Privileged(t)
	obj := fixture(t, "tail")
	s, err := Parse(obj)
	if err != nil || len(s.Warnings) > 0 {
		t.Fatal(s, err)
	}
	mustAttach(t, mustLoad(t, s), "")
	if !registered(t, "so_tailing") {
		t.Error("not registered")
	}
	s, err = Parse(patch(t, obj, "struct_ops/cong_avoid\x00", "struct_ops/cong_other\x00"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Load(); !errors.Is(err, ErrProgram) || !strings.Contains(err.Error(), `"so_tail"`) {
		t.Errorf("a section that names no member: %v", err)
	}
}

func TestLoadErrors(t *testing.T) {
	kerneltest.Privileged(t)
	t.Run("name", func(t *testing.T) {
		s := mustParse(t, "basic")
		s.Ops[0].Name = "so_sixteen_bytes"
		if _, err := s.Load(); !errors.Is(err, ErrName) {
			t.Error(err)
		}
	})
	t.Run("required", func(t *testing.T) {
		s := mustParse(t, "basic")
		delete(s.Ops[0].Programs, "ssthresh")
		if _, err := s.Load(); !errors.Is(err, ErrRequired) {
			t.Error(err)
		}
	})
	t.Run("verifier", func(t *testing.T) {
		_, err := mustParse(t, "refused").Load()
		var ve *VerifierError
		var library *ebpf.VerifierError
		if !errors.As(err, &ve) || !errors.As(err, &library) {
			t.Fatalf("%T %v", err, err)
		}
		if ve.Program != "so_writes" || ve.Member != "cong_avoid" {
			t.Errorf("%q %q", ve.Program, ve.Member)
		}
		short, long := fmt.Sprint(err), fmt.Sprintf("%+v", err)
		if strings.Contains(short, "\n") || !strings.Contains(short, "so_writes") || !strings.Contains(short, "no write support to tcp_sock") {
			t.Errorf("short: %s", short)
		}
		if strings.Count(long, "\n") != len(library.Log) || !strings.HasPrefix(long, short) {
			t.Errorf("long: %s", long)
		}
	})
	t.Run("kernel function", func(t *testing.T) {
		_, err := mustParse(t, "kfunc").Load()
		if !errors.Is(err, ErrKernel) || !strings.Contains(err.Error(), "kernel function missing: so_no_such_function (so_calls for cong_avoid)") {
			t.Error(err)
		}
	})
	t.Run("no such map", func(t *testing.T) {
		if _, err := mustParse(t, "basic").Load("so_other"); !errors.Is(err, ErrNotFound) {
			t.Error(err)
		}
	})
	t.Run("kernel without BTF", func(t *testing.T) {
		whole := kernelLayout
		defer func() { kernelLayout = whole }()
		kernelLayout = func() (*layout, error) { return readLayout(filepath.Join(t.TempDir(), "vmlinux")) }
		if _, err := mustParse(t, "basic").Load(); !errors.Is(err, ErrKernelBTF) || !errors.Is(err, fs.ErrNotExist) {
			t.Error(err)
		}
		if _, err := Live(); !errors.Is(err, ErrKernelBTF) {
			t.Error(err)
		}
	})
}

func TestAttachTaken(t *testing.T) {
	kerneltest.Privileged(t)
	for _, name := range []string{"reno", "so_basic"} {
		s := mustParse(t, "basic")
		if name == "so_basic" {
			mustAttach(t, mustLoad(t, s), "")
		}
		s.Ops[0].Name = name
		l, err := mustLoad(t, s).Attach("")
		if !errors.Is(err, ErrExists) || !errors.Is(err, unix.EEXIST) || !strings.Contains(err.Error(), fmt.Sprintf("%q", name)) {
			t.Errorf("%s: %v, %v", name, l, err)
		}
	}
	if !registered(t, "so_basic") {
		t.Error("the first is no longer registered")
	}
}

func TestAttachTwice(t *testing.T) {
	kerneltest.Privileged(t)
	o := mustLoad(t, mustParse(t, "basic"))
	mustAttach(t, o, "")
	if l, err := o.Attach(""); err == nil {
		l.Close()
		t.Error("no error")
	}
	if !registered(t, "so_basic") {
		t.Error("the first is no longer registered")
	}
}

func TestUpdate(t *testing.T) {
	kerneltest.Privileged(t)
	s := mustParse(t, "several")
	o := mustLoad(t, s, "so_one", "so_two", "so_plain", "so_next")
	l := mustAttach(t, o, "so_one")
	if !hasLinks(t) {
		if err := l.Update(o, "so_next"); !errors.Is(err, ErrNoLinks) {
			t.Errorf("kernel without links: %v", err)
		}
		return
	}
	first := l.MapID()
	done := socket(t, "so_one")
	if err := l.Update(o, "so_two"); !errors.Is(err, unix.EINVAL) {
		t.Errorf("another name: %v", err)
	}
	if err := l.Update(o, "so_plain"); err == nil {
		t.Error("one without a link: no error")
	}
	slow, err := Open(mustInspect(t, first))
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Update(o, "so_next"); err != nil {
		t.Fatal(err)
	}
	if err := slow.Update(mustLoad(t, s, "so_next"), "so_next"); !errors.Is(err, unix.EPERM) {
		t.Errorf("in the place of what is replaced already: %v", err)
	}
	slow.Close()
	now, old := mustInspect(t, l.MapID()), mustInspect(t, first)
	if now.MapID == old.MapID || !now.Registered() || now.LinkID != l.LinkID() || member(now, "ssthresh").Program != "so_second" {
		t.Errorf("now: %+v", *now)
	}
	// The socket runs the old one, which is in no table.
	if old.State != StateToBeFree || old.Registered() || old.LinkID != 0 || old.Refs != 1 {
		t.Errorf("old: %+v", *old)
	}
	done()
	waitFreed(t, first)

	plain := mustAttach(t, o, "so_plain")
	if err := plain.Update(o, "so_two"); !errors.Is(err, ErrNoLinks) {
		t.Errorf("without a link: %v", err)
	}
}

// waitFreed waits until the kernel has freed a map, which is after an RCU grace
// period at least.
func waitFreed(t testing.TB, id uint32) {
	t.Helper()
	for deadline := time.Now().Add(lingers); ; time.Sleep(time.Millisecond) {
		i, err := Inspect(id)
		if errors.Is(err, ErrNotFound) {
			return
		}
		if err != nil || time.Now().After(deadline) {
			t.Fatalf("map %d is not freed: %+v, %v", id, i, err)
		}
	}
}

// While a socket runs what was unregistered, it is there to be freed.
func TestToBeFreed(t *testing.T) {
	kerneltest.Privileged(t)
	for _, m := range []string{"so_one", "so_plain"} {
		t.Run(m, func(t *testing.T) {
			o := mustLoad(t, mustParse(t, "several"), m)
			l := mustAttach(t, o, m)
			o.Close()
			i := mustInspect(t, l.MapID())
			done := socket(t, m)
			defer done()
			if now := mustInspect(t, l.MapID()); now.Refs != i.Refs+1 || !now.Registered() {
				t.Errorf("with a socket: %+v; without: %+v", *now, *i)
			}
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			gone(t, m)
			// Before 6.4 nothing but descriptors and pins keeps the map; then it
			// can no longer be seen.
			now, err := Inspect(i.MapID)
			if hasLinks(t) && (err != nil || now.State != StateToBeFree || now.Registered() || now.Refs != 1) {
				t.Errorf("unregistered: %+v, %v", now, err)
			}
			if err == nil {
				if err := Unregister(now); !errors.Is(err, ErrNotFound) {
					t.Errorf("unregister again: %v", err)
				}
			}
			done()
			waitFreed(t, i.MapID)
		})
	}
}

func bpffs(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("bpf", dir, "bpf", 0, "mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestPin(t *testing.T) {
	kerneltest.Privileged(t)
	dir := bpffs(t)
	for _, m := range []string{"so_one", "so_plain"} {
		t.Run(m, func(t *testing.T) {
			path := filepath.Join(dir, m)
			o := mustLoad(t, mustParse(t, "several"), m)
			l := mustAttach(t, o, m)
			id, link := l.MapID(), l.LinkID()
			old := unix.Umask(0)
			err := l.Pin(path)
			unix.Umask(old)
			if err != nil {
				t.Fatal(err)
			}
			if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
				t.Errorf("mode %v, %v", st.Mode(), err)
			}
			if err := errors.Join(l.Close(), o.Close()); err != nil {
				t.Fatal(err)
			}
			if !registered(t, m) {
				t.Fatal("the pin does not hold it")
			}
			again, err := OpenPinned(path)
			if err != nil {
				t.Fatal(err)
			}
			if again.MapID() != id || again.LinkID() != link {
				t.Errorf("opened: %+v", *again)
			}
			if err := again.Close(); err != nil || !registered(t, m) {
				t.Errorf("closed, and registered is %v: %v", registered(t, m), err)
			}
			if err := Unregister(mustInspect(t, id)); err != nil {
				t.Fatal(err)
			}
			if registered(t, m) {
				t.Error("still registered")
			}
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Error(err)
			}
			waitFreed(t, id)
		})
	}
	if _, err := OpenPinned(filepath.Join(dir, "so_none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("open a pin that is not there: %v", err)
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := m.Pin(filepath.Join(dir, "so_array")); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenPinned(filepath.Join(dir, "so_array")); !errors.Is(err, errForeign) {
		t.Errorf("open a pin of something else: %v", err)
	}
}

// The holders of a link are found, whether or not the kernel needs to know them.
func TestHolders(t *testing.T) {
	kerneltest.Privileged(t)
	if !hasLinks(t) {
		t.Skip("this kernel has no links")
	}
	dir := bpffs(t)
	l := mustAttach(t, mustLoad(t, mustParse(t, "basic")), "")
	path := filepath.Join(dir, "so_basic")
	if err := l.Pin(path); err != nil {
		t.Fatal(err)
	}
	var held *HeldError
	if err := unpin(l.LinkID()); !errors.As(err, &held) {
		t.Fatalf("while this process holds it: %v", err)
	}
	self := fmt.Sprintf("(pid %d)", os.Getpid())
	if len(held.Processes) != 1 || !strings.HasSuffix(held.Processes[0], self) || !slices.Equal(held.Pins, []string{path}) {
		t.Errorf("held: %+v", *held)
	}
	if err := l.Close(); err != nil || !registered(t, "so_basic") {
		t.Fatalf("the pin does not hold it: %v", err)
	}
	other := filepath.Join(t.TempDir(), "so_basic") // where a link that was changed meanwhile may lead
	if err := os.WriteFile(other, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if removed, err := removeHeld(other, l.LinkID()); err != nil || removed {
		t.Error(err)
	}
	if _, err := os.Stat(other); err != nil {
		t.Errorf("what is no pin of it is removed: %v", err)
	}
	if err := unpin(l.LinkID()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the pin is still there: %v", err)
	}
	gone(t, "so_basic")
}

// A link that is forgotten is not collected.
func TestForgottenLink(t *testing.T) {
	kerneltest.Privileged(t)
	id := mustAttach(t, mustLoad(t, mustParse(t, "basic")), "").MapID()
	for range 3 {
		churn()
	}
	if !mustInspect(t, id).Registered() {
		t.Error("it is no longer registered")
	}
}

func TestInspectUnknown(t *testing.T) {
	kerneltest.Privileged(t)
	if _, err := Inspect(1<<31 - 2); !errors.Is(err, ErrNotFound) {
		t.Errorf("no map: %v", err)
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	info, err := m.Info()
	if err != nil {
		t.Fatal(err)
	}
	id, _ := info.ID()
	if _, err := Inspect(uint32(id)); !errors.Is(err, ErrNotFound) {
		t.Errorf("another map: %v", err)
	}
}

// What programs see of the kernel's configuration is in the map that they use.
func TestKconfigLoaded(t *testing.T) {
	kerneltest.Privileged(t)
	s := mustParse(t, "kconfig")
	o := mustLoad(t, s)
	info, err := o.coll.Programs[key("so_cwnd", "ssthresh")].Info()
	if err != nil {
		t.Fatal(err)
	}
	ids, _ := info.MapIDs()
	if len(ids) == 0 || len(ids) > 2 { // the second is what it was made of
		t.Fatalf("the program uses maps %v", ids)
	}
	m, err := ebpf.NewMapFromID(ids[0])
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	value, err := m.LookupBytes(uint32(0))
	if err != nil {
		t.Fatal(err)
	}
	var res unix.Timespec
	if err := unix.ClockGetres(unix.CLOCK_MONOTONIC_COARSE, &res); err != nil {
		t.Fatal(err)
	}
	if hz := kconfigValues(t, s, value)["CONFIG_HZ"].(uint64); hz != uint64(time.Second/time.Duration(res.Nano())) {
		t.Errorf("CONFIG_HZ is %d, and a tick is %d ns", hz, res.Nano())
	}
	if err := m.Put(uint32(0), make([]byte, len(value))); err == nil {
		t.Error("the map is not frozen")
	}
}

// The scanner of the kernel's BTF finds what the library finds.
func TestLayout(t *testing.T) {
	kerneltest.Privileged(t)
	l, err := kernelLayout()
	if err != nil {
		t.Fatal(err)
	}
	checkLayout(t, l)
}

// plain is what of a live one can be printed.
func plain(i *Info) Info {
	p := *i
	p.places = nil
	return p
}

// What may change while it runs changes at once and by itself; what may not stays.
func TestSetLive(t *testing.T) {
	kerneltest.Privileged(t)
	l := mustAttach(t, mustLoad(t, mustParse(t, "basic")), "")
	defer l.Close()
	value := func(name string) any {
		i := mustInspect(t, l.MapID())
		return i.Params[slices.IndexFunc(i.Params, func(p Param) bool { return p.Name == name })].Value
	}
	i := mustInspect(t, l.MapID())
	if err := i.Set(map[string]any{"not_constant": 4_000_000_000}); err != nil {
		t.Fatal(err)
	}
	if got := value("not_constant"); got != uint64(4_000_000_000) {
		t.Errorf("it is %v", got)
	}
	for _, c := range []struct {
		name  string
		value any
		want  error
	}{{"p_u32", 1, ErrFixed}, {"nothing", 1, ErrNotFound}, {"not_constant", -1, nil}} {
		err := i.Set(map[string]any{"not_constant": 5, c.name: c.value})
		if err == nil || c.want != nil && !errors.Is(err, c.want) || value("not_constant") != uint64(4_000_000_000) {
			t.Errorf("%s = %v: %v, and it is %v", c.name, c.value, err, value("not_constant"))
		}
	}
}

// However often a map of programs is looked at, it goes when nothing uses it.
func TestSlotsGo(t *testing.T) {
	kerneltest.Privileged(t)
	for range 3 {
		m, err := ebpf.NewMap(&ebpf.MapSpec{Name: "so_slot", Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1})
		if err != nil {
			t.Fatal(err)
		}
		info, err := m.Info()
		if err != nil {
			t.Fatal(err)
		}
		id, _ := info.ID()
		for range 5 {
			if _, err := infoOfMap(uint32(id)); err != nil {
				t.Fatal(err)
			}
			m.Close()
		}
		for deadline := time.Now().Add(lingers); ; time.Sleep(10 * time.Millisecond) {
			next, err := ebpf.MapGetNextID(id - 1)
			if errors.Is(err, os.ErrNotExist) || err == nil && next != id {
				break
			}
			if err != nil || time.Now().After(deadline) {
				t.Fatalf("map %d stays: %v", id, err)
			}
		}
	}
}

// A connection whose algorithm gives it to another when it starts without ECN runs
// the other, and holds no reference to the first.
func TestFallback(t *testing.T) {
	kerneltest.Privileged(t)
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	o := mustLoad(t, mustParse(t, "fallback"))
	for _, c := range []struct{ name, runs string }{{"so_falls", "reno"}, {"so_asks", "so_asks"}} {
		l := mustAttach(t, o, c.name)
		err := ns.Do(func() error {
			lo, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(lo)
			ifr, err := unix.NewIfreq("lo")
			if err != nil {
				return err
			}
			ifr.SetUint16(unix.IFF_UP)
			if err := unix.IoctlIfreq(lo, unix.SIOCSIFFLAGS, ifr); err != nil {
				return err
			}
			choose := func(_, _ string, raw syscall.RawConn) (err error) {
				if e := raw.Control(func(fd uintptr) {
					err = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, c.name)
				}); e != nil {
					return e
				}
				return err
			}
			// A listener agrees to ECN of an algorithm that needs it if its own does.
			s, err := (&net.ListenConfig{Control: choose}).Listen(t.Context(), "tcp4", "127.0.0.1:0")
			if err != nil {
				return err
			}
			defer s.Close()
			before := mustInspect(t, l.MapID()).Refs
			d := net.Dialer{Control: choose}
			conn, err := d.Dial("tcp4", s.Addr().String())
			if err != nil {
				return err
			}
			defer conn.Close()
			raw, err := conn.(*net.TCPConn).SyscallConn()
			if err != nil {
				return err
			}
			var runs string
			raw.Control(func(fd uintptr) {
				runs, err = unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION)
			})
			after := mustInspect(t, l.MapID()).Refs
			if runs != c.runs || (after != before) != (c.runs == c.name) {
				t.Errorf("%s: the connection runs %q, references %d before and %d after", c.name, runs, before, after)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
	var fell uint32
	if err := o.coll.Variables["so_fell"].Get(&fell); err != nil || fell != 2 {
		t.Errorf("%d fell, want both ends of the first, %v", fell, err)
	}
}

// Where the kernel cannot detach a link (before 6.11) its pins are removed: all, or in the
// end none.
func TestUnpinFails(t *testing.T) {
	kerneltest.Privileged(t)
	if !hasLinks(t) {
		t.Skip("no links")
	}
	dir := bpffs(t)
	l := mustAttach(t, mustLoad(t, mustParse(t, "basic")), "")
	paths := []string{filepath.Join(dir, "so_a"), filepath.Join(dir, "so_b")}
	for _, p := range paths {
		if err := l.Pin(p); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.Remove(p) })
	}
	l.Close() // the pins hold it
	info, err := Inspect(l.MapID())
	if err != nil {
		t.Fatal(err)
	}
	refused := errors.New("refused")
	restore := fault.Set(func(step string) error {
		switch step {
		case "detach BPF link":
			return unix.EOPNOTSUPP
		case "remove so_b":
			return refused
		}
		return nil
	})
	err = Unregister(info)
	restore()
	if !errors.Is(err, refused) || !registered(t, "so_basic") {
		t.Errorf("registered: %v, %v", registered(t, "so_basic"), err)
	}
	for _, p := range paths {
		if st, err := os.Stat(p); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", p, st, err)
		}
	}
	if err := Unregister(info); err != nil {
		t.Error(err)
	}
}
