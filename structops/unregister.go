// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"ccload/internal/tcpca"

	"golang.org/x/sys/unix"
)

// HeldError says that a congestion control cannot be unregistered, because this
// kernel cannot detach a link (before 6.11) and others hold it.
type HeldError struct {
	LinkID    uint32
	Processes []string // "name (pid)"
	Pins      []string // paths
}

func (e *HeldError) Error() string {
	holders := slices.Concat(e.Processes, e.Pins)
	if len(holders) == 0 {
		holders = []string{"something that cannot be seen from here"}
	}
	return fmt.Sprintf("link %d is held by %s, and this kernel cannot detach it (before 6.11)", e.LinkID, strings.Join(holders, ", "))
}

// lingers is how long the kernel may take until a name is gone: it waits for an
// RCU grace period.
const lingers = 5 * time.Second

// Unregister takes a live congestion control out of the kernel's table, whoever
// put it there, and waits until its name is gone. Pins of a link that was
// detached stay, and hold nothing more.
//
// Before Linux 6.11 the link cannot be detached: if pins are all that holds it
// they are removed, else the error is a *HeldError. ErrNotFound says that it is
// not registered.
func Unregister(info *Info) error {
	if err := unregister(info); err != nil {
		return fmt.Errorf("congestion control %q: unregister: %w", info.Name, permission("", err, looking...))
	}
	return nil
}

func unregister(info *Info) error {
	// What the caller knows may be old.
	now, err := Inspect(info.MapID)
	if err != nil {
		return err
	}
	if !now.Registered() {
		return fmt.Errorf("BPF map %d: %w: it is not registered (%v)", now.MapID, ErrNotFound, now.State)
	}
	if now.LinkID == 0 {
		fd, err := openID(unix.BPF_MAP_GET_FD_BY_ID, now.MapID)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := deleteElement(fd); err != nil {
			return err
		}
		return waitGone(now.Name)
	}
	fd, err := openID(unix.BPF_LINK_GET_FD_BY_ID, now.LinkID)
	if err != nil {
		return err
	}
	err = detachLink(fd)
	unix.Close(fd) // before anything looks for who else holds it
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
		err = unpin(now.LinkID)
	}
	if err != nil {
		return err
	}
	return waitGone(now.Name)
}

func waitGone(name string) error {
	for deadline := time.Now().Add(lingers); ; time.Sleep(time.Millisecond) {
		there, _, err := tcpca.Ask(name)
		if err != nil || !there {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the kernel still has it after %v", lingers)
		}
	}
}

// unpin removes the pins of a link, if they are all that holds it.
func unpin(link uint32) error {
	held := &HeldError{LinkID: link}
	var err error
	if held.Processes, err = processes("/proc", link); err != nil {
		return err
	}
	if held.Pins, err = pinsOf(link); err != nil {
		return err
	}
	if len(held.Processes) > 0 || len(held.Pins) == 0 {
		return held
	}
	fd, err := openID(unix.BPF_LINK_GET_FD_BY_ID, link) // which holds it until all are removed
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var removed []string
	for _, path := range held.Pins {
		// Others may be able to change what is on the way there: it is looked at, removed
		// and put back in one and the same directory.
		dir, err := os.Open(filepath.Dir(path))
		if err == nil {
			defer dir.Close()
			at := fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(path))
			var was bool
			if was, err = removeHeld(at, link); was {
				removed = append(removed, at)
			}
		}
		if err != nil {
			for _, at := range removed {
				err = errors.Join(err, pin(fd, at))
			}
			return err
		}
	}
	return nil
}

// removeHeld removes a file if it is a pin of the link.
func removeHeld(at string, link uint32) (removed bool, err error) {
	if pinnedLink(at) != link {
		return false, nil
	}
	err = removePin(at)
	return err == nil, err
}

// processes finds who has a link open; proc is where procfs is mounted. What
// cannot be read is passed over.
func processes(proc string, link uint32) ([]string, error) {
	files, err := filepath.Glob(proc + "/[0-9]*/fdinfo/*")
	if err != nil {
		return nil, err
	}
	var found []string
	for _, path := range files {
		b, err := os.ReadFile(path)
		if err != nil || fdinfoLink(string(b)) != link {
			continue
		}
		dir := filepath.Dir(filepath.Dir(path))
		name, _ := os.ReadFile(dir + "/comm")
		who := fmt.Sprintf("%s (pid %s)", strings.TrimSpace(string(name)), filepath.Base(dir))
		if !slices.Contains(found, who) {
			found = append(found, who)
		}
	}
	return found, nil
}

// fdinfoLink is the link_id of a /proc/PID/fdinfo file; 0 if it has none.
func fdinfoLink(text string) uint32 {
	for line := range strings.Lines(text) {
		if v, ok := strings.CutPrefix(line, "link_id:"); ok {
			id, _ := strconv.ParseUint(strings.TrimSpace(v), 10, 32)
			return uint32(id)
		}
	}
	return 0
}

// pinsOf finds the pins of a link on every bpffs that is mounted here.
func pinsOf(link uint32) ([]string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var pins []string
	for lines := bufio.NewScanner(f); lines.Scan(); {
		root, ok := MountPoint(lines.Text(), "bpf")
		if !ok {
			continue
		}
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() && pinnedLink(path) == link {
				pins = append(pins, path)
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return pins, nil
}

// MountPoint reads a line of mountinfo (proc_pid_mountinfo(5)) about a file system
// of a type: the mount point is the fifth field, the type comes after a lone dash.
func MountPoint(line, fstype string) (path string, ok bool) {
	before, after, _ := strings.Cut(line, " - ")
	fields := strings.Fields(before)
	if len(fields) < 5 || !strings.HasPrefix(after, fstype+" ") {
		return "", false
	}
	path, err := strconv.Unquote(`"` + strings.ReplaceAll(fields[4], `"`, `\"`) + `"`) // \040 is a space
	return path, err == nil
}

// pinnedLink is the id of the link that a pin holds; 0 if it holds none.
func pinnedLink(path string) uint32 {
	fd, err := openPin(path)
	if err != nil {
		return 0
	}
	defer unix.Close(fd)
	if kind, err := fdKind(fd); err != nil || !strings.HasSuffix(kind, "link") {
		return 0
	}
	id, err := linkID(fd)
	if err != nil {
		return 0
	}
	return id
}
