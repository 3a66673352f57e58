// SPDX-License-Identifier: Apache-2.0

// Package inetdiag lists TCP sockets over sock_diag(7), as ss(8) does.
package inetdiag

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"unsafe"

	"github.com/mdlayher/netlink"
	"github.com/mdlayher/netlink/nlenc"
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
type Conn struct{ c *netlink.Conn }

// Dial opens a sock_diag socket in the network namespace of the calling thread.
func Dial() (*Conn, error) {
	c, err := netlink.Dial(unix.NETLINK_INET_DIAG, nil)
	if err != nil {
		return nil, fmt.Errorf("sock_diag: %w", err)
	}
	return &Conn{c}, nil
}

// Close ends the connection. It may be called again.
func (c *Conn) Close() error {
	c.c.Close()
	return nil
}

// The request and the answer (include/uapi/linux/inet_diag.h).
const (
	sockDiagByFamily = 20
	sizeRequest      = 56 // struct inet_diag_req_v2
	sizeMessage      = 72 // struct inet_diag_msg
	attrInfo         = 2  // INET_DIAG_INFO
	attrCong         = 4  // INET_DIAG_CONG
)

// Dump calls fn for every TCP socket, IPv4 and IPv6, whose state is among the
// bits of states (1<<TCP_ESTABLISHED …; 0: all), with its tcp_info if info is
// set. The *Socket is used again for the next. An error of fn ends the dump.
func (c *Conn) Dump(states uint32, info bool, fn func(*Socket) error) error {
	if states == 0 {
		states = ^uint32(0)
	}
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		msgs, err := c.c.Execute(netlink.Message{
			Header: netlink.Header{Type: sockDiagByFamily, Flags: netlink.Request | netlink.Dump},
			Data:   request(family, states, info),
		})
		if err != nil {
			return fmt.Errorf("sock_diag: %w", err)
		}
		var s Socket
		for _, m := range msgs {
			if err := s.parse(m.Data); err != nil {
				return fmt.Errorf("sock_diag: %w", err)
			}
			if err := fn(&s); err != nil {
				return err
			}
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
	msgs, err := c.c.Execute(netlink.Message{
		Header: netlink.Header{Type: sockDiagByFamily, Flags: netlink.Request},
		Data:   req,
	})
	if err == nil && len(msgs) != 1 {
		err = fmt.Errorf("%d answers", len(msgs))
	}
	if err == nil {
		err = s.parse(msgs[0].Data)
	}
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
	nlenc.PutUint32(b[4:8], states)
	return b
}

func (s *Socket) parse(b []byte) error {
	if len(b) < sizeMessage {
		return fmt.Errorf("message of %d bytes: too short", len(b))
	}
	*s = Socket{
		State:  b[1],
		Src:    addrPort(b[0], b[8:24], b[4:6]),
		Dst:    addrPort(b[0], b[24:40], b[6:8]),
		Cookie: uint64(nlenc.Uint32(b[44:48])) | uint64(nlenc.Uint32(b[48:52]))<<32,
		UID:    nlenc.Uint32(b[64:68]),
		Inode:  nlenc.Uint32(b[68:72]),
	}
	attrs, err := netlink.NewAttributeDecoder(b[sizeMessage:])
	if err != nil {
		return err
	}
	for attrs.Next() {
		switch attrs.Type() {
		case attrCong:
			s.Cong = attrs.String()
		case attrInfo:
			// Older kernels give less, newer ones more than this structure has.
			copy(unsafe.Slice((*byte)(unsafe.Pointer(&s.Info)), unsafe.Sizeof(s.Info)), attrs.Bytes())
		}
	}
	return attrs.Err()
}

func addrPort(family uint8, addr, port []byte) netip.AddrPort {
	ip := netip.AddrFrom16([16]byte(addr))
	if family == unix.AF_INET {
		ip = netip.AddrFrom4([4]byte(addr))
	}
	return netip.AddrPortFrom(ip, binary.BigEndian.Uint16(port))
}
