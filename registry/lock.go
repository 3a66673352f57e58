// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"ccload/internal/change"
	"ccload/internal/fault"

	"golang.org/x/sys/unix"
)

// Whoever changes something holds the one lock of all ccloads: flock(2) on our place on
// bpffs, which an ordinary user can not even open. It ends with the process, however
// that ends. While bpffs is not mounted, who wants to mount it holds another one.
const (
	mountLock = "/run/ccload-mount"
	lockWait  = 10 * time.Second
	lockPoll  = 5 * time.Millisecond
)

// LockedError says that the lock was not to be had: who holds it now.
type LockedError struct {
	Path    string
	PID     int    // 0: it cannot be seen from here
	Command string // "": not known
}

func (e *LockedError) Error() string {
	who := "a process that cannot be seen from here"
	if e.PID != 0 {
		who = fmt.Sprintf("process %d", e.PID)
	}
	if e.Command != "" {
		who += fmt.Sprintf(" (%s)", e.Command)
	}
	return fmt.Sprintf("timed out after %v waiting for the lock on %s, held by %s", lockWait, e.Path, who)
}

// lock waits for the lock, and mounts bpffs if need be. Capabilities do not do: what is
// pinned has to be root's. From then on until unlock a signal does not end the process. It
// is not reentrant.
func lock() (unlock func(), err error) {
	if uid := os.Geteuid(); uid != 0 {
		if err := need("/", "CAP_SYS_ADMIN"); err != nil {
			return nil, err
		}
		return nil, fmt.Errorf("must be run as root, not as uid %d: %w", uid, unix.EACCES)
	}
	if _, err := mountBPFFS(); err != nil {
		return nil, err
	}
	if err := fault.At("wait for the lock"); err != nil {
		return nil, err
	}
	letGo, err := lockDir(rootDir)
	if err != nil {
		return nil, err
	}
	end, err := change.Begin()
	if err != nil {
		letGo()
		return nil, err
	}
	unlock = func() { letGo(); end() }
	if err := fault.At("have the lock"); err != nil {
		unlock()
		return nil, err
	}
	return unlock, nil
}

// locked runs fn with the lock.
func locked(fn func() error) error {
	unlock, err := lock()
	if err != nil {
		return err
	}
	defer unlock()
	return fn()
}

// lockDir makes and locks a directory of ours. It goes with the lock, if it is empty
// then.
func lockDir(path string) (unlock func(), err error) {
	for deadline := time.Now().Add(lockWait); ; time.Sleep(lockPoll) {
		d, err := makeDir(path)
		if err != nil {
			return nil, err
		}
		err = unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil && d.current() {
			return func() {
				unix.Rmdir(path) // which fails, as it should, where something is in it
				d.Close()
			}, nil
		}
		if err == nil { // who had it has removed it
			d.Close()
			continue
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			d.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		if time.Now().After(deadline) {
			err = d.lockedBy()
			d.Close()
			return nil, err
		}
		d.Close()
	}
}

// current says whether a directory is still the one at its path.
func (d *dir) current() bool {
	now, err := os.Lstat(d.path)
	if err != nil {
		return false
	}
	held, err := d.Stat()
	return err == nil && os.SameFile(held, now)
}

// lockedBy says who has locked a directory.
func (d *dir) lockedBy() error {
	e := &LockedError{Path: d.path}
	var st unix.Stat_t
	if unix.Fstat(int(d.Fd()), &st) != nil {
		return e
	}
	f, err := os.Open("/proc/locks")
	if err != nil {
		return e
	}
	defer f.Close()
	e.PID = flockHolder(f, st.Dev, st.Ino)
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", e.PID)); err == nil && e.PID != 0 {
		const most = 60
		e.Command = strings.TrimSpace(strings.ReplaceAll(string(b), "\x00", " "))
		if len(e.Command) > most {
			e.Command = e.Command[:most] + "…"
		}
		e.Command = strings.Trim(strconv.Quote(e.Command), `"`)
	}
	return e
}

// flockHolder finds who has a file locked by flock(2) in /proc/locks (proc_locks(5)); 0
// if nobody is seen.
func flockHolder(locks io.Reader, dev, inode uint64) (pid int) {
	file := fmt.Sprintf("%02x:%02x:%d", unix.Major(dev), unix.Minor(dev), inode)
	for s := bufio.NewScanner(locks); s.Scan(); {
		// 1: FLOCK  ADVISORY  WRITE 4711 00:1f:42 0 EOF; a waiting one has "->" after the number.
		f := strings.Fields(s.Text())
		if len(f) == 8 && f[1] == "FLOCK" && f[5] == file {
			pid, _ = strconv.Atoi(f[4])
			return max(0, pid)
		}
	}
	return 0
}
