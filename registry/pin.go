// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"ccload/internal/fault"
	"ccload/structops"

	"golang.org/x/sys/unix"
)

// pinName is the file that pins a name. bpffs allows no dot in file names, and
// no congestion control has a dash in its name.
func pinName(name string) string { return strings.ReplaceAll(name, ".", "-") }

// mountBPFFS mounts bpffs where it is not.
func mountBPFFS() (warnings []string, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(bpffs, &st); err != nil {
		return nil, fmt.Errorf("bpffs: %s: %w", bpffs, err)
	}
	if st.Type == unix.BPF_FS_MAGIC {
		return nil, nil
	}
	fail := func(err error) ([]string, error) {
		return nil, fmt.Errorf("mount bpffs on %s: %w", bpffs, err)
	}
	if err := need("/", "CAP_SYS_ADMIN"); err != nil {
		return fail(err)
	}
	unlock, err := lockDir(mountLock)
	if err != nil {
		return fail(err)
	}
	defer unlock()
	if err := unix.Statfs(bpffs, &st); err == nil && st.Type == unix.BPF_FS_MAGIC {
		return nil, nil // somebody was faster
	}
	if err := fault.At("mount bpffs"); err != nil {
		return fail(err)
	}
	if err := unix.Mount("bpf", bpffs, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return fail(err)
	}
	return []string{"mounted bpffs on " + bpffs}, nil
}

// unpinName is the name that a file pins.
func unpinName(file string) string { return strings.ReplaceAll(file, "-", ".") }

// pinPath is where a name is pinned.
func pinPath(name string) string { return filepath.Join(pinDir, pinName(name)) }

// pin pins a registration in the place that is its name's. What is there already
// can only be stale: the caller has the lock, and the name is free or its own.
func pin(l *structops.Link, name string) (path string, stale bool, err error) {
	path = pinPath(name)
	err = newPin(path, l.Pin)
	if errors.Is(err, fs.ErrExist) {
		stale = true
		if err := unpinStale(path); err != nil {
			return "", false, err
		}
		err = newPin(path, l.Pin)
	}
	return path, stale, err
}

// otherFile says that two files are known to differ.
func otherFile(a, b string) bool {
	x, err1 := os.Stat(a)
	y, err2 := os.Stat(b)
	return err1 == nil && err2 == nil && !os.SameFile(x, y)
}

// unpinStale removes the pin of a name, if what it holds is registered no more.
func unpinStale(path string) error {
	var stale bool
	err := withPin(path, func(path string) error { stale = structops.Stale(path); return nil })
	if err != nil {
		return err
	}
	if !stale {
		return &RefusedError{path, "it holds something else", "if nobody else needs it, remove it: rm " + path}
	}
	return unpin(path)
}

// sweepPins removes the pins of names that are not registered (any more): of a map
// that was pinned to be registered next, and of a registration that was ended.
// What is no congestion control is not ours to remove.
func sweepPins() (problems []error) {
	names, _ := pinsIn(pinDir)
	for _, name := range names {
		var refused *RefusedError
		if err := unpinStale(filepath.Join(pinDir, name)); err != nil && !errors.As(err, &refused) {
			problems = append(problems, err)
		}
	}
	tidyUp(pinDir)
	return problems
}

// pinDepth is how deep below bpffs pins are looked for.
const pinDepth = 8

// walkPins finds what is pinned on bpffs, by whomever, and hands it to fn with the
// directory that it is in: it follows no symbolic link, but nothing else is known of
// who made it.
func walkPins(fn func(d *dir, name string)) {
	fd, err := unix.Open(bpffs, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	root := &dir{os.NewFile(uintptr(fd), bpffs), bpffs}
	defer root.Close()
	root.walk(0, fn)
}

func (d *dir) walk(depth int, fn func(d *dir, name string)) {
	dirs, files, _ := d.names()
	for _, name := range files {
		if d.inode(name) != 0 {
			fn(d, name)
		}
	}
	if depth == pinDepth {
		return
	}
	for _, name := range dirs {
		fd, err := unix.Openat(int(d.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			continue
		}
		path := filepath.Join(d.path, name)
		sub := &dir{os.NewFile(uintptr(fd), path), path}
		sub.walk(depth+1, fn)
		sub.Close()
	}
}

// inode is that of a file in it; 0 if it is none.
func (d *dir) inode(name string) uint64 {
	var st unix.Stat_t
	if unix.Fstatat(int(d.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return 0
	}
	return st.Ino
}

// pins finds what is pinned on bpffs: the paths by the id of the map that they hold, be
// it directly or through a link. They are for people: what is at a path may be
// something else by now. What cannot be opened is passed over.
func pins() map[uint32][]string {
	byMap := map[uint32][]string{}
	walkPins(func(d *dir, name string) {
		if id := pinnedMap(d.at(name)); id != 0 {
			byMap[id] = append(byMap[id], filepath.Join(d.path, name))
		}
	})
	return byMap
}

// pinSet are the pins of a map, found while they held it.
type pinSet []foundPin

type foundPin struct {
	dir   *dir
	name  string
	inode uint64
}

// pinsOf finds the pins of a map. Close is to be called.
func pinsOf(mapID uint32) (set pinSet) {
	walkPins(func(d *dir, name string) {
		inode := d.inode(name)
		if pinnedMap(d.at(name)) != mapID {
			return
		}
		fd, err := unix.FcntlInt(d.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return
		}
		set = append(set, foundPin{&dir{os.NewFile(uintptr(fd), d.path), d.path}, name, inode})
	})
	return set
}

func (s pinSet) paths() (paths []string) {
	for _, p := range s {
		paths = append(paths, filepath.Join(p.dir.path, p.name))
	}
	return paths
}

// remove removes them. What is a different file by now stays, and so does the one at
// the path keep.
func (s pinSet) remove(keep string) error {
	var errs []error
	for _, p := range s {
		if p.dir.inode(p.name) != p.inode || filepath.Join(p.dir.path, p.name) == keep {
			continue
		}
		if err := p.dir.remove(p.name, 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	tidyUp(pinDir)
	return errors.Join(errs...)
}

func (s pinSet) Close() error {
	for _, p := range s {
		p.dir.Close()
	}
	return nil
}

// ownMap is pinnedMap of a pin of ours.
func ownMap(path string) (id uint32) {
	withPin(path, func(path string) error { id = pinnedMap(path); return nil })
	return id
}

// pinnedMap is the id of the map that a pin holds; 0 if it holds none.
func pinnedMap(path string) uint32 {
	name, err := unix.BytePtrFromString(path)
	if err != nil {
		return 0
	}
	attr := struct {
		path  uint64
		fd    uint32
		flags uint32
	}{path: uint64(uintptr(unsafe.Pointer(name)))}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_OBJ_GET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	runtime.KeepAlive(name)
	if errno != 0 {
		return 0
	}
	defer unix.Close(int(fd))
	f, err := os.Open("/proc/self/fdinfo/" + strconv.Itoa(int(fd)))
	if err != nil {
		return 0
	}
	defer f.Close()
	return parseMapID(f)
}

// parseMapID reads the map_id of a /proc/PID/fdinfo file, which maps and
// struct_ops links have (proc(5)); 0 if there is none.
func parseMapID(r io.Reader) uint32 {
	for s := bufio.NewScanner(r); s.Scan(); {
		if v, ok := strings.CutPrefix(s.Text(), "map_id:"); ok {
			id, _ := strconv.ParseUint(strings.TrimSpace(v), 10, 32)
			return uint32(id)
		}
	}
	return 0
}
