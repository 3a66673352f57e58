// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"

	"ccload/harness/link"
	"ccload/harness/trace"
	"ccload/internal/netns"
)

const (
	probePort     = 9 // discard (RFC 863); nothing else is in these namespaces
	probeTrips    = 21
	probeHeaders  = 20 + 8                 // IPv4 and UDP, or ICMP
	probeTrain    = 150 * time.Millisecond // length of the train, at least
	probeMinTrain = 5                      // packets
	probePatience = 3 * time.Second        // the longest train that is worth its time
)

// probe measures the empty link from its two ends, as any traffic meets it: the
// median round-trip time of small packets, one at a time, and the rate at which
// a train of full packets, sent faster than that, arrives. A link so slow that
// a train would take seconds is not measured for its rate.
func probe(ctx context.Context, sender, receiver *netns.NS, cfg trace.Link) (m trace.Measured, err error) {
	fail := func(err error) (trace.Measured, error) { return m, fmt.Errorf("probe the link: %w", err) }
	s, err := listenUDP(sender, link.SenderAddr)
	if err != nil {
		return fail(err)
	}
	defer s.Close()
	r, err := listenUDP(receiver, link.ReceiverAddr)
	if err != nil {
		return fail(err)
	}
	defer r.Close()
	defer context.AfterFunc(ctx, func() { s.Close(); r.Close() })()

	to := &net.UDPAddr{IP: link.ReceiverAddr.AsSlice(), Port: probePort}
	rtt, err := probeRTT(ctx, sender, cfg)
	if err == nil {
		m.RTT = &rtt
		m.Rate, err = probeRate(s, r, to, cfg)
	}
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	if err != nil {
		return fail(err)
	}
	return m, nil
}

func listenUDP(ns *netns.NS, ip netip.Addr) (c *net.UDPConn, err error) {
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) (err error) {
		// Room for the whole train, so that none of it is lost behind the link.
		cerr := raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20)
			err = errors.Join(err, unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1))
		})
		return errors.Join(err, cerr)
	}}
	err = ns.Do(func() error {
		p, err := config.ListenPacket(context.Background(), "udp4", netip.AddrPortFrom(ip, probePort).String())
		if err == nil {
			c = p.(*net.UDPConn)
		}
		return err
	})
	return c, err
}

// probeRTT is the median of round trips, in seconds. The kernel at the far end
// answers echo requests by itself and the one at this end stamps the answers, so
// neither waits for a process to be woken. The time on the wire of the probe
// itself is not part of the link's.
func probeRTT(ctx context.Context, sender *netns.NS, cfg trace.Link) (rtt float64, err error) {
	err = sender.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		defer context.AfterFunc(ctx, func() { unix.Shutdown(fd, unix.SHUT_RD) })()
		limit := unix.NsecToTimeval(int64((2*cfg.RTT + 1) * 1e9))
		if err := errors.Join(
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit),
		); err != nil {
			return err
		}
		var trips []float64
		for i := range probeTrips {
			t, err := echo(fd, i)
			if err != nil {
				return err
			}
			trips = append(trips, t)
			if len(trips) >= 3 && float64(len(trips))*cfg.RTT > 1 {
				break // enough of a long delay
			}
		}
		slices.Sort(trips)
		rtt = trips[len(trips)/2] - float64(probeHeaders)*8/cfg.Rate
		return nil
	})
	return rtt, err
}

// echo sends one echo request (RFC 792) and returns the seconds until its answer
// came.
func echo(fd, seq int) (float64, error) {
	b, err := (&icmp.Message{Type: ipv4.ICMPTypeEcho, Body: &icmp.Echo{ID: os.Getpid() & 0xffff, Seq: seq}}).Marshal(nil)
	if err != nil {
		return 0, err
	}
	var sent unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_REALTIME, &sent); err != nil {
		return 0, err
	}
	if err := unix.Sendto(fd, b, 0, &unix.SockaddrInet4{Addr: link.ReceiverAddr.As4()}); err != nil {
		return 0, err
	}
	var in, oob [256]byte
	for {
		n, oobn, _, _, err := unix.Recvmsg(fd, in[:], oob[:], 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("no answer: %w", err)
		}
		if n == 0 { // shut down
			return 0, errors.New("no answer")
		}
		if n < 28 { // IPv4 header and ICMP's
			continue
		}
		m, err := icmp.ParseMessage(unix.IPPROTO_ICMP, in[20:n])
		if e, ok := m.Body.(*icmp.Echo); err != nil || !ok || m.Type != ipv4.ICMPTypeEchoReply || e.Seq != seq {
			continue
		}
		came, err := stamp(oob[:oobn])
		if err != nil {
			return 0, err
		}
		return float64(came-sent.Nano()) / 1e9, nil
	}
}

