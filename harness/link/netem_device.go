// SPDX-License-Identifier: Apache-2.0

package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"syscall"
	"unsafe"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"ccload/internal/netns"
)

// port is one end of a veth pair. It is gone with the other end, and with the
// namespace of either.
type port struct {
	ns    *netns.NS
	name  string
	index uint32
	conn  *netlink.Conn // rtnetlink(7), in the namespace
}

// Of include/uapi/linux: what x/sys does not name.
const (
	vethInfoPeer = 1  // VETH_INFO_PEER
	netemRate    = 6  // TCA_NETEM_RATE
	netemLatency = 10 // TCA_NETEM_LATENCY64: ns, since 4.15
	netemSeed    = 14 // TCA_NETEM_PRNG_SEED, since 6.6
	statsBasic   = 1  // TCA_STATS_BASIC
	statsQueue   = 3  // TCA_STATS_QUEUE
	statsPackets = 8  // TCA_STATS_PKT64: what TCA_STATS_BASIC has 32 bits of

	sizeLink  = 16 // struct ifinfomsg
	sizeTC    = 20 // struct tcmsg
	sizeNetem = 24 // struct tc_netem_qopt
	rootQdisc = math.MaxUint32
)

// Flags of a request that makes something new, and of one that changes something.
const (
	create netlink.HeaderFlags = netlink.Create | netlink.Excl
	change netlink.HeaderFlags = 0
)

// ethernet is the size of the header that IP packets have on a veth.
const ethernet = 14

// pair makes a veth pair, both ends of one name, with an end in each of two
// namespaces, and takes both up.
//
// Both have one hardware address and know no ARP, so that each takes what the
// other sends and nothing but the flows' packets crosses the link. TCP's packets
// come in one MTU each: with gso_max_segs of 1 it does not even form larger ones
// to be cut behind a queue.
func pair(a, b *netns.NS, name string, mtu int) (_, _ *port, err error) {
	ports := [2]*port{{ns: a, name: name}, {ns: b, name: name}}
	defer func() {
		if err != nil {
			for _, p := range ports {
				if p.index != 0 {
					p.remove()
				}
				if p.conn != nil {
					p.conn.Close()
				}
			}
			err = fmt.Errorf("link: device %q: %w", name, err)
		}
	}()
	for _, p := range ports {
		if p.conn, err = netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{NetNS: p.ns.FD()}); err != nil {
			return nil, nil, fmt.Errorf("netlink: %w", err)
		}
		p.conn.SetOption(netlink.ExtendedAcknowledge, true) // words in place of a number alone, where there are any
	}
	device := func(ae *netlink.AttributeEncoder) {
		ae.String(unix.IFLA_IFNAME, name)
		ae.Bytes(unix.IFLA_ADDRESS, []byte{2, 0, 0, 0, 0, 1}) // of local administration
		ae.Uint32(unix.IFLA_MTU, uint32(mtu))
		ae.Uint32(unix.IFLA_GSO_MAX_SEGS, 1)
	}
	ae := netlink.NewAttributeEncoder()
	device(ae)
	ae.Nested(unix.IFLA_LINKINFO, func(ae *netlink.AttributeEncoder) error {
		ae.String(unix.IFLA_INFO_KIND, "veth")
		ae.Nested(unix.IFLA_INFO_DATA, func(ae *netlink.AttributeEncoder) error {
			ae.Do(vethInfoPeer, func() ([]byte, error) {
				ae := netlink.NewAttributeEncoder()
				device(ae)
				ae.Uint32(unix.IFLA_NET_NS_FD, uint32(b.FD()))
				attrs, err := ae.Encode()
				return append(make([]byte, sizeLink), attrs...), err
			})
			return nil
		})
		return nil
	})
	if err := ports[0].ask(unix.RTM_NEWLINK, create, make([]byte, sizeLink), ae); err != nil {
		if errors.Is(err, unix.EOPNOTSUPP) {
			err = fmt.Errorf("%w: the kernel lacks veth (CONFIG_VETH)", err)
		}
		return nil, nil, fmt.Errorf("make: %w", err)
	}
	for _, p := range ports {
		if err := p.setUp(); err != nil {
			return nil, nil, err
		}
	}
	return ports[0], ports[1], nil
}

// setUp turns off what would merge packets, or send any by itself, and takes the
// port up.
func (p *port) setUp() error {
	return p.ns.Do(func() error {
		if err := noIPv6(p.name); err != nil {
			return err
		}
		s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(s)
		for _, cmd := range []uint32{unix.ETHTOOL_STSO, unix.ETHTOOL_SGSO, unix.ETHTOOL_SGRO} {
			if _, err := ethtool(s, p.name, cmd, 0); err != nil {
				return fmt.Errorf("offloads: %w", err)
			}
		}
		r, err := unix.NewIfreq(p.name)
		if err != nil {
			return err
		}
		if err := unix.IoctlIfreq(s, unix.SIOCGIFINDEX, r); err != nil {
			return fmt.Errorf("index: %w", err)
		}
		p.index = r.Uint32()
		r.SetUint16(unix.IFF_UP | unix.IFF_RUNNING | unix.IFF_NOARP)
		if err := unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, r); err != nil {
			return fmt.Errorf("up: %w", err)
		}
		return nil
	})
}

