// SPDX-License-Identifier: Apache-2.0

package sampler

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"ccload/harness/flow"
	"ccload/harness/trace"
	"ccload/internal/inetdiag"
	"ccload/internal/kerneltest"
	"ccload/internal/netns"
)

var addr = netip.MustParseAddr("127.0.0.1")

// loopback is a namespace of its own with its loopback device up.
func loopback(t *testing.T) *netns.NS {
	t.Helper()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	err = ns.Do(func() error {
		s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(s)
		r, err := unix.NewIfreq("lo")
		if err != nil {
			return err
		}
		r.SetUint16(unix.IFF_UP)
		return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, r)
	})
	if err != nil {
		t.Fatal(err)
	}
	return ns
}

func now() int64 {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return ts.Nano()
}

// send lets one flow run until so many bytes have been acknowledged, or the
// context is done.
func send(ctx context.Context, t *testing.T, ns *netns.NS, port uint16, bytes int64) flow.Result {
	t.Helper()
	to := netip.AddrPortFrom(addr, port+10000)
	r, err := flow.Listen(ns, to, "reno")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	s, err := flow.Open(ns, netip.AddrPortFrom(addr, port), "reno")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	res, err := s.Send(ctx, to, flow.Load{Duration: 30 * time.Second, Bytes: bytes})
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// Of four flows only the one that was asked for is seen, from its beginning to
// its end; another has the same port in another namespace.
func TestSamplers(t *testing.T) {
	kerneltest.Privileged(t)
	ns, other := loopback(t), loopback(t)
	ack, err := OpenAck(ns, 9000, 10000, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer ack.Close()
	diag, err := OpenDiag(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer diag.Close()

	var mu sync.Mutex
	samples := map[trace.Source][]trace.Sample{}
	const enough = 20
	ctx, cancel := context.WithCancel(t.Context()) // done when there are enough of both
	defer cancel()
	start := now()
	target := Target{Start: start, Flows: map[uint16]int32{10000: 7}, Sink: func(s trace.Sample) {
		mu.Lock()
		defer mu.Unlock()
		samples[s.Source] = append(samples[s.Source], s)
		if len(samples[trace.Ack]) >= enough && len(samples[trace.Diag]) >= enough {
			cancel()
		}
	}}
	ack.Start(target)
	diag.Start(target, addr, map[uint16]netip.AddrPort{10000: netip.AddrPortFrom(addr, 20000)}, time.Millisecond, now)
	send(ctx, t, ns, 10001, 1_000_000) // not seen by the program
	send(ctx, t, ns, 9999, 1_000_000)  // seen, but not a flow
	send(ctx, t, other, 10000, 1_000_000)
	begun := float64(now()-start) / 1e9
	bytes := send(ctx, t, ns, 10000, 0).Bytes
	lost, err := ack.Close()
	if err != nil || lost != 0 {
		t.Errorf("%d events lost, %v", lost, err)
	}
	if again, err := ack.Close(); again != lost || err != nil {
		t.Errorf("closed again: %d, %v", again, err)
	}
	if err := diag.Close(); err != nil {
		t.Error(err)
	}
	ended := float64(now()-start) / 1e9 // a sample on an interval is stamped when the answer has come
	for _, source := range []trace.Source{trace.Ack, trace.Diag} {
		if n := len(samples[source]); n < enough {
			t.Fatalf("%s: %d samples", source, n)
		}
		var last trace.Sample
		for _, s := range samples[source] {
			if s.Flow != 7 || s.Time < begun || s.Time > ended || s.Time < last.Time || s.Cwnd < 1 || s.Cwnd > 1e6 || s.SRTT > 1 ||
				s.BytesAcked < last.BytesAcked || s.Delivered < last.Delivered || s.BytesAcked > bytes+2 || s.Inflight > 1e6 || s.MinRTT > s.SRTT+1 {
				t.Fatalf("%s: %+v after %+v", source, s, last)
			}
			last = s
		}
		if last.BytesAcked == 0 || last.SRTT == 0 || last.MinRTT == 0 {
			t.Errorf("%s: the last sample is %+v", source, last)
		}
	}
	// A sample on an ACK is taken before the ACK counts.
	if last := samples[trace.Ack][len(samples[trace.Ack])-1]; last.BytesAcked < bytes*9/10 {
		t.Errorf("the last of the samples on ACKs is %+v", last)
	}
}

// The kernel's structure and ours are one.
func TestEventSize(t *testing.T) {
	if n := unsafe.Sizeof(event{}); n != 72 {
		t.Errorf("%d bytes", n)
	}
}

func TestOpenAckRefuses(t *testing.T) {
	kerneltest.Privileged(t)
	if a, err := OpenAck(loopback(t), 1, 2, 5000); err == nil {
		a.Close()
		t.Error("a ring buffer of 5000 bytes was taken")
	}
}

// What the kernel keeps of a closed connection in FIN-WAIT-2 has no tcp_info, and is no
// sample: its window and its counters would be 0.
func TestFinWait(t *testing.T) {
	kerneltest.Privileged(t)
	ns := loopback(t)
	from, to := netip.AddrPortFrom(addr, 10005), netip.AddrPortFrom(addr, 20005)
	var client, server net.Conn
	err := ns.Do(func() error {
		l, err := net.Listen("tcp4", to.String())
		if err != nil {
			return err
		}
		defer l.Close()
		if client, err = (&net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(from)}).Dial("tcp4", to.String()); err != nil {
			return err
		}
		server, err = l.Accept()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { // nothing of it stays
		server.(*net.TCPConn).SetLinger(0)
		server.Close()
	}()
	diag, err := OpenDiag(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer diag.Close()
	var seen []trace.Sample
	look := func() (state uint8) {
		t.Helper()
		if err := diag.sample(Target{Sink: func(s trace.Sample) { seen = append(seen, s) }}, 1, from, to, now); err != nil {
			t.Fatal(err)
		}
		var s inetdiag.Socket
		if err := diag.conn.Lookup(&s, from, to); err != nil {
			t.Fatal(err)
		}
		return s.State
	}
	if state := look(); state != 1 || len(seen) != 1 || seen[0].Cwnd == 0 {
		t.Fatalf("established, as state %d: %+v", state, seen)
	}
	client.Close()
	const finWait2 = 5
	for look() != finWait2 {
		time.Sleep(time.Millisecond)
	}
	seen = nil
	if look(); len(seen) != 0 {
		t.Errorf("in FIN-WAIT-2: %+v", seen)
	}
}
