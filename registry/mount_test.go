// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"strings"
	"testing"

	"ccload/structops"
)

// The bpffs of process 1 is the last that is mounted in its usual place.
func TestBPFFSDevice(t *testing.T) {
	for text, want := range map[string]string{
		"": "",
		"22 1 8:1 / / rw - ext4 /dev/sda1 rw\n42 22 0:39 / /sys/fs/bpf rw,nosuid - bpf bpf rw,mode=700\n":                                    "0:39",
		"42 22 0:39 / /sys/fs/bpf rw shared:1 - bpf bpf rw\n43 42 0:40 / /sys/fs/bpf rw - bpf bpf rw\n44 22 0:41 / /other rw - bpf bpf rw\n": "0:40",
		"42 22 0:39 / /sys/fs/bpf/x rw - bpf bpf rw\n":                                                                                       "",
	} {
		if got := bpffsDevice(strings.NewReader(text)); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

// A selection that another bpffs remembers is nobody's here, and not put back; what it
// names is said also when that is gone.
func TestOtherMount(t *testing.T) {
	privateBPFFS(t)
	if !Apart() {
		t.Error("a bpffs of our own is not apart")
	}
	const name = "ccr_apart"
	r := register(t, Options{Name: name})
	if len(r.Warnings) != 1 || !strings.Contains(r.Warnings[0], "is not that of process 1") {
		t.Errorf("warnings: %q", r.Warnings)
	}
	before := state(t, nil)
	def, _, _ := strings.Cut(before, ":")
	if _, err := SetDefault(nil, name, false); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { setDefault("/", def) })
	by := func() string {
		d, _, err := Lookup(name)
		if err != nil || len(d.Selected) != 1 {
			t.Fatalf("%+v, %v", d, err)
		}
		return d.Selected[0].By
	}
	if got := by(); got != byCcload {
		t.Errorf("selected by %q", got)
	}

	// Elsewhere there is no journal of it.
	j, err := openMap(undoPath)
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	if err := unpin(undoPath); err != nil {
		t.Fatal(err)
	}
	if got := by(); got != "" {
		t.Errorf("selected by %q, which nobody knows here", got)
	}
	restored, err := Restore()
	if err != nil || len(restored.Restored) > 0 || len(restored.Warnings) != 1 || restored.Warnings[0] != "default: ccr_apart is selected; not by a ccload that shares the bpffs here" {
		t.Errorf("%+v, %v", restored, err)
	}
	if _, err := Unregister(name, UnregisterOptions{}); err == nil || !strings.HasSuffix(err.Error(), "of these not by a ccload that shares the bpffs here: default") {
		t.Error(err)
	}
	again, err := j.Clone() // which does not know that it was pinned
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if err := newPin(undoPath, again.Pin); err != nil {
		t.Fatal(err)
	}

	// The name goes while it is selected, as it does with its mount.
	e, err := findBPF(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := structops.Unregister(e.info); err != nil {
		t.Fatal(err)
	}
	_, warnings, err := List()
	if err != nil || len(warnings) != 1 || warnings[0] != "default: ccr_apart is selected, which is not registered" {
		t.Errorf("%q, %v", warnings, err)
	}
	if _, _, err := Lookup(name); err == nil || !strings.HasSuffix(err.Error(), "but it is selected for default") {
		t.Error(err)
	}
	if restored, err := Restore(); err != nil || len(restored.Restored) != 1 {
		t.Errorf("%+v, %v", restored, err)
	}
	if after := state(t, nil); after != before {
		t.Errorf("it was %q, is %q", before, after)
	}
}
