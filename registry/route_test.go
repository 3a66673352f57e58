// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"

	"ccload/internal/kerneltest"
	"ccload/internal/netns"

	"github.com/jsimonetti/rtnetlink/v2"
	"golang.org/x/sys/unix"
)

// routes describes all routes of a namespace to the last attribute.
func routes(t *testing.T, ns *netns.NS) (lines []string) {
	t.Helper()
	err := ns.Do(func() error {
		c, err := dialRoutes()
		if err != nil {
			return err
		}
		defer c.Close()
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			all, err := dumpRoutes(c, family)
			if err != nil {
				return err
			}
			for _, r := range all {
				if r.prefix().Addr().IsLinkLocalUnicast() {
					continue // the kernel adds and removes these in its own time
				}
				r.set(unix.RTA_CACHEINFO, nil)          // counts of uses
				r.header[rtFlags] &= unix.RTNH_F_ONLINK // the others are the device's
				lines = append(lines, fmt.Sprintf("%s %x %x", r.prefix(), r.header, r.attrs))
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(lines)
	return lines
}

// congestionOf reads the congestion control of a socket.
func congestionOf(c syscall.Conn) (name string, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return "", err
	}
	cerr := raw.Control(func(fd uintptr) {
		name, err = unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION)
	})
	return name, errors.Join(err, cerr)
}

// between opens a connection from one namespace to an address in another, and says
// what congestion control each end has and whether its socket may choose reno.
func between(t *testing.T, from, to *netns.NS, addr string) (opener, accepter string, chooses error) {
	t.Helper()
	var l net.Listener
	if err := to.Do(func() (err error) { l, err = net.Listen("tcp", net.JoinHostPort(addr, "0")); return err }); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var c *net.TCPConn
	if err := from.Do(func() (err error) { c, err = dialHere(netip.MustParseAddrPort(l.Addr().String())); return err }); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	opener, err1 := congestionOf(c)
	accepter, err2 := congestionOf(s.(*net.TCPConn))
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	raw, _ := c.SyscallConn()
	raw.Control(func(fd uintptr) {
		chooses = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "reno")
	})
	return opener, accepter, chooses
}

// dialHere connects in the network namespace of the calling thread, which Dial of
// two address families would leave.
func dialHere(to netip.AddrPort) (*net.TCPConn, error) {
	return new(net.Dialer).DialTCP(context.Background(), "tcp", netip.AddrPort{}, to)
}

