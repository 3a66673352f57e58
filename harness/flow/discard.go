// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// discard reads up to n bytes without a copy. It tells the kernel a length that
// buf does not have, which MSG_TRUNC makes harmless: nothing is written.
func discard(fd int, buf []byte, n int) (int, error) {
	r, _, errno := unix.Syscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(&buf[0])), uintptr(n), unix.MSG_TRUNC, 0, 0)
	if errno != 0 {
		return -1, errno
	}
	return int(r), nil
}
