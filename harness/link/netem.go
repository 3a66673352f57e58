// SPDX-License-Identifier: Apache-2.0

package link

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"ccload/harness/trace"
	"ccload/internal/netns"
)

// NetemLink is the emulated path made of the kernel's own emulator, netem: from
// the sender over a router to the receiver, each in a namespace of its own.
//
// Router's device towards the receiver: a netem for loss on purpose and half the
// RTT, and, as its child, one that is the bottleneck: its rate, with a limit that
// is the buffer. Receiver's device: a netem for the other half. Packets of the
// delays are limited by nothing.
//
// The bottleneck must not be on the sender's own device: there a drop is told to
// TCP at once, and a packet that waits counts as not yet sent. Packets part with
// their socket where they are routed, so a bridge or a redirection in place of
// the router would not do. In a guest at 100 Mbit/s the router makes up a seventh
// of the instructions and the delay on the way there, which could as well be part
// of the way back, a tenth; in wall time neither shows.
//
// What Begin's rows, Counters.Max and Counters.Area tell of the queue is sampled,
// at Begin's interval; the counters are the kernel's and exact, a queue that
// dropped a packet was full. Since the delay comes first, the queue is seen half
// an RTT later than in user space; a round trip is the same.
type NetemLink struct {
	cfg              trace.Link
	clock            clock
	router           *netns.NS
	sender, receiver *port  // the ends
	toSender, out    *port  // the router's
	loss, bottleneck *watch // loss: nil if there is none on purpose

	sampling sync.WaitGroup
	stopped  atomic.Bool
	rows     chan<- []trace.LinkSample
	start    int64 // ns: of the recording
	since    int64 // ns: until when area is summed up
	base     state // before it
	last     state
	accepted uint64 // packets: the most that was seen
	area     uint64 // packets × ns
	max      int    // packets
	warnings []string
	failure  error // of sampling

	once sync.Once
	err  error
}

// state is that of the forward direction.
type state struct {
	queue netem
	lost  uint64 // packets that the delay dropped: on purpose
}

// Handles of queueing disciplines.
const (
	delayHandle      = 1 << 16
	bottleneckHandle = 2 << 16
)

// unlimited is a netem's limit, in packets, where nothing is to be dropped: more
// than memory holds. netem takes memory for what it has only.
const unlimited = 1 << 30

// CanNetem says why netem cannot be what a link is to be; nil if it can.
func CanNetem(cfg trace.Link) error {
	switch {
	case cfg.Loss.Every > 0:
		return fmt.Errorf("link of kind %q: it cannot lose exactly each %dth packet, only with a probability", Netem, cfg.Loss.Every)
	case cfg.ECN > 0:
		return fmt.Errorf("link of kind %q: it cannot mark when more than %d packets wait", Netem, cfg.ECN)
	case cfg.Burst > 1:
		return fmt.Errorf("link of kind %q: its bursts are of 1 segment, not of %d", Netem, cfg.Burst)
	}
	return nil
}

