// SPDX-License-Identifier: Apache-2.0

package link

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"ccload/harness/trace"
	"ccload/internal/kerneltest"
	"ccload/internal/netns"
)

// bulk sends over the link with the kernel's cubic for a while, after the slow
// start, and returns what the bottleneck let through, in bit/s, and the end.
func bulk(b *testing.B, cfg trace.Link, d time.Duration) (float64, *End) {
	var ns [2]*netns.NS
	for i := range ns {
		var err error
		if ns[i], err = netns.New(); err != nil {
			b.Fatal(err)
		}
		defer ns[i].Close()
		for _, mem := range []string{"tcp_rmem", "tcp_wmem"} { // the sockets must not be what limits
			if err := ns[i].Do(func() error {
				return os.WriteFile("/proc/sys/net/ipv4/"+mem, []byte("4096 16777216 16777216"), 0)
			}); err != nil {
				b.Fatal(err)
			}
		}
	}
	l, err := New(ns[0], ns[1], "bench", cfg)
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	var ln net.Listener
	var c net.Conn
	if err := ns[1].Do(func() (err error) { ln, err = net.Listen("tcp4", ReceiverAddr.String()+":5001"); return err }); err != nil {
		b.Fatal(err)
	}
	defer ln.Close()
	go func() {
		if c, err := ln.Accept(); err == nil {
			io.Copy(io.Discard, struct{ io.Reader }{c})
			c.Close()
		}
	}()
	err = ns[0].Do(func() (err error) {
		c, err = net.Dial("tcp4", ln.Addr().String())
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	raw, _ := c.(*net.TCPConn).SyscallConn()
	raw.Control(func(fd uintptr) {
		err = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "cubic")
	})
	if err != nil {
		b.Fatal(err)
	}
	rows := make(chan []trace.LinkSample, 16)
	start := l.Now()
	if err := l.Begin(start, 1, time.Second, rows); err != nil {
		b.Fatal(err)
	}
	go func() {
		buf := make([]byte, 1<<18)
		for {
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	}()
	const warmUp = 1.0 // s
	time.Sleep(d + time.Second)
	at := l.Now()
	c.(*net.TCPConn).SetLinger(0)
	c.Close()
	end, err := l.Finish(at)
	if err != nil {
		b.Fatal(err)
	}
	var before uint64
	for chunk := range rows {
		for _, r := range chunk {
			if r.Time <= warmUp {
				before = r.Delivered
			}
		}
	}
	return float64(end.Delivered-before) * 8 / (float64(at-start)/1e9 - warmUp), end
}

// A configured 1 Gbit/s in packets of 1500 bytes: how much of it is delivered.
func BenchmarkGigabit(b *testing.B) {
	kerneltest.Privileged(b)
	cfg := trace.Link{Rate: 1e9, RTT: 0.010, Buffer: 833, MTU: 1500}
	var share, p50 float64
	for range b.N {
		rate, end := bulk(b, cfg, 3*time.Second)
		share += rate / cfg.Rate
		p50 += end.Lateness.P50
		if end.Unseen > 0 {
			b.Errorf("%d packets were lost before the emulator", end.Unseen)
		}
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(share/float64(b.N), "delivered/configured")
	b.ReportMetric(p50/float64(b.N)*1e6, "late-p50-us")
}

// The delay that packets have beyond the exact one, at 90 of 100 Mbit/s: from
// just before each is sent until the kernel stamps it at the far end.
func BenchmarkDelay(b *testing.B) {
	cfg := trace.Link{Rate: 1e8, RTT: 0.020, Buffer: 166, MTU: 1500}
	_, s, r := ends(b, cfg)
	for b.Loop() {
		late := delayErrors(b, cfg, s, r, 20000)
		slices.Sort(late)
		b.ReportMetric(late[len(late)/2]*1e6, "added-p50-us")
		b.ReportMetric(late[len(late)*99/100]*1e6, "added-p99-us")
	}
	b.ReportMetric(0, "ns/op")
}

// delayErrors sends full packets 1/0.9 of their serialization apart and returns
// by how many seconds each came too late. What the sender's own unevenness makes
// them wait for each other is worked out and not counted.
func delayErrors(b *testing.B, cfg trace.Link, s, r *net.UDPConn, n int) (late []float64) {
	each := int64(float64(cfg.MTU) * 8 / cfg.Rate * 1e9)
	wall := func() int64 {
		var ts unix.Timespec
		unix.ClockGettime(unix.CLOCK_REALTIME, &ts)
		return ts.Nano()
	}
	s.SetDeadline(time.Now().Add(time.Minute))
	r.SetDeadline(time.Now().Add(time.Minute))
	raw, err := r.SyscallConn()
	if err != nil {
		b.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		err = errors.Join(unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1),
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20))
	})
	if err != nil {
		b.Fatal(err)
	}
	sent := make([]int64, n)
	go func() {
		p := make([]byte, cfg.MTU-28)
		to := r.LocalAddr().(*net.UDPAddr)
		next := wall()
		for i := range n {
			for next += each * 10 / 9; wall() < next; {
				time.Sleep(time.Duration(next - wall()))
			}
			binary.NativeEndian.PutUint32(p, uint32(i))
			sent[i] = wall()
			s.WriteToUDP(p, to)
		}
	}()
	in, oob := make([]byte, cfg.MTU), make([]byte, 64)
	var free int64 // when the bottleneck is
	for i := range n {
		_, oobn, _, _, err := r.ReadMsgUDP(in, oob)
		if err != nil {
			b.Fatalf("packet %d: %v", i, err)
		}
		if got := binary.NativeEndian.Uint32(in); got != uint32(i) {
			b.Fatalf("packet %d: got %d", i, got)
		}
		msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil || len(msgs) != 1 {
			b.Fatalf("packet %d: %d control messages, %v", i, len(msgs), err)
		}
		came := (*unix.Timespec)(unsafe.Pointer(&msgs[0].Data[0])).Nano()
		free = max(free, sent[i]) + each
		late = append(late, float64(came-free)/1e9-cfg.RTT/2)
	}
	return late
}
