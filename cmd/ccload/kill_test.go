// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jsimonetti/rtnetlink/v2"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"ccload/internal/kerneltest"
	"ccload/internal/netns"
	"ccload/registry"
	"ccload/structops"
)

// subject is this program as ccload.
func subject(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return &exec.Cmd{Path: self, Args: append([]string{"ccload"}, args...)}
}

// done runs ccload to its end.
func done(t *testing.T, args ...string) {
	t.Helper()
	if out, err := subject(t, args...).CombinedOutput(); err != nil {
		t.Fatalf("ccload %q: %v\n%s", args, err, out)
	}
}

// Wherever a command is killed, the next one sees what it left and finishes or undoes
// it: what undoes the command then leaves nothing behind.
func TestKilled(t *testing.T) {
	kerneltest.Privileged(t)
	kills := 20
	if testing.Short() { // a guest is slow
		kills = 4
	}
	ns, group, plain := place(t)
	wanted := filepath.Join(t.TempDir(), "wanted.yaml")
	write(t, wanted, fmt.Appendf(nil, `
register:
  cct_k: {from: bpf_reno, allow: true}
  cct_l: {from: bpf_cubic, set: {beta: 0.8}}
use:
  - {cc: cct_k, netns: %q}
  - {cc: cct_l, netns: %[1]q, route: 198.18.0.0/15}
`, ns.Path()))
	const name = "cct_k"
	// registered says whether the name is, and that it is as it should be: once, with
	// its pin, and without a shadow.
	registered := func(t *testing.T) bool {
		t.Helper()
		live, err := structops.Live()
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, i := range live {
			if i.Registered() && i.Name == name {
				n++
			}
			if i.Registered() && strings.HasSuffix(i.Name, ".new") {
				t.Errorf("shadow %q is still there", i.Name)
			}
		}
		if _, err := os.Stat("/sys/fs/bpf/ccload/name/" + name); n > 1 || (err == nil) != (n == 1) {
			t.Errorf("%d are registered, and of the pin: %v", n, err)
		}
		return n > 0
	}
	stays := func(t *testing.T) {
		t.Helper()
		if !registered(t) {
			t.Error("the name is gone")
		}
	}
	// The default and a listener get new sockets the code that is registered.
	listener := []string{"use", name, "--netns", ns.Path(), "--sockets", "state listening"}
	replaced := func(t *testing.T) {
		t.Helper()
		stays(t)
		var held []string
		for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			live, err := structops.Live()
			if err != nil {
				t.Fatal(err)
			}
			held = nil
			for _, i := range live {
				if i.Name == name && !i.Registered() && i.Refs > 0 {
					held = append(held, fmt.Sprintf("map %d (%s, %d references)", i.MapID, i.State, i.Refs))
				}
			}
			if held == nil || time.Now().After(deadline) {
				break
			}
		}
		if held != nil {
			t.Errorf("code that was replaced is still in use: %q", held)
		}
	}
	for _, c := range []struct {
		name          string
		before, after [][]string // before and after all the kills
		verb          []string   // killed; %d stands for another number each time
		undo          [][]string // after each: may fail
		check         func(*testing.T)
	}{
		{name: "register", verb: []string{"register", "bpf_cubic", "--as", name, "--allow"}, check: func(t *testing.T) { registered(t) },
			undo: [][]string{{"unregister", name}}},
		{name: "register without link", verb: []string{"register", plain, "--as", name}, check: func(t *testing.T) { registered(t) },
			undo: [][]string{{"unregister", name}}},
		{name: "unregister", verb: []string{"unregister", name}, check: func(t *testing.T) { registered(t) },
			before: [][]string{{"register", "bpf_reno", "--as", name}}, undo: [][]string{{"register", "bpf_reno", "--as", name}},
			after: [][]string{{"unregister", name}}},
		{name: "replace", verb: []string{"replace", name, "bpf_cubic", "--set", "c=0.%d"}, check: replaced,
			before: [][]string{{"register", "bpf_cubic", "--as", name, "--allow"}, {"use", name, "--netns", ns.Path()}, listener},
			after:  [][]string{{"use", "--restore"}, {"unregister", name}}},
		{name: "replace and migrate", verb: []string{"replace", name, "bpf_cubic", "--set", "c=0.%d", "--migrate"}, check: stays,
			before: [][]string{{"register", "bpf_cubic", "--as", name}}, after: [][]string{{"unregister", name}}},
		{name: "replace without link", verb: []string{"replace", name, "bpf_cubic", "--set", "c=0.%d"}, check: replaced,
			before: [][]string{{"register", plain, "--as", name, "--allow"}, {"use", name, "--netns", ns.Path()}, listener},
			after:  [][]string{{"use", "--restore"}, {"unregister", name}}},
		{name: "set", verb: []string{"set", name, "beta=0.%d"}, check: stays,
			before: [][]string{{"register", "bpf_cubic", "--as", name}}, after: [][]string{{"unregister", name}}},
		{name: "use", verb: []string{"use", name, "--netns", ns.Path(), "--allow"}, undo: [][]string{{"use", "--restore"}}, check: stays,
			before: [][]string{{"register", "bpf_reno", "--as", name}}, after: [][]string{{"unregister", name}}},
		{name: "use route", verb: []string{"use", name, "--netns", ns.Path(), "--route", "198.18.0.0/15", "--lock"}, check: stays,
			before: [][]string{{"register", "bpf_reno", "--as", name}}, undo: [][]string{{"use", "--restore"}}, after: [][]string{{"unregister", name}}},
		{name: "use cgroup", verb: []string{"use", "--cgroup", group, "--split", name + "=1,cubic=2"}, check: stays,
			before: [][]string{{"register", "bpf_reno", "--as", name}}, undo: [][]string{{"use", "--restore"}}, after: [][]string{{"unregister", name}}},
		{name: "use sockets", verb: []string{"use", name, "--netns", ns.Path(), "--sockets", "state listening"}, check: stays,
			before: [][]string{{"register", "bpf_reno", "--as", name}}, after: [][]string{{"unregister", name}},
			undo: [][]string{{"use", "--restore", "--netns", ns.Path(), "--sockets", ""}}},
		{name: "apply", verb: []string{"apply", wanted}, check: func(t *testing.T) {
			done(t, "apply", wanted)
			stays(t)
		}, undo: [][]string{{"use", "--restore"}, {"unregister", name}, {"unregister", "cct_l"}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			outside, err := kerneltest.Take()
			if err != nil {
				t.Fatal(err)
			}
			for _, args := range c.before {
				done(t, args...)
			}
			routes := routesOf(t, ns)
			inside, err := kerneltest.Take()
			if err != nil {
				t.Fatal(err)
			}
			verb := func(n int) *exec.Cmd {
				args := slices.Clone(c.verb)
				for i, a := range args {
					args[i] = strings.ReplaceAll(a, "%d", fmt.Sprint(500+n))
				}
				return subject(t, args...)
			}
			begin := time.Now()
			if out, err := verb(0).CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			whole := time.Since(begin)
			undo := func() {
				for _, args := range c.undo {
					subject(t, args...).Run()
				}
				// Any verb that changes something sweeps first.
				subject(t, "unregister", "cct_none").Run()
			}
			undo()
			rnd := rand.New(rand.NewPCG(1, uint64(kills)))
			for n := range kills {
				cmd := verb(n + 1)
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				at := time.Duration(rnd.Int64N(int64(whole)))
				time.Sleep(at)
				cmd.Process.Kill()
				cmd.Wait()
				subject(t, "unregister", "cct_none").Run()
				c.check(t)
				undo()
				if err := inside.Check(); err != nil {
					t.Fatalf("killed after %v of %v: %v", at, whole, err)
				}
				if now := routesOf(t, ns); now != routes {
					t.Fatalf("killed after %v of %v: the routes are\n%s, and were\n%s", at, whole, now, routes)
				}
			}
			for _, args := range c.after {
				done(t, args...)
			}
			if err := outside.Check(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// place makes what can be selected for: a network namespace with a route and a
// listener, a control group; and an object whose registration has no link.
func place(t *testing.T) (ns *netns.NS, group, plain string) {
	t.Helper()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	kerneltest.Name(t, ns, "cct_killed")
	c, err := rtnetlink.Dial(&netlink.Config{NetNS: ns.FD()})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Link.Set(&rtnetlink.LinkMessage{Index: 1, Flags: unix.IFF_UP, Change: unix.IFF_UP}); err != nil {
		t.Fatal(err)
	}
	if err := c.Route.Add(&rtnetlink.RouteMessage{
		Family: unix.AF_INET, DstLength: 15, Table: unix.RT_TABLE_MAIN, Protocol: unix.RTPROT_STATIC,
		Scope: unix.RT_SCOPE_LINK, Type: unix.RTN_UNICAST,
		Attributes: rtnetlink.RouteAttributes{Dst: net.IPv4(198, 18, 0, 0).To4(), OutIface: 1},
	}); err != nil {
		t.Fatal(err)
	}
	err = ns.Do(func() error {
		var lc net.ListenConfig
		lc.SetMultipathTCP(false) // of which not all can be put back
		l, err := lc.Listen(t.Context(), "tcp4", "127.0.0.1:0")
		if err == nil {
			t.Cleanup(func() { l.Close() })
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}

	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if point, ok := structops.MountPoint(line, "cgroup2"); ok && group == "" {
			group, err = os.MkdirTemp(point, "cct")
		}
	}
	if group == "" || err != nil {
		kerneltest.Skip(t, fmt.Sprintf("cgroup2: not mounted, or %v", err))
	}
	t.Cleanup(func() {
		if err := os.Remove(group); err != nil {
			t.Error(err)
		}
	})

	obj, err := os.ReadFile("../../bpf/cubic.bpf.o")
	if err != nil {
		t.Fatal(err)
	}
	plain = filepath.Join(t.TempDir(), "plain.o")
	write(t, plain, bytes.ReplaceAll(obj, []byte(".struct_ops.link"), []byte(".struct_ops\x00link")))
	return ns, group, plain
}

func write(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// routesOf are the routes of a namespace that name a congestion control, and its
// default.
func routesOf(t *testing.T, ns *netns.NS) string {
	t.Helper()
	s, err := registry.Selections(ns)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(s)
}
