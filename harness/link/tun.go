// SPDX-License-Identifier: Apache-2.0

package link

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"unsafe"

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
		t.fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("/dev/net/tun: %w: the kernel lacks TUN (CONFIG_TUN)", err)
		}
		if err != nil {
			return fmt.Errorf("/dev/net/tun: %w", err)
		}
		return t.setUp(addr, mtu)
	})
	if err != nil {
		t.close()
		return nil, fmt.Errorf("link: device %q: %w", name, err)
	}
	return t, nil
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
	// Router solicitations and the like would be packets on the link that nobody sent.
	err = os.WriteFile("/proc/sys/net/ipv6/conf/"+t.name+"/disable_ipv6", []byte("1"), 0)
	if err != nil && !errors.Is(err, os.ErrNotExist) { // a kernel without IPv6
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

func (t *tun) close() error {
	if t.fd < 0 {
		return nil
	}
	err := unix.Close(t.fd)
	t.fd = -1
	return err
}

// dropped is how many packets the kernel could not queue for the engine.
func (t *tun) dropped() (n uint64, err error) {
	err = t.ns.Do(func() error {
		b, err := os.ReadFile("/proc/thread-self/net/dev")
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(b)) {
			name, stats, ok := strings.Cut(line, ":")
			if f := strings.Fields(stats); ok && strings.TrimSpace(name) == t.name && len(f) >= 12 {
				_, err := fmt.Sscan(f[11], &n) // transmit: bytes packets errs drop
				return err
			}
		}
		return fmt.Errorf("device %q: %w", t.name, os.ErrNotExist)
	})
	return n, err
}

// Offloads tells which of a device's offloads are on, by ethtool(8)'s names.
func (t *tun) offloads() (on map[string]bool, err error) {
	on = map[string]bool{}
	err = t.ns.Do(func() error {
		s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(s)
		for name, cmd := range map[string]uint32{
			"tx-checksumming": 0x16, "tcp-segmentation-offload": 0x1e, "generic-receive-offload": 0x2b,
		} {
			v := struct{ cmd, data uint32 }{cmd: cmd} // struct ethtool_value
			var r struct {
				name [unix.IFNAMSIZ]byte
				data unsafe.Pointer
				_    [16]byte
			}
			copy(r.name[:], t.name)
			r.data = unsafe.Pointer(&v)
			if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(s), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&r))); errno != 0 {
				return fmt.Errorf("%s: %w", name, errno)
			}
			on[name] = v.data != 0
		}
		return nil
	})
	return on, err
}
