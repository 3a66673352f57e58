// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"errors"
	"math"
	"slices"
	"testing"
	"time"

	"ccload/internal/kerneltest"
	"ccload/internal/netns"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// BenchmarkGroup is what a connection's start costs more when it has its congestion
// control from a control group's selection, and not by default: one name or several by
// weight that are the default anyway, and one that is not. Connections over loopback are
// opened, accepted and closed, in blocks by turns; for "crr" a byte goes each way, as in
// netperf's TCP_CRR. As with most, one end is the group's and the other is not, by turns
// this and that; both run the same. The ratio is the median of the pairs' ratios.
// "nothing" is a program that does nothing.
func BenchmarkGroup(b *testing.B) {
	kerneltest.Privileged(b)
	elsewhere, group := groups(b)
	ns := loopback(b)
	name, err := Default(ns)
	if err != nil {
		b.Fatal(err)
	}
	nothing, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SockOps, Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	if err != nil {
		b.Fatal(err)
	}
	defer nothing.Close()
	const other = "reno" // everybody may choose it, everywhere
	for what, arms := range map[string][]Arm{
		"nothing": {{name, 1}}, "default": {{name, 1}}, "split": {{name, 1}, {name, 1}}, "other": {{other, 1}}, "crr": {{other, 1}},
	} {
		b.Run(what, func(b *testing.B) {
			prog, err := loadGroup(arms)
			if err != nil {
				b.Fatal(err)
			}
			defer prog.Close()
			attached := prog
			if what == "nothing" {
				attached = nothing
			}
			run := func(listener, opener string, selected bool) time.Duration {
				def := arms[0].Name
				if selected {
					def = name
					l, err := link.AttachCgroup(link.CgroupOptions{Path: group, Attach: ebpf.AttachCGroupSockOps, Program: attached})
					if err != nil {
						b.Fatal(err)
					}
					defer func() {
						if err := errors.Join(l.Detach(), l.Close()); err != nil {
							b.Fatal(err)
						}
					}()
				}
				if err := ns.Do(func() error { return setDefault("/", def) }); err != nil {
					b.Fatal(err)
				}
				return block(b, ns, listener, opener, group, arms[0].Name, what == "crr")
			}
			var ratios []float64
			var without time.Duration
			for b.Loop() {
				const pairs = 500
				for i := range pairs {
					listener, opener := group, elsewhere
					if i&2 != 0 {
						listener, opener = opener, listener
					}
					var took [2]time.Duration // without, with
					for n := range took {
						with := n ^ i&1 // either comes first as often
						took[with] = run(listener, opener, with == 1)
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
const connections, warm = 60, 12

// processor is the processor time of the thread.
func processor() (time.Duration, error) {
	var ts unix.Timespec
	err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts)
	return time.Duration(ts.Nano()), err
}

// oneByte sends a byte from one socket to another.
func oneByte(from, to int) error {
	var b [1]byte
	_, werr := unix.Write(from, b[:])
	_, rerr := unix.Read(to, b[:])
	return errors.Join(werr, rerr)
}

// chooses gives a socket a congestion control by way of a third, so that it is changed
// twice whichever of the two is the default.
func chooses(fd int, cc string) error {
	const third = "cubic"
	return errors.Join(
		unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, third),
		unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, cc))
}

// block is the processor time that a block of connections takes: both ends of all
// are worked on by the one thread that opens them. The listener is of one control
// group, who opens them of another; the end that is not of the given one chooses for
// itself.
func block(b *testing.B, ns *netns.NS, listener, opener, group, cc string, crr bool) (d time.Duration) {
	err := ns.Do(func() error {
		move(b, listener)
		l, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(l)
		if listener != group {
			if err := chooses(l, cc); err != nil {
				return err
			}
		}
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
			if opener != group {
				if err := chooses(c, cc); err != nil {
					return err
				}
			}
			if err := unix.Connect(c, to); err != nil {
				return err
			}
			s, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
			if err != nil {
				return err
			}
			if crr {
				if err := errors.Join(oneByte(c, s), oneByte(s, c)); err != nil {
					return err
				}
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
