// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// Of many states those stay that were used last, and nothing of a process that was killed.
func TestTidy(t *testing.T) {
	dir := t.TempDir()
	const more = 3
	for i := range mostSnapshots + more {
		path := filepath.Join(dir, fmt.Sprint(i))
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		used := time.Now().Add(-time.Duration(i) * time.Minute)
		if err := os.Chtimes(path, used, used); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{".lock", ".new-1"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	tidy(dir)
	for i := range mostSnapshots + more {
		if _, err := os.Stat(filepath.Join(dir, fmt.Sprint(i))); (err == nil) != (i < mostSnapshots) {
			t.Errorf("the state used %d minutes ago: %v", i, err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, ".lock")); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(dir, ".new-1")); err == nil {
		t.Error("half a state is still there")
	}
}
