// SPDX-License-Identifier: Apache-2.0

// Package inetdiag lists TCP sockets over sock_diag(7), as ss(8) does.
package inetdiag

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"
	"unsafe"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Socket is one TCP socket as the kernel describes it.
type Socket struct {
	State    uint8 // TCP_ESTABLISHED = 1 … (include/net/tcp_states.h)
	Src, Dst netip.AddrPort
	UID      uint32
	Inode    uint32 // 0 once the socket is nobody's
	Cookie   uint64
	Cong     string       // congestion control's name; empty for those that have none (TIME-WAIT)
	Info     unix.TCPInfo // as much as the kernel gave; the rest is zero
}

// Conn is a sock_diag socket. It belongs to the network namespace that the
// dialling thread was in and may be used from any thread, one call at a time.
type Conn struct {
	c     *netlink.Conn
	raw   syscall.RawConn
	buf   []byte
	names map[string]string // of congestion controls, so that each is made once
}

// Dial opens a sock_diag socket in the network namespace of the calling thread.
func Dial() (*Conn, error) {
	c, err := netlink.Dial(unix.NETLINK_INET_DIAG, nil)
	if err != nil {
		return nil, fmt.Errorf("sock_diag: %w", err)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("sock_diag: %w", err)
	}
	return &Conn{c, raw, make([]byte, sizeBuffer), map[string]string{}}, nil
}

// sizeBuffer is more than the kernel puts into one answer (32 KiB; netlink_dump,
// Linux 6.18), and as much as it puts into that goes by what we can take.
const sizeBuffer = 64 << 10

// Close ends the connection. It may be called again.
func (c *Conn) Close() error {
	c.c.Close()
	return nil
}

// ask sends a request and calls fn for each message of the answer, which is valid
// until fn returns. Messages are read where they were received: a machine may have
// very many sockets. After an error of fn the rest of the answer is read all the
// same, so that the next request gets its own.
func (c *Conn) ask(flags netlink.HeaderFlags, request []byte, fn func([]byte) error) error {
	_, err := c.c.Send(netlink.Message{
		Header: netlink.Header{Type: sockDiagByFamily, Flags: netlink.Request | flags},
		Data:   request,
	})
	if err != nil {
		return err
	}
	for {
		b, rerr := c.receive()
		if rerr != nil {
			return rerr
		}
		for len(b) > 0 {
			m, rest, merr := next(b)
			if merr != nil {
				return merr
			}
			b = rest
			switch m.kind {
			case netlink.Done, netlink.Error:
				return cmp.Or(err, m.errno())
			}
			if err == nil {
				err = fn(m.data)
			}
			if m.flags&netlink.Multi == 0 {
				return err
			}
		}
	}
}

func (c *Conn) receive() (b []byte, err error) {
	var n int
	rerr := c.raw.Read(func(fd uintptr) bool {
		n, _, err = unix.Recvfrom(int(fd), c.buf, 0)
		return !errors.Is(err, unix.EAGAIN)
	})
	if err = cmp.Or(rerr, err); err != nil {
		return nil, os.NewSyscallError("recvfrom", err)
	}
	return c.buf[:n], nil
}

// message is a netlink message (netlink(7)).
type message struct {
	kind  netlink.HeaderType
	flags netlink.HeaderFlags
	data  []byte
}

const sizeHeader = 16 // struct nlmsghdr

// next cuts the first message off.
func next(b []byte) (m message, rest []byte, err error) {
	if len(b) < sizeHeader {
		return m, nil, fmt.Errorf("%d bytes: too short for a message", len(b))
	}
	n := binary.NativeEndian.Uint32(b)
	if n < sizeHeader || uint64(n) > uint64(len(b)) {
		return m, nil, fmt.Errorf("message of %d bytes in %d", n, len(b))
	}
	m = message{netlink.HeaderType(binary.NativeEndian.Uint16(b[4:])), netlink.HeaderFlags(binary.NativeEndian.Uint16(b[6:])), b[sizeHeader:n]}
	return m, b[min(align(int(n)), len(b)):], nil
}

// errno is what ends an answer; nil if all went well.
func (m message) errno() error {
	if len(m.data) < 4 {
		return nil
	}
	if code := int32(binary.NativeEndian.Uint32(m.data)); code < 0 {
		return unix.Errno(-code)
	}
	return nil
}

// align rounds up to where the next message or attribute begins.
func align(n int) int { return (n + 3) &^ 3 }

