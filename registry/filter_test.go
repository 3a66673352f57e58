// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"ccload/internal/inetdiag"
)

// socketsToFilter are sockets that differ in all that a filter can ask for.
var socketsToFilter = []*inetdiag.Socket{
	{State: 1, Src: netip.MustParseAddrPort("192.0.2.1:40000"), Dst: netip.MustParseAddrPort("10.0.0.1:443"), Cong: "cubic"},
	{State: 1, Src: netip.MustParseAddrPort("[::ffff:192.0.2.1]:443"), Dst: netip.MustParseAddrPort("[::ffff:10.1.0.1]:1024"), Cong: "reno"},
	{State: 8, Src: netip.MustParseAddrPort("[2001:db8::1]:22"), Dst: netip.MustParseAddrPort("[2001:db8:1::2]:443"), Cong: "cubic"},
	{State: 10, Src: netip.MustParseAddrPort("[::]:443"), Dst: netip.MustParseAddrPort("[::]:0"), Cong: "reno"},
	{State: 2, Src: netip.MustParseAddrPort("192.0.2.1:1023"), Dst: netip.MustParseAddrPort("198.18.0.1:80"), Cong: "bbr"},
}

func TestFilter(t *testing.T) {
	for _, c := range []struct{ text, text2, chosen string }{ // as String has it; of the above
		{"", "", "abce"},
		{"dst 10.0.0.0/8", "dst 10.0.0.0/8", "ab"},
		{"dst = 10.9.9.9/8", "dst 10.0.0.0/8", "ab"},
		{"dst 10.0.0.1", "dst 10.0.0.1", "a"},
		{"dst 10.0.0.1:443", "dst 10.0.0.1:443", "a"},
		{"dst 10.0.0.0/8:1024", "dst 10.0.0.0/8:1024", "b"},
		{"src *:443", "src *:443", "b"},
		{"src :443 state all", "src *:443 and state all", "bd"},
		{"src *", "src *", "abce"},
		{"dst ::ffff:10.0.0.0/104", "dst 10.0.0.0/8", "ab"},
		{"dst [2001:db8::]/32", "dst [2001:db8::/32]", "c"},
		{"dst [2001:db8::/32]:443", "dst [2001:db8::/32]:443", "c"},
		{"dst [2001:db8:1::2]:443", "dst [2001:db8:1::2]:443", "c"},
		{"dst 2001:db8:1::2", "dst [2001:db8:1::2]", "c"},
		{"dst 0.0.0.0/0", "dst 0.0.0.0/0", "abe"},
		{"dport = :443", "dport = :443", "ac"},
		{"dport 443", "dport = :443", "ac"},
		{"sport >= :1024", "sport >= :1024", "a"},
		{"sport<:1024", "sport < :1024", "bce"},
		{"sport le 443", "sport <= :443", "bc"},
		{"sport gt 443", "sport > :443", "ae"},
		{"sport neq 443", "sport != :443", "ace"},
		{"state established", "state established", "ab"},
		{"state established state close-wait", "state close-wait state established", "abc"},
		{"state connected exclude established", "state close-wait state closing state fin-wait-1 state fin-wait-2 state last-ack state syn-recv state syn-sent state time-wait", "ce"},
		{"exclude established", "", "cde"},
		{"not state established", "not state established", "cde"},
		{"state all", "state all", "abcde"},
		{"state synchronized", "state synchronized", "abc"},
		{"cc cubic", "cc cubic", "ac"},
		{"cc = reno or dport = :80", "cc reno or dport = :80", "be"},
		{"cc cubic dport 443 and not src 192.0.2.1", "cc cubic and dport = :443 and not src 192.0.2.1", "c"},
		{"(cc bbr or cc cubic) and sport > :1000", "(cc bbr or cc cubic) and sport > :1000", "ae"},
		{"cc bbr | cc cubic & sport > :1000", "cc bbr or cc cubic and sport > :1000", "ae"},
		{"!(cc cubic && dport == 443) && !!(cc bbr || cc reno)", "not (cc cubic and dport = :443) and not not (cc bbr or cc reno)", "be"},
		{"state listening or cc bbr", "state listening or cc bbr", "de"},
	} {
		f, err := ParseFilter(c.text)
		if err != nil {
			t.Error(err)
			continue
		}
		var chosen string
		for i, s := range socketsToFilter {
			if f.states(unnamed)>>s.State&1 == 1 && f.match(s) {
				chosen += string(rune('a' + i))
			}
		}
		if chosen != c.chosen || c.text2 != "" && f.String() != c.text2 {
			t.Errorf("%q: read as %q, chooses %q, want %q and %q", c.text, f, chosen, c.text2, c.chosen)
		}
	}
}

