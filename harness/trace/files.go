// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"

	"github.com/parquet-go/parquet-go"
	"github.com/parquet-go/parquet-go/compress/zstd"
	"golang.org/x/sys/unix"

	"ccload/internal/atomicfile"
)

// The files of a result directory.
const (
	runFile     = "run.json"
	samplesFile = "samples.parquet"
	linkFile    = "link.parquet"
)

// Writer writes a result directory. Sample and Link may be called from
// different goroutines.
type Writer struct {
	dir     string
	root    *os.Root
	samples *rows[Sample]
	links   *rows[LinkSample]
	reserve *reserve
	made    string // the topmost directory that was made; "": there were all
	closed  bool
}

// Create makes a result directory, and those above it. One that holds a result
// already is refused, as is a symbolic link: who else may write to the directory above
// could have put it there. No file that is there already is written to.
func Create(dir string) (_ *Writer, err error) {
	fail := func(err error) (*Writer, error) { return nil, fmt.Errorf("results %q: %w", dir, err) }
	made, err := makeDir(dir)
	if err != nil {
		return fail(err)
	}
	root, err := openDir(dir)
	if err != nil {
		return fail(err)
	}
	w := &Writer{dir: dir, root: root, reserve: &reserve{}, made: made}
	defer func() {
		if err == nil {
			return
		}
		if w.samples != nil {
			root.Remove(samplesFile)
		}
		w.root.Close()
		w.reserve.release()
		removeDirs(dir, made)
	}()
	for _, name := range []string{runFile, samplesFile, linkFile} {
		if _, err := root.Lstat(name); !errors.Is(err, fs.ErrNotExist) {
			return fail(fmt.Errorf("it holds a result already: %w", fs.ErrExist))
		}
	}
	if err := w.reserve.take(root); err != nil {
		return fail(err)
	}
	if w.samples, err = newRows(w, samplesFile, func(s *Sample) float64 { return s.Time }); err != nil {
		return fail(err)
	}
	if w.links, err = newRows(w, linkFile, func(s *LinkSample) float64 { return s.Time }); err != nil {
		w.samples.close()
		return fail(err)
	}
	return w, nil
}

// openDir opens a directory that is no symbolic link.
func openDir(dir string) (*os.Root, error) {
	st, err := os.Lstat(dir)
	if err != nil {
		return nil, err
	}
	if st.Mode()&fs.ModeSymlink != 0 {
		return nil, errors.New("refusing a symbolic link: name the directory itself")
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	if opened, err := root.Stat("."); err != nil || !os.SameFile(st, opened) {
		root.Close()
		return nil, errors.Join(err, errors.New("it was replaced meanwhile"))
	}
	return root, nil
}

// File makes one more file in the directory.
func (w *Writer) File(name string) (*os.File, error) {
	f, err := w.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return nil, fmt.Errorf("results %q: %w", w.dir, err)
	}
	return f, nil
}

// Sample adds a sample. On a full disk the error is ENOSPC, and what was added
// before can still be finished. Samples may come out of order by up to some tens of
// thousands of rows; the file has them in order of time.
func (w *Writer) Sample(s Sample) error { return w.samples.add(s) }

// Link adds a state of the link.
func (w *Writer) Link(s LinkSample) error { return w.links.add(s) }

// Empty says that nothing was added.
func (w *Writer) Empty() bool { return w.samples.empty() && w.links.empty() }

// Finish writes what is left and then run.json, which makes the result whole. Of a run
// that ended before anything was seen nothing stays, the directory neither.
func (w *Writer) Finish(r *Run) error {
	if r.Incomplete && w.Empty() {
		return w.discard()
	}
	err := w.end()
	if err == nil {
		err = writeRun(w.root, r)
	}
	if cerr := w.root.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("results %q: %w", w.dir, err)
	}
	return nil
}

// Rewrite puts another run.json in the place of a result directory's: what was
// found out about the run after its end belongs there too.
func Rewrite(dir string, r *Run) error {
	root, err := openDir(dir)
	if err == nil {
		defer root.Close()
		err = writeRun(root, r)
	}
	if err != nil {
		return fmt.Errorf("results %q: %w", dir, err)
	}
	return nil
}

