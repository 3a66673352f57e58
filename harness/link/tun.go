// SPDX-License-Identifier: Apache-2.0

package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"unsafe"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"ccload/internal/netns"
)

// tun is a TUN device. It is gone when its descriptor is closed, or with the
// process.
type tun struct {
	fd   int
	name string
	ns   *netns.NS
}

// A packet is preceded by a struct virtio_net_hdr. With TUN_F_CSUM neither end
// works out TCP's checksum for a wire that is not there: the header carries the
// promise from one to the other. Segmentation stays off, so each packet is one
// MTU at the most.
const headroom = 10

// queueLen is room between the kernel and the engine for all that it may fall
// behind: what does not fit is lost unseen. In packets; some kernels (seen on 6.1
// and 6.12) take no more than 32767.
const queueLen = 30000

// openTUN makes a TUN device with an address in a namespace and sets it up.
func openTUN(ns *netns.NS, name string, addr netip.Prefix, mtu int) (*tun, error) {
	t := &tun{-1, name, ns}
	err := ns.Do(func() (err error) { // the device is made where the file was opened
		if t.fd, err = openClone(); err != nil {
			return err
		}
		return t.setUp(addr, mtu)
	})
	if err != nil {
		t.close()
		return nil, fmt.Errorf("link: device %q: %w", name, err)
	}
	return t, nil
}

// openClone opens the device that TUN devices are made of.
func openClone() (int, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
		return -1, fmt.Errorf("/dev/net/tun: %w: the kernel lacks TUN (CONFIG_TUN)", err)
	}
	if err != nil {
		return -1, fmt.Errorf("/dev/net/tun: %w", err)
	}
	return fd, nil
}

func (t *tun) setUp(addr netip.Prefix, mtu int) error {
	req, err := unix.NewIfreq(t.name)
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(t.fd, unix.TUNSETIFF, req); err != nil {
		return fmt.Errorf("make: %w", err)
	}
	if err := unix.IoctlSetInt(t.fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM); err != nil {
		return fmt.Errorf("offloads: %w", err)
	}
	if err := noIPv6(t.name); err != nil {
		return err
	}
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	set := func(what string, ioctl uint, fill func(*unix.Ifreq) error) error {
		r, err := unix.NewIfreq(t.name)
		if err != nil {
			return err
		}
		if err := errors.Join(fill(r), unix.IoctlIfreq(s, ioctl, r)); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		return nil
	}
	mask := netip.PrefixFrom(netip.AddrFrom4([4]byte{255, 255, 255, 255}), addr.Bits()).Masked().Addr()
	const ifUp = unix.IFF_UP | unix.IFF_RUNNING
	return errors.Join(
		set("queue length", unix.SIOCSIFTXQLEN, func(r *unix.Ifreq) error { r.SetUint32(queueLen); return nil }),
		set("MTU", unix.SIOCSIFMTU, func(r *unix.Ifreq) error { r.SetUint32(uint32(mtu)); return nil }),
		set("address", unix.SIOCSIFADDR, func(r *unix.Ifreq) error { return r.SetInet4Addr(addr.Addr().AsSlice()) }),
		set("netmask", unix.SIOCSIFNETMASK, func(r *unix.Ifreq) error { return r.SetInet4Addr(mask.AsSlice()) }),
		set("up", unix.SIOCSIFFLAGS, func(r *unix.Ifreq) error { r.SetUint16(ifUp); return nil }),
	)
}

// setBurst bounds how many segments TCP hands to the device at once. Without that
// it forms large packets, which are cut up on their way into the device, so that
// eight or more full packets may arrive in the same moment.
func (t *tun) setBurst(segments int) error {
	fail := func(err error) error {
		return fmt.Errorf("link: device %q: bursts of %d segments: %w", t.name, segments, err)
	}
	var index int
	err := t.ns.Do(func() error {
		i, err := net.InterfaceByName(t.name)
		if err == nil {
			index = i.Index
		}
		return err
	})
	if err != nil {
		return fail(err)
	}
	c, err := netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{NetNS: t.ns.FD()})
	if err != nil {
		return fail(err)
	}
	defer c.Close()
	ae := netlink.NewAttributeEncoder()
	ae.Uint32(unix.IFLA_GSO_MAX_SEGS, uint32(segments))
	attrs, err := ae.Encode()
	if err != nil {
		return fail(err)
	}
	head := make([]byte, sizeLink)
	binary.NativeEndian.PutUint32(head[4:], uint32(index))
	if _, err := c.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.RTM_NEWLINK, Flags: netlink.Request | netlink.Acknowledge}, Data: append(head, attrs...),
	}); err != nil {
		return fail(err)
	}
	return nil
}

func (t *tun) close() error {
	if t.fd < 0 {
		return nil
	}
	err := unix.Close(t.fd)
	t.fd = -1
	return err
}

// noIPv6 keeps a device of the namespace that the thread is in from speaking IPv6
// by itself: router solicitations and the like would be packets on the link that
// nobody sent.
func noIPv6(device string) error {
	err := os.WriteFile("/proc/sys/net/ipv6/conf/"+device+"/disable_ipv6", []byte("1"), 0)
	if errors.Is(err, os.ErrNotExist) { // a kernel without IPv6
		return nil
	}
	return err
}

// dropped is how many packets a device could not hand on: for a TUN device, could
// not queue for the engine.
func dropped(ns *netns.NS, device string) (n uint64, err error) {
	err = ns.Do(func() error {
		b, err := os.ReadFile("/proc/thread-self/net/dev")
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(b)) {
			name, stats, ok := strings.Cut(line, ":")
			if f := strings.Fields(stats); ok && strings.TrimSpace(name) == device && len(f) >= 12 {
				_, err := fmt.Sscan(f[11], &n) // transmit: bytes packets errs drop
				return err
			}
		}
		return fmt.Errorf("device %q: %w", device, os.ErrNotExist)
	})
	return n, err
}

// offloads tells which of a device's offloads are on, by ethtool(8)'s names.
func offloads(ns *netns.NS, device string) (on map[string]bool, err error) {
	on = map[string]bool{}
	err = ns.Do(func() error {
		s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(s)
		for name, cmd := range map[string]uint32{
			"tx-checksumming": 0x16, "tcp-segmentation-offload": 0x1e, "generic-receive-offload": 0x2b,
		} {
			v, err := ethtool(s, device, cmd, 0)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			on[name] = v != 0
		}
		return nil
	})
	return on, err
}

// ethtool gives one command of a value to a device, through a socket of its
// namespace, and returns the value of the answer.
func ethtool(s int, device string, cmd, value uint32) (uint32, error) {
	v := struct{ cmd, data uint32 }{cmd, value} // struct ethtool_value
	var r struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}
	copy(r.name[:], device)
	r.data = unsafe.Pointer(&v)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(s), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&r))); errno != 0 {
		return 0, errno
	}
	return v.data, nil
}
