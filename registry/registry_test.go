// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"ccload/internal/kerneltest"
	"ccload/structops"

	"golang.org/x/sys/unix"
)

func init() {
	kerneltest.More = func() ([]string, error) {
		live, err := structops.Live()
		return []string{fmt.Sprintf("%d congestion controls in BPF", len(live))}, err
	}
}

// reno is the smallest congestion control there is.
func reno(t *testing.T) *structops.Spec {
	t.Helper()
	b, err := os.ReadFile("../bpf/reno.bpf.o")
	if err != nil {
		t.Fatal(err)
	}
	spec, err := structops.Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	return spec
}

// register registers reno and takes it out at the end of the test.
func register(t *testing.T, o Options) *Registration {
	t.Helper()
	r, err := Register(reno(t), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		var gone *NotFoundError
		if _, err := Unregister(o.Name, UnregisterOptions{Reset: "reno"}); err != nil && !errors.As(err, &gone) {
			t.Error(err)
		}
	})
	return r
}

func TestRegister(t *testing.T) {
	kerneltest.Privileged(t)
	const name = "ccr.life"
	r := register(t, Options{Name: name, Allow: true})
	if r.Name != name || r.MapID == 0 || r.Pin != "/sys/fs/bpf/ccload/name/ccr-life" {
		t.Errorf("registered %+v", r)
	}
	entries, warnings, err := List()
	if err != nil || len(warnings) > 0 {
		t.Fatal(err, warnings)
	}
	i := slices.IndexFunc(entries, func(e *Entry) bool { return e.Name == name })
	if i < 0 {
		t.Fatal("it is not listed")
	}
	e := entries[i]
	if e.Kind != BPF || e.Default || !e.Allowed || e.State != "registered" || *e.Refs < 1 ||
		e.MapID != r.MapID || e.LinkID != r.LinkID || e.Pin != r.Pin || len(e.Programs) != 3 {
		t.Errorf("listed as %+v", *e)
	}
	for _, e := range entries {
		if e.Kind == "" || e.Kind == BPF && e.MapID == 0 || e.Kind == Builtin && e.Refs != nil {
			t.Errorf("listed: %+v", *e)
		}
	}
	u, err := Unregister(name, UnregisterOptions{})
	if err != nil || !slices.Equal(u.Pins, []string{r.Pin}) || len(u.Warnings) > 0 {
		t.Errorf("unregistered %+v, %v", u, err)
	}
	if names, _ := available(); slices.Contains(names, name) {
		t.Error("it is still there")
	}
	var gone *NotFoundError
	if _, err := Unregister(name, UnregisterOptions{}); !errors.As(err, &gone) {
		t.Errorf("the second time: %v", err)
	}
}

// A socket goes on with a congestion control that was unregistered.
func TestUnregisterWithSockets(t *testing.T) {
	kerneltest.Privileged(t)
	const name = "ccr_sockets"
	register(t, Options{Name: name})
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) {
			err = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, name)
		})
		return errors.Join(err, cerr)
	}}
	l, err := lc.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	d, warnings, err := Lookup(name)
	if err != nil || len(warnings) > 0 {
		t.Fatal(err, warnings)
	}
	if len(d.SocketList) != 1 || d.Sockets != 1 {
		t.Fatalf("sockets: %+v", d.SocketList)
	}
	if s := d.SocketList[0]; s.State != "LISTEN" || s.Local.String() != l.Addr().String() {
		t.Errorf("socket: %+v, want that of %v", s, l.Addr())
	}
	u, err := Unregister(name, UnregisterOptions{})
	if err != nil || u.Sockets != 1 {
		t.Errorf("unregistered: %+v, %v", u, err)
	}
}

