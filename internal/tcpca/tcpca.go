// SPDX-License-Identifier: Apache-2.0

// Package tcpca asks the kernel for TCP congestion controls one by one. Its list of
// them, a sysctl, ends after 2,047 bytes, and from then on the kernel warns of each
// look at it.
package tcpca

import (
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// maxName is the longest name, in bytes (TCP_CA_NAME_MAX); the kernel cuts a longer one
// without a word.
const maxName = 15

// Ask says whether the kernel has a congestion control of that name now, and whether it
// is an allowed one: whether everybody may choose it for a socket. It loads no module.
// Of the default of the network namespace it may say that it is allowed to who may not
// change the network.
func Ask(name string) (there, allowed bool, err error) {
	if name == "" || len(name) > maxName {
		return false, false, nil
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false, false, fmt.Errorf("congestion control %q: socket: %w", name, err)
	}
	defer unix.Close(fd)
	// What a socket has already it may choose, allowed or not: it gets another first.
	other := "reno"
	if name == other {
		other = "cubic"
	}
	unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, other)
	err = withoutNetAdmin(func() error {
		return unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, name)
	})
	switch {
	case err == nil:
		return true, true, nil
	case errors.Is(err, unix.EPERM):
		return true, false, nil
	case errors.Is(err, unix.ENOENT):
		return false, false, nil
	}
	return false, false, fmt.Errorf("congestion control %q: %w", name, err)
}

// Load is Ask that first has the kernel load the module that has the name, if there is
// one and the caller may do that.
func Load(name string) (there, allowed bool, err error) {
	there, allowed, err = Ask(name)
	if there || err != nil || name == "" || len(name) > maxName {
		return there, allowed, err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false, false, fmt.Errorf("congestion control %q: socket: %w", name, err)
	}
	unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, name)
	unix.Close(fd)
	return Ask(name)
}

// withoutNetAdmin runs fn without CAP_NET_ADMIN, with which the kernel loads modules for
// names that it does not know, and lets a socket have what is not allowed. Capabilities
// are a thread's: it is one of its own, which ends with its goroutine unless it has them
// all again.
func withoutNetAdmin(fn func() error) (err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var have [2]unix.CapUserData
		if err = unix.Capget(&header, &have[0]); err != nil {
			err = fmt.Errorf("capabilities: %w", err)
			return
		}
		less := have
		less[0].Effective &^= 1 << unix.CAP_NET_ADMIN
		if err = unix.Capset(&header, &less[0]); err != nil {
			err = fmt.Errorf("capabilities: %w", err)
			return
		}
		err = fn()
		if back := unix.Capset(&header, &have[0]); back != nil {
			err = errors.Join(err, fmt.Errorf("capabilities: %w", back))
			return
		}
		runtime.UnlockOSThread()
	}()
	<-done
	return err
}
