// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"ccload/internal/kerneltest"

	"golang.org/x/sys/unix"
)

func extension(t *testing.T, name string) *Extension {
	t.Helper()
	e, err := ParseExtension(fixture(t, name))
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func TestParseExtension(t *testing.T) {
	e := extension(t, "extensions")
	var got []string
	for _, f := range e.Forms {
		got = append(got, f.Policy+" "+string(f.How)+" "+f.Program+" "+f.Member)
	}
	want := []string{"absent freplace so_absent ", "only tail-call only_slot undo_cwnd", "scale freplace so_scaled ", "scale tail-call scale_slot init", "wide freplace so_wide "}
	if !slices.Equal(got, want) || e.License != "Dual BSD/GPL" || len(e.Warnings) != 1 || !strings.Contains(e.Warnings[0], `"so_xdp"`) {
		t.Errorf("%q, %q, %q", got, e.License, e.Warnings)
	}
	obj := fixture(t, "extensions")
	for _, c := range []struct {
		what string
		obj  []byte
		is   error
		text string
	}{
		{"text", []byte("#include"), ErrObject, ""},
		{"no BTF", patch(t, patch(t, obj, ".BTF\x00", ".XXX\x00"), ".BTF.ext\x00", ".XXX.ext\x00"), ErrNoBTF, "-g"},
		{"licence", patch(t, obj, "Dual BSD/GPL", "Proprietary!"), ErrLicense, `"Proprietary!"`},
		{"a congestion control", fixture(t, "basic"), ErrNoExtension, ""},
		{"two for one", patch(t, obj, "freplace/absent", "freplace/scale\x00"), nil, `function "scale": two programs for freplace`},
	} {
		t.Run(c.what, func(t *testing.T) {
			e, err := ParseExtension(c.obj)
			if err == nil || c.is != nil && !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("%v, %v", e, err)
			}
		})
	}
}

func FuzzParseExtension(f *testing.F) {
	for _, name := range []string{"extensions", "extrefused", "basic"} {
		b, err := os.ReadFile("testdata/" + name + ".bpf.o")
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, obj []byte) {
		e, err := ParseExtension(obj)
		if err != nil {
			return
		}
		for _, form := range e.Forms {
			if form.Policy == "" || (form.proto != nil) != (form.How == Freplace) {
				t.Errorf("%+v", form)
			}
			if form.proto != nil {
				declaration(form.Program, form.proto)
				sameProto(form.proto, form.proto)
			}
		}
	})
}

