// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"ccload/harness/trace"
)

// ParseRate reads a rate: a number and one of bit, kbit, mbit, gbit, tbit (powers of
// 1000) or kibit … (powers of 1024). Case does not matter. What tc(8) writes for
// bytes a second, kbps …, is refused, for most who write it mean bits; and so is a
// number without a unit.
func ParseRate(s string) (bitPerSecond float64, err error) {
	v, unit, err := number("rate", s)
	if err != nil {
		return 0, err
	}
	if unit == "" {
		return 0, fmt.Errorf("rate %q: which unit? say %[1]skbit, %[1]smbit or %[1]sgbit", s)
	}
	prefix, isBits := strings.CutSuffix(unit, "bit")
	prefix, isBytes := strings.CutSuffix(prefix, "bps")
	factor, known := map[string]float64{
		"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12,
		"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40,
	}[prefix]
	switch {
	case known && isBytes && !isBits:
		spell := func(v float64) string { return strconv.FormatFloat(v, 'f', -1, 64) + prefix + "bit" }
		return 0, fmt.Errorf("rate %q: in bits or in bytes? say %s or %s", s, spell(v), spell(8*v))
	case !known || !isBits || isBytes:
		return 0, fmt.Errorf("rate %q: unknown unit %q: say bit, kbit, mbit or gbit", s, unit)
	}
	return positive("rate", s, v*factor)
}

// ParseTime reads a time: a number and one of ns, us, ms, s, min, h, and what
// tc(8) writes for them. Zero needs a unit as well.
func ParseTime(s string) (seconds float64, err error) {
	v, unit, err := number("time", s)
	if err != nil {
		return 0, err
	}
	switch unit {
	case "ns", "nsec", "nsecs":
		v /= 1e9
	case "us", "µs", "usec", "usecs":
		v /= 1e6
	case "ms", "msec", "msecs":
		v /= 1e3
	case "s", "sec", "secs":
	case "m", "min":
		v *= 60
	case "h":
		v *= 3600
	case "":
		return 0, fmt.Errorf("time %q: which unit? say %[1]sms or %[1]ss", s)
	default:
		return 0, fmt.Errorf("time %q: unknown unit %q: say us, ms, s or min", s, unit)
	}
	return v, nil
}

// ParseBuffer reads the size of a buffer: in bandwidth-delay products (1bdp),
// in packets (100p) or in bytes (64kb). One of the results is not zero: which
// member of trace.Link it belongs to. Defaults makes packets of the others.
func ParseBuffer(s string) (packets int, bdp, bytes float64, err error) {
	v, unit, err := number("buffer", s)
	if err != nil {
		return 0, 0, 0, err
	}
	if _, err := positive("buffer", s, v); err != nil {
		return 0, 0, 0, err
	}
	size, known := map[string]float64{
		"b": 1, "k": 1 << 10, "kb": 1 << 10, "m": 1 << 20, "mb": 1 << 20, "g": 1 << 30, "gb": 1 << 30,
	}[unit]
	switch {
	case unit == "bdp":
		return 0, v, 0, nil
	case unit == "p":
		packets, err = whole("buffer", s, v)
		return packets, 0, 0, err
	case known:
		bytes, err = positive("buffer", s, v*size)
		return 0, 0, bytes, err
	case unit == "":
		return 0, 0, 0, fmt.Errorf("buffer %q: which unit? say %[1]sbdp, %[1]sp or %[1]skb", s)
	}
	return 0, 0, 0, fmt.Errorf("buffer %q: unknown unit %q: say bdp, p (packets), b, kb or mb", s, unit)
}

// ParseMTU reads the size of the link's packets, in bytes.
func ParseMTU(s string) (bytes int, err error) {
	bytes, err = strconv.Atoi(s)
	if err != nil || bytes < minMTU || bytes > maxMTU {
		return 0, fmt.Errorf("mtu %q: a whole number of bytes from %d to %d", s, minMTU, maxMTU)
	}
	return bytes, nil
}

// ParseCC reads the name of a congestion control. Whether the kernel has it is
// another matter; but it may name a directory.
func ParseCC(s string) (string, error) {
	if len(s) > 15 || strings.Trim(s, ".") == "" || strings.IndexFunc(s, func(r rune) bool { return r <= ' ' || r > '~' || strings.ContainsRune(`/$"\'`, r) }) >= 0 {
		return "", fmt.Errorf("congestion control %q: not a name", s)
	}
	return s, nil
}

// ParseLoss reads loss on purpose: 0.01% or a probability such as 0.0001 is
// random and seeded, 1/10000 drops exactly every ten thousandth packet.
func ParseLoss(s string) (trace.Loss, error) {
	if one, n, ok := strings.Cut(s, "/"); ok {
		every, err := strconv.Atoi(n)
		if one != "1" || err != nil || every < 2 {
			return trace.Loss{}, fmt.Errorf("loss %q: of the form 1/N, with N from 2", s)
		}
		return trace.Loss{Every: every}, nil
	}
	v, unit, err := number("loss", s)
	if err != nil {
		return trace.Loss{}, err
	}
	switch unit {
	case "":
	case "%":
		v /= 100
	default:
		return trace.Loss{}, fmt.Errorf("loss %q: say 0.01%% or 1/10000", s)
	}
	if v >= 1 {
		return trace.Loss{}, fmt.Errorf("loss %q: less than 100%% is possible", s)
	}
	return trace.Loss{Probability: v}, nil
}

// ParseECN reads the marking threshold, in packets: 20p.
func ParseECN(s string) (packets int, err error) {
	v, unit, err := number("ecn", s)
	if err != nil {
		return 0, err
	}
	if unit != "p" {
		return 0, fmt.Errorf("ecn %q: in packets: say 20p", s)
	}
	return whole("ecn", s, v)
}

// number splits a number that is not negative from the unit behind it.
func number(what, s string) (v float64, unit string, err error) {
	end := strings.IndexFunc(s, func(r rune) bool { return !strings.ContainsRune("0123456789.", r) })
	if end < 0 {
		end = len(s)
	}
	v, err = strconv.ParseFloat(s[:end], 64)
	if err != nil || math.IsInf(v, 0) {
		return 0, "", fmt.Errorf("%s %q: not a number with a unit", what, s)
	}
	return v, strings.ToLower(s[end:]), nil
}

func positive(what, s string, v float64) (float64, error) {
	if v <= 0 || math.IsInf(v, 0) {
		return 0, fmt.Errorf("%s %q: out of range", what, s)
	}
	return v, nil
}

func whole(what, s string, v float64) (int, error) {
	if v < 1 || v > math.MaxInt32 || v != math.Floor(v) {
		return 0, fmt.Errorf("%s %q: a whole number of packets, at least 1", what, s)
	}
	return int(v), nil
}
