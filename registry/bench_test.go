// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"math"
	"slices"
	"testing"
	"time"

	"ccload/internal/kerneltest"
	"ccload/internal/netns"

	"golang.org/x/sys/unix"
)

// BenchmarkGroup is what a connection's start costs more under a control group's
// selection: connections over loopback, opened, accepted and closed, in blocks by
// turns with the program and without. The ratio is the median of the pairs' ratios.
func BenchmarkGroup(b *testing.B) {
	kerneltest.Privileged(b)
	group, _ := groups(b)
	ns := loopback(b)
	def, err := Default(ns)
	if err != nil {
		b.Fatal(err)
	}
	move(b, group)
	for what, arms := range map[string][]Arm{"one": {{def, 1}}, "split": {{def, 1}, {"reno", 1}}} {
		b.Run(what, func(b *testing.B) {
			var ratios []float64
			var without time.Duration
			for b.Loop() {
				const pairs = 100
				for range pairs {
					plain := block(b, ns)
					if _, err := UseGroup(group, arms); err != nil {
						b.Fatal(err)
					}
					selected := block(b, ns)
					if _, err := RestoreGroup(group); err != nil {
						b.Fatal(err)
					}
					ratios = append(ratios, selected.Seconds()/plain.Seconds())
					without += plain
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

const connections = 300 // of a block

// processor is the processor time of the thread.
func processor() (time.Duration, error) {
	var ts unix.Timespec
	err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts)
	return time.Duration(ts.Nano()), err
}

// block is the processor time that a block of connections takes: both ends of all
// are worked on by the one thread that opens them.
func block(b *testing.B, ns *netns.NS) (d time.Duration) {
	err := ns.Do(func() error {
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
		begin, err := processor()
		if err != nil {
			return err
		}
		for range connections {
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
