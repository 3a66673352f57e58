// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"context"
	"fmt"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jsimonetti/rtnetlink/v2"
	"github.com/jsimonetti/rtnetlink/v2/driver"
	"golang.org/x/sys/unix"

	"ccload/harness/flow"
	"ccload/harness/sampler"
	"ccload/harness/trace"
	"ccload/internal/inetdiag"
	"ccload/internal/kerneltest"
	"ccload/internal/netns"
)

// path is a fast way from one socket to another, with nothing emulated.
type path struct {
	sender, receiver *netns.NS
	from, to         netip.Addr
}

// paths are loopback and plain veth, each in namespaces of its own.
func paths(b *testing.B) map[string]path {
	b.Helper()
	var ns [3]*netns.NS
	for i := range ns {
		var err error
		if ns[i], err = netns.New(); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { ns[i].Close() })
	}
	device(b, ns[0], "lo", netip.MustParsePrefix("127.0.0.1/8"))

	var c *rtnetlink.Conn
	if err := ns[1].Do(func() (err error) { c, err = rtnetlink.Dial(nil); return err }); err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	peer := uint32(ns[2].FD())
	err := c.Link.New(&rtnetlink.LinkMessage{Attributes: &rtnetlink.LinkAttributes{
		Name: "veth", Info: &rtnetlink.LinkInfo{Kind: "veth", Data: &driver.Veth{PeerInfo: &rtnetlink.LinkMessage{
			Attributes: &rtnetlink.LinkAttributes{Name: "veth", NetNS: rtnetlink.NetNSForFD(peer)},
		}}},
	}})
	if err != nil {
		b.Fatal(err)
	}
	device(b, ns[1], "veth", netip.MustParsePrefix("198.18.0.1/30"))
	device(b, ns[2], "veth", netip.MustParsePrefix("198.18.0.2/30"))
	return map[string]path{
		"loopback": {ns[0], ns[0], netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.1")},
		"veth":     {ns[1], ns[2], netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("198.18.0.2")},
	}
}