func TestUnregisterDefault(t *testing.T) {
	kerneltest.Privileged(t)
	const name = "ccr_default"
	register(t, Options{Name: name, Allow: true})
	ns := newNS(t)
	kerneltest.Name(t, ns, "ccr_default")

	before, err := Default(ns)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := SetDefault(ns, name, false); err != nil {
		t.Fatal(err)
	}
	var inUse *InUseError
	if _, err := Unregister(name, UnregisterOptions{}); !errors.As(err, &inUse) || !slices.Equal(inUse.Namespaces, []string{"ccr_default"}) {
		t.Errorf("in use: %v", err)
	}
	for _, to := range []string{name, "nowhere", ""} {
		if _, err := Unregister(name, UnregisterOptions{Reset: to}); err == nil {
			t.Errorf("reset to %q: no error", to)
		}
		if got, _ := Default(ns); got != name {
			t.Errorf("after the refused reset to %q the default is %s", to, got)
		}
	}
	u, err := Unregister(name, UnregisterOptions{Reset: "reno"})
	if err != nil || !slices.Equal(u.Reset, []string{"ccr_default"}) {
		t.Errorf("unregistered: %+v, %v", u, err)
	}
	if got, _ := Default(ns); got != "reno" {
		t.Errorf("the default is %s", got)
	}
	if r, err := Restore(); err != nil || len(r.Warnings) > 0 {
		t.Errorf("restored %+v, %v", r, err)
	}
	if got, _ := Default(ns); got != before {
		t.Errorf("the default is %s, was %s", got, before)
	}
}

// Whatever fails, nothing is left.
func TestRegisterErrors(t *testing.T) {
	kerneltest.Privileged(t)
	before, err := kerneltest.Take()
	if err != nil {
		t.Fatal(err)
	}
	var taken *TakenError
	if _, err := Register(reno(t), Options{Name: "reno"}); !errors.As(err, &taken) || taken.Kind != Builtin {
		t.Errorf("a built-in's name: %v", err)
	}
	if _, err := Register(reno(t), Options{Map: "nope"}); !errors.Is(err, structops.ErrNotFound) {
		t.Errorf("no such map: %v", err)
	}
	for _, name := range []string{"x234567890123456", "a-b", "../x", " "} {
		if _, err := Register(reno(t), Options{Name: name}); !errors.Is(err, structops.ErrName) {
			t.Errorf("%q: %v", name, err)
		}
	}
	if err := before.Check(); err != nil {
		t.Error(err)
	}

	// What is in the way of the pin and is not ours to remove.
	way := filepath.Join(pinDir, "ccr_way/x")
	if err := os.MkdirAll(way, 0o700); err != nil {
		t.Fatal(err)
	}
	var refused *RefusedError
	if _, err := Register(reno(t), Options{Name: "ccr_way"}); !errors.As(err, &refused) || refused.Path != filepath.Dir(way) {
		t.Errorf("the place of the pin is taken: %v", err)
	}
	for _, dir := range []string{way, filepath.Dir(way)} {
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	}
	os.Remove(pinDir)
	os.Remove(rootDir)
	if err := before.Check(); err != nil {
		t.Error(err)
	}
}

// Of several that register one name at the same time exactly one succeeds.
func TestRegisterRace(t *testing.T) {
	kerneltest.Privileged(t)
	const name, n = "ccr_race", 4
	errs := make(chan error, n)
	for range n {
		spec := reno(t)
		go func() {
			_, err := Register(spec, Options{Name: name})
			errs <- err
		}()
	}
	var won int
	for range n {
		err := <-errs
		switch taken := (*TakenError)(nil); {
		case err == nil:
			won++
		case !errors.As(err, &taken) && !errors.Is(err, structops.ErrExists):
			t.Error(err)
		}
	}
	d, _, err := Lookup(name)
	if won != 1 || err != nil {
		t.Fatalf("%d succeeded; %v", won, err)
	}
	if !strings.HasPrefix(d.Pin, pinDir) {
		t.Errorf("it is not pinned: %+v", d.Entry)
	}
	if _, err := Unregister(name, UnregisterOptions{}); err != nil {
		t.Error(err)
	}
}