// NewNetem sets up the path between two fresh namespaces, as New does, but out of
// the kernel's netem. It refuses what netem cannot do; see CanNetem.
func NewNetem(sender, receiver *netns.NS, id string, cfg trace.Link) (_ *NetemLink, err error) {
	if _, err := NewQueue(cfg, 0, 0); err != nil {
		return nil, err
	}
	if err := CanNetem(cfg); err != nil {
		return nil, err
	}
	l := &NetemLink{cfg: cfg}
	if l.clock, err = newClock(); err != nil {
		return nil, fmt.Errorf("link: clock: %w", err)
	}
	defer func() {
		if err != nil {
			l.Close()
		}
	}()
	if l.router, err = netns.New(); err != nil {
		return nil, fmt.Errorf("link: router: %w", err)
	}
	if err := l.router.Do(func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0) }); err != nil {
		return nil, fmt.Errorf("link: router: %w", err)
	}
	if l.sender, l.toSender, err = pair(sender, l.router, "cc"+id+"s", cfg.MTU); err != nil {
		return nil, err
	}
	if l.receiver, l.out, err = pair(receiver, l.router, "cc"+id+"r", cfg.MTU); err != nil {
		return nil, err
	}
	plain := cfg
	plain.Loss, plain.Buffer = trace.Loss{}, trainBuffer(cfg)
	delay, bottleneck := emulators(plain, 0)
	for _, step := range []func() error{
		func() error { return l.sender.address(netip.PrefixFrom(SenderAddr, 30)) },
		func() error { return l.receiver.address(netip.PrefixFrom(ReceiverAddr, 30)) },
		func() error { return l.toSender.route(SenderAddr) },
		func() error { return l.out.route(ReceiverAddr) },
		func() error { return l.out.emulate(delay, create) },
		func() error { return l.out.emulate(bottleneck, create) },
		func() error { return l.receiver.emulate(delay, create) },
	} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	if l.bottleneck, err = l.out.watch(bottleneckHandle); err != nil {
		return nil, err
	}
	if cfg.Loss.Probability > 0 {
		if l.loss, err = l.out.watch(delayHandle); err != nil {
			return nil, err
		}
	}
	return l, nil
}

// emulators are the two of the forward direction.
func emulators(cfg trace.Link, seed uint64) (delay, bottleneck emulator) {
	return emulator{
			handle: delayHandle, parent: rootQdisc, limit: unlimited,
			delay: int64(cfg.RTT * 1e9 / 2), loss: cfg.Loss.Probability, seed: seed,
		}, emulator{
			handle: bottleneckHandle, parent: delayHandle | 1, limit: cfg.Buffer, rate: cfg.Rate,
		}
}

// Now is the link's clock: CLOCK_MONOTONIC in ns.
func (l *NetemLink) Now() int64 { return l.clock.now() }

// Begin sets the buffer and the loss as configured, starts the counters afresh at
// the time start and sends the state of the queue to rows at the given interval
// from then on. Finish closes the channel. The queue should be empty.
func (l *NetemLink) Begin(start int64, seed uint64, every time.Duration, rows chan<- []trace.LinkSample) error {
	delay, bottleneck := emulators(l.cfg, seed)
	if err := errors.Join(l.out.emulate(delay, change), l.out.emulate(bottleneck, change)); err != nil {
		return err
	}
	if l.loss != nil {
		n, err := l.loss.read()
		if err != nil {
			return err
		}
		if n.seed != seed {
			l.warnings = append(l.warnings, "this kernel's netem takes no seed: that of the run does not decide which packets are lost")
		}
	}
	var err error
	if l.base, err = l.state(); err != nil {
		return err
	}
	l.start, l.since, l.last, l.rows = start, start, l.base, rows
	l.sampling.Go(func() {
		runtime.LockOSThread()
		unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0)
		l.failure = l.sample(int64(every))
	})
	return nil
}

func (l *NetemLink) state() (s state, err error) {
	var n netem
	if l.loss != nil {
		// The delay counts what its child drops as well. It is asked first, so what
		// happens in between can only make the loss seem less for a moment.
		if n, err = l.loss.read(); err != nil {
			return s, err
		}
	}
	if s.queue, err = l.bottleneck.read(); err != nil {
		return s, err
	}
	s.lost = l.last.lost
	if l.loss != nil {
		s.lost = max(s.lost, n.drops-min(n.drops, s.queue.drops))
	}
	return s, nil
}

// sample sends rows until the link is stopped.
func (l *NetemLink) sample(every int64) error {
	chunk := make([]trace.LinkSample, 0, chunkRows)
	defer func() { l.rows <- chunk }()
	for due := l.start; !l.stopped.Load(); {
		if now := l.clock.now(); now < due {
			// In steps, so that it ends soon. Go's scheduler is not told of it, as with
			// the other kind's threads.
			wait := unix.NsecToTimespec(min(due-now, int64(nap)))
			unix.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&wait)), 0, 0)
			continue
		}
		row, err := l.look()
		if err != nil {
			return err
		}
		chunk = append(chunk, row)
		if len(chunk) == chunkRows {
			l.rows <- chunk
			chunk = make([]trace.LinkSample, 0, chunkRows)
		}
		due += every
	}
	return nil
}

