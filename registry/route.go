// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"ccload/internal/fault"
	"ccload/internal/netns"

	"github.com/mdlayher/netlink"
	"github.com/mdlayher/netlink/nlenc"
	"golang.org/x/sys/unix"
)

// A route can name the congestion control of the connections over it, whichever
// side opens them: the metric RTAX_CC_ALGO of rtnetlink(7), congctl in
// ip-route(8). Its bit in RTAX_LOCK forbids sockets to choose another. The route
// keeps a hash of the name and no reference: while the kernel has no congestion
// control of that name, the default is used and the route does not show it.

// RouteChange says what UseRoute changed.
type RouteChange struct {
	Prefix   netip.Prefix `json:"prefix"`
	Before   string       `json:"before,omitempty"` // with " lock" if it was locked; absent: none
	After    string       `json:"after"`
	Made     bool         `json:"made,omitempty"` // there was no route of exactly this prefix: a copy of the one that covers it was made
	Undo     bool         `json:"undo,omitempty"` // Restore puts back what was there before this or an earlier selection
	Warnings []string     `json:"warnings,omitempty"`
}

// UseRoute selects a congestion control for new connections to and from a prefix
// in a network namespace (nil: the caller's), on the best route of exactly that
// prefix in the main table; if there is none, on a more specific copy of the route
// that covers it. The rest of the route stays as it is. With lock, sockets may not
// choose another. A kernel module that has the name is loaded if need be; the list
// of allowed ones does not matter.
//
// Restore takes it back. It needs CAP_NET_ADMIN and CAP_BPF, and for another
// namespace CAP_SYS_ADMIN.
func UseRoute(ns *netns.NS, prefix netip.Prefix, name string, lockIt bool) (*RouteChange, error) {
	fail := func(err error) (*RouteChange, error) { return nil, fmt.Errorf("route %q: %w", prefix, err) }
	if !prefix.IsValid() || prefix != prefix.Masked() {
		return fail(fmt.Errorf("bits are set beyond the prefix: %s is meant?", prefix.Masked()))
	}
	if err := need("/", "CAP_NET_ADMIN", "CAP_BPF"); err != nil {
		return fail(err)
	}
	unlock, err := lock()
	if err != nil {
		return fail(err)
	}
	defer unlock()
	c := &RouteChange{Prefix: prefix, After: selection(name, lockIt)}
	if err := in(ns, c.apply); err != nil {
		return fail(err)
	}
	return c, nil
}

// selection is how a congestion control of a route is written down.
func selection(name string, locked bool) string {
	if locked {
		return name + " lock"
	}
	return name
}

// noRoute stands in the journal for a route that was not there.
const noRoute = "-"

func (c *RouteChange) apply() error {
	name, _, _ := strings.Cut(c.After, " ")
	if _, err := autoload(name); err != nil {
		return err
	}
	conn, err := dialRoutes()
	if err != nil {
		return err
	}
	defer conn.Close()
	all, err := dumpRoutes(conn, family(c.Prefix))
	if err != nil {
		return err
	}
	r, now, flags := best(all, c.Prefix, c.Prefix.Bits()), noRoute, netlink.Replace
	if r != nil {
		now = r.congestion()
		c.Before = now
	} else if r, flags, c.Made = covering(all, c.Prefix), netlink.Create|netlink.Excl, true; r == nil {
		return errors.New("there is no route to it in the main table")
	}
	if err := r.usable(c.Made); err != nil {
		return err
	}
	if c.Made {
		r = r.specific(c.Prefix)
	}
	if r.device() == 1 { // the loopback device, in every namespace
		c.Warnings = append(c.Warnings, "routes over the loopback device have no effect: the kernel's local routes carry its traffic")
	}
	j, err := openJournal(true)
	if err != nil {
		return err
	}
	defer j.close()
	k, err := keyOf(keyRoute, r.target().bytes())
	if err != nil {
		return err
	}
	p, err := j.remember(k, now, c.After)
	if err != nil {
		return err
	}
	c.Undo = !p.empty
	return p.settled(r.with(c.After).send(conn, unix.RTM_NEWROUTE, flags))
}

