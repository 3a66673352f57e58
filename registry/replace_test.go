// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"errors"
	"net"
	"os"
	"slices"
	"testing"

	"ccload/internal/kerneltest"
	"ccload/internal/netns"
	"ccload/structops"
)

// The threshold of a new connection, and starting's argument, that leave it alone.
const unlimited, unchanged = 0x7fffffff, 0

// starting is bpf_cubic, whose new connections show the code that they run: they
// begin with this slow start threshold, in segments.
func starting(t *testing.T, threshold int) *structops.Spec {
	t.Helper()
	spec := parseObject(t, "cubic.bpf.o", structops.Parse)
	for name, v := range map[string]int{"hystart": 0, "initial_ssthresh": threshold} {
		if err := spec.Set(name, v); err != nil {
			t.Fatal(err)
		}
	}
	return spec
}

// opened is a connection inside a namespace that runs its default at both ends.
func opened(t *testing.T, ns *netns.NS) *wire {
	t.Helper()
	l := listening(t, ns, "")
	p := accepted(t, ns, l)
	p.l = l
	return p
}

// listening is a listener that has chosen a congestion control, or none.
func listening(t *testing.T, ns *netns.NS, name string) (l *net.TCPListener) {
	t.Helper()
	err := ns.Do(func() error {
		any, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			return err
		}
		if l = any.(*net.TCPListener); name != "" {
			return SetSocket(l, name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// accepted is a connection inside a namespace to a listener there.
func accepted(t *testing.T, ns *netns.NS, l *net.TCPListener) *wire {
	t.Helper()
	p := &wire{}
	err := ns.Do(func() (err error) {
		if p.c, err = net.DialTCP("tcp4", nil, l.Addr().(*net.TCPAddr)); err != nil {
			return err
		}
		p.s, err = l.AcceptTCP()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.close)
	return p
}

// serving registers bpf_cubic and makes it the default of a namespace that can be
// seen by the same name.
func serving(t *testing.T, name string, spec *structops.Spec, o Options) (*Registration, *netns.NS) {
	t.Helper()
	o.Name = name
	r, err := Register(spec, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := Unregister(name, UnregisterOptions{Reset: "reno"}); err != nil {
			t.Error(err)
		}
	})
	ns := island(t)
	kerneltest.Name(t, ns, name)
	if _, err := SetDefault(ns, name, false); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { RestoreDefault(ns) })
	return r, ns
}

// begins fails the test if new connections of a namespace do not begin with that
// threshold. It returns one of them.
func begins(t *testing.T, ns *netns.NS, threshold uint32) *wire {
	t.Helper()
	p := opened(t, ns)
	for _, c := range []net.Conn{p.c, p.s} {
		if _, got := window(t, ns, c); got != threshold {
			t.Errorf("a new connection begins with the threshold %d, want %d", got, threshold)
		}
	}
	return p
}

// New connections run the new code at once, open ones the old until they are moved,
// which changes nothing but the code.
func TestReplace(t *testing.T) {
	for what, link := range map[string]bool{"link": true, "no link": false} {
		t.Run(what, func(t *testing.T) {
			kerneltest.Privileged(t)
			const name = "ccr_replace"
			spec := starting(t, 100)
			spec.Ops[0].Link = link
			was, ns := serving(t, name, spec, Options{Allow: true})
			link = was.LinkID != 0
			listener := listening(t, ns, name)
			accepts := func(threshold uint32) {
				t.Helper()
				p := accepted(t, ns, listener)
				defer p.close()
				if _, got := window(t, ns, p.s); got != threshold {
					t.Errorf("a listener that has chosen the name accepts one with the threshold %d, want %d", got, threshold)
				}
			}
			accepts(100)
			wires := []*wire{begins(t, ns, 100)}
			cwnd, _ := window(t, ns, wires[0].c)

			replace := func(threshold int, migrate bool) *Replacement {
				t.Helper()
				r, err := Replace(name, starting(t, threshold), ReplaceOptions{Migrate: migrate})
				if err != nil {
					t.Fatal(err)
				}
				warned := 1
				if link {
					warned = 0
				}
				if r.Before != was.MapID || r.MapID == was.MapID || r.LinkID != was.LinkID || len(r.Warnings) != warned || !slices.Equal(r.Namespaces, []string{name}) {
					t.Errorf("replaced: %+v; it was %+v", r, was)
				}
				d, _, err := Lookup(name)
				if err != nil || d.MapID != r.MapID || d.LinkID != r.LinkID || !d.Allowed || d.Pin != was.Pin || !slices.Equal(d.DefaultIn, []string{name}) {
					t.Errorf("after the replacement: %+v, %v", d, err)
				}
				was.MapID = r.MapID
				return r
			}
			r := replace(200, false)
			if r.Migrated != nil {
				t.Errorf("migrated unasked: %+v", r.Migrated)
			}
			wires = append(wires, begins(t, ns, 200))
			accepts(200)
			if old, err := structops.Inspect(r.Before); link && (err != nil || old.State != structops.StateToBeFree || old.Refs < 2) {
				t.Errorf("the code of the open connection: %+v, %v", old, err)
			}

			r = replace(unchanged, true)
			// Both ends of two connections, and the listener that has chosen.
			if m := r.Migrated; m == nil || m.Matched != 5 || m.Moved != 5 || m.Kept+m.Gone+m.Failed+m.Window != 0 {
				t.Errorf("migrated: %+v", r.Migrated)
			}
			for i, p := range wires {
				for _, c := range []*net.TCPConn{p.c, p.s} {
					if w, threshold := window(t, ns, c); w != cwnd || threshold != uint32(100*(i+1)) || congestion(t, c) != name {
						t.Errorf("migrated: window %d, threshold %d, %s", w, threshold, congestion(t, c))
					}
				}
			}
			if m := replace(unchanged, true).Migrated; m.Matched != 5 || m.Moved != 5 {
				t.Errorf("migrated again: %+v", m)
			}
			begins(t, ns, unlimited)
			accepts(unlimited)
		})
	}
}

// One that was killed when the kernel had replaced the code, and nothing else was
// done, is finished by whoever changes something next.
func TestReplaceKilled(t *testing.T) {
	kerneltest.Privileged(t)
	const name = "ccr_killed"
	was, ns := serving(t, name, starting(t, 100), Options{Allow: true})
	if was.LinkID == 0 {
		t.Skip("this kernel has no links")
	}
	listener := listening(t, ns, name)
	e, err := findBPF(name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pinReplaced(e.info); err != nil {
		t.Fatal(err)
	}
	spec := starting(t, 200)
	spec.Ops[0].Name, spec.Ops[0].Flags = name, nonRestricted
	if err := new(Replacement).update(e.info, spec, spec.Ops[0]); err != nil {
		t.Fatal(err)
	}
	begins(t, ns, 100)
	if warnings, err := Recover(); err != nil || !slices.Equal(warnings, []string{`finished a replacement of "ccr_killed" that was interrupted`}) {
		t.Fatal(warnings, err)
	}
	begins(t, ns, 200)
	p := accepted(t, ns, listener)
	if _, got := window(t, ns, p.s); got != 200 {
		t.Errorf("the listener accepts one with the threshold %d", got)
	}
	if _, err := os.Stat(replacedDir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s: %v", replacedDir, err)
	}
}

// A replacement that fails leaves the old code serving.
func TestReplaceErrors(t *testing.T) {
	for what, link := range map[string]bool{"link": true, "no link": false} {
		t.Run(what, func(t *testing.T) {
			kerneltest.Privileged(t)
			const name = "ccr_replace.bad" // 15 bytes
			spec := starting(t, 100)
			spec.Ops[0].Link = link
			was, ns := serving(t, name, spec, Options{Allow: true})
			before, err := kerneltest.Take()
			if err != nil {
				t.Fatal(err)
			}
			other := func(file string) *structops.Spec {
				return parseObject(t, "../structops/testdata/"+file, structops.Parse)
			}
			incomplete := starting(t, 200)
			delete(incomplete.Ops[0].Programs, "ssthresh")
			var gone *NotFoundError
			var kind *KindError
			var refused *structops.VerifierError
			for _, c := range []struct {
				name string
				spec *structops.Spec
				o    ReplaceOptions
				is   func(error) bool
			}{
				{name, other("refused.bpf.o"), ReplaceOptions{}, func(err error) bool { return errors.As(err, &refused) }},
				{name, incomplete, ReplaceOptions{}, func(err error) bool { return errors.Is(err, structops.ErrRequired) }},
				{name, other("kfunc.bpf.o"), ReplaceOptions{Migrate: true}, func(err error) bool { return errors.Is(err, structops.ErrKernel) }},
				{name, other("several.bpf.o"), ReplaceOptions{Map: "so_none"}, func(err error) bool { return errors.Is(err, structops.ErrNotFound) }},
				{"ccr_replace.baf", starting(t, 200), ReplaceOptions{}, func(err error) bool { return errors.As(err, &gone) && gone.Nearest == name }},
				{"reno", starting(t, 200), ReplaceOptions{}, func(err error) bool { return errors.As(err, &kind) }},
			} {
				if r, err := Replace(c.name, c.spec, c.o); !c.is(err) {
					t.Errorf("%s: %+v, %v", c.name, r, err)
				}
			}
			if err := before.Check(); err != nil {
				t.Error(err)
			}
			if i, err := structops.Inspect(was.MapID); err != nil || !i.Registered() {
				t.Errorf("the old one: %+v, %v", i, err)
			}
			begins(t, ns, 100)
			if r, err := Replace(name, starting(t, 200), ReplaceOptions{}); err != nil || len(r.Namespaces) != 1 {
				t.Errorf("a good one: %+v, %v", r, err)
			}
			begins(t, ns, 200)
		})
	}
}

// One that is restricted stays so; who selects it is told that its new sockets do
// not get the new code, where that is the case, and the namespace's default stays.
func TestReplaceRestricted(t *testing.T) {
	kerneltest.Privileged(t)
	const name = "ccr_restricted"
	was, ns := serving(t, name, starting(t, 100), Options{Allow: true})
	if _, err := Replace(name, starting(t, 200), ReplaceOptions{}); err != nil {
		t.Fatal(err)
	}
	d, _, err := Lookup(name)
	if err != nil || !d.Allowed || d.MapID == was.MapID {
		t.Errorf("%+v, %v", d, err)
	}
	if got, err := Default(ns); err != nil || got != name {
		t.Errorf("the default is %s, %v", got, err)
	}
	const restricted = "ccr_restricted2"
	register(t, Options{Name: restricted})
	if _, err := Replace(restricted, starting(t, 200), ReplaceOptions{}); err != nil {
		t.Fatal(err)
	}
	if allowed, err := Allowed(); err != nil || slices.Contains(allowed, restricted) {
		t.Errorf("allowed are %q, %v", allowed, err)
	}
}