func TestUseRoute(t *testing.T) {
	kerneltest.Privileged(t)
	const name = "ccr_route"
	register(t, Options{Name: name}) // it is restricted, which does not matter here
	near, far := linked(t)
	for i := range behind {
		addr := netip.MustParsePrefix(within[i]).Addr().Next()
		for _, c := range []struct {
			what, prefix string
			lock, made   bool
		}{
			{"the route itself", behind[i], false, false},
			{"the route itself, locked", behind[i], true, false},
			{"a part of a route", within[i], true, true},
			{"an address", addr.String() + "/" + fmt.Sprint(addr.BitLen()), false, true},
			{"what the device brought", netip.MustParsePrefix(ends[0][i]).Masked().String(), true, false},
		} {
			t.Run(c.what+" "+c.prefix, func(t *testing.T) {
				prefix := netip.MustParsePrefix(c.prefix)
				to := addr
				if !prefix.Contains(to) {
					to = netip.MustParsePrefix(ends[1][i]).Addr()
				}
				before := routes(t, near)
				was, _, _ := between(t, near, far, to.String())
				for _, n := range []string{"reno", name} {
					r, err := UseRoute(near, prefix, n, c.lock)
					if err != nil {
						t.Fatal(err)
					}
					if want := n == "reno" && c.made; r.Made != want || len(r.Warnings) > 0 {
						t.Errorf("%+v, want made %v", r, want)
					}
				}
				got, accepter, chooses := between(t, near, far, to.String())
				if got != name || (chooses == nil) == c.lock || accepter == name {
					t.Errorf("it opens with %s, accepts with %s; choosing gives %v", got, accepter, chooses)
				}
				var found []Selection
				if err := near.Do(func() (err error) { found, err = routeSelections("x"); return err }); err != nil {
					t.Fatal(err)
				}
				if want := []Selection{{Kind: byRoute, Name: name, Namespace: "x", Target: c.prefix, Lock: c.lock}}; !slices.Equal(found, want) {
					t.Errorf("selected: %+v", found)
				}
				r, err := RestoreRoute(near, prefix)
				if err != nil || len(r.Warnings) > 0 || len(r.Restored) != 1 || r.Restored[0].To != "" || !strings.HasPrefix(r.Restored[0].From, name) {
					t.Errorf("restored %+v, %v", r, err)
				}
				if after := routes(t, near); !slices.Equal(after, before) {
					t.Errorf("routes were\n%s\nare\n%s", strings.Join(before, "\n"), strings.Join(after, "\n"))
				}
				if again, _, _ := between(t, near, far, to.String()); again != was {
					t.Errorf("connections have %s, had %s", again, was)
				}
				nothingLeft(t)
			})
		}
	}

	prefix := netip.MustParsePrefix(behind[0])
	for what, c := range map[string]struct {
		prefix, name string
	}{
		"unknown name":   {behind[0], "renno"},
		"no route":       {"192.0.2.0/24", "reno"},
		"bits too many":  {"198.19.5.1/16", "reno"},
		"no route there": {"::/0", "reno"},
	} {
		before := routes(t, near)
		if r, err := UseRoute(near, netip.MustParsePrefix(c.prefix), c.name, false); err == nil {
			t.Errorf("%s: %+v", what, r)
		}
		if !slices.Equal(routes(t, near), before) {
			t.Errorf("%s: the routes changed", what)
		}
		nothingLeft(t)
	}

	// A route that somebody else has changed since is left alone, one that is gone is
	// told; so is one that has no effect.
	if _, err := UseRoute(near, prefix, name, false); err != nil {
		t.Fatal(err)
	}
	foreign := func(congestion string) {
		t.Helper()
		err := near.Do(func() error {
			c, err := dialRoutes()
			if err != nil {
				return err
			}
			defer c.Close()
			all, err := dumpRoutes(c, unix.AF_INET)
			if err != nil {
				return err
			}
			return best(all, prefix, prefix.Bits()).with(congestion).send(c, unix.RTM_NEWROUTE, 0x100) // NLM_F_REPLACE
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	foreign("reno lock")
	r, err := RestoreRoute(near, prefix)
	if err != nil || len(r.Restored) > 0 || len(r.Warnings) != 1 || !strings.Contains(r.Warnings[0], "reno lock") {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := UseRoute(near, prefix, name, false); err != nil {
		t.Fatal(err)
	}
	if r, err = RestoreRoute(near, prefix); err != nil || len(r.Restored) != 1 || r.Restored[0].To != "reno lock" {
		t.Errorf("%+v, %v", r, err)
	}
	if got, _, chooses := between(t, near, far, "198.19.5.1"); got != "reno" || chooses == nil {
		t.Errorf("the route gives %s, lets choose: %v", got, chooses == nil)
	}
	foreign("")
	made := netip.MustParsePrefix(within[0])
	if _, err := UseRoute(near, made, name, false); err != nil {
		t.Fatal(err)
	}
	c := rt(t, near)
	if err := c.Route.Delete(&rtnetlink.RouteMessage{
		Family: unix.AF_INET, DstLength: uint8(made.Bits()), Table: unix.RT_TABLE_MAIN,
		Attributes: rtnetlink.RouteAttributes{Dst: made.Addr().AsSlice()},
	}); err != nil {
		t.Fatal(err)
	}
	if r, err = RestoreRoute(near, made); err != nil || len(r.Restored) > 0 {
		t.Errorf("%+v, %v", r, err)
	}
	nothingLeft(t)

	lo := netip.MustParsePrefix("198.18.99.0/24")
	if err := c.Route.Add(&rtnetlink.RouteMessage{
		Family: unix.AF_INET, DstLength: 24, Table: unix.RT_TABLE_MAIN, Protocol: unix.RTPROT_STATIC, Type: unix.RTN_UNICAST, Scope: unix.RT_SCOPE_LINK,
		Attributes: rtnetlink.RouteAttributes{Dst: lo.Addr().AsSlice(), OutIface: 1},
	}); err != nil {
		t.Fatal(err)
	}
	if u, err := UseRoute(near, lo, name, false); err != nil || len(u.Warnings) != 1 {
		t.Errorf("%+v, %v", u, err)
	}
	if r, err = Restore(); err != nil || len(r.Restored) != 1 {
		t.Errorf("%+v, %v", r, err)
	}
	nothingLeft(t)
}

// A route over several next hops keeps them, with their weights.
func TestUseMultipath(t *testing.T) {
	kerneltest.Privileged(t)
	near, _ := linked(t)
	c := rt(t, near)
	for i, p := range []string{"198.18.200.0/24", "2001:db8:9::/48"} {
		to := netip.MustParsePrefix(p)
		var hops []rtnetlink.NextHop
		for n := range 2 {
			gw := netip.MustParsePrefix(ends[1][i]).Addr()
			for range n * 5 {
				gw = gw.Next()
			}
			hops = append(hops, rtnetlink.NextHop{Hop: rtnetlink.RTNextHop{IfIndex: 2, Hops: uint8(3 * n)}, Gateway: gw.AsSlice()})
		}
		hops[0].Hop.IfIndex = up(t, c, "ccr0")
		hops[1].Hop.IfIndex = hops[0].Hop.IfIndex
		if err := c.Route.Add(&rtnetlink.RouteMessage{
			Family: family(to), DstLength: uint8(to.Bits()), Table: unix.RT_TABLE_MAIN, Protocol: unix.RTPROT_STATIC, Type: unix.RTN_UNICAST,
			Attributes: rtnetlink.RouteAttributes{Dst: to.Addr().AsSlice(), Priority: 77, Multipath: hops},
		}); err != nil {
			t.Fatal(err)
		}
		before := routes(t, near)
		if _, err := UseRoute(near, to, "reno", true); err != nil {
			t.Fatal(err)
		}
		if during := routes(t, near); slices.Equal(during, before) || len(during) != len(before) {
			t.Errorf("%s: routes were\n%s\nare\n%s", p, strings.Join(before, "\n"), strings.Join(during, "\n"))
		}
		if r, err := RestoreRoute(near, to); err != nil || len(r.Restored) != 1 {
			t.Errorf("%s: %+v, %v", p, r, err)
		}
		if after := routes(t, near); !slices.Equal(after, before) {
			t.Errorf("%s: routes were\n%s\nare\n%s", p, strings.Join(before, "\n"), strings.Join(after, "\n"))
		}
	}
	nothingLeft(t)
}

// Whatever a route message holds, it is read and written without a panic, and what
// is set is what is read.
func FuzzRoute(f *testing.F) {
	f.Add([]byte("\x02\x10\x00\x00\xfe\x04\x00\x01\x00\x00\x00\x00\x08\x00\x01\x00\xc6\x13\x00\x00\x14\x00\x08\x00\x08\x00\x02\x00\x78\x05\x00\x00\x08\x00\x08\x00\xb0\x04\x00\x00"), "reno lock")
	f.Add([]byte("\x0a\x40\x00\x00\xfe\x02\x00\x01\x00\x00\x00\x00\x24\x00\x09\x00\x10\x00\x11\x02\x02\x00\x00\x00\x08\x00\x05\x00\xc6\x12\x07\x02\x10\x00\x00\x03\x02\x00\x00\x00\x08\x00\x05\x00\xc6\x12\x07\x07"), "cubic")
	f.Fuzz(func(t *testing.T, b []byte, congestion string) {
		r, err := parseRoute(b)
		if err != nil {
			return
		}
		name, rest, _ := strings.Cut(congestion, " ")
		congestion = selection(name, rest != "")
		if name == "" || len(name) > 15 || strings.ContainsRune(name, 0) {
			congestion = ""
		}
		if got := r.with(congestion).congestion(); got != congestion {
			t.Errorf("set %q, read %q", congestion, got)
		}
		best([]*route{r}, r.prefix(), r.prefix().Bits())
		if p := r.prefix(); p.IsValid() {
			k := key{}
			copy(k.Target[:], r.target().bytes())
			if targetOf(k) != r.target() {
				t.Errorf("target %+v, read %+v", r.target(), targetOf(k))
			}
		}
	})
}