func writeRun(root *os.Root, r *Run) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return atomicfile.Write(root, runFile, append(b, '\n'))
}

// discard removes what Create made.
func (w *Writer) discard() error {
	err := w.end()
	for _, name := range []string{samplesFile, linkFile} {
		err = errors.Join(err, w.root.Remove(name))
	}
	err = errors.Join(err, w.root.Close())
	removeDirs(w.dir, w.made)
	return err
}

// Close writes what is left. Without Finish the directory has no run.json, and
// Open says that the run did not end. It may be called again.
func (w *Writer) Close() error {
	defer w.root.Close()
	if err := w.end(); err != nil {
		return fmt.Errorf("results %q: %w", w.dir, err)
	}
	return nil
}

func (w *Writer) end() error {
	if w.closed {
		return nil
	}
	w.closed = true
	defer w.reserve.release() // what is left of it is run.json's
	return errors.Join(w.samples.close(), w.links.close())
}

// reserve is room on the disk for the end of a result, for a file without its end
// cannot be read: on a full disk what there is is kept in it. It has no name, so
// that it is gone with the process.
type reserve struct {
	mu   sync.Mutex
	file *os.File // nil: released
	full bool     // the disk
}

// reserved is enough for all the rows that wait to be written, and for run.json.
const reserved = 16 << 20

func (r *reserve) take(root *os.Root) (err error) {
	if r.file, err = root.OpenFile(".", unix.O_TMPFILE|os.O_WRONLY, 0o600); err != nil {
		r.file = nil
		return nil // a file system that cannot do that goes without
	}
	if err := unix.Fallocate(int(r.file.Fd()), 0, 0, reserved); err == unix.ENOSPC {
		return fmt.Errorf("not even %d MiB for the end of the result: %w", reserved>>20, err)
	}
	return nil
}

func (r *reserve) release() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.file != nil {
		r.file.Close()
		r.file = nil
	}
}

// spend makes the room free because the disk is full.
func (r *reserve) spend() {
	r.release()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.full = true
}

func (r *reserve) spent() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.full
}

// sparing writes to a file, at the end in the reserve's room.
type sparing struct {
	*os.File
	reserve *reserve
}

func (s sparing) Write(p []byte) (int, error) {
	n, err := s.File.Write(p)
	if errors.Is(err, unix.ENOSPC) && !s.reserve.spent() {
		s.reserve.spend()
		var m int
		m, err = s.File.Write(p[n:])
		n += m
	}
	return n, err
}

// rows writes one Parquet file, in order of time.
type rows[T any] struct {
	mu      sync.Mutex
	file    *os.File
	w       *parquet.GenericWriter[T]
	buf     []T
	time    func(*T) float64
	reserve *reserve
	some    bool // rows were added
}

const rowsBuffered = 1 << 16

func newRows[T any](w *Writer, name string, time func(*T) float64) (*rows[T], error) {
	f, err := w.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return nil, err
	}
	return &rows[T]{
		file: f, time: time, buf: make([]T, 0, rowsBuffered), reserve: w.reserve,
		w: parquet.NewGenericWriter[T](sparing{f, w.reserve}, parquet.Compression(&zstd.Codec{}),
			parquet.MaxRowsPerRowGroup(rowsBuffered), parquet.CreatedBy("ccload", "", "")),
	}, nil
}

func (r *rows[T]) add(row T) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.reserve.spent() {
		return unix.ENOSPC
	}
	r.buf, r.some = append(r.buf, row), true
	if len(r.buf) < rowsBuffered {
		return nil
	}
	return r.flush(rowsBuffered / 2)
}

func (r *rows[T]) empty() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return !r.some
}

// flush writes the n earliest rows.
func (r *rows[T]) flush(n int) error {
	slices.SortStableFunc(r.buf, func(a, b T) int {
		switch ta, tb := r.time(&a), r.time(&b); {
		case ta < tb:
			return -1
		case ta > tb:
			return 1
		}
		return 0
	})
	if _, err := r.w.Write(r.buf[:n]); err != nil {
		return err
	}
	r.buf = append(r.buf[:0], r.buf[n:]...)
	return nil
}

func (r *rows[T]) close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return errors.Join(r.flush(len(r.buf)), r.w.Close(), r.file.Close())
}
