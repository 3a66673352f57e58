// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"ccload/internal/fault"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// All that is kept is in one place on bpffs. Each of its directories belongs to root
// alone.
const (
	bpffs      = "/sys/fs/bpf"
	rootDir    = bpffs + "/ccload"
	pinDir     = rootDir + "/name"    // the link or map of each name
	useDir     = rootDir + "/use"     // selections
	extendDir  = rootDir + "/extend"  // extensions
	replaceDir = rootDir + "/replace" // replacements under way
	mapDir     = rootDir + "/map"     // maps that objects pin by name
)

// dir is a directory of ours, open and proved. The kernel mounts bpffs with mode 1777
// unless told otherwise, so that anybody may have made what is there: nothing in a
// directory is read, followed or removed before it is known that nobody but root could
// have put it there, and then only through the descriptor that was proved.
type dir struct {
	*os.File
	path string // as users know it
}

// RefusedError says that something on bpffs is not what ccload makes there.
type RefusedError struct {
	Path string
	Why  string
	Do   string // what the user can do
}

func (e *RefusedError) Error() string { return fmt.Sprintf("refusing %s: %s; %s", e.Path, e.Why, e.Do) }

// openDir opens a directory of ours, and proves it and those above it.
func openDir(path string) (*dir, error) { return walkDir(path, (*dir).sub) }

// makeDir is openDir; what is missing is made.
func makeDir(path string) (*dir, error) {
	return walkDir(path, func(d *dir, name string) (*dir, error) {
		var s *dir
		var err, serr error
		for range 100 { // who lets the lock go may remove it in between
			if err = fault.At("make directory " + filepath.Join(d.path, name)); err == nil {
				err = unix.Mkdirat(int(d.Fd()), name, 0o700)
			}
			if err != nil && !errors.Is(err, fs.ErrExist) {
				return nil, d.denied("mkdir", name, err)
			}
			if s, serr = d.sub(name); !errors.Is(serr, fs.ErrNotExist) {
				break
			}
		}
		if err == nil && serr != nil {
			d.remove(name, unix.AT_REMOVEDIR)
		}
		return s, serr
	})
}

func walkDir(path string, step func(d *dir, name string) (*dir, error)) (*dir, error) {
	base := bpffs
	if path == mountLock {
		base = filepath.Dir(mountLock)
	}
	fd, err := unix.Open(base, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: base, Err: err}
	}
	d := &dir{os.NewFile(uintptr(fd), base), base}
	if path == base {
		return d, nil
	}
	for name := range strings.SplitSeq(strings.TrimPrefix(path, base+"/"), "/") {
		next, err := step(d, name)
		d.Close()
		if err != nil {
			return nil, err
		}
		d = next
	}
	return d, nil
}

