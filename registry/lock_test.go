// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"cmp"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"ccload/internal/kerneltest"
	"ccload/structops"
)

// One has the lock, and the next gets it when it is let go.
func TestLock(t *testing.T) {
	kerneltest.Privileged(t)
	unlock, err := lock()
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan error)
	go func() {
		unlock, err := lock()
		if err == nil {
			unlock()
		}
		got <- err
	}()
	select {
	case err := <-got:
		t.Fatalf("two had the lock: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	unlock()
	if err := <-got; err != nil {
		t.Error(err)
	}
}

// Pins of what is not registered, as processes leave them that are killed in
// between, go with the next call; what is something else stays.
func TestSweep(t *testing.T) {
	kerneltest.Privileged(t)
	swept := func(what, path string) {
		t.Helper()
		if _, err := os.Stat(path); err != nil {
			t.Fatal(err)
		}
		foreign := filepath.Join(pinDir, "ccr_foreign")
		if err := os.Mkdir(foreign, 0o700); err != nil {
			t.Fatal(err)
		}
		unlock, err := lock()
		if err != nil {
			t.Fatal(err)
		}
		unlock()
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the pin of what %s: %v", what, err)
		}
		if err := os.Remove(foreign); err != nil {
			t.Error(err)
		}
		tidyUp(pinDir)
	}
	const name = "ccr_swept"
	r := register(t, Options{Name: name})
	e, err := find(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := structops.Unregister(e.info); err != nil {
		t.Fatal(err)
	}
	swept("was unregistered", r.Pin)
	if r.LinkID != 0 {
		return // what a killed process has not pinned goes with it
	}

	obj, err := reno(t).Load("")
	if err != nil {
		t.Fatal(err)
	}
	defer obj.Close()
	killed := errors.New("killed")
	var path string
	_, err = obj.AttachPinned("", func(l *structops.Link) error {
		path, _, err = pin(l, name)
		return cmp.Or(err, killed)
	})
	if !errors.Is(err, killed) {
		t.Fatal(err)
	}
	swept("was to be registered", path)
}