// remove takes away the pair that the port is an end of.
func (p *port) remove() error {
	head := make([]byte, sizeLink)
	binary.NativeEndian.PutUint32(head[4:], p.index)
	err := p.ask(unix.RTM_DELLINK, change, head, netlink.NewAttributeEncoder())
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("link: device %q: remove: %w", p.name, err)
	}
	return nil
}

// ask sends one request and waits until it has been done.
func (p *port) ask(typ netlink.HeaderType, flags netlink.HeaderFlags, head []byte, ae *netlink.AttributeEncoder) error {
	attrs, err := ae.Encode()
	if err == nil {
		_, err = p.conn.Execute(netlink.Message{
			Header: netlink.Header{Type: typ, Flags: netlink.Request | netlink.Acknowledge | flags},
			Data:   append(head, attrs...),
		})
	}
	return err
}

// address gives the port an IPv4 address, with a route to its network.
func (p *port) address(a netip.Prefix) error {
	ae := netlink.NewAttributeEncoder()
	ae.Bytes(unix.IFA_LOCAL, a.Addr().AsSlice())
	ae.Bytes(unix.IFA_ADDRESS, a.Addr().AsSlice())
	head := binary.NativeEndian.AppendUint32([]byte{unix.AF_INET, byte(a.Bits()), 0, unix.RT_SCOPE_UNIVERSE}, p.index)
	if err := p.ask(unix.RTM_NEWADDR, create, head, ae); err != nil {
		return fmt.Errorf("link: device %q: address %s: %w", p.name, a, err)
	}
	return nil
}

// route leads what goes to an IPv4 address out of the port.
func (p *port) route(to netip.Addr) error {
	ae := netlink.NewAttributeEncoder()
	ae.Bytes(unix.RTA_DST, to.AsSlice())
	ae.Uint32(unix.RTA_OIF, p.index)
	head := []byte{unix.AF_INET, 32, 0, 0, unix.RT_TABLE_MAIN, unix.RTPROT_STATIC, unix.RT_SCOPE_LINK, unix.RTN_UNICAST, 0, 0, 0, 0}
	if err := p.ask(unix.RTM_NEWROUTE, create, head, ae); err != nil {
		return fmt.Errorf("link: device %q: route to %s: %w", p.name, to, err)
	}
	return nil
}

// emulator is what one netem does.
type emulator struct {
	handle, parent uint32
	limit          int     // packets that it holds, the one being sent included
	delay          int64   // ns
	rate           float64 // bit/s of IP; 0: any
	loss           float64 // probability
	seed           uint64
}

// losses are what the kernel is told of the loss: a share of all 32 bits.
func (e emulator) losses() uint32 { return uint32(math.Round(e.loss * math.MaxUint32)) }

func (e emulator) bytesPerSecond() uint32 { return uint32(math.Round(e.rate / 8)) }

// emulate makes a netem, or changes the one that is there: that keeps its packets
// and its counters.
func (p *port) emulate(e emulator, flags netlink.HeaderFlags) error {
	ae := netlink.NewAttributeEncoder()
	ae.String(unix.TCA_KIND, "netem")
	ae.Do(unix.TCA_OPTIONS, func() ([]byte, error) {
		fixed := make([]byte, sizeNetem)
		binary.NativeEndian.PutUint32(fixed[4:], uint32(e.limit))
		binary.NativeEndian.PutUint32(fixed[8:], e.losses())
		ae := netlink.NewAttributeEncoder()
		ae.Int64(netemLatency, e.delay)
		ae.Uint64(netemSeed, e.seed)
		if e.rate > 0 {
			// struct tc_netem_rate: byte/s, what to add to a packet's size, and no cells.
			overhead := int32(-ethernet)
			rate := binary.NativeEndian.AppendUint32(nil, e.bytesPerSecond())
			rate = binary.NativeEndian.AppendUint32(rate, uint32(overhead))
			ae.Bytes(netemRate, append(rate, make([]byte, 8)...))
		}
		attrs, err := ae.Encode()
		return append(fixed, attrs...), err
	})
	if err := p.ask(unix.RTM_NEWQDISC, flags, p.tc(e.handle, e.parent), ae); err != nil {
		if errors.Is(err, unix.ENOENT) {
			err = fmt.Errorf("%w: the kernel lacks netem (CONFIG_NET_SCH_NETEM)", err)
		}
		return fmt.Errorf("link: device %q: netem: %w", p.name, err)
	}
	return nil
}

