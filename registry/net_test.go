// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"testing"

	"ccload/internal/netns"

	"github.com/jsimonetti/rtnetlink/v2"
	"github.com/jsimonetti/rtnetlink/v2/driver"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// The addresses of the two ends of a pair, and prefixes behind the second.
var (
	ends   = [2][]string{{"198.18.7.1/24", "2001:db8:7::1/64"}, {"198.18.7.2/24", "2001:db8:7::2/64"}}
	behind = []string{"198.19.0.0/16", "2001:db8:8::/48"}
	within = []string{"198.19.5.0/24", "2001:db8:8:5::/64"} // of those
)

// rt opens rtnetlink in a namespace.
func rt(t testing.TB, ns *netns.NS) *rtnetlink.Conn {
	t.Helper()
	c, err := rtnetlink.Dial(&netlink.Config{NetNS: ns.FD()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// up gives a device addresses and takes it up.
func up(t testing.TB, c *rtnetlink.Conn, name string, addrs ...string) (index uint32) {
	t.Helper()
	links, err := c.Link.List()
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(links, func(l rtnetlink.LinkMessage) bool { return l.Attributes.Name == name })
	if i < 0 {
		t.Fatalf("no device %q", name)
	}
	index = links[i].Index
	if err := c.Link.Set(&rtnetlink.LinkMessage{Index: index, Flags: unix.IFF_UP, Change: unix.IFF_UP}); err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		p := netip.MustParsePrefix(a)
		addr := net.IP(p.Addr().AsSlice())
		err := c.Address.New(&rtnetlink.AddressMessage{
			Family: family(p), PrefixLength: uint8(p.Bits()), Index: index, Flags: unix.IFA_F_NODAD,
			Attributes: &rtnetlink.AddressAttributes{Address: addr, Local: addr, Flags: unix.IFA_F_NODAD},
		})
		if err != nil && !errors.Is(err, unix.EEXIST) {
			t.Fatal(err)
		}
	}
	return index
}

// linked is two network namespaces with a veth between them. The second has an
// address of each prefix that is behind it, and the first a route there.
func linked(t testing.TB) (near, far *netns.NS) {
	t.Helper()
	near, far = newNS(t), newNS(t)
	a, b := rt(t, near), rt(t, far)
	err := a.Link.New(&rtnetlink.LinkMessage{Attributes: &rtnetlink.LinkAttributes{
		Name: "ccr0", Info: &rtnetlink.LinkInfo{Kind: "veth", Data: &driver.Veth{PeerInfo: &rtnetlink.LinkMessage{
			Attributes: &rtnetlink.LinkAttributes{Name: "ccr0", NetNS: rtnetlink.NetNSForFD(uint32(far.FD()))},
		}}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	up(t, a, "lo")
	up(t, b, "lo", "198.19.5.1/32", "2001:db8:8:5::1/128")
	index := up(t, a, "ccr0", ends[0]...)
	up(t, b, "ccr0", ends[1]...)
	for i, p := range behind {
		to := netip.MustParsePrefix(p)
		err := a.Route.Add(&rtnetlink.RouteMessage{
			Family: family(to), DstLength: uint8(to.Bits()), Table: unix.RT_TABLE_MAIN, Protocol: unix.RTPROT_STATIC, Type: unix.RTN_UNICAST,
			Attributes: rtnetlink.RouteAttributes{
				Dst: to.Addr().AsSlice(), OutIface: index, Gateway: netip.MustParsePrefix(ends[1][i]).Addr().AsSlice(),
				Metrics: &rtnetlink.RouteMetrics{MTU: 1400, AdvMSS: 1200},
			},
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return near, far
}