// extensible loads what can be extended.
func extensible(t *testing.T) (*Object, *Info) {
	t.Helper()
	o, err := mustParse(t, "extensible").Load()
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

func TestPolicies(t *testing.T) {
	kerneltest.Privileged(t)
	o, i := extensible(t)
	check := func(i *Info) {
		t.Helper()
		ps, err := Policies(i)
		if err != nil || len(ps) != 3 {
			t.Fatalf("%+v, %v", ps, err)
		}
		for n, want := range []Policy{
			{Name: "only", Slot: "cong_avoid"},
			{Name: "scale", Signature: "__u32 scale(__u32 cwnd)", Copies: []string{"init", "ssthresh"}, Slot: "init"},
			{Name: "wide", Signature: "__u32 wide(__u32 a, bool b)", Copies: []string{"ssthresh"}},
		} {
			if got := ps[n]; got.Name != want.Name || got.Signature != want.Signature || !slices.Equal(got.Copies, want.Copies) || got.Slot != want.Slot {
				t.Errorf("%+v, want %+v", got, want)
			}
		}
	}
	check(i)
	l, err := o.Attach("")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	live, err := Inspect(i.MapID)
	if err != nil {
		t.Fatal(err)
	}
	check(live)
}

// dial gives an open connection.
func dial(t *testing.T) (fd int) {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	conn, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	f, err := conn.(*net.TCPConn).File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return int(f.Fd())
}

// The function's result is seen where init puts it: in ssthresh.
func TestExtensionAttach(t *testing.T) {
	for how, want := range map[How]uint32{Freplace: 50 * 7, TailCall: 507} {
		t.Run(string(how), func(t *testing.T) {
			kerneltest.Privileged(t)
			o, _ := extensible(t)
			info, err := o.Info("")
			if err != nil {
				t.Fatal(err)
			}
			l, err := o.Attach("")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			dir := bpffsDir(t)
			path := func(member string) string { return filepath.Join(dir, member) }
			fd := dial(t)
			ssthresh := func() uint32 {
				t.Helper()
				for _, cc := range []string{"reno", "so_extensible"} {
					if err := unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, cc); err != nil {
						t.Fatal(err)
					}
				}
				i, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
				if err != nil {
					t.Fatal(err)
				}
				return i.Snd_ssthresh
			}
			if got := ssthresh(); got != 100 {
				t.Errorf("before: %d", got)
			}
			r, instead, err := extension(t, "extensions").Load(info, "scale", how)
			var forbidden *PermissionError
			if how == Freplace && errors.As(err, &forbidden) && len(forbidden.Missing) == 0 {
				t.Skip(err)
			}
			if err != nil || instead != "" {
				t.Fatal(err, instead)
			}
			if err := r.Attach(path); err != nil {
				t.Fatal(err)
			}
			if err := r.Attach(path); !errors.Is(err, unix.EBUSY) {
				t.Errorf("attached twice: %v", err)
			}
			r.Close()
			if got := ssthresh(); got != want {
				t.Errorf("extended: %d, want %d", got, want)
			}

			// It goes into other code of the same name.
			next, to := extensible(t)
			places := map[string]string{}
			for _, m := range r.Members() {
				places[m] = path(m)
			}
			again, err := Reload(places, "scale", to)
			if err != nil {
				t.Fatal(err)
			}
			if err := again.Attach(func(m string) string { return path(m) + "2" }); err != nil {
				t.Fatal(err)
			}
			again.Close()
			for _, p := range places {
				if err := Detach(p); err != nil {
					t.Error(err)
				}
			}
			if got := ssthresh(); got != 100 {
				t.Errorf("removed: %d", got)
			}
			if l.LinkID() != 0 {
				if err := l.Update(next, ""); err != nil {
					t.Fatal(err)
				}
				if got := ssthresh(); got != want {
					t.Errorf("replaced: %d, want %d", got, want)
				}
			}
			for _, m := range again.Members() {
				p, err := OpenPlace(path(m) + "2")
				if err != nil || p.How != how || p.Program == "" {
					t.Errorf("%+v, %v", p, err)
				}
				if err := Detach(path(m) + "2"); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// The kernel empties a slot in the background when nobody holds its map any more.
// Whoever looks at the map before it is filled brings that about; here the kernel's
// worker is kept waiting until afterwards.
func TestSlotStays(t *testing.T) {
	kerneltest.Privileged(t)
	runtime.LockOSThread() // for good: the thread ends with the test
	var here unix.CPUSet
	if err := unix.SchedGetaffinity(0, &here); err != nil {
		t.Fatal(err)
	}
	one := 0
	for !here.IsSet(one) {
		one++
	}
	here.Zero()
	here.Set(one)
	if err := unix.SchedSetaffinity(0, &here); err != nil {
		t.Fatal(err)
	}
	if err := unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 1}, 0); err != nil {
		t.Fatal(err)
	}
	o, info := extensible(t)
	l, err := o.Attach("")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	o.Close()
	path := bpffsDir(t) + "/slot"
	for range 10 {
		r, _, err := extension(t, "extensions").Load(info, "scale", TailCall)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Policies(info); err != nil {
			t.Fatal(err)
		}
		if err := r.Attach(func(string) string { return path }); err != nil {
			t.Fatal(err)
		}
		r.Close()
		time.Sleep(10 * time.Millisecond)
		if p, err := OpenPlace(path); err != nil || p.Program != "scale_slot" {
			t.Errorf("%+v, %v", p, err)
		}
		if err := Detach(path); err != nil {
			t.Fatal(err)
		}
	}
}

// bpffsDir is a directory for pins.
func bpffsDir(t *testing.T) string {
	t.Helper()
	const dir = "/sys/fs/bpf/so_extension"
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestExtensionErrors(t *testing.T) {
	kerneltest.Privileged(t)
	_, info := extensible(t)
	for _, c := range []struct {
		object, policy string
		how            How
		is             error
		text           string
	}{
		{"extensions", "wide", "", ErrPolicy, `"so_extensible" has __u32 wide(__u32 a, bool b), the object __u64 so_wide(__u32 a)`},
		{"extensions", "only", "", ErrPolicy, `has the slot for "only" in cong_avoid, the object's program is for undo_cwnd`},
		{"extensions", "only", Freplace, ErrPolicy, "the object has no program for only (freplace), but for absent (freplace), only (tail-call)"},
		{"extensions", "absent", "", ErrNotFound, `"absent"`},
		{"extrefused", "scale", TailCall, nil, `field not writable: tcp_sock.snd_nxt: no write support to tcp_sock at off `},
	} {
		r, _, err := extension(t, c.object).Load(info, c.policy, c.how)
		if err == nil || c.is != nil && !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s, %s: %v, %v", c.policy, c.how, r, err)
		}
	}
}

func TestVerifyExtension(t *testing.T) {
	kerneltest.Privileged(t)
	_, info := extensible(t)
	locked := false
	got := map[string]string{}
	for _, object := range []string{"extensions", "extrefused"} {
		for _, r := range extension(t, object).Verify(info) {
			why := "fits"
			if r.Why != nil {
				why = string(r.Why.Kind)
			}
			if r.Fits != (r.Why == nil) || r.For != "so_extensible" || r.Fits && (len(r.Functions) == 0 || *r.Functions[0].Processed == 0) {
				t.Errorf("%+v", r)
			}
			locked = locked || r.Why != nil && (r.Why.Kind == NotPermitted || r.Why.Kind == LockedDown)
			got[object+" "+r.Program] = why
		}
	}
	want := map[string]string{
		"extensions so_scaled": "fits", "extensions scale_slot": "fits", "extensions so_wide": "signature changed",
		"extensions only_slot": "signature changed", "extrefused scale_slot": "field not writable", "extrefused so_calls": "helper not available",
	}
	for what, why := range want {
		if locked && strings.Contains(what, " so_") && what != "extensions so_wide" {
			why = got[what] // that it is forbidden
		}
		if got[what] != why {
			t.Errorf("%s: %q, want %q", what, got[what], why)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%q", got)
	}
}