// tc is a struct tcmsg (rtnetlink(7)).
func (p *port) tc(handle, parent uint32) []byte {
	b := binary.NativeEndian.AppendUint32(nil, unix.AF_UNSPEC)
	for _, v := range []uint32{p.index, handle, parent, 0} {
		b = binary.NativeEndian.AppendUint32(b, v)
	}
	return b
}

// netem is the state of one.
type netem struct {
	packets uint64 // that have left
	bytes   uint64 // of IP, of these
	waiting int    // packets
	backlog int64  // bytes of IP, of these
	drops   uint64 // packets, those of its child included
	seed    uint64 // 0: the kernel knows none
}

// parse reads the body of an RTM_NEWQDISC message. It does not allocate.
func (n *netem) parse(b []byte) error {
	err := attributes(b, sizeTC, func(typ uint16, b []byte) error {
		switch typ {
		case unix.TCA_OPTIONS:
			return attributes(b, sizeNetem, func(typ uint16, b []byte) error {
				if typ == netemSeed && len(b) >= 8 {
					n.seed = binary.NativeEndian.Uint64(b)
				}
				return nil
			})
		case unix.TCA_STATS2:
			return attributes(b, 0, func(typ uint16, b []byte) error {
				switch {
				case typ == statsBasic && len(b) >= 12: // struct gnet_stats_basic
					n.bytes = binary.NativeEndian.Uint64(b)
					n.packets = uint64(binary.NativeEndian.Uint32(b[8:]))
				case typ == statsPackets && len(b) >= 8:
					n.packets = binary.NativeEndian.Uint64(b)
				case typ == statsQueue && len(b) >= 12: // struct gnet_stats_queue
					n.waiting = int(binary.NativeEndian.Uint32(b))
					n.backlog = int64(binary.NativeEndian.Uint32(b[4:]))
					n.drops = uint64(binary.NativeEndian.Uint32(b[8:]))
				}
				return nil
			})
		}
		return nil
	})
	n.bytes -= ethernet * n.packets
	n.backlog -= int64(ethernet * n.waiting)
	return err
}

// attributes visits the attributes (netlink(7)) behind the first skip bytes.
func attributes(b []byte, skip int, visit func(typ uint16, b []byte) error) error {
	if len(b) < skip {
		return fmt.Errorf("%d bytes, wanted at least %d", len(b), skip)
	}
	for b = b[skip:]; len(b) >= 4; {
		n := int(binary.NativeEndian.Uint16(b))
		if n < 4 || n > len(b) {
			return fmt.Errorf("attribute of %d bytes, %d are left", n, len(b))
		}
		if err := visit(binary.NativeEndian.Uint16(b[2:])&0x3fff, b[4:n]); err != nil {
			return err
		}
		b = b[min(len(b), (n+3)&^3):]
	}
	return nil
}

// watch asks for the state of one netem again and again, in few instructions.
type watch struct {
	fd      int
	request []byte
	answer  [4096]byte
}

func (p *port) watch(handle uint32) (*watch, error) {
	head := make([]byte, unix.SizeofNlMsghdr)
	binary.NativeEndian.PutUint16(head[4:], unix.RTM_GETQDISC)
	binary.NativeEndian.PutUint16(head[6:], unix.NLM_F_REQUEST|unix.NLM_F_ECHO)
	w := &watch{request: append(head, p.tc(handle, 0)...)}
	binary.NativeEndian.PutUint32(w.request, uint32(len(w.request)))
	err := p.ns.Do(func() (err error) {
		w.fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("link: device %q: netlink: %w", p.name, err)
	}
	return w, nil
}

// read may be called by one goroutine at a time. The answer is there when the
// request has been sent, so neither call waits, and Go's scheduler need not know.
func (w *watch) read() (n netem, err error) {
	fail := func(err error) (netem, error) { return n, fmt.Errorf("link: state of netem: %w", err) }
	if _, _, errno := unix.RawSyscall(unix.SYS_WRITE, uintptr(w.fd), uintptr(unsafe.Pointer(&w.request[0])), uintptr(len(w.request))); errno != 0 {
		return fail(errno)
	}
	size, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(w.fd), uintptr(unsafe.Pointer(&w.answer[0])), uintptr(len(w.answer)))
	if errno != 0 {
		return fail(errno)
	}
	b := w.answer[:size]
	switch {
	case len(b) < unix.SizeofNlMsghdr:
		return fail(fmt.Errorf("an answer of %d bytes", len(b)))
	case binary.NativeEndian.Uint16(b[4:]) == unix.NLMSG_ERROR && len(b) >= unix.SizeofNlMsghdr+4:
		return fail(syscall.Errno(-int32(binary.NativeEndian.Uint32(b[unix.SizeofNlMsghdr:]))))
	}
	if err := n.parse(b[unix.SizeofNlMsghdr:]); err != nil {
		return fail(err)
	}
	return n, nil
}

func (w *watch) close() { unix.Close(w.fd) }
