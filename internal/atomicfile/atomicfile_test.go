// SPDX-License-Identifier: Apache-2.0

package atomicfile

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"ccload/internal/fault"
)

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// What a symbolic link points to stays as it is; the link is replaced.
func TestWrite(t *testing.T) {
	dir, elsewhere := t.TempDir(), filepath.Join(t.TempDir(), "elsewhere")
	if err := os.WriteFile(elsewhere, []byte("theirs"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(elsewhere, filepath.Join(dir, "out")); err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	for _, content := range []string{"ours", "ours, again"} {
		if err := Write(root, "out", []byte(content)); err != nil {
			t.Fatal(err)
		}
		if got := read(t, filepath.Join(dir, "out")); got != content {
			t.Errorf("the file holds %q, want %q", got, content)
		}
	}
	if got := read(t, elsewhere); got != "theirs" {
		t.Errorf("what the link pointed to holds %q", got)
	}

	refused := errors.New("refused")
	defer fault.Set(func(step string) error {
		if step == "rename to out" {
			return refused
		}
		return nil
	})()
	if err := Write(root, "out", []byte("half")); err != refused {
		t.Errorf("error %v, want %v", err, refused)
	}
	if got := read(t, filepath.Join(dir, "out")); got != "ours, again" {
		t.Errorf("after a failure the file holds %q", got)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
