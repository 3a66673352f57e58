// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"errors"
	"fmt"
	"syscall"

	"ccload/structops"

	"golang.org/x/sys/unix"
)

// maxName is the longest name, in bytes (TCP_CA_NAME_MAX); the kernel cuts a longer
// one without a word.
const maxName = 15

// SetSocket gives one TCP socket a congestion control (TCP_CONGESTION, tcp(7)), be
// it connected or not; what a listener accepts gets it, too. A kernel module that
// has it is loaded if need be. A name that the kernel does not know gives a
// *NotFoundError. One that is not allowed to everybody needs CAP_NET_ADMIN, and
// gives a *structops.PermissionError without. The choice is read back: an algorithm
// that hands the socket on to another, for want of ECN, is an error.
func SetSocket(conn syscall.Conn, name string) error {
	fail := func(err error) error { return fmt.Errorf("socket: congestion control %q: %w", name, err) }
	raw, err := conn.SyscallConn()
	if err != nil {
		return fail(err)
	}
	if _, err := autoload(name); err != nil {
		return fail(err)
	}
	var got string
	cerr := raw.Control(func(fd uintptr) {
		err = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, name)
		if err == nil {
			got, err = unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION)
		}
	})
	switch {
	case cerr != nil:
		return fail(cerr)
	case errors.Is(err, unix.EPERM):
		if missing := need("/", "CAP_NET_ADMIN"); missing != nil {
			return fail(missing)
		}
		return fail(&structops.PermissionError{Errno: err})
	case errors.Is(err, unix.ENOPROTOOPT), errors.Is(err, unix.EOPNOTSUPP):
		return fail(fmt.Errorf("not a TCP socket: %w", err))
	case err != nil:
		return fail(err)
	case got != name:
		return fail(fmt.Errorf("the algorithm fell back to %q", got))
	}
	return nil
}
