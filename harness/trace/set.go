// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Set is what one command measures: one result in a directory, or several in
// directories below it. The directory holds nothing else, so that what is read
// from it is of one kind; its file set.json tells what was to be measured, and
// whether it was:
//
//	running     it is being measured, and its file is locked; without a lock
//	            it was killed
//	complete    every run ended as it should
//	incomplete  it ended early, and what there is was kept
type Set struct {
	dir  string
	made string // the topmost directory that was made for it; "": there were all
	file *os.File
	size int
	head setHead
}

type setHead struct {
	Format  int      `json:"format"`
	State   string   `json:"state"`
	Started string   `json:"started"` // RFC 3339
	PID     int      `json:"pid"`     // of who measures
	Runs    []string `json:"runs"`    // directories of results in this one
}

const setFile = "set.json"

const (
	running    = "running"
	complete   = "complete"
	incomplete = "incomplete"
)

// OccupiedError says that a directory cannot take a set of results.
type OccupiedError struct {
	Dir    string // that was asked for
	Why    string
	Remove string // what to remove to make room; "": another directory is the only way
}

func (e *OccupiedError) Error() string { return fmt.Sprintf("results %q: %s", e.Dir, e.Why) }

func (e *OccupiedError) Is(target error) bool { return target == fs.ErrExist }

// CreateSet makes a directory for the results of runs, which are directories in it
// or "." for itself. It has to be new or empty, and not within another set's.
func CreateSet(dir string, runs []string) (_ *Set, err error) {
	fail := func(err error) (*Set, error) { return nil, fmt.Errorf("results %q: %w", dir, err) }
	abs, err := filepath.Abs(dir)
	if err != nil {
		return fail(err)
	}
	for at := filepath.Dir(abs); at != filepath.Dir(at); at = filepath.Dir(at) {
		for _, name := range []string{setFile, runFile} {
			if _, err := os.Lstat(filepath.Join(at, name)); err == nil {
				return nil, &OccupiedError{dir, fmt.Sprintf("%q above it holds results, and can hold no others", at), ""}
			}
		}
	}
	if err := occupied(dir); err != nil {
		return nil, err
	}
	s := &Set{dir: dir, head: setHead{Format: Format, State: running, Started: time.Now().UTC().Format(time.RFC3339), PID: os.Getpid(), Runs: runs}}
	if s.made, err = makeDir(dir); err != nil {
		return fail(err)
	}
	defer func() {
		if err != nil {
			removeDirs(dir, s.made)
		}
	}()
	root, err := openDir(dir)
	if err != nil {
		return fail(err)
	}
	defer root.Close()
	// Whoever comes first has it.
	s.file, err = root.OpenFile(setFile, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if errors.Is(err, fs.ErrExist) {
		return nil, cmp.Or(occupied(dir), error(&OccupiedError{dir, "another run has just used it", ""}))
	}
	if err != nil {
		return fail(err)
	}
	unix.Flock(int(s.file.Fd()), unix.LOCK_EX|unix.LOCK_NB) // a file system without locks has none
	if err := s.write(running); err != nil {
		s.file.Close()
		os.Remove(filepath.Join(s.dir, setFile))
		return fail(err)
	}
	return s, nil
}

// write writes the file in its place: on a full disk there is room for no other.
func (s *Set) write(state string) error {
	s.head.State = state
	b, err := json.MarshalIndent(s.head, "", "  ")
	if err != nil {
		return err
	}
	if s.size == 0 {
		s.size = len(b) + len(incomplete)
	}
	b = append(b, bytes.Repeat([]byte(" "), s.size-len(b))...)
	_, err = s.file.WriteAt(append(b, '\n'), 0)
	return err
}

// Close says that the set is complete, or that it ended early. One in which nothing
// was measured is removed. It may be called again.
func (s *Set) Close(whole bool) error {
	if s.file == nil {
		return nil
	}
	defer func() { s.file = nil }()
	// Where its run.json could not be written, there are samples all the same.
	if !slices.ContainsFunc(s.head.Runs, func(run string) bool {
		return slices.ContainsFunc([]string{runFile, samplesFile}, func(file string) bool {
			_, err := os.Lstat(filepath.Join(s.dir, run, file))
			return err == nil
		})
	}) {
		err := errors.Join(os.Remove(filepath.Join(s.dir, setFile)), s.file.Close())
		removeDirs(s.dir, s.made)
		return err
	}
	state := incomplete
	if whole {
		state = complete
	}
	if err := errors.Join(s.write(state), s.file.Close()); err != nil {
		return fmt.Errorf("results %q: %w", s.dir, err)
	}
	return nil
}

// occupied says why a directory is not empty; nil: it is, or there is none.
func occupied(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("results %q: %w", dir, err)
	}
	if len(entries) == 0 {
		return nil
	}
	head, alive, err := readSet(dir)
	has := func(name string) bool {
		return slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return e.Name() == name })
	}
	switch {
	case err == nil && alive:
		return &OccupiedError{dir, fmt.Sprintf("a run (pid %d) is writing results there", head.PID), ""}
	case err == nil && head.State == running || err != nil && has(samplesFile) && !has(runFile):
		return &OccupiedError{dir, "it holds what is left of a run that was killed", dir}
	case err == nil && head.State == incomplete:
		return &OccupiedError{dir, "it holds the results of a run that was interrupted", dir}
	case err == nil || has(runFile):
		return &OccupiedError{dir, "it holds results already", dir}
	}
	return &OccupiedError{dir, fmt.Sprintf("it is not empty: there is %q", entries[0].Name()), ""}
}

