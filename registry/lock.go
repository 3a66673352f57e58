// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"ccload/internal/change"
	"ccload/internal/fault"
	"ccload/structops"

	"golang.org/x/sys/unix"
)

// Whoever changes something holds the one lock of all ccloads: flock(2) on the
// directory where bpffs is mounted. It ends with the process, however that ends.
const (
	lockWait = 10 * time.Second
	lockPoll = 5 * time.Millisecond
)

// errLocked says that another ccload did not finish in time.
var errLocked = fmt.Errorf("another ccload is at work: it has held the lock on %s for %v", bpffs, lockWait)

// lock waits for the lock, mounts bpffs if need be, and sweeps what a ccload that
// was killed has left half done. From then on until unlock a signal does not end the
// process. It is not reentrant.
func lock() (unlock func(), err error) {
	if _, err := mountBPFFS(); err != nil {
		return nil, err
	}
	if err := fault.At("wait for the lock"); err != nil {
		return nil, err
	}
	dir, err := lockDir()
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	end, err := change.Begin()
	if err != nil {
		dir.Close()
		return nil, err
	}
	unlock = func() { dir.Close(); end() }
	if err := fault.At("have the lock"); err != nil {
		unlock()
		return nil, err
	}
	takeOver()
	sweepPins()
	sweepReplacements()
	sweepExtensions()
	sweepUses()
	sweepMaps()
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

// lockDir locks whatever directory is at the path of bpffs.
func lockDir() (*os.File, error) {
	for deadline := time.Now().Add(lockWait); ; time.Sleep(lockPoll) {
		dir, err := os.Open(bpffs)
		if err != nil {
			if errors.Is(err, fs.ErrPermission) {
				err = &structops.PermissionError{Missing: []string{"CAP_SYS_ADMIN"}, Errno: unix.EACCES}
			}
			return nil, err
		}
		err = unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if now, serr := os.Stat(bpffs); err == nil && serr == nil {
			if held, herr := dir.Stat(); herr == nil && os.SameFile(held, now) {
				return dir, nil
			}
		}
		dir.Close() // somebody has it, or has mounted bpffs over it
		if err != nil && !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, err
		}
		if time.Now().After(deadline) {
			return nil, errLocked
		}
	}
}

// sweepPins removes the pins of names that are not registered (any more): of a map
// that was pinned to be registered next, and of a registration that was ended.
// What is no congestion control is not ours to remove.
func sweepPins() {
	names, _ := pinsIn(pinDir)
	for _, name := range names {
		unpinStale(filepath.Join(pinDir, name))
	}
	tidyUp(pinDir)
}
