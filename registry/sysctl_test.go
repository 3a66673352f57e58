// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"errors"
	"slices"
	"testing"

	"ccload/internal/kerneltest"
	"ccload/internal/netns"
)

func TestSetDefault(t *testing.T) {
	kerneltest.Privileged(t)
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	before, err := Default(ns)
	if err != nil {
		t.Fatal(err)
	}
	outside, err := Default(nil)
	if err != nil {
		t.Fatal(err)
	}

	c, err := SetDefault(ns, "reno", false)
	if err != nil {
		t.Fatal(err)
	}
	if c.Before != before || c.After != "reno" {
		t.Errorf("got %+v, want from %s to reno", c, before)
	}
	if got, err := Default(ns); err != nil || got != "reno" {
		t.Errorf("default is %q, %v", got, err)
	}
	if got, _ := Default(nil); got != outside {
		t.Errorf("the caller's own default went from %s to %s", outside, got)
	}

	var missing *NotFoundError
	if _, err := SetDefault(ns, "renno", false); !errors.As(err, &missing) || missing.Nearest != "reno" {
		t.Errorf("an unknown name gave %v", err)
	}
	for _, name := range []string{"", " ", "reno ", "reno2345678901234567", "../reno"} {
		if _, err := SetDefault(ns, name, false); !errors.As(err, &missing) {
			t.Errorf("%q gave %v", name, err)
		}
	}
	if got, _ := Default(ns); got != "reno" {
		t.Errorf("a failing change left %q", got)
	}
	if _, err := RestoreDefault(ns); err != nil {
		t.Error(err)
	}
}

func TestAllow(t *testing.T) {
	kerneltest.Privileged(t)
	before, err := Allowed()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, n := range before {
			if err := Allow(n); err != nil {
				t.Error(err)
			}
		}
	})
	if !slices.Contains(before, "reno") {
		t.Fatalf("reno is not allowed: %q", before)
	}
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()

	// From inside another namespace, where the list cannot be changed.
	if err := ns.Do(func() error { return Disallow("reno") }); err != nil {
		t.Fatal(err)
	}
	if after, _ := Allowed(); slices.Contains(after, "reno") || len(after) != len(before)-1 {
		t.Errorf("without reno %q became %q", before, after)
	}
	var restricted *RestrictedError
	if _, err := SetDefault(ns, "reno", false); !errors.As(err, &restricted) {
		t.Errorf("a restricted default gave %v", err)
	}
	c, err := SetDefault(ns, "reno", true)
	if err != nil || !c.Allowed {
		t.Errorf("with allow: %+v, %v", c, err)
	}
	if after, _ := Allowed(); !slices.Contains(after, "reno") {
		t.Errorf("not allowed afterwards: %q", after)
	}
	if _, err := RestoreDefault(ns); err != nil {
		t.Error(err)
	}
}
