// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"math"
	"path/filepath"
	"strings"
	"testing"

	"ccload/harness/trace"
)

// bad is what a parser must refuse; the value is what the error has to say.
type bad map[string]string

func (b bad) check(t *testing.T, parse func(string) error) {
	t.Helper()
	for in, want := range b {
		if err := parse(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error %v, want one with %q", in, err, want)
		}
	}
}

// near allows for the rounding of binary fractions.
func near(a, b float64) bool { return math.Abs(a-b) <= 1e-12*math.Abs(b) }

func TestParseRate(t *testing.T) {
	for in, want := range map[string]float64{
		"20mbit": 20e6, "1gbit": 1e9, "500kbit": 5e5, "1.5Mbit": 1.5e6, "9600bit": 9600,
		"1kibit": 1024, "1MIbit": 1 << 20, ".5gbit": 5e8, "1TBIT": 1e12,
	} {
		if got, err := ParseRate(in); err != nil || !near(got, want) {
			t.Errorf("%q: %v, %v; want %v", in, got, err, want)
		}
	}
	bad{
		"2Mbps": "in bits or in bytes? say 2mbit or 16mbit", "1bps": "say 1bit or 8bit", ".5gibps": "say 0.5gibit or 4gibit",
		"50": "which unit? say 50kbit, 50mbit or 50gbit", "1000000": "which unit?", "1bitbps": "unknown unit", "1bpsbit": "unknown unit",
		"": "not a number", "mbit": "not a number", "-1mbit": "not a number", "20mb": `unknown unit "mb"`, "20m": "unknown unit",
		"20 mbit": "unknown unit", "0": "which unit?", "0mbit": "out of range", "1e9": `unknown unit "e9"`, "1.2.3bit": "not a number",
		"nan": "not a number", "inf": "not a number", "1xbit": "unknown unit", strings.Repeat("9", 400): "not a number",
	}.check(t, func(s string) error { _, err := ParseRate(s); return err })
}

func TestParseMTU(t *testing.T) {
	for in, want := range map[string]int{"576": 576, "1500": 1500, "9000": 9000} {
		if got, err := ParseMTU(in); err != nil || got != want {
			t.Errorf("%q: %v, %v; want %v", in, got, err, want)
		}
	}
	const wrong = "a whole number of bytes from 576 to 9000"
	bad{"": wrong, "575": wrong, "9001": wrong, "0": wrong, "-1": wrong, "1500b": wrong, "1.5": wrong, "99999999999999999999": wrong}.
		check(t, func(s string) error { _, err := ParseMTU(s); return err })
}

