// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"math"
	"runtime"
	"slices"
	"testing"
	"time"

	"ccload/internal/kerneltest"
	"ccload/internal/netns"

	"golang.org/x/sys/unix"
)

// BenchmarkGroup is what a connection's start costs more when a control group's
// selection, of one name or by weight, gives it what it has by default anyway:
// connections over loopback, opened, accepted and closed, in blocks by turns. As with
// most, one end is the group's and the other is not, by turns this and that. The
// ratio is the median of the pairs' ratios.
func BenchmarkGroup(b *testing.B) {
	kerneltest.Privileged(b)
	elsewhere, group := groups(b)
	ns := loopback(b)
	name, err := Default(ns)
	if err != nil {
		b.Fatal(err)
	}
	// Both sorts of blocks come after the same work, and with no garbage to collect.
	run := func(arms []Arm, listener, opener string, selected bool) time.Duration {
		if _, err := UseGroup(group, arms); err != nil {
			b.Fatal(err)
		}
		restore := func() {
			if _, err := RestoreGroup(group); err != nil {
				b.Fatal(err)
			}
		}
		if selected {
			defer restore()
		} else {
			restore()
		}
		runtime.GC()
		return block(b, ns, listener, opener)
	}
	for what, arms := range map[string][]Arm{"one": {{name, 1}}, "split": {{name, 1}, {name, 1}}} {
		b.Run(what, func(b *testing.B) {
			var ratios []float64
			var without time.Duration
			for b.Loop() {
				const pairs = 100
				for i := range pairs {
					listener, opener := group, elsewhere
					if i&2 != 0 {
						listener, opener = opener, listener
					}
					var took [2]time.Duration // without, with
					for n := range took {
						with := n ^ i&1 // either comes first as often
						took[with] = run(arms, listener, opener, with == 1)
					}
					ratios = append(ratios, took[1].Seconds()/took[0].Seconds())
					without += took[0]
				}
			}
			slices.Sort(ratios)
			n := float64(len(ratios))
			var mean, square float64
			for _, r := range ratios {
				mean += r / n
				square += r * r / n
			}
			b.ReportMetric(without.Seconds()*1e6/n/connections, "µs/connection")
			b.ReportMetric(ratios[len(ratios)/2], "ratio")
			b.ReportMetric(math.Sqrt((square-mean*mean)/n)*math.Sqrt(math.Pi/2), "error") // of a median
		})
	}
}

// Connections of a block, and those before that warm up caches.
const connections, warm = 300, 30

// processor is the processor time of the thread.
func processor() (time.Duration, error) {
	var ts unix.Timespec
	err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts)
	return time.Duration(ts.Nano()), err
}

// block is the processor time that a block of connections takes: both ends of all
// are worked on by the one thread that opens them. The listener is of one control
// group, who opens them of another.
func block(b *testing.B, ns *netns.NS, listener, opener string) (d time.Duration) {
	err := ns.Do(func() error {
		move(b, listener)
		l, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(l)
		if err := unix.Bind(l, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
			return err
		}
		if err := unix.Listen(l, 1); err != nil {
			return err
		}
		to, err := unix.Getsockname(l)
		if err != nil {
			return err
		}
		move(b, opener)
		var begin time.Duration
		for i := range warm + connections {
			if i == warm {
				if begin, err = processor(); err != nil {
					return err
				}
			}
			c, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			if err := unix.Connect(c, to); err != nil {
				return err
			}
			s, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
			if err != nil {
				return err
			}
			unix.Close(c)
			unix.Close(s)
		}
		end, err := processor()
		d = end - begin
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	return d
}
