// SPDX-License-Identifier: Apache-2.0

package inetdiag

import (
	"errors"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// A connection over loopback is seen from both ends, with the congestion control
// that it was given and the window of RFC 6928.
func TestDump(t *testing.T) {
	for _, network := range []string{"tcp4", "tcp6"} {
		t.Run(network, func(t *testing.T) {
			l, err := net.Listen(network, map[string]string{"tcp4": "127.0.0.1:0", "tcp6": "[::1]:0"}[network])
			if err != nil {
				t.Skip(err)
			}
			defer l.Close()
			c, err := net.Dial(network, l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			raw, err := c.(*net.TCPConn).SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			var ino uint64
			raw.Control(func(fd uintptr) {
				err = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "reno")
				var st unix.Stat_t
				unix.Fstat(int(fd), &st)
				ino = st.Ino
			})
			if err != nil {
				t.Fatal(err)
			}
			local := c.LocalAddr().(*net.TCPAddr).AddrPort()

			d, err := Dial()
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			var found, others int
			err = d.Dump(1<<1, true, func(s *Socket) error {
				if s.State != 1 {
					t.Errorf("asked for ESTABLISHED, got state %d", s.State)
				}
				if s.Src != local {
					others++
					return nil
				}
				found++
				if s.Cong != "reno" || s.Info.Snd_cwnd != 10 || uint64(s.Inode) != ino || s.Cookie == 0 ||
					s.Dst != netip.MustParseAddrPort(l.Addr().String()) {
					t.Errorf("got %+v", *s)
				}
				return nil
			})
			if err != nil || found != 1 || others == 0 {
				t.Errorf("found %d times, %d others, %v", found, others, err)
			}
			stop := errors.New("stop")
			for range 2 {
				if err := d.Dump(0, false, func(*Socket) error { return stop }); err != stop {
					t.Errorf("the error of fn: got %v", err)
				}
			}
		})
	}
}

func TestParseRefusesShortMessages(t *testing.T) {
	var s Socket
	for n := range sizeMessage {
		if s.parse(make([]byte, n), map[string]string{}) == nil {
			t.Fatalf("%d bytes were taken", n)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(make([]byte, sizeMessage))
	f.Add(append(make([]byte, sizeMessage), 8, 0, 4, 0, 'r', 'e', 'n', 0))
	f.Add(append([]byte{sizeHeader + sizeMessage, 15: 0}, make([]byte, sizeMessage)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		new(Socket).parse(b, map[string]string{})
		for len(b) > 0 {
			m, rest, err := next(b)
			if err != nil {
				return
			}
			if len(rest)+len(m.data) >= len(b) {
				t.Fatalf("%d bytes after %d of %d", len(rest), len(m.data), len(b))
			}
			m.errno()
			b = rest
		}
	})
}

func TestLookup(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	src, dst := c.LocalAddr().(*net.TCPAddr).AddrPort(), l.Addr().(*net.TCPAddr).AddrPort()
	d, err := Dial()
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	var s Socket
	if err := d.Lookup(&s, src, dst); err != nil || s.Src != src || s.Dst != dst || s.State != 1 || s.Info.Snd_cwnd == 0 || s.Cong == "" {
		t.Errorf("got %+v, %v", s, err)
	}
	if err := d.Lookup(&s, dst, netip.AddrPortFrom(dst.Addr(), 1)); !errors.Is(err, unix.ENOENT) {
		t.Errorf("a socket that is not there: %v", err)
	}
}
