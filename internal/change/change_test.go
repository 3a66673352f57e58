// SPDX-License-Identifier: Apache-2.0

package change

import (
	"errors"
	"testing"
)

func begin(t *testing.T) (end func()) {
	t.Helper()
	end, err := Begin()
	if err != nil {
		t.Fatal(err)
	}
	return end
}

func TestStop(t *testing.T) {
	why := errors.New("a signal")
	again := func() { stopped = nil }
	t.Cleanup(again)

	if !Stop(why) {
		t.Error("nothing is under way, but the process may not end")
	}
	if _, err := Begin(); err != why {
		t.Errorf("Begin after Stop: %v, want %v", err, why)
	}

	again()
	outer := begin(t)
	if Stop(why) {
		t.Error("the process may end in the middle of a change")
	}
	inner := begin(t) // a part of it
	inner()
	inner() // ends once only
	outer()
	if _, err := Begin(); err != why {
		t.Errorf("Begin after the change: %v, want %v", err, why)
	}

	again()
	group := Together()
	if !Stop(why) {
		t.Error("nothing has begun yet, but the process may not end")
	}
	if _, err := Begin(); err != why {
		t.Errorf("Begin after Stop: %v, want %v", err, why)
	}
	again()
	begin(t)()
	if Stop(why) {
		t.Error("the process may end between two changes that are one")
	}
	begin(t)()
	group()
	if !Stop(why) {
		t.Error("all is over, but the process may not end")
	}
}