// look takes one sample.
func (l *NetemLink) look() (row trace.LinkSample, err error) {
	s, err := l.state()
	if err != nil {
		return row, err
	}
	now := l.clock.now()
	l.area += uint64(l.last.queue.waiting) * uint64(max(0, now-l.since))
	l.max = max(l.max, s.queue.waiting)
	l.last, l.since = s, now
	c := l.counters()
	return trace.LinkSample{
		Time: float64(now-l.start) / 1e9, Queue: int32(s.queue.waiting), QueueBytes: s.queue.backlog,
		Enqueued: c.Enqueued, Delivered: c.Delivered, Drops: c.Drops, Losses: c.Losses,
	}, nil
}

func (l *NetemLink) counters() Counters {
	q, b := l.last.queue, l.base.queue
	// Between two of its counters the kernel may move a packet from one to the other,
	// so that it is in neither.
	l.accepted = max(l.accepted, q.packets+uint64(q.waiting)-b.packets-uint64(b.waiting))
	c := Counters{
		Enqueued:  l.accepted,
		Delivered: q.bytes - b.bytes,
		Drops:     q.drops - b.drops,
		Losses:    l.last.lost - l.base.lost,
		Max:       l.max, Area: l.area,
	}
	if c.Drops > 0 {
		c.Max = l.cfg.Buffer
	}
	return c
}

// Finish ends the recording, a little after the time at, which must not lie
// ahead, takes the link down and tells what it counted. Of lateness the kernel
// tells nothing.
func (l *NetemLink) Finish(at int64) (*End, error) {
	l.stop()
	err := l.failure
	if err == nil && l.rows != nil {
		var row trace.LinkSample
		if row, err = l.look(); err == nil {
			l.rows <- []trace.LinkSample{row}
		}
	}
	unseen, uerr := l.Unseen()
	if err := errors.Join(err, uerr, l.Close()); err != nil {
		return nil, err
	}
	if l.rows != nil {
		close(l.rows)
	}
	return &End{Counters: l.counters(), Unseen: unseen, Warnings: l.warnings}, nil
}

// Threads are none: the kernel moves the packets.
func (l *NetemLink) Threads() []int { return nil }

// Unseen counts the packets that were dropped, but neither by the bottleneck nor
// on purpose.
func (l *NetemLink) Unseen() (n uint64, err error) {
	for _, p := range []*port{l.sender, l.toSender, l.out, l.receiver} {
		d, err := dropped(p.ns, p.name)
		if err != nil {
			return 0, fmt.Errorf("link: %w", err)
		}
		n += d
	}
	w, err := l.receiver.watch(delayHandle)
	if err != nil {
		return 0, err
	}
	defer w.close()
	back, err := w.read()
	return n + back.drops, err
}

// Offloads tells which offloads the link's devices have on.
func (l *NetemLink) Offloads() (map[string]bool, error) { return offloads(l.sender.ns, l.sender.name) }

func (l *NetemLink) stop() {
	l.stopped.Store(true)
	l.sampling.Wait()
}

// Close takes the link down. It may be called again.
func (l *NetemLink) Close() error {
	l.once.Do(func() {
		l.stop()
		for _, w := range []*watch{l.loss, l.bottleneck} {
			if w != nil {
				w.close()
			}
		}
		for _, p := range []*port{l.sender, l.receiver} {
			if p != nil {
				l.err = errors.Join(l.err, p.remove())
			}
		}
		for _, p := range []*port{l.sender, l.toSender, l.out, l.receiver} {
			if p != nil {
				p.conn.Close()
			}
		}
		if l.router != nil {
			l.err = errors.Join(l.err, l.router.Close())
		}
	})
	return l.err
}