// device gives a device an address and takes it up.
func device(b *testing.B, ns *netns.NS, name string, p netip.Prefix) {
	b.Helper()
	err := ns.Do(func() error {
		s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(s)
		for _, set := range []struct {
			ioctl uint
			fill  func(r *unix.Ifreq) error
		}{
			{unix.SIOCSIFADDR, func(r *unix.Ifreq) error { return r.SetInet4Addr(p.Addr().AsSlice()) }},
			{unix.SIOCSIFFLAGS, func(r *unix.Ifreq) error { r.SetUint16(unix.IFF_UP); return nil }},
		} {
			r, err := unix.NewIfreq(name)
			if err != nil {
				return err
			}
			if err := set.fill(r); err != nil {
				return err
			}
			if err := unix.IoctlIfreq(s, set.ioctl, r); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
}

const benchPort = 10000

// bulk is the throughput of one flow, in bit/s.
func (p path) bulk(b *testing.B, ctx context.Context, cc string, d time.Duration) float64 {
	b.Helper()
	to := netip.AddrPortFrom(p.to, benchPort+1)
	r, err := flow.Listen(p.receiver, to, cc)
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	s, err := flow.Open(p.sender, netip.AddrPortFrom(p.from, benchPort), cc)
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	res, err := s.Send(ctx, to, flow.Load{Duration: d})
	if err != nil {
		b.Fatal(err)
	}
	return float64(res.Bytes) * 8 / res.Duration.Seconds()
}

func median(v []float64) float64 {
	slices.Sort(v)
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}

// pairs measures two things in turn, in changing order, and reports the median
// of the ratios and its standard error: the machine changes its speed, but not so
// fast. least is how often at least; a single pair tells nothing.
func pairs(b *testing.B, least int, one, other func() float64) {
	b.Helper()
	other() // warms up
	var ratios, ones []float64
	for i := range max(b.N, least) {
		var v, w float64
		if i%2 == 0 {
			v, w = one(), other()
		} else {
			w, v = other(), one()
		}
		ratios, ones = append(ratios, v/w), append(ones, v)
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(median(ratios), "ratio")
	// Of a median, for what is about normally distributed, from the distance of the quartiles.
	n := len(ratios)
	b.ReportMetric(1.2533*(ratios[3*n/4]-ratios[n/4])/1.349/math.Sqrt(float64(n)), "stderr")
	b.ReportMetric(median(ones)/1e9, "Gbit/s")
}

// A congestion control against the kernel's cubic, over loopback and veth.
// CCLOAD_CC names it; it has to be registered.
func BenchmarkBulk(b *testing.B) {
	kerneltest.Privileged(b)
	cc := os.Getenv("CCLOAD_CC")
	if cc == "" {
		cc = "bpf_cubic"
	}
	if err := known([]trace.Flow{{CC: cc}}); err != nil {
		b.Skipf("%v; register it first, or set CCLOAD_CC", err)
	}
	for name, p := range paths(b) {
		b.Run(name, func(b *testing.B) {
			bulk := func(cc string) func() float64 {
				return func() float64 { return p.bulk(b, b.Context(), cc, 250*time.Millisecond) }
			}
			pairs(b, 101, bulk(cc), bulk("cubic"))
		})
	}
}

// Sampling on every ACK, written to a file as in a run, against none: on one
// connection, now with and now without, so that nothing else differs.
func BenchmarkPerAck(b *testing.B) {
	kerneltest.Privileged(b)
	for name, p := range paths(b) {
		b.Run(name, func(b *testing.B) {
			defer debug.SetGCPercent(debug.SetGCPercent(400)) // as Run does
			ctx, cancel := context.WithCancel(b.Context())
			over := make(chan struct{})
			go func() { p.bulk(b, ctx, "cubic", time.Hour); close(over) }()
			defer func() { cancel(); <-over }()
			var diag *inetdiag.Conn
			if err := p.sender.Do(func() (err error) { diag, err = inetdiag.Dial(); return err }); err != nil {
				b.Fatal(err)
			}
			defer diag.Close()
			bulk := func() float64 {
				acked := func() uint64 {
					var s inetdiag.Socket
					if err := diag.Lookup(&s, netip.AddrPortFrom(p.from, benchPort), netip.AddrPortFrom(p.to, benchPort+1)); err != nil {
						b.Fatal(err)
					}
					return s.Info.Bytes_acked
				}
				time.Sleep(20 * time.Millisecond)
				before, start := acked(), time.Now()
				time.Sleep(100 * time.Millisecond)
				return float64(acked()-before) * 8 / time.Since(start).Seconds()
			}
			var samples, lost uint64
			var took time.Duration
			sampled := func() float64 {
				w, err := trace.Create(filepath.Join(b.TempDir(), fmt.Sprint(samples)))
				if err != nil {
					b.Fatal(err)
				}
				defer w.Close()
				ack, err := sampler.OpenAck(p.sender, benchPort, benchPort, 0)
				if err != nil {
					b.Fatal(err)
				}
				defer ack.Close()
				x := &experiment{out: w, seen: map[int32]*seen{1: newSeen()}}
				start := time.Now()
				ack.Start(sampler.Target{Flows: map[uint16]int32{benchPort: 1}, Sink: x.sample})
				v := bulk()
				l, err := ack.Close()
				if err != nil {
					b.Fatal(err)
				}
				took += time.Since(start)
				samples += x.seen[1].sampled.Ack
				lost += l
				return v
			}
			pairs(b, 201, sampled, bulk)
			b.ReportMetric(float64(samples)/took.Seconds(), "samples/s")
			b.ReportMetric(float64(lost), "lost")
		})
	}
}

// The whole of an experiment at 1 Gbit/s, samples on every ACK included.
func BenchmarkRunGigabit(b *testing.B) {
	kerneltest.Privileged(b)
	var used, probed, rtt, lost float64
	for i := range b.N {
		r, err := Run(b.Context(), trace.Experiment{
			Link: trace.Link{Rate: 1e9, RTT: 0.010}, Flows: flows("cubic"), Duration: 5, PerAck: true,
		}, Options{Dir: fmt.Sprintf("%s/%d", b.TempDir(), i)})
		if err != nil {
			b.Fatal(err)
		}
		if len(r.Warnings) > 0 {
			b.Log(strings.Join(r.Warnings, "\n"))
		}
		used += *r.Bottleneck.Utilisation / float64(b.N)
		probed += *r.Link.Measured.Rate / 1e9 / float64(b.N)
		rtt += *r.Link.Measured.RTT / float64(b.N)
		lost += float64(r.Sampling.Lost)
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(used, "used/configured")
	b.ReportMetric(probed, "probed/configured")
	b.ReportMetric(rtt*1e3, "rtt-ms-of-10")
	b.ReportMetric(lost, "lost")
}
