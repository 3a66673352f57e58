// SPDX-License-Identifier: Apache-2.0

// Package flow makes traffic: one TCP connection a flow, from a namespace to
// another, with a congestion control chosen by its name, that sends as much as TCP
// takes or as an application offers.
//
// Both ends use it: some need the receiver to help (DCTCP's receiver tells about
// every mark, RFC 8257 §3.2).
package flow

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ccload/internal/netns"
)

// lowWater is how many bytes wake the receiver: a small part of its buffer.
const lowWater = 64 << 10

// Receiver is the end that takes one flow and throws away what it brings.
type Receiver struct {
	listener *os.File
	done     chan struct{}

	mu     sync.Mutex
	conn   *os.File // nil: none yet
	closed bool
}

// Listen waits at an address of a namespace for the flow.
func Listen(ns *netns.NS, at netip.AddrPort, cc string) (_ *Receiver, err error) {
	fd, err := socket(ns, at, cc)
	if err != nil {
		return nil, fmt.Errorf("receiver at %v: %w", at, err)
	}
	if err := unix.Listen(fd, 1); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("receiver at %v: listen: %w", at, err)
	}
	r := &Receiver{listener: os.NewFile(uintptr(fd), "listener"), done: make(chan struct{})}
	go r.run()
	return r, nil
}

func (r *Receiver) run() {
	defer close(r.done)
	conn := -1
	if wait(r.listener, false, func(fd int) (err error) {
		conn, _, err = unix.Accept4(fd, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		return err
	}) != nil {
		return // Close
	}
	// To be woken for every packet would be most of what an end costs; it acknowledges
	// them as it does without (socket(7): SO_RCVLOWAT).
	unix.SetsockoptInt(conn, unix.SOL_SOCKET, unix.SO_RCVLOWAT, lowWater)
	r.mu.Lock()
	r.conn = os.NewFile(uintptr(conn), "connection")
	if r.closed {
		r.conn.Close()
	}
	r.mu.Unlock()
	// With MSG_TRUNC TCP counts the bytes as read without a copy of them (tcp(7)).
	var none [1]byte
	for n := 1; n > 0; {
		if wait(r.conn, false, func(fd int) (err error) {
			n, err = discard(fd, none[:], 1<<20)
			return err
		}) != nil {
			return // the sender's abort, or Close
		}
	}
}

// Close ends the flow's receiving end, whatever it does. It may be called again.
func (r *Receiver) Close() error {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return nil
	}
	r.closed = true
	err := r.listener.Close()
	if r.conn != nil {
		err = errors.Join(err, r.conn.Close())
	}
	r.mu.Unlock()
	<-r.done
	return err
}

// Sender is the end that sends. Its methods are for one goroutine.
type Sender struct {
	fd int // of file
	// file is nil once the sender is closed.
	file *os.File
	cc   string
}

// Result is what the sender's socket tells when its flow has ended.
type Result struct {
	Duration    time.Duration // of the call of Send
	Bytes       uint64        // payload that was acknowledged
	Retransmits uint64        // segments
	Timeouts    int           // of the retransmission timer, the handshake's included; 0 before Linux 6.7
	Limited     float64       // share of the time when a buffer of a socket held the flow back, not the network
	Connected   bool          // whether the handshake ended before the flow did
}

// Open makes the socket of a sender, which is bound to an address of the
// namespace: by it the samples of a flow are told from another's.
func Open(ns *netns.NS, at netip.AddrPort, cc string) (*Sender, error) {
	fd, err := socket(ns, at, cc)
	if err != nil {
		return nil, fmt.Errorf("sender at %v: %w", at, err)
	}
	return &Sender{fd: fd, file: os.NewFile(uintptr(fd), "sender"), cc: cc}, nil
}

// Load is what there is to send.
type Load struct {
	Duration time.Duration // from the start of the handshake; then the flow is over
	Bytes    int64         // the flow is over when that many are acknowledged; 0: no limit
	Rate     float64       // bit/s that the application offers; 0: as much as TCP takes
}

// chunk is what is written at most at a time, in bytes.
const chunk = 64 << 10

// tick is how often an application with a rate writes: all that is due by then,
// and never more. What TCP did not take in time stays due.
const tick = 10 * time.Millisecond

// Send connects and sends the load, or until the context is done, which is no
// error. Then it aborts the connection.
func (s *Sender) Send(ctx context.Context, to netip.AddrPort, load Load) (Result, error) {
	r, err := s.send(ctx, to, load)
	if err != nil {
		return r, fmt.Errorf("send to %v: %w", to, err)
	}
	return r, nil
}

