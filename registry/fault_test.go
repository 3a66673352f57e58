// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"errors"
	"strings"
	"testing"

	"ccload/internal/fault"
	"ccload/internal/kerneltest"
)

var errFault = errors.New("a test wants it so")

// failing has one step fail, or all that begin with something.
func failing(steps ...string) func(string) error {
	return func(s string) error {
		for _, step := range steps {
			if strings.HasPrefix(s, step) {
				return errFault
			}
		}
		return nil
	}
}

// A name that could not be unregistered is selected again, and what was there before it
// is not forgotten: not even if that is what took its place for a moment.
func TestUnregisterFails(t *testing.T) {
	kerneltest.Privileged(t)
	const name = "ccr_stays"
	register(t, Options{Name: name})
	ns := newNS(t)
	kerneltest.Name(t, ns, name)
	before := state(t, ns)
	was, _, _ := strings.Cut(before, ":")
	if _, err := SetDefault(ns, name, true); err != nil {
		t.Fatal(err)
	}
	selected := state(t, ns)
	restore := fault.Set(failing("detach BPF link", "delete from BPF map"))
	_, err := Unregister(name, UnregisterOptions{Reset: was})
	restore()
	if !errors.Is(err, errFault) {
		t.Fatal(err)
	}
	if now := state(t, ns); now != selected {
		t.Errorf("it was %q, is %q", selected, now)
	}
	r, err := Restore()
	if err != nil || len(r.Restored) != 1 || r.Restored[0].From != name || r.Restored[0].To != was {
		t.Errorf("restored %+v, %v", r, err)
	}
	if now := state(t, ns); now != before {
		t.Errorf("it was %q, is %q", before, now)
	}
	nothingLeft(t)
}
