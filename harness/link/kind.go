// SPDX-License-Identifier: Apache-2.0

package link

import (
	"fmt"
	"math"

	"golang.org/x/sys/unix"

	"ccload/harness/trace"
	"ccload/internal/netns"
)

// The kinds of link.
const (
	Userspace = "userspace" // New: ccload's own, over TUN devices
	Netem     = "netem"     // NewNetem: of the kernel's emulator
	Auto      = "auto"      // one of them, by what the kernel has: see Choose
)

// Choose turns the kind Auto, which "" means too, into the one that a link is to
// be on this machine, and says why. What is not Auto it leaves, without a reason
// and without a look at the machine.
//
// Userspace comes first: it records each drop when it happens and can lose and
// mark packets in ways that netem cannot.
func Choose(cfg trace.Link) (kind, reason string, err error) {
	if cfg.Kind != "" && cfg.Kind != Auto {
		return cfg.Kind, "", nil
	}
	noTUN := HasTUN()
	if noTUN == nil {
		return Userspace, "there is /dev/net/tun", nil
	}
	err = CanNetem(cfg)
	if err == nil {
		err = HasNetem()
	}
	if err != nil {
		return "", "", fmt.Errorf("no kind of link works here: %s: %w; %s: %w", Userspace, noTUN, Netem, err)
	}
	return Netem, fmt.Sprintf("not %s: %v", Userspace, noTUN), nil
}

// Rounded tells what a link of a kind cannot do as exactly as it was asked for, by
// more than 1 %, a line each with both values.
func Rounded(cfg trace.Link) (lines []string) {
	note := func(what string, asked, is float64, unit string) {
		if math.Abs(is-asked) > 0.01*asked {
			lines = append(lines, fmt.Sprintf("%s: %g%s was asked for: it is %g%s", what, asked, unit, is, unit))
		}
	}
	note("rtt", cfg.RTT, 2*float64(int64(cfg.RTT*1e9/2))/1e9, " s") // half of it each way, in ns
	if cfg.Kind == Netem {
		e, b := emulators(cfg, 0)
		note("loss", cfg.Loss.Probability, float64(e.losses())/math.MaxUint32, "")
		note("rate", cfg.Rate, float64(b.bytesPerSecond())*8, " bit/s")
	} else {
		note("rate", cfg.Rate, math.Floor(cfg.Rate), " bit/s")
	}
	return lines
}

// HasTUN says why the kernel has no TUN devices for New; nil if it has.
func HasTUN() error {
	fd, err := openClone()
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// HasNetem says why the kernel has not what NewNetem needs; nil if it has. It
// makes a link for a moment, in namespaces of its own.
func HasNetem() error {
	var ns [2]*netns.NS
	for i := range ns {
		var err error
		if ns[i], err = netns.New(); err != nil {
			return err
		}
		defer ns[i].Close()
	}
	l, err := NewNetem(ns[0], ns[1], "probe", trace.Link{Rate: 1e6, Buffer: 1, MTU: 1500})
	if err != nil {
		return err
	}
	return l.Close()
}
