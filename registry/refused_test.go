// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"ccload/internal/fault"
	"ccload/internal/kerneltest"
	"ccload/internal/netns"
	"ccload/structops"

	"golang.org/x/sys/unix"
)

// refuse lets the kernel refuse some of our programs until the test ends.
func refuse(t *testing.T, programs ...string) {
	t.Helper()
	t.Cleanup(fault.Set(func(step string) error {
		what, program, ok := strings.Cut(step, " program ")
		if ok && (what == "load" || what == "attach") && slices.Contains(programs, program) {
			return unix.EPERM
		}
		return nil
	}))
}

// everyWay runs a test of what is done to open sockets in each of the ways in which
// that can be done: the kernel refuses some of our programs, or all.
func everyWay(t *testing.T, test func(*testing.T)) {
	for _, refused := range [][]string{nil, {"count"}, {"move"}, {"restore"}, {"move", "restore", "count"}} {
		t.Run(cmp.Or(strings.Join(refused, ","), "none"), func(t *testing.T) {
			kerneltest.Privileged(t)
			refuse(t, refused...)
			test(t)
		})
	}
}

// Where the kernel does not count what sockets remember, their namespaces are looked
// through: the map stays as long as one of them remembers, in any of them.
func TestMoveUncounted(t *testing.T) {
	kerneltest.Privileged(t)
	const name = "ccr_uncounted"
	register(t, Options{Name: name})
	refuse(t, "count")
	pinned := func(want bool) {
		t.Helper()
		if _, err := os.Stat(formerPath); errors.Is(err, fs.ErrNotExist) == want {
			t.Errorf("what sockets had is remembered: %v, want %v", !want, want)
		}
	}
	a, b := island(t), island(t)
	kerneltest.Name(t, a, "ccr_a")
	kerneltest.Name(t, b, "ccr_b")
	p, q := wired(t, a, "tcp4", "127.0.0.1:0"), wired(t, b, "tcp6", "[::1]:0")
	t.Cleanup(func() { RestoreSockets(a, nil); RestoreSockets(b, nil) })

	if m, err := MoveSockets(a, filter(t, "cc "+name), "reno"); err != nil || m.Matched != 0 {
		t.Errorf("none matches: %+v, %v", m, err)
	}
	pinned(false)
	if m, err := MoveSockets(a, nil, name); err != nil || m.Moved != 2 || len(m.Warnings) > 0 {
		t.Errorf("%+v, %v", m, err)
	}
	if m, err := MoveSockets(b, nil, name); err != nil || m.Moved != 2 {
		t.Errorf("%+v, %v", m, err)
	}
	if m, err := RestoreSockets(b, nil); err != nil || m.Moved != 2 || congestion(t, q.c) != "reno" {
		t.Errorf("restored: %+v, %v", m, err)
	}
	pinned(true)
	p.close()
	if m, err := RestoreSockets(b, nil); err != nil || m.Matched != 0 {
		t.Errorf("restored again: %+v, %v", m, err)
	}
	pinned(false)
	if m, err := MoveSockets(b, nil, name); err != nil || m.Moved != 2 {
		t.Errorf("%+v, %v", m, err)
	}
	if m, err := MoveSockets(b, nil, "reno"); err != nil || m.Moved != 2 || len(m.Warnings) > 0 {
		t.Errorf("moved to what they had: %+v, %v", m, err)
	}
	pinned(false)
}