// route undoes the selection on a route of the network namespace that the thread
// is in.
func (o *Restored) route(t target, v *value, warning *string) error {
	o.Kind, o.Target, o.To = byRoute, t.prefix.String(), v.Before.String()
	conn, err := dialRoutes()
	if err != nil {
		return err
	}
	defer conn.Close()
	all, err := dumpRoutes(conn, family(t.prefix))
	if err != nil {
		return err
	}
	made := o.To == noRoute
	if made {
		o.To = ""
	}
	i := slices.IndexFunc(all, func(r *route) bool { return r.target() == t && r.congestion() != "" })
	if i < 0 {
		i = slices.IndexFunc(all, func(r *route) bool { return r.target() == t })
	}
	if i < 0 {
		if !made {
			*warning = "the route is gone"
		}
		return nil
	}
	r := all[i]
	o.From = r.congestion()
	if o.From == "" { // which it also shows when the name is gone
		o.From = v.Ours[1].String()
		if _, err := autoload(v.Ours[1].name()); err == nil {
			o.From = ""
		}
	}
	switch {
	case !v.ours(o.From):
		*warning = left(o.From)
		return nil
	case made:
		return r.settable().send(conn, unix.RTM_DELROUTE, 0)
	case o.From == o.To:
		return nil
	}
	if name, _, _ := strings.Cut(o.To, " "); name != "" {
		if err := Require(name); err != nil {
			return err
		}
	}
	return r.with(o.To).send(conn, unix.RTM_NEWROUTE, netlink.Replace)
}

// route is a route as rtnetlink gives it: struct rtmsg and its attributes.
type route struct {
	header [unix.SizeofRtMsg]byte
	attrs  []netlink.Attribute
}

// Offsets in struct rtmsg (rtnetlink(7)).
const (
	rtFamily = iota
	rtDstLen
	rtSrcLen
	rtTOS
	rtTable
	rtProtocol
	rtScope
	rtType
	rtFlags // 4 bytes
)

const (
	attrNexthop = 30     // RTA_NH_ID
	attrTypes   = 0x3fff // NLA_TYPE_MASK
	metricCC    = unix.RTAX_CC_ALGO
	hopFlags    = 1 | 1<<4 // RTNH_F_DEAD, RTNH_F_LINKDOWN: the kernel tells them and does not take them
)

// target tells the routes of a namespace apart: those that the kernel takes for
// one and replaces.
type target struct {
	table, priority uint32
	tos             uint8
	prefix          netip.Prefix
}

func (t target) bytes() []byte {
	b := binary.NativeEndian.AppendUint32(nil, t.table)
	b = binary.NativeEndian.AppendUint32(b, t.priority)
	addr := t.prefix.Addr().As16()
	return append(append(b, t.tos, uint8(t.prefix.Bits()), uint8(family(t.prefix))), addr[:]...)
}

// targetOf reads the key of a route.
func targetOf(k key) target {
	b := k.Target[:]
	addr := netip.AddrFrom16([16]byte(b[11:27]))
	if b[10] == unix.AF_INET {
		addr = addr.Unmap()
	}
	return target{binary.NativeEndian.Uint32(b), binary.NativeEndian.Uint32(b[4:]), b[8], netip.PrefixFrom(addr, int(b[9]))}
}

func family(p netip.Prefix) uint8 {
	if p.Addr().Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func dialRoutes() (*netlink.Conn, error) {
	c, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		return nil, fmt.Errorf("rtnetlink: %w", err)
	}
	c.SetOption(netlink.ExtendedAcknowledge, true) // errors say more where the kernel can
	return c, nil
}

// dumpRoutes gives the routes of a family in all tables.
func dumpRoutes(c *netlink.Conn, family uint8) ([]*route, error) {
	msgs, err := c.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.RTM_GETROUTE, Flags: netlink.Request | netlink.Dump},
		Data:   append([]byte{family}, make([]byte, unix.SizeofRtMsg-1)...),
	})
	if err != nil {
		return nil, fmt.Errorf("rtnetlink: %w", err)
	}
	var all []*route
	for _, m := range msgs {
		r, err := parseRoute(m.Data)
		if err != nil {
			return nil, fmt.Errorf("rtnetlink: %w", err)
		}
		if r.header[rtFamily] == family { // a kernel without it gives those of the others
			all = append(all, r)
		}
	}
	return all, nil
}

func parseRoute(b []byte) (*route, error) {
	if len(b) < unix.SizeofRtMsg {
		return nil, fmt.Errorf("route message of %d bytes: too short", len(b))
	}
	r := &route{header: [unix.SizeofRtMsg]byte(b)}
	var err error
	r.attrs, err = netlink.UnmarshalAttributes(b[unix.SizeofRtMsg:])
	return r, err
}