// The request and the answer (include/uapi/linux/inet_diag.h).
const (
	sockDiagByFamily = 20
	sizeRequest      = 56 // struct inet_diag_req_v2
	sizeMessage      = 72 // struct inet_diag_msg
	attrInfo         = 2  // INET_DIAG_INFO
	attrCong         = 4  // INET_DIAG_CONG
	sizeAttr         = 4  // struct nlattr
)

// Dump calls fn for every TCP socket, IPv4 and IPv6, whose state is among the
// bits of states (1<<TCP_ESTABLISHED …; 0: all), with its tcp_info if info is
// set. The *Socket is used again for the next. An error of fn ends the dump.
func (c *Conn) Dump(states uint32, info bool, fn func(*Socket) error) error {
	if states == 0 {
		states = ^uint32(0)
	}
	var s Socket
	var ferr error
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		err := c.ask(netlink.Dump, request(family, states, info), func(b []byte) error {
			if err := s.parse(b, c.names); err != nil {
				return err
			}
			ferr = fn(&s)
			return ferr
		})
		if ferr != nil {
			return ferr
		}
		if err != nil {
			return fmt.Errorf("sock_diag: %w", err)
		}
	}
	return nil
}

// Lookup fills in s with the one TCP socket that is connected from src to dst,
// both IPv4, and its tcp_info. Unlike Dump it does not walk through the sockets of
// the whole machine. If there is none the error is unix.ENOENT.
func (c *Conn) Lookup(s *Socket, src, dst netip.AddrPort) error {
	req := request(unix.AF_INET, ^uint32(0), true)
	from, to := src.Addr().As4(), dst.Addr().As4()
	binary.BigEndian.PutUint16(req[8:], src.Port()) // struct inet_diag_sockid
	binary.BigEndian.PutUint16(req[10:], dst.Port())
	copy(req[12:], from[:])
	copy(req[28:], to[:])
	for i := 48; i < 56; i++ { // any cookie (INET_DIAG_NOCOOKIE)
		req[i] = 0xff
	}
	err := c.ask(0, req, func(b []byte) error { return s.parse(b, c.names) })
	if err == nil && s.Dst != dst { // who listens at src answers for it, too
		err = unix.ENOENT
	}
	if err != nil {
		return fmt.Errorf("sock_diag: %w", err)
	}
	return nil
}

func request(family uint8, states uint32, info bool) []byte {
	b := make([]byte, sizeRequest)
	b[0], b[1] = family, unix.IPPROTO_TCP
	b[2] = 1 << (attrCong - 1)
	if info {
		b[2] |= 1 << (attrInfo - 1)
	}
	binary.NativeEndian.PutUint32(b[4:8], states)
	return b
}

func (s *Socket) parse(b []byte, names map[string]string) error {
	if len(b) < sizeMessage {
		return fmt.Errorf("message of %d bytes: too short", len(b))
	}
	*s = Socket{
		State:  b[1],
		Src:    addrPort(b[0], b[8:24], b[4:6]),
		Dst:    addrPort(b[0], b[24:40], b[6:8]),
		Cookie: uint64(binary.NativeEndian.Uint32(b[44:48])) | uint64(binary.NativeEndian.Uint32(b[48:52]))<<32,
		UID:    binary.NativeEndian.Uint32(b[64:68]),
		Inode:  binary.NativeEndian.Uint32(b[68:72]),
	}
	for b = b[sizeMessage:]; len(b) >= sizeAttr; {
		n := int(binary.NativeEndian.Uint16(b))
		if n < sizeAttr || n > len(b) {
			return fmt.Errorf("attribute of %d bytes in %d", n, len(b))
		}
		switch value := b[sizeAttr:n]; binary.NativeEndian.Uint16(b[2:]) {
		case attrCong:
			value, _, _ = bytes.Cut(value, []byte{0})
			name, known := names[string(value)]
			if !known {
				name = string(value)
				names[name] = name
			}
			s.Cong = name
		case attrInfo:
			// Older kernels give less, newer ones more than this structure has.
			copy(unsafe.Slice((*byte)(unsafe.Pointer(&s.Info)), unsafe.Sizeof(s.Info)), value)
		}
		b = b[min(align(n), len(b)):]
	}
	return nil
}

func addrPort(family uint8, addr, port []byte) netip.AddrPort {
	ip := netip.AddrFrom16([16]byte(addr))
	if family == unix.AF_INET {
		ip = netip.AddrFrom4([4]byte(addr))
	}
	return netip.AddrPortFrom(ip, binary.BigEndian.Uint16(port))
}