// unaccepted is a connection that nobody has accepted yet: no process holds its other
// end.
func unaccepted(t *testing.T, ns *netns.NS, l *net.TCPListener) *net.TCPConn {
	t.Helper()
	var c net.Conn
	if err := ns.Do(func() (err error) { c, err = net.Dial("tcp4", l.Addr().String()); return err }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

// Without iterators, what no process holds is counted, and the reason is said; so is
// what the kernel refused.
func TestMoveUnreachable(t *testing.T) {
	kerneltest.Privileged(t)
	const name = "ccr_unreached"
	register(t, Options{Name: name})
	ns := island(t)
	t.Cleanup(func() { RestoreSockets(ns, nil) })
	p := wired(t, ns, "tcp4", "127.0.0.1:0")
	c := unaccepted(t, ns, p.l)
	refuse(t, "move", "restore", "count")

	m, err := MoveSockets(ns, nil, name)
	if err != nil || m.Matched != 4 || m.Moved != 3 || m.Failed != 1 || m.Reasons[outcome{State: notHeld}.reason()] != 1 {
		t.Errorf("%+v, %v", m, err)
	}
	if m == nil || len(m.Warnings) != 1 || !strings.Contains(m.Warnings[0], `refuses the iter/tcp program "move": operation not permitted`) {
		t.Errorf("the warnings: %+v", m)
	}
	if got := congestion(t, c); got != name {
		t.Errorf("the end that is held runs %s", got)
	}
	m, err = RestoreSockets(ns, nil)
	if err != nil || m.Matched != 3 || m.Moved != 3 || m.Failed != 0 || len(m.Warnings) != 2 || !slices.ContainsFunc(m.Warnings, func(w string) bool { return strings.HasPrefix(w, "1 sockets cannot be reached") }) {
		t.Errorf("restored: %+v, %v", m, err)
	}

	// Whoever may not look into processes reaches none.
	defer fault.Set(func(step string) error {
		if step == "pidfd_getfd" || strings.HasPrefix(step, "load program") {
			return unix.EPERM
		}
		return nil
	})()
	m, err = MoveSockets(ns, nil, name)
	if err != nil || m.Matched != 4 || m.Moved != 0 || m.Reasons[outcome{State: notReached, Error: -int32(unix.EPERM)}.reason()] != 3 {
		t.Errorf("%+v, %v", m, err)
	}
	if isPinned(formerPath) {
		t.Error("nothing was moved, and the pin is there")
	}
}

// Without iterators, a listener of MPTCP, such as Go's library makes, is moved, too,
// and put back; that what it accepts meanwhile is not is said.
func TestMoveMultipath(t *testing.T) {
	kerneltest.Privileged(t)
	if b, err := os.ReadFile("/proc/sys/net/mptcp/enabled"); err != nil || string(b) != "1\n" {
		t.Skip("the kernel has no MPTCP")
	}
	const name = "ccr_multipath"
	register(t, Options{Name: name})
	ns := island(t)
	t.Cleanup(func() { RestoreSockets(ns, nil) })
	var l net.Listener
	if err := ns.Do(func() (err error) { l, err = net.Listen("tcp4", "127.0.0.1:0"); return err }); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	choosing(t, l.(*net.TCPListener), "reno")
	refuse(t, "move", "restore", "count")
	m, err := MoveSockets(ns, filter(t, "state listening"), name)
	if err != nil || m.Matched != 1 || m.Moved != 1 || len(m.Warnings) != 2 || !slices.ContainsFunc(m.Warnings, func(w string) bool { return strings.Contains(w, "MPTCP") }) {
		t.Errorf("%+v, %v", m, err)
	}
	c := unaccepted(t, ns, l.(*net.TCPListener))
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if got := congestion(t, s.(*net.TCPConn)); got != name {
		t.Errorf("it accepts with %s", got)
	}
	c.Close()
	s.Close()
	if m, err = RestoreSockets(ns, filter(t, "state listening")); err != nil || m.Matched != 1 || m.Moved != 1 || congestion(t, l.(*net.TCPListener)) != "reno" {
		t.Errorf("restored: %+v, %v", m, err)
	}
}

// Without iterators, a replacement reaches connections; of listeners it says that they
// are left.
func TestReplaceRefused(t *testing.T) {
	kerneltest.Privileged(t)
	const name = "ccr_replace"
	_, ns := serving(t, name, starting(t, 100), Options{Allow: true})
	l := listening(t, ns, name)
	w := begins(t, ns, 100)
	refuse(t, "move", "restore", "count")
	r, err := Replace(name, starting(t, unchanged), ReplaceOptions{Migrate: true})
	if err != nil {
		t.Fatal(err)
	}
	if m := r.Migrated; m.Moved != 2 || m.Failed != m.Reasons[outcome{State: cannotTell}.reason()] || m.Failed == 0 || m.Gone != 0 {
		t.Errorf("migrated: %+v", m)
	}
	if r.Warnings == nil || !strings.Contains(r.Warnings[len(r.Warnings)-1], "the kernel refuses") {
		t.Errorf("the warnings: %q", r.Warnings)
	}
	d, _, err := Lookup(name)
	if err != nil || d.MapID != r.MapID {
		t.Errorf("%+v, %v", d, err)
	}
	l.Close()
	w.l.Close()
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if _, err := structops.Inspect(r.Before); err != nil {
			break // no connection runs it
		}
		if time.Now().After(deadline) {
			t.Fatal("connections go on with the old code")
		}
	}
	listening(t, ns, name)
	if r, err = Replace(name, starting(t, 100), ReplaceOptions{}); err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(r.Warnings, func(w string) bool { return strings.Contains(w, "listening sockets may hand out the old code") }) {
		t.Errorf("the warnings: %q", r.Warnings)
	}
}

// An extension takes the slot where the kernel does not let it take the function's
// place, whether it says so at once or only when that is to be done. A way that was
// asked for is not left, and both refused change nothing.
func TestExtendRefused(t *testing.T) {
	for what, steps := range map[string][]string{
		"loading":    {"load program gentle_backoff"},
		"attaching":  {"replace function"},
		"everything": {"load program gentle_backoff", "replace function", "load program backoff_slot"},
	} {
		for _, errno := range []unix.Errno{unix.EPERM, unix.EINVAL, unix.EOPNOTSUPP, 524} {
			t.Run(fmt.Sprintf("%s %d", what, errno), func(t *testing.T) {
				kerneltest.Privileged(t)
				const name = "ccr_ext"
				registerAs(t, "cubic.bpf.o", name)
				t.Cleanup(fault.Set(func(step string) error {
					if slices.Contains(steps, step) {
						return errno
					}
					return nil
				}))
				if _, err := Extend(name, "backoff", gentle(t), structops.Freplace); err == nil {
					t.Error("the function was replaced")
				}
				x, err := Extend(name, "backoff", gentle(t), "")
				if what == "everything" {
					var missing *structops.PermissionError
					if errno == unix.EPERM && !errors.As(err, &missing) {
						t.Errorf("the reason is lost: %v", err)
					}
					if err == nil || len(pinned(t)) > 0 || function(t, name, "backoff").Extended != nil {
						t.Errorf("%+v, %v; left: %q", x, err, pinned(t))
					}
				} else if err != nil || x.How != structops.TailCall || x.Instead == "" {
					t.Errorf("%+v, %v", x, err)
				}
			})
		}
	}
}
