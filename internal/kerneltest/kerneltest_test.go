// SPDX-License-Identifier: Apache-2.0

package kerneltest

import (
	"strings"
	"testing"

	"ccload/internal/netns"
)

// A namespace that was left open must be seen, and must no longer be seen when
// it is gone.
func TestSnapshotSeesNamespace(t *testing.T) {
	Privileged(t)
	before, err := Take()
	if err != nil {
		t.Fatal(err)
	}
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	after, err := Take()
	if err != nil {
		t.Fatal(err)
	}
	if d := diff(before, after); !strings.HasPrefix(d, "+ network namespace net:[") || strings.Contains(d, "\n") {
		t.Errorf("with a new namespace the difference is %q", d)
	}
	ns.Close()
	if err := before.Check(); err != nil {
		t.Error(err)
	}
}

func TestDiff(t *testing.T) {
	before := Snapshot{"device lo": true, "pin /a": true}
	after := Snapshot{"device lo": true, "device x": true}
	if got, want := diff(before, after), "+ device x\n- pin /a"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// The subtest must not wait for its parent's turn.
func TestPrivilegedNests(t *testing.T) {
	Privileged(t)
	t.Run("sub", func(t *testing.T) { Privileged(t) })
}