// setMost is how large a set.json is at most, in bytes.
const setMost = 16 << 20

// readSet reads what a directory says of its set. alive: somebody is measuring it.
func readSet(dir string) (head setHead, alive bool, err error) {
	fd, err := unix.Open(filepath.Join(dir, setFile), unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return head, false, err
	}
	f := os.NewFile(uintptr(fd), setFile)
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, setMost))
	if err != nil {
		return head, false, err
	}
	if err := parseJSON(b, &head); err != nil {
		return head, false, fmt.Errorf("%s: %w", setFile, err)
	}
	if head.Format > Format {
		return head, false, fmt.Errorf("%s: format %d is newer than this ccload's %d", setFile, head.Format, Format)
	}
	if !slices.Contains([]string{running, complete, incomplete}, head.State) {
		return head, false, fmt.Errorf(`%s: field "state": %q is unknown`, setFile, head.State)
	}
	for _, run := range head.Runs {
		if !filepath.IsLocal(run) {
			return head, false, fmt.Errorf(`%s: field "runs": %q is not within the directory`, setFile, run)
		}
	}
	alive = head.State == running && unix.Flock(fd, unix.LOCK_SH|unix.LOCK_NB) == unix.EWOULDBLOCK
	return head, alive, nil
}

// makeDir makes a directory and those above it, and tells the topmost that it made.
func makeDir(dir string) (made string, err error) {
	for at := filepath.Clean(dir); ; at = filepath.Dir(at) {
		if _, err := os.Lstat(at); err == nil || at == filepath.Dir(at) {
			break
		}
		made = at
	}
	return made, os.MkdirAll(dir, 0o755)
}

// removeDirs removes directories that were made, from one up to the topmost, unless
// there is something in them.
func removeDirs(dir, made string) {
	if made == "" {
		return
	}
	for at := filepath.Clean(dir); os.Remove(at) == nil && at != made; at = filepath.Dir(at) {
	}
}

// OpenAll reads the results in directories: each is a set's, or a result's, or has
// such below it. What is left of a run that was killed cannot be read, and is told in a
// warning, as is what makes a set less than whole; where there is nothing else it is
// an error.
func OpenAll(dirs []string) (results []*Result, warnings []string, err error) {
	l := &loader{seen: map[string]bool{}}
	for _, dir := range dirs {
		before, warned := len(l.results), len(l.warnings)
		if err := l.load(dir); err != nil {
			return nil, nil, err
		}
		switch {
		case len(l.results) > before || l.again:
		case len(l.warnings) > warned:
			return nil, nil, errors.New(strings.Join(l.warnings[warned:], "; "))
		default:
			return nil, nil, fmt.Errorf("results %q: there are none", dir)
		}
	}
	return l.results, l.warnings, nil
}

type loader struct {
	results  []*Result
	warnings []string
	seen     map[string]bool // directories of results
	again    bool            // one was asked for that is there already
}

func (l *loader) warn(dir, format string, args ...any) {
	l.warnings = append(l.warnings, fmt.Sprintf("results %q: %s", dir, fmt.Sprintf(format, args...)))
}

func (l *loader) load(dir string) error {
	head, alive, err := readSet(dir)
	if err == nil {
		return l.set(dir, head, alive)
	}
	if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
		return fmt.Errorf("results %q: %w", dir, err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("results %q: %w", dir, errors.Unwrap(err))
	}
	has := func(name string) bool {
		return slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return e.Name() == name })
	}
	switch {
	case has(runFile):
		if err := l.result(dir); err != nil {
			return err
		}
	case has(samplesFile):
		l.warn(dir, "the run was killed before it was whole: without its end %s cannot be read", samplesFile)
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := l.load(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// set reads the results that a set names, in its order.
func (l *loader) set(dir string, head setHead, alive bool) error {
	var absent []string
	for _, run := range head.Runs {
		at := filepath.Join(dir, run)
		if _, err := os.Lstat(filepath.Join(at, runFile)); err != nil {
			absent = append(absent, run)
			continue
		}
		if err := l.result(at); err != nil {
			return err
		}
	}
	which := ""
	if len(head.Runs) > 1 && len(absent) > 0 {
		const told = 3
		which = fmt.Sprintf("; %d of %d results are missing: %s", len(absent), len(head.Runs), strings.Join(absent[:min(told, len(absent))], ", "))
		if len(absent) > told {
			which += ", …"
		}
	}
	switch {
	case alive:
		l.warn(dir, "a run (pid %d) is still writing there%s", head.PID, which)
	case head.State == running:
		l.warn(dir, "the run was killed before it was whole: without its end %s cannot be read%s", samplesFile, which)
	case len(absent) > 0:
		l.warn(dir, "the run was interrupted%s", which)
	}
	return nil
}

func (l *loader) result(dir string) error {
	key := dir
	if abs, err := filepath.Abs(dir); err == nil {
		key = abs
	}
	if l.seen[key] {
		l.again = true
		return nil
	}
	l.seen[key] = true
	r, err := Open(dir)
	if err != nil {
		return err
	}
	l.results = append(l.results, r)
	return nil
}