func TestParseCC(t *testing.T) {
	for _, in := range []string{"reno", "bpf_cubic", "dctcp-reno", "a.b", ".a", "exactly15bytes_"} {
		if got, err := ParseCC(in); err != nil || got != in {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
	for _, in := range []string{
		"", ".", "..", "...", "a/b", "/", "../reno", "a b", "a\n", "a\x1b[2J", "$cc", "ä", `a"b`, `a\b`, "exactly_16_bytes", strings.Repeat("9", 100000),
	} {
		if _, err := ParseCC(in); err == nil {
			t.Errorf("%.20q: no error", in)
		}
	}
}

func TestParseTime(t *testing.T) {
	for in, want := range map[string]float64{
		"40ms": 0.04, "1s": 1, "100us": 1e-4, "100µs": 1e-4, "5ns": 5e-9, "2min": 120, "1.5h": 5400, "0s": 0, "3secs": 3, "7MSEC": 0.007,
	} {
		if got, err := ParseTime(in); err != nil || !near(got, want) {
			t.Errorf("%q: %v, %v; want %v", in, got, err, want)
		}
	}
	bad{"40": "say 40ms or 40s", "": "not a number", "ms": "not a number", "-1s": "not a number", "4 s": "unknown unit", "4d": "unknown unit"}.
		check(t, func(s string) error { _, err := ParseTime(s); return err })
}

func TestParseBuffer(t *testing.T) {
	for in, want := range map[string]struct {
		packets    int
		bdp, bytes float64
	}{
		"1bdp": {0, 1, 0}, "0.5BDP": {0, 0.5, 0}, "100p": {100, 0, 0}, "64kb": {0, 0, 65536}, "700b": {0, 0, 700}, "1mb": {0, 0, 1 << 20},
	} {
		if p, b, n, err := ParseBuffer(in); err != nil || p != want.packets || b != want.bdp || n != want.bytes {
			t.Errorf("%q: %v, %v, %v, %v; want %v", in, p, b, n, err, want)
		}
	}
	bad{"100": "say 100bdp, 100p", "0p": "out of range", "0bdp": "out of range", "1.5p": "whole number", "x": "not a number", "5q": "unknown unit"}.
		check(t, func(s string) error { _, _, _, err := ParseBuffer(s); return err })
}

func TestParseLoss(t *testing.T) {
	for in, want := range map[string]trace.Loss{
		"0.01%": {Probability: 0.0001}, "1/10000": {Every: 10000}, "0.5": {Probability: 0.5}, "0%": {}, "1/2": {Every: 2},
	} {
		if got, err := ParseLoss(in); err != nil || got.Every != want.Every || !near(got.Probability, want.Probability) {
			t.Errorf("%q: %+v, %v; want %+v", in, got, err, want)
		}
	}
	bad{"": "not a number", "100%": "less than 100%", "1": "less than 100%", "2/3": "1/N", "1/1": "1/N", "1/x": "1/N", "1/-5": "1/N", "3p": "say 0.01%"}.
		check(t, func(s string) error { _, err := ParseLoss(s); return err })
}

func TestParseECN(t *testing.T) {
	if got, err := ParseECN("20p"); err != nil || got != 20 {
		t.Errorf("got %v, %v", got, err)
	}
	bad{"": "not a number", "20": "say 20p", "0p": "at least 1", "1.5p": "whole", "20kb": "say 20p"}.
		check(t, func(s string) error { _, err := ParseECN(s); return err })
}

// Whatever is typed, a parser either refuses it or gives something in range.
func FuzzParse(f *testing.F) {
	for _, s := range []string{"20mbit", "40ms", "1bdp", "64kb", "0.01%", "1/10000", "20p", "1e5", "2Mbps", "9000", "reno", "..", "٣ms", "..", "9999999999999999999999p"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if v, err := ParseRate(s); err == nil && !(v > 0 && v < math.Inf(1) && strings.HasSuffix(strings.ToLower(s), "bit")) {
			t.Errorf("rate %q: %v", s, v)
		}
		if v, err := ParseTime(s); err == nil && !(v >= 0 && v < math.Inf(1)) {
			t.Errorf("time %q: %v", s, v)
		}
		if p, b, n, err := ParseBuffer(s); err == nil && !(p > 0 && b == 0 && n == 0 || p == 0 && (b > 0) != (n > 0) && b+n < math.Inf(1)) {
			t.Errorf("buffer %q: %v, %v, %v", s, p, b, n)
		}
		if l, err := ParseLoss(s); err == nil && !(l.Probability >= 0 && l.Probability < 1 && (l.Every == 0 || l.Every >= 2 && l.Probability == 0)) {
			t.Errorf("loss %q: %+v", s, l)
		}
		if n, err := ParseECN(s); err == nil && n < 1 {
			t.Errorf("ecn %q: %v", s, n)
		}
		if n, err := ParseMTU(s); err == nil && (n < minMTU || n > maxMTU) {
			t.Errorf("mtu %q: %v", s, n)
		}
		if _, err := ParseCC(s); err == nil && (!filepath.IsLocal(s) || filepath.Clean(s) != s || s == "." || strings.ContainsRune(s, '/')) {
			t.Errorf("congestion control %q names more than a file", s)
		}
	})
}