func TestFilterErrors(t *testing.T) {
	for text, want := range map[string]string{
		"dest 10.0.0.1":         `column 1: "dest": not a word of filters; did you mean "dst"?`,
		"cc reno xyzzy":         `column 9: "xyzzy": not a word of filters, which are dst, src, dport, sport, state, exclude, cc`,
		"dst":                   "column 4: a value is missing",
		"dst = )":               "column 7: a value is missing",
		"dst 10.0.0.256":        `column 5: "10.0.0.256": not an address or prefix`,
		"dst 10.0.0.0/33":       `column 5: "10.0.0.0/33": not an address or prefix`,
		"dst [10.0.0.1]:1":      `column 5: "[10.0.0.1]:1": not an IPv6 address in brackets`,
		"dst [::1":              `column 5: "[::1": not an address or prefix`,
		"dst [::1]x":            `column 5: "[::1]x": not an IPv6 address in brackets`,
		"dst fe80::1%lo":        `column 5: "fe80::1%lo": not an address or prefix`,
		"dst != 10.0.0.1":       "column 5: a value is missing",
		"dport = :https":        `column 9: "https": not a port, from 0 to 65535`,
		"dport = :65536":        `column 9: "65536": not a port, from 0 to 65535`,
		"dst 10.0.0.1:":         `column 5: "": not a port, from 0 to 65535`,
		"sport => 1":            "column 8: a value is missing",
		"state estab":           `column 7: "estab": not a state; did you mean "established"?`,
		"state all exclude all": "column 1: no state is left",
		"(cc reno":              "column 9: a ) is missing, for the ( in column 1",
		"cc reno)":              `column 8: ")" is too much`,
		"cc reno and":           "column 12: something is missing at the end",
		"or cc reno":            `column 1: "or": not a word of filters, which are dst, src, dport, sport, state, exclude, cc`,
	} {
		f, err := ParseFilter(text)
		e, ok := errors.AsType[*FilterError](err)
		if !ok {
			t.Errorf("%q: read as %q, %v", text, f, err)
		} else if !strings.HasSuffix(e.Error(), ": "+want) {
			t.Errorf("%q: %v, want %s", text, err, want)
		}
	}
}

// What is read is written so that it reads the same and chooses the same.
func FuzzParseFilter(f *testing.F) {
	for _, text := range []string{
		"", "dst 10.0.0.0/8:443 or src [2001:db8::]/32", "sport >= :1024 state established exclude all",
		"not (cc cubic | cc=reno) && !state listening", "dst ::ffff:1.2.3.4/97", "((dport != 1))",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		a, err := ParseFilter(text)
		if err != nil {
			e, ok := errors.AsType[*FilterError](err)
			if !ok || e.Column < 1 || e.Column > len(text)+1 {
				t.Fatal(err)
			}
			return
		}
		b, err := ParseFilter(a.String())
		if err != nil {
			t.Fatalf("%q is written as %q: %v", text, a, err)
		}
		if a.String() != b.String() {
			t.Fatalf("%q is written as %q, and that as %q", text, a, b)
		}
		for _, s := range socketsToFilter {
			if a.match(s) != b.match(s) || a.states(unnamed) != b.states(unnamed) {
				t.Fatalf("%q and %q differ for %+v", text, a, s)
			}
			if a.match(s) && a.states(anyState)>>s.State&1 == 0 {
				t.Fatalf("%q matches %+v, whose state it leaves out", text, s)
			}
		}
	})
}
