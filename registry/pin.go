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

	"ccload/structops"

	"golang.org/x/sys/unix"
)

const (
	bpffs  = "/sys/fs/bpf"
	pinDir = bpffs + "/ccload"
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
	dir, err := lockDir()
	if err != nil {
		return fail(err)
	}
	defer dir.Close()
	if err := unix.Statfs(bpffs, &st); err == nil && st.Type == unix.BPF_FS_MAGIC {
		return nil, nil // somebody was faster
	}
	if err := unix.Mount("bpf", bpffs, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return fail(err)
	}
	warnings = append(warnings, "mounted bpffs on "+bpffs)
	if otherFile("/proc/self/ns/mnt", "/proc/1/ns/mnt") {
		warnings = append(warnings, "this mount namespace is not that of process 1: the pin, and with it the registration, ends when the last process in it does")
	}
	return warnings, nil
}

// pin pins a registration in the place that is its name's. What is there already
// can only be stale: the caller has the lock, and the name is free or its own.
func pin(l *structops.Link, name string) (path string, stale bool, err error) {
	path = filepath.Join(pinDir, pinName(name))
	if err := ownDir(pinDir); err != nil {
		return "", false, err
	}
	err = l.Pin(path)
	if errors.Is(err, fs.ErrExist) {
		stale = true
		if err := os.Remove(path); err != nil {
			return "", false, fmt.Errorf("stale pin: %w", err)
		}
		err = l.Pin(path)
	}
	return path, stale, err
}

// otherFile says that two files are known to differ.
func otherFile(a, b string) bool {
	x, err1 := os.Stat(a)
	y, err2 := os.Stat(b)
	return err1 == nil && err2 == nil && !os.SameFile(x, y)
}

// pins finds what is pinned on bpffs, by whomever: the paths by the id of the
// map that they hold, be it directly or through a link. What cannot be opened is
// passed over.
func pins() map[uint32][]string {
	byMap := map[uint32][]string{}
	filepath.WalkDir(bpffs, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil
		}
		if id := pinnedMap(path); id != 0 {
			byMap[id] = append(byMap[id], path)
		}
		return nil
	})
	return byMap
}

// removePins removes pins, and our directory with the last one in it.
func removePins(paths []string) error {
	var errs []error
	for _, p := range paths {
		if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	os.Remove(pinDir)
	return errors.Join(errs...)
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