// attr is an attribute's content, nil if there is none.
func (r *route) attr(typ uint16) []byte {
	for _, a := range r.attrs {
		if a.Type&attrTypes == typ {
			return a.Data
		}
	}
	return nil
}

// number is an attribute of 32 bits, 0 if there is none.
func (r *route) number(typ uint16) uint32 {
	if b := r.attr(typ); len(b) == 4 {
		return nlenc.Uint32(b)
	}
	return 0
}

// attribute makes one; its length counts a header of 4 bytes.
func attribute(typ uint16, data []byte) netlink.Attribute {
	return netlink.Attribute{Length: uint16(4 + len(data)), Type: typ, Data: data}
}

// set replaces an attribute, or with nil removes it, in its place.
func (r *route) set(typ uint16, data []byte) {
	i := slices.IndexFunc(r.attrs, func(a netlink.Attribute) bool { return a.Type&attrTypes == typ })
	switch {
	case i < 0 && data != nil:
		r.attrs = append(r.attrs, attribute(typ, data))
	case i >= 0 && data != nil:
		r.attrs[i] = attribute(typ, data)
	case i >= 0:
		r.attrs = slices.Delete(r.attrs, i, i+1)
	}
}

func (r *route) clone() *route { return &route{r.header, slices.Clone(r.attrs)} }

func (r *route) table() uint32 {
	if t := r.number(unix.RTA_TABLE); t != 0 {
		return t
	}
	return uint32(r.header[rtTable])
}

func (r *route) device() uint32 { return r.number(unix.RTA_OIF) }

func (r *route) prefix() netip.Prefix {
	addr, ok := netip.AddrFromSlice(r.attr(unix.RTA_DST))
	if !ok { // a default route has none
		addr = netip.IPv6Unspecified()
		if r.header[rtFamily] == unix.AF_INET {
			addr = netip.IPv4Unspecified()
		}
	}
	return netip.PrefixFrom(addr, int(r.header[rtDstLen]))
}

func (r *route) target() target {
	return target{r.table(), r.number(unix.RTA_PRIORITY), r.header[rtTOS], r.prefix()}
}

// best is the route that the kernel prefers among those of the main table to a
// prefix whose own prefix has that length; nil if there is none. Of equal ones the
// first counts.
func best(all []*route, to netip.Prefix, bits int) (found *route) {
	for _, r := range all {
		p := r.prefix()
		if r.table() != unix.RT_TABLE_MAIN || r.header[rtTOS] != 0 || r.header[rtSrcLen] != 0 || p.Bits() != bits || !p.Contains(to.Addr()) {
			continue
		}
		if found == nil || r.number(unix.RTA_PRIORITY) < found.number(unix.RTA_PRIORITY) {
			found = r
		}
	}
	return found
}

// covering is the best route of the longest prefix that covers another.
func covering(all []*route, to netip.Prefix) *route {
	for bits := to.Bits() - 1; bits >= 0; bits-- {
		if r := best(all, to, bits); r != nil {
			return r
		}
	}
	return nil
}

// usable says why a route cannot carry a congestion control, be it itself or as
// what is copied.
func (r *route) usable(copied bool) error {
	if r.header[rtType] != unix.RTN_UNICAST {
		return fmt.Errorf("the route %s carries no traffic: its type is %d", r.prefix(), r.header[rtType])
	}
	if r.header[rtProtocol] == unix.RTPROT_RA && !copied {
		return errors.New("the route is from router advertisements, and the next would set it anew: select it on more specific prefixes")
	}
	return nil
}

// specific is a copy of the route for a part of its prefix, as an administrator
// would make it.
func (r *route) specific(p netip.Prefix) *route {
	s := r.clone()
	s.header[rtDstLen], s.header[rtProtocol] = uint8(p.Bits()), unix.RTPROT_STATIC
	s.set(unix.RTA_DST, p.Addr().AsSlice())
	s.set(unix.RTA_CACHEINFO, nil) // it does not expire
	return s
}

// metrics reads the metrics of a route: their attributes, and which are locked.
func (r *route) metrics() (attrs []netlink.Attribute, locked uint32) {
	attrs, err := netlink.UnmarshalAttributes(r.attr(unix.RTA_METRICS))
	if err != nil {
		return nil, 0
	}
	for _, a := range attrs {
		if a.Type == unix.RTAX_LOCK && len(a.Data) == 4 {
			locked = nlenc.Uint32(a.Data)
		}
	}
	return attrs, locked
}