// probeRate is the rate at which the bottleneck lets packets out, in bit/s; nil if
// it would take too long.
func probeRate(s, r *net.UDPConn, to *net.UDPAddr, cfg trace.Link) (*float64, error) {
	each := time.Duration(float64(cfg.MTU) * 8 / cfg.Rate * float64(time.Second))
	train := max(probeTrain, probeMinTrain*each)
	if train > probePatience {
		return nil, nil
	}
	r.SetReadDeadline(time.Time{})
	sent := make(chan error, 1)
	go func() { sent <- sendTrain(s, to, cfg.MTU-probeHeaders, train, each) }()

	// What the buffer drops does not count: as long as it is never empty, what
	// arrives does so at the bottleneck's rate.
	var b [1]byte // the rest of a packet need not be copied
	var oob [64]byte
	var deadline time.Time
	var came []int64 // ns, as the kernel stamped them: when this process got to read them is no matter
	r.SetReadDeadline(time.Now().Add(train + time.Duration(cfg.RTT*float64(time.Second)) + 2*time.Second))
	for {
		_, oobn, _, _, err := r.ReadMsgUDPAddrPort(b[:], oob[:])
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil {
			return nil, err
		}
		at, err := stamp(oob[:oobn])
		if err != nil {
			return nil, err
		}
		came = append(came, at)
		// The train is over when nothing has come for a while.
		if pause, now := 20*each+100*time.Millisecond, time.Now(); deadline.Before(now.Add(pause)) {
			deadline = now.Add(2 * pause)
			r.SetReadDeadline(deadline)
		}
	}
	if err := <-sent; err != nil {
		return nil, err
	}
	if len(came) < 2 {
		return nil, errors.New("the train of packets did not arrive")
	}
	rate := float64(cfg.MTU) * 8 * 1e9 / gap(came)
	return &rate, nil
}

// gap is the time between two packets, by the line that fits their arrivals best
// (least squares): a few that came late change it little.
func gap(came []int64) float64 {
	n := float64(len(came))
	var products, squares float64
	for i, at := range came {
		d := float64(i) - (n-1)/2
		products += d * float64(at-came[0])
		squares += d * d
	}
	return products / squares
}

// stamp is when the kernel received a message (SO_TIMESTAMPNS), in ns since 1970.
func stamp(oob []byte) (int64, error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return 0, err
	}
	for _, c := range msgs {
		if c.Header.Level == unix.SOL_SOCKET && c.Header.Type == unix.SO_TIMESTAMPNS {
			return (*unix.Timespec)(unsafe.Pointer(&c.Data[0])).Nano(), nil
		}
	}
	return 0, errors.New("the kernel did not stamp the packet")
}

// sendTrain keeps the bottleneck busy for a while: a burst to begin with, and
// then a fifth more than it lets through, so that the buffer is never empty.
func sendTrain(s *net.UDPConn, to *net.UDPAddr, payload int, train, each time.Duration) error {
	// Several packets a call, which the kernel cuts (UDP_SEGMENT, since 4.18): fast
	// links need it. It takes up to 64 of them, and 64 KiB.
	at := max(1, min(64, 65000/payload, int(time.Millisecond/each)))
	raw, err := s.SyscallConn()
	if err != nil {
		return err
	}
	if cerr := raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, payload)
	}); cerr != nil || err != nil {
		at = 1
	}
	b := make([]byte, at*payload)
	start := time.Now()
	for n := 0; ; {
		elapsed := time.Since(start)
		if elapsed >= train {
			return nil
		}
		for ; time.Duration(n)*each < elapsed+elapsed/5+10*time.Millisecond+2*each; n += at {
			if _, err := s.WriteToUDP(b, to); err != nil {
				return err
			}
		}
		time.Sleep(time.Millisecond)
	}
}
