// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"errors"
	"io/fs"
	"os"
	"slices"
	"testing"

	"ccload/internal/fault"
	"ccload/internal/kerneltest"

	"golang.org/x/sys/unix"
)

// refuse lets the kernel refuse some of our programs until the test ends.
func refuse(t *testing.T, programs ...string) {
	t.Helper()
	t.Cleanup(fault.Set(func(step string) error {
		if slices.ContainsFunc(programs, func(p string) bool { return step == "load program "+p }) {
			return unix.EPERM
		}
		return nil
	}))
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