// congestion is the congestion control that a route names, "" if it names none.
func (r *route) congestion() string {
	attrs, locked := r.metrics()
	for _, a := range attrs {
		if a.Type == metricCC {
			return selection(nlenc.String(a.Data), locked>>metricCC&1 == 1)
		}
	}
	return ""
}

// with is the route as it can be set with another congestion control, or with ""
// none.
func (r *route) with(congestion string) *route {
	s := r.settable()
	name, lock, _ := strings.Cut(congestion, " ")
	attrs, locked := r.metrics()
	attrs = slices.DeleteFunc(slices.Clone(attrs), func(a netlink.Attribute) bool {
		return a.Type == metricCC || a.Type == unix.RTAX_LOCK
	})
	locked &^= 1 << metricCC
	if lock != "" {
		locked |= 1 << metricCC
	}
	if locked != 0 {
		attrs = append(attrs, attribute(unix.RTAX_LOCK, nlenc.Uint32Bytes(locked)))
	}
	if name != "" {
		attrs = append(attrs, attribute(metricCC, nlenc.Bytes(name)))
	}
	var b []byte
	if len(attrs) > 0 {
		b, _ = netlink.MarshalAttributes(attrs) // it fails on attributes that are too long only
	}
	s.set(unix.RTA_METRICS, b)
	return s
}

// settable is the route without what the kernel tells and does not take.
func (r *route) settable() *route {
	s := r.clone()
	binary.NativeEndian.PutUint32(s.header[rtFlags:], nlenc.Uint32(r.header[rtFlags:])&unix.RTNH_F_ONLINK)
	if info := r.attr(unix.RTA_CACHEINFO); len(info) >= 12 {
		if in := int32(nlenc.Uint32(info[8:12])); in > 0 { // struct rta_cacheinfo: rta_expires, in hundredths of a second
			s.set(unix.RTA_EXPIRES, nlenc.Uint32Bytes(uint32(in+99)/100))
		}
	}
	s.set(unix.RTA_CACHEINFO, nil)
	if hops := bytes.Clone(r.attr(unix.RTA_MULTIPATH)); hops != nil {
		for rest := hops; len(rest) >= unix.SizeofRtNexthop; { // struct rtnexthop: length, flags, …
			rest[2] &^= hopFlags
			n := (int(nlenc.Uint16(rest[:2])) + 3) &^ 3
			rest = rest[min(max(n, unix.SizeofRtNexthop), len(rest)):]
		}
		s.set(unix.RTA_MULTIPATH, hops)
	}
	if r.attr(attrNexthop) != nil { // the nexthop object has these
		for _, typ := range []uint16{unix.RTA_OIF, unix.RTA_GATEWAY, unix.RTA_VIA, unix.RTA_MULTIPATH, unix.RTA_ENCAP_TYPE, unix.RTA_ENCAP} {
			s.set(typ, nil)
		}
	}
	return s
}

// send asks the kernel to add, replace or delete the route.
func (r *route) send(c *netlink.Conn, typ netlink.HeaderType, flags netlink.HeaderFlags) error {
	attrs, err := netlink.MarshalAttributes(r.attrs)
	if err != nil {
		return err
	}
	if err := fault.At("change route " + r.prefix().String()); err != nil {
		return err
	}
	_, err = c.Execute(netlink.Message{
		Header: netlink.Header{Type: typ, Flags: netlink.Request | netlink.Acknowledge | flags},
		Data:   append(r.header[:], attrs...),
	})
	if err != nil {
		return fmt.Errorf("rtnetlink: %w", err)
	}
	return nil
}

// routeSelections lists the routes of the network namespace that the thread is in
// that name a congestion control, whoever has set it.
func routeSelections(label string) ([]Selection, error) {
	conn, err := dialRoutes()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	var found []Selection
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		all, err := dumpRoutes(conn, family)
		if err != nil {
			return nil, err
		}
		for _, r := range all {
			if cc := r.congestion(); cc != "" {
				name, lock, _ := strings.Cut(cc, " ")
				found = append(found, Selection{Kind: byRoute, Name: name, Namespace: label, Target: r.prefix().String(), Lock: lock != ""})
			}
		}
	}
	return found, nil
}
