// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"ccload/internal/kerneltest"
	"ccload/internal/netns"
)

// newNS makes a network namespace for the test.
func newNS(t testing.TB) *netns.NS {
	t.Helper()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

// as it was: the default of a namespace and the list of allowed ones.
func state(t *testing.T, ns *netns.NS) string {
	t.Helper()
	def, err := Default(ns)
	if err != nil {
		t.Fatal(err)
	}
	allowed, err := Allowed()
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(allowed)
	return def + ": " + strings.Join(allowed, " ")
}

// nothingLeft fails the test if there is a journal.
func nothingLeft(t *testing.T) {
	t.Helper()
	if _, err := os.Stat(useDir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is left: %v", useDir, err)
	}
}

// Several selections go back to what was there before the first, and the names
// that were allowed for them are not allowed any more.
func TestRestoreDefault(t *testing.T) {
	kerneltest.Privileged(t)
	const name = "ccr_undo"
	register(t, Options{Name: name})
	for what, ns := range map[string]*netns.NS{"another namespace": newNS(t), "this one": nil} {
		before := state(t, ns)
		was, _, _ := strings.Cut(before, ":")
		for _, to := range []string{"reno", name, "reno", name} {
			if _, err := SetDefault(ns, to, true); err != nil {
				t.Fatal(err)
			}
		}
		r, err := RestoreDefault(ns)
		if err != nil || len(r.Warnings) > 0 || len(r.Restored) != 1 || r.Restored[0].From != name || r.Restored[0].To != was {
			t.Errorf("%s: restored %+v, %v", what, r, err)
		}
		if after := state(t, ns); after != before {
			t.Errorf("%s: it was %q, is %q", what, before, after)
		}
		nothingLeft(t)
		if r, err := RestoreDefault(ns); err != nil || len(r.Restored)+len(r.Warnings) > 0 {
			t.Errorf("%s: again: %+v, %v", what, r, err)
		}

		// By hand, too.
		for _, to := range []string{name, was} {
			if _, err := SetDefault(ns, to, true); err != nil {
				t.Fatal(err)
			}
		}
		if after := state(t, ns); after != before {
			t.Errorf("%s: by hand it was %q, is %q", what, before, after)
		}
		nothingLeft(t)
	}
}

// A default that the namespace would not take from its administrator is put back
// all the same.
func TestRestoreRestricted(t *testing.T) {
	kerneltest.Privileged(t)
	ns := newNS(t)
	was, err := Default(ns)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := SetDefault(ns, "reno", false); err != nil {
		t.Fatal(err)
	}
	if err := Disallow(was); err != nil {
		t.Fatal(err)
	}
	defer Allow(was)
	r, err := RestoreDefault(ns)
	if err != nil || len(r.Restored) != 1 {
		t.Errorf("%+v, %v", r, err)
	}
	after, _ := Default(ns)
	if allowed, _ := Allowed(); after != was || slices.Contains(allowed, was) {
		t.Errorf("the default is %s, want %s; allowed are %q", after, was, allowed)
	}
	nothingLeft(t)
}

// What somebody else has set since is left alone.
func TestRestoreForeign(t *testing.T) {
	kerneltest.Privileged(t)
	const name = "ccr_undo"
	register(t, Options{Name: name, Allow: true})
	ns := newNS(t)
	was, err := Default(ns)
	if err != nil {
		t.Fatal(err)
	}
	set := func(to string) {
		t.Helper()
		if err := ns.Do(func() error { return setDefault("/", to) }); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := SetDefault(ns, name, false); err != nil {
		t.Fatal(err)
	}
	set("reno")
	r, err := RestoreDefault(ns)
	if err != nil || len(r.Restored) > 0 || len(r.Warnings) != 1 || !strings.Contains(r.Warnings[0], "reno") {
		t.Errorf("%+v, %v", r, err)
	}
	if after, _ := Default(ns); after != "reno" {
		t.Errorf("the default is %s", after)
	}
	nothingLeft(t)

	// If ccload selects again after that, it is what they had set that comes back.
	set(was)
	if _, err := SetDefault(ns, name, false); err != nil {
		t.Fatal(err)
	}
	set("reno")
	if _, err := SetDefault(ns, name, false); err != nil {
		t.Fatal(err)
	}
	if r, err := RestoreDefault(ns); err != nil || len(r.Restored) != 1 || r.Restored[0].To != "reno" {
		t.Errorf("%+v, %v", r, err)
	}
}

// A process that is killed leaves either a change that is known, or none.
func TestRestoreKilled(t *testing.T) {
	kerneltest.Privileged(t)
	const name = "ccr_undo"
	register(t, Options{Name: name, Allow: true})
	ns := newNS(t)
	was, err := Default(ns)
	if err != nil {
		t.Fatal(err)
	}
	// announce is all that a killed process has come to.
	announce := func(now, to string) {
		t.Helper()
		err := ns.Do(func() error {
			j, err := openJournal(true)
			if err != nil {
				return err
			}
			defer j.close()
			k, err := keyOf(keyDefault, nil)
			if err == nil {
				_, err = j.remember(k, now, to)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	announce(was, name)
	if r, err := RestoreDefault(ns); err != nil || len(r.Restored)+len(r.Warnings) > 0 {
		t.Errorf("nothing was done, restored %+v, %v", r, err)
	}
	nothingLeft(t)

	if _, err := SetDefault(ns, name, false); err != nil {
		t.Fatal(err)
	}
	announce(name, "reno")
	if r, err := RestoreDefault(ns); err != nil || len(r.Restored) != 1 || r.Restored[0].To != was {
		t.Errorf("restored %+v, %v", r, err)
	}
	nothingLeft(t)
}

// Entries go with their namespaces, and what was allowed for them, too.
func TestSweepUses(t *testing.T) {
	kerneltest.Privileged(t)
	const name = "ccr_undo"
	register(t, Options{Name: name})
	before := state(t, nil)
	gone, kept := newNS(t), newNS(t)
	if _, err := SetDefault(gone, name, true); err != nil {
		t.Fatal(err)
	}
	if _, err := SetDefault(kept, "reno", false); err != nil {
		t.Fatal(err)
	}
	gone.Close()
	if warnings, err := Recover(); err != nil || len(warnings) > 0 {
		t.Fatal(warnings, err)
	}
	if after := state(t, nil); after != before {
		t.Errorf("it was %q, is %q", before, after)
	}
	r, err := Restore() // a descriptor leads there
	if err != nil || len(r.Restored) != 1 || len(r.Warnings) > 0 {
		t.Errorf("%+v, %v", r, err)
	}
	nothingLeft(t)
}