// sub opens and proves a directory in it.
func (d *dir) sub(name string) (*dir, error) {
	fd, err := unix.Openat(int(d.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		var st unix.Stat_t
		if unix.Fstatat(int(d.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil && st.Mode&unix.S_IFMT == unix.S_IFLNK {
			return nil, d.refuse(name, "it is a symbolic link")
		}
		return nil, d.refuse(name, "it is not a directory")
	}
	if err != nil {
		return nil, d.denied("open", name, err)
	}
	s := &dir{os.NewFile(uintptr(fd), filepath.Join(d.path, name)), filepath.Join(d.path, name)}
	if err := s.prove(d, name); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func (d *dir) prove(parent *dir, name string) error {
	var in unix.Statfs_t
	var st unix.Stat_t
	if err := errors.Join(unix.Fstatfs(int(d.Fd()), &in), unix.Fstat(int(d.Fd()), &st)); err != nil {
		return parent.wrap("stat", name, err)
	}
	switch mode := st.Mode & 0o777; {
	case in.Type != unix.BPF_FS_MAGIC && d.path != mountLock:
		return parent.refuse(name, "it is not on bpffs")
	case st.Uid != 0:
		return parent.refuse(name, fmt.Sprintf("it is owned by uid %d, not by root", st.Uid))
	case mode != 0o700 && mode&0o022 == 0: // what is in it is root's
		path := filepath.Join(parent.path, name)
		return &RefusedError{path, fmt.Sprintf("its mode is %04o, not 0700", mode), "chmod 700 " + path}
	case mode != 0o700:
		return parent.refuse(name, fmt.Sprintf("its mode is %04o, not 0700", mode))
	}
	return nil
}

// refuse says why something in it is not ours.
func (d *dir) refuse(name, why string) error {
	path := filepath.Join(d.path, name)
	e := &RefusedError{path, why, "if nobody else needs it, remove it: rm -r " + path}
	var st unix.Stat_t
	if d.path == bpffs && unix.Stat(bpffs, &st) == nil && st.Mode&0o022 != 0 {
		e.Do += fmt.Sprintf(" (anybody may make it: the mode of %s is %04o)", bpffs, st.Mode&0o7777)
	}
	return e
}

// denied is wrap, or says which capability is missing.
func (d *dir) denied(op, name string, err error) error {
	if missing := need("/", "CAP_SYS_ADMIN"); errors.Is(err, fs.ErrPermission) && missing != nil {
		return missing
	}
	return d.wrap(op, name, err)
}

func (d *dir) wrap(op, name string, err error) error {
	return &fs.PathError{Op: op, Path: filepath.Join(d.path, name), Err: err}
}

// at is a path to something in it that leads through the descriptor.
func (d *dir) at(name string) string { return fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), name) }

// do hands such a path to fn.
func (d *dir) do(name string, fn func(path string) error) error { return d.shown(fn(d.at(name))) }

// shown is an error whose text has paths as users know them.
func (d *dir) shown(err error) error {
	if err == nil {
		return nil
	}
	return &shownError{err, d.at(""), d.path + "/"}
}

type shownError struct {
	error
	path, shown string
}

func (e *shownError) Error() string { return strings.ReplaceAll(e.error.Error(), e.path, e.shown) }

func (e *shownError) Unwrap() error { return e.error }

// pinned says whether a name in it is a pin that root made: fs.ErrNotExist if there is
// nothing, a *RefusedError if it is something else.
func (d *dir) pinned(name string) error {
	var st unix.Stat_t
	if err := unix.Fstatat(int(d.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return d.wrap("stat", name, err)
	}
	switch kind := st.Mode & unix.S_IFMT; {
	case kind == unix.S_IFLNK:
		return d.refuse(name, "it is a symbolic link")
	case kind == unix.S_IFDIR:
		return d.refuse(name, "it is a directory")
	case kind != unix.S_IFREG:
		return d.refuse(name, "it is not a pin")
	case st.Uid != 0:
		return d.refuse(name, fmt.Sprintf("it is owned by uid %d, not by root", st.Uid))
	}
	return nil
}

// names are those of the directories and of all else in it, in order.
func (d *dir) names() (dirs, files []string, err error) {
	if _, err := d.Seek(0, 0); err != nil {
		return nil, nil, err
	}
	entries, err := d.ReadDir(-1)
	for _, e := range entries {
		if e.IsDir() {
			dirs = append(dirs, e.Name())
		} else {
			files = append(files, e.Name())
		}
	}
	slices.Sort(dirs)
	slices.Sort(files)
	return dirs, files, err
}

// pins are the names of the pins in it. What else is there is refused.
func (d *dir) pins() (names []string, refused []error) {
	dirs, files, err := d.names()
	if err != nil {
		return nil, []error{err}
	}
	for _, name := range append(dirs, files...) {
		if err := d.pinned(name); err == nil {
			names = append(names, name)
		} else if !errors.Is(err, fs.ErrNotExist) {
			refused = append(refused, err)
		}
	}
	return names, refused
}

// pinsIn is pins of a directory that need not be there.
func pinsIn(path string) (names []string, refused []error) {
	d, err := openDir(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, []error{err}
	}
	defer d.Close()
	return d.pins()
}

// dirsIn are the names of the directories in a directory of ours.
func dirsIn(path string) []string {
	d, err := openDir(path)
	if err != nil {
		return nil
	}
	defer d.Close()
	dirs, _, _ := d.names()
	return dirs
}

// withPin hands fn a path that leads to a pin of ours.
func withPin(path string, fn func(path string) error) error {
	d, err := openDir(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.pinned(filepath.Base(path)); err != nil {
		return err
	}
	return d.do(filepath.Base(path), fn)
}

// isPinned says whether a pin of ours is there, or something that is in its way.
func isPinned(path string) bool {
	return !errors.Is(withPin(path, func(string) error { return nil }), fs.ErrNotExist)
}

// newPin hands fn a path at which it can pin; directories are made.
func newPin(path string, fn func(path string) error) error {
	d, err := makeDir(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer d.Close()
	if err = fault.At("pin " + path); err == nil {
		err = d.do(filepath.Base(path), fn)
	}
	if err != nil {
		tidyUp(filepath.Dir(path))
		return err
	}
	return nil
}

// rename moves a pin of ours; directories are made.
func rename(from, to string) error {
	old, err := openDir(filepath.Dir(from))
	if err != nil {
		return err
	}
	defer old.Close()
	if err := old.pinned(filepath.Base(from)); err != nil {
		return err
	}
	d, err := makeDir(filepath.Dir(to))
	if err != nil {
		return err
	}
	defer d.Close()
	if err = fault.At("rename " + from); err == nil {
		err = unix.Renameat2(int(old.Fd()), filepath.Base(from), int(d.Fd()), filepath.Base(to), unix.RENAME_NOREPLACE)
	}
	if err != nil {
		tidyUp(filepath.Dir(to))
		return old.wrap("rename", filepath.Base(from), err)
	}
	return nil
}

// unpin removes a pin of ours, and the directories that are empty then. One that is not
// there is no error.
func unpin(path string) error {
	defer tidyUp(filepath.Dir(path))
	d, err := openDir(filepath.Dir(path))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.pinned(filepath.Base(path)); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	return d.remove(filepath.Base(path), 0)
}

// remove removes a pin in it, or with AT_REMOVEDIR an empty directory.
func (d *dir) remove(name string, flags int) error {
	err := fault.At("remove " + filepath.Join(d.path, name))
	if err == nil {
		err = unix.Unlinkat(int(d.Fd()), name, flags)
	}
	if err != nil {
		return d.wrap("remove", name, err)
	}
	return nil
}

// tidyUp removes a directory of ours and those above it, as long as they are empty, but
// for the one that is locked.
func tidyUp(path string) {
	for ; path != rootDir && path != bpffs; path = filepath.Dir(path) {
		d, err := openDir(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return
		}
		d.Close()
		parent, err := openDir(filepath.Dir(path))
		if err != nil {
			return
		}
		err = parent.remove(filepath.Base(path), unix.AT_REMOVEDIR)
		parent.Close()
		if err != nil {
			return
		}
	}
}

// openMap opens a map that is pinned in a directory of ours.
func openMap(path string) (m *ebpf.Map, err error) {
	err = withPin(path, func(path string) (err error) { m, err = ebpf.LoadPinnedMap(path, nil); return err })
	return m, err
}

// openLink opens a link that is pinned in a directory of ours.
func openLink(path string) (l link.Link, err error) {
	err = withPin(path, func(path string) (err error) { l, err = link.LoadPinnedLink(path, nil); return err })
	return l, err
}
