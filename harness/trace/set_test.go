// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// kill ends a set as a kill of its process does.
func (s *Set) kill() { s.file.Close() }

// occupiedBy is what a further set in the directory meets.
func occupiedBy(t *testing.T, dir, why string, remove bool) {
	t.Helper()
	_, err := CreateSet(dir, []string{"."})
	e, ok := errors.AsType[*OccupiedError](err)
	if !ok || !errors.Is(err, fs.ErrExist) || !strings.Contains(e.Why, why) || (e.Remove == dir) != remove {
		t.Errorf("another set in %s: %+v, want %s", dir, err, why)
	}
}

// load reads sets and results, which are told by the names of their directories.
func load(dirs ...string) (got []string, warnings string, err error) {
	results, w, err := OpenAll(dirs)
	for _, r := range results {
		got = append(got, filepath.Base(r.Dir))
	}
	return got, strings.Join(w, "\n"), err
}

// A directory holds one set, and tells in what state it is.
func TestSet(t *testing.T) {
	top := t.TempDir()
	dir := filepath.Join(top, "a", "set")
	s, err := CreateSet(dir, []string{"y", "x"})
	if err != nil {
		t.Fatal(err)
	}
	occupiedBy(t, dir, fmt.Sprintf("a run (pid %d) is writing results there", os.Getpid()), false)
	if _, _, err := load(dir); err == nil || !strings.Contains(err.Error(), "is still writing there; 2 of 2 results are missing: y, x") {
		t.Errorf("at the start: %v", err)
	}
	write(t, filepath.Join(dir, "x"), 10)
	if got, w, err := load(dir); err != nil || !slices.Equal(got, []string{"x"}) || !strings.Contains(w, "is still writing there; 1 of 2 results are missing: y") {
		t.Errorf("meanwhile: %v, %s, %v", got, w, err)
	}
	write(t, filepath.Join(dir, "y"), 10)
	if err := errors.Join(s.Close(true), s.Close(true)); err != nil {
		t.Fatal(err)
	}
	occupiedBy(t, dir, "it holds results already", true)
	occupiedBy(t, filepath.Join(dir, "new"), "above it holds results", false)
	occupiedBy(t, filepath.Join(dir, "x", "new"), "above it holds results", false)
	// In the order in which they were measured, however named, and each once.
	if got, w, err := load(dir, filepath.Join(dir, "x"), dir); err != nil || w != "" || !slices.Equal(got, []string{"y", "x"}) {
		t.Errorf("complete: %v, %s, %v", got, w, err)
	}
	// What another put there is not of it.
	write(t, filepath.Join(dir, "z"), 10)
	if got, _, err := load(top); err != nil || !slices.Equal(got, []string{"y", "x"}) {
		t.Errorf("from above: %v, %v", got, err)
	}
}

func TestSetInterrupted(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "set")
	s, err := CreateSet(dir, []string{"x", "y", "z"})
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "x"), 10)
	if err := s.Close(false); err != nil {
		t.Fatal(err)
	}
	occupiedBy(t, dir, "it holds the results of a run that was interrupted", true)
	if got, w, err := load(dir); err != nil || len(got) != 1 || !strings.Contains(w, "the run was interrupted; 2 of 3 results are missing: y, z") {
		t.Errorf("%v, %s, %v", got, w, err)
	}
}

func TestSetKilled(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "set")
	s, err := CreateSet(dir, []string{"x", "y"})
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "x"), 10)
	if _, err := Create(filepath.Join(dir, "y")); err != nil {
		t.Fatal(err)
	}
	s.kill()
	occupiedBy(t, dir, "it holds what is left of a run that was killed", true)
	if got, w, err := load(dir); err != nil || len(got) != 1 || !strings.Contains(w, "was killed before it was whole") || !strings.Contains(w, "missing: y") {
		t.Errorf("%v, %s, %v", got, w, err)
	}
	// One of one result has nothing that can be read, whether a set's or not.
	for _, inSet := range []bool{true, false} {
		dir := filepath.Join(t.TempDir(), "set")
		if inSet {
			if s, err = CreateSet(dir, []string{"."}); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := Create(dir); err != nil {
			t.Fatal(err)
		}
		if inSet {
			s.kill()
		}
		occupiedBy(t, dir, "it holds what is left of a run that was killed", true)
		if _, _, err := load(dir); err == nil || !strings.Contains(err.Error(), "was killed before it was whole: without its end samples.parquet cannot be read") {
			t.Errorf("%v", err)
		}
	}
}

// What measured nothing leaves nothing, and takes nothing along.
func TestSetOfNothing(t *testing.T) {
	top := t.TempDir()
	dir := filepath.Join(top, "a", "b")
	s, err := CreateSet(dir, []string{"x/1"})
	if err != nil {
		t.Fatal(err)
	}
	w, err := Create(filepath.Join(dir, "x", "1"))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.Finish(&Run{Format: Format, Incomplete: true}), s.Close(false)); err != nil {
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(top); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	// An empty directory of the user's stays.
	if s, err = CreateSet(top, []string{"."}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(false); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(top); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	// A row is something.
	if w, err = Create(filepath.Join(top, "r")); err != nil {
		t.Fatal(err)
	}
	w.Link(LinkSample{})
	if err := w.Finish(&Run{Format: Format, Incomplete: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(top, "r", runFile)); err != nil {
		t.Error(err)
	}
}

func TestSetRefuses(t *testing.T) {
	top := t.TempDir()
	os.WriteFile(filepath.Join(top, "notes.txt"), nil, 0o600)
	occupiedBy(t, top, `it is not empty: there is "notes.txt"`, false)

	// A link in the place of the file is not followed.
	target := filepath.Join(t.TempDir(), "target")
	dir := t.TempDir()
	os.Symlink(target, filepath.Join(dir, setFile))
	occupiedBy(t, dir, "it is not empty", false)
	if _, err := os.Lstat(target); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the link's target was made: %v", err)
	}

	if _, _, err := load(t.TempDir()); err == nil || !strings.Contains(err.Error(), "there are none") {
		t.Errorf("nothing: %v", err)
	}
	for content, want := range map[string]string{
		`{"format":1,"state":"complete","runs":["../x"]}`: `set.json: field "runs": "../x" is not within the directory`,
		`{"format":1,"state":"perhaps"}`:                  `set.json: field "state": "perhaps" is unknown`,
		`{"format":9,"state":"complete"}`:                 "format 9 is newer",
		`{"format":1,"state":7}`:                          `set.json: field "state": number is not of type string`,
		`{`:                                               "set.json",
	} {
		dir := t.TempDir()
		os.WriteFile(filepath.Join(dir, setFile), []byte(content), 0o600)
		if _, _, err := load(dir); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", content, err)
		}
	}
}
