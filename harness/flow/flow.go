// SPDX-License-Identifier: Apache-2.0

// Package flow makes bulk traffic: one TCP connection a flow, from a namespace to
// another, with a congestion control chosen by its name.
//
// Both ends use it: some need the receiver to help (DCTCP's receiver tells about
// every mark, RFC 8257 §3.2). The sockets are used by threads that block, as the
// ordinary programs do whose traffic this stands for.
package flow

import (
	"context"
	"fmt"
	"net/netip"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ccload/internal/netns"
)

// step is how long a blocked call may last before it looks whether it is to end.
const step = 50 * time.Millisecond

// Receiver is the end that takes one flow and throws away what it brings.
type Receiver struct {
	fd   int
	done chan struct{}

	mu     sync.Mutex
	conn   int // -1: none
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
	r := &Receiver{fd: fd, done: make(chan struct{}), conn: -1}
	go r.run()
	return r, nil
}

func (r *Receiver) run() {
	defer close(r.done)
	urgent()
	conn, err := retry(func() (int, error) {
		conn, _, err := unix.Accept4(r.fd, unix.SOCK_CLOEXEC)
		return conn, err
	})
	if err != nil {
		return // Close has shut it down
	}
	defer unix.Close(conn)
	r.mu.Lock()
	r.conn = conn
	closed := r.closed
	r.mu.Unlock()
	// With MSG_TRUNC TCP counts the bytes as read without a copy of them (tcp(7)).
	var none [1]byte
	for !closed {
		n, err := retry(func() (int, error) { return discard(conn, none[:], 1<<20) })
		closed = n <= 0 || err != nil
	}
	r.mu.Lock()
	r.conn = -1
	r.mu.Unlock()
}

// Close ends the flow's receiving end, whatever it does. It may be called again.
func (r *Receiver) Close() error {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return nil
	}
	r.closed = true
	unix.Shutdown(r.fd, unix.SHUT_RDWR) // wakes a blocked accept, as a close would not
	if r.conn >= 0 {
		unix.Shutdown(r.conn, unix.SHUT_RDWR)
	}
	r.mu.Unlock()
	<-r.done
	return unix.Close(r.fd)
}

// Sender is the end that sends. Its methods are for one goroutine.
type Sender struct {
	fd int
	cc string
}

// Result is what the sender's socket tells when its flow has ended.
type Result struct {
	Duration    time.Duration // of the call of Send
	Bytes       uint64        // payload that was acknowledged
	Retransmits uint64        // segments
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
	return &Sender{fd: fd, cc: cc}, nil
}

// Send connects and sends as fast as TCP takes it until d has passed or, if
// bytes is not zero, that many have been acknowledged; or until the context is
// done, which is no error. Then it aborts the connection.
func (s *Sender) Send(ctx context.Context, to netip.AddrPort, d time.Duration, bytes int64) (r Result, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		urgent()
		r, err = s.send(ctx, to, d, bytes)
	}()
	<-done
	if err != nil {
		return r, fmt.Errorf("send to %v: %w", to, err)
	}
	return r, nil
}

func (s *Sender) send(ctx context.Context, to netip.AddrPort, d time.Duration, bytes int64) (r Result, err error) {
	start := time.Now()
	end := start.Add(d)
	over := func() bool { return ctx.Err() != nil || !time.Now().Before(end) }
	if r.Connected, err = s.connect(to, over); err != nil || !r.Connected {
		r.Duration = time.Since(start)
		return r, err
	}
	if err := check(s.fd, s.cc); err != nil {
		return r, err
	}

	buf := make([]byte, 1<<18)
	left := bytes
	for !over() && (bytes == 0 || left > 0) {
		if err := timeout(s.fd, end); err != nil {
			return r, err
		}
		chunk := buf
		if bytes > 0 && left < int64(len(buf)) {
			chunk = buf[:left]
		}
		n, err := retry(func() (int, error) { return unix.Write(s.fd, chunk) })
		if err != nil && err != unix.EAGAIN {
			return r, fmt.Errorf("write: %w", err)
		}
		left -= int64(max(n, 0))
	}
	if bytes > 0 && left == 0 {
		if err := s.drain(over); err != nil {
			return r, err
		}
	}
	r.Duration = time.Since(start)
	info, err := unix.GetsockoptTCPInfo(s.fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return r, fmt.Errorf("read tcp_info: %w", err)
	}
	if info.Bytes_acked > 0 {
		r.Bytes = info.Bytes_acked - 1 // the SYN counts as one
	}
	r.Retransmits = uint64(info.Total_retrans)
	if info.Busy_time > 0 {
		r.Limited = float64(info.Rwnd_limited+info.Sndbuf_limited) / float64(info.Busy_time)
	}
	return r, s.Close()
}

// Close aborts the connection: nothing of it stays in the network. It may be
// called again.
func (s *Sender) Close() error {
	if s.fd < 0 {
		return nil
	}
	unix.SetsockoptLinger(s.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	err := unix.Close(s.fd)
	s.fd = -1
	return err
}

// connect says whether the connection was there before it was over.
func (s *Sender) connect(to netip.AddrPort, over func() bool) (bool, error) {
	if err := unix.SetNonblock(s.fd, true); err != nil {
		return false, fmt.Errorf("connect: %w", err)
	}
	_, err := retry(func() (int, error) { return 0, unix.Connect(s.fd, sockaddr(to)) })
	if err != nil && err != unix.EINPROGRESS {
		return false, fmt.Errorf("connect: %w", err)
	}
	fds := []unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLOUT}}
	for fds[0].Revents == 0 {
		if over() {
			return false, nil
		}
		if _, err := unix.Poll(fds, int(step/time.Millisecond)); err != nil && err != unix.EINTR {
			return false, fmt.Errorf("connect: %w", err)
		}
	}
	errno, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && errno != 0 {
		err = unix.Errno(errno)
	}
	if err != nil {
		return false, fmt.Errorf("connect: %w", err)
	}
	return true, unix.SetNonblock(s.fd, false)
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

// socket makes a TCP socket in a namespace, bound and with its congestion control.
func socket(ns *netns.NS, at netip.AddrPort, cc string) (fd int, err error) {
	err = ns.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
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
	if err := unix.Bind(fd, sockaddr(at)); err != nil {
		return -1, fmt.Errorf("bind: %w", err)
	}
	return fd, check(fd, cc)
}

// urgent makes the calling goroutine's thread go before all that is not, since an
// end of a flow stands for a machine of its own. The thread ends with the
// goroutine, for it has been changed. Where it may not, others disturb the flow.
func urgent() {
	runtime.LockOSThread()
	unix.Setpriority(unix.PRIO_PROCESS, 0, -20)
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

// timeout lets a blocking write last until the end, but not longer than a step.
func timeout(fd int, end time.Time) error {
	tv := unix.NsecToTimeval(int64(max(time.Millisecond, min(step, time.Until(end)))))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv); err != nil {
		return fmt.Errorf("timeout: %w", err)
	}
	return nil
}

func sockaddr(a netip.AddrPort) *unix.SockaddrInet4 {
	return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
}

// retry repeats what a signal has interrupted; Go's runtime sends itself some.
func retry(call func() (int, error)) (int, error) {
	for {
		if n, err := call(); err != unix.EINTR {
			return n, err
		}
	}
}