func (s *Sender) send(ctx context.Context, to netip.AddrPort, load Load) (r Result, err error) {
	start := time.Now()
	end := start.Add(load.Duration)
	if err := s.file.SetWriteDeadline(end); err != nil {
		return r, fmt.Errorf("deadline: %w", err)
	}
	defer context.AfterFunc(ctx, func() { s.file.SetWriteDeadline(time.Unix(1, 0)) })()
	over := func() bool { return ctx.Err() != nil || !time.Now().Before(end) }

	if r.Connected, err = s.connect(to); err != nil || !r.Connected {
		return s.result(r, start, err)
	}
	if err := check(s.fd, s.cc); err != nil {
		return r, err
	}
	buf := make([]byte, chunk)
	most := load.Bytes
	if most == 0 {
		most = math.MaxInt64
	}
	due, begun := most, time.Now()
	if load.Rate > 0 {
		due = 0
	}
	var sent int64
	for sent < most {
		if sent == due {
			ticks := time.Since(begun)/tick + 1
			if !sleep(ctx, begun.Add(ticks*tick), end) {
				break
			}
			due = min(int64(load.Rate/8*(ticks*tick).Seconds()), most)
			continue
		}
		n, err := s.file.Write(buf[:min(chunk, due-sent)])
		sent += int64(n)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil {
			return r, fmt.Errorf("write: %w", err)
		}
	}
	if sent == most {
		if err := s.drain(over); err != nil {
			return r, err
		}
	}
	if r, err = s.result(r, start, nil); err != nil {
		return r, err
	}
	return r, s.Close()
}

// result adds what the socket tells, unless there is an error already.
func (s *Sender) result(r Result, start time.Time, err error) (Result, error) {
	r.Duration = time.Since(start)
	if err != nil {
		return r, err
	}
	info, err := unix.GetsockoptTCPInfo(s.fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return r, fmt.Errorf("read tcp_info: %w", err)
	}
	if info.Bytes_acked > 0 {
		r.Bytes = info.Bytes_acked - 1 // the SYN counts as one
	}
	r.Retransmits, r.Timeouts = uint64(info.Total_retrans), int(info.Total_rto)
	if info.Busy_time > 0 {
		r.Limited = float64(info.Rwnd_limited+info.Sndbuf_limited) / float64(info.Busy_time)
	}
	return r, nil
}

// Close aborts the connection: nothing of it stays in the network. It may be
// called again.
func (s *Sender) Close() error {
	if s.file == nil {
		return nil
	}
	err := s.file.Close()
	s.file = nil
	return err
}

// sleep waits until a time; it is false if the end comes first.
func sleep(ctx context.Context, until, end time.Time) bool {
	if until.After(end) {
		until = end
	}
	select {
	case <-time.After(time.Until(until)):
		return until.Before(end)
	case <-ctx.Done():
		return false
	}
}

// connect says whether the connection was there before the deadline.
func (s *Sender) connect(to netip.AddrPort) (bool, error) {
	err := unix.Connect(s.fd, sockaddr(to))
	if err == nil {
		return true, nil
	}
	if err == unix.EINPROGRESS || err == unix.EINTR {
		err = wait(s.file, true, func(fd int) error {
			errno, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
			if err == nil && errno != 0 {
				err = unix.Errno(errno)
			}
			if err != nil {
				return err
			}
			if _, err := unix.Getpeername(fd); err != nil {
				return unix.EAGAIN // still under way
			}
			return nil
		})
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("connect: %w", err)
	}
	return true, nil
}

// wait calls a function until it gives another result than that it would block,
// each time that the socket has become readable, or writable.
func wait(f *os.File, writable bool, call func(fd int) error) (err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	until := raw.Read
	if writable {
		until = raw.Write
	}
	werr := until(func(fd uintptr) bool {
		for {
			if err = call(int(fd)); err != unix.EINTR {
				return err != unix.EAGAIN
			}
		}
	})
	if werr != nil {
		return werr
	}
	return err
}

// drain waits until all that was written has been acknowledged.
func (s *Sender) drain(over func() bool) error {
	for !over() {
		n, err := unix.IoctlGetInt(s.fd, unix.SIOCOUTQ)
		if err != nil {
			return fmt.Errorf("unacknowledged bytes: %w", err)
		}
		if n == 0 {
			return nil
		}
		time.Sleep(time.Millisecond)
	}
	return nil
}

// socket makes a TCP socket in a namespace, bound and with its congestion control. To
// close it, or what it accepts, aborts, also when the process is killed: else the kernel
// would try for minutes to finish, and keep the congestion control for so long.
func socket(ns *netns.NS, at netip.AddrPort, cc string) (fd int, err error) {
	err = ns.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		return err
	})
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	if err := unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, cc); err != nil {
		return -1, fmt.Errorf("congestion control %q: %w", cc, err)
	}
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return -1, fmt.Errorf("linger: %w", err)
	}
	if err := unix.Bind(fd, sockaddr(at)); err != nil {
		return -1, fmt.Errorf("bind: %w", err)
	}
	return fd, check(fd, cc)
}

// check reads a socket's congestion control back: a route or a BPF program may
// have chosen another.
func check(fd int, cc string) error {
	got, err := unix.GetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION)
	if err != nil {
		return fmt.Errorf("congestion control %q: read back: %w", cc, err)
	}
	if got != cc {
		return fmt.Errorf("congestion control %q: the socket has %q", cc, got)
	}
	return nil
}

func sockaddr(a netip.AddrPort) *unix.SockaddrInet4 {
	return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
}
