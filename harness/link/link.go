// SPDX-License-Identifier: Apache-2.0

package link

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"ccload/harness/trace"
	"ccload/internal/netns"
)

// The addresses of the two ends, of the range for tests of networks (RFC 2544).
var (
	SenderAddr   = netip.MustParseAddr("198.18.0.1")
	ReceiverAddr = netip.MustParseAddr("198.18.0.2")
)

// Link is the emulated path between two network namespaces: a TUN device in each
// and a thread for each direction between them, or one for both where there is
// one processor only.
type Link struct {
	cfg            trace.Link
	sender, recver *tun
	clock          clock
	stopped        atomic.Bool
	threads        sync.WaitGroup

	forward, back *line
	next          atomic.Pointer[run] // to be begun with the next packet
	current       *run                // of the reading thread, until it has ended

	mu   sync.Mutex
	tids []int

	procs int // GOMAXPROCS before
	once  sync.Once
	err   error
}

// run is what is recorded between Begin and Close.
type run struct {
	queue *Queue
	start int64 // ns
	every int64 // ns between rows
	due   int64 // ns: the next row
	chunk []trace.LinkSample
	rows  chan<- []trace.LinkSample
}

// clock reads CLOCK_MONOTONIC, as the kernel's timers and bpf_ktime_get_ns do.
type clock struct {
	base  int64
	start time.Time
}

func newClock() (clock, error) {
	var ts unix.Timespec
	c := clock{start: time.Now()}
	err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	c.base = ts.Nano()
	return c, err
}

func (c clock) now() int64 { return c.base + int64(time.Since(c.start)) }

// MaxMemory bounds what the packets of a link may take, in bytes.
const MaxMemory = 4 << 30

// burst is what the buffer holds at least until Begin.
const burst = 60 * time.Millisecond

// trainBuffer is the buffer until Begin: however small it is to be, a burst must be
// able to keep the bottleneck busy, or its rate could not be measured.
func trainBuffer(cfg trace.Link) int {
	return max(cfg.Buffer, 16+int(cfg.Rate*burst.Seconds()/8/float64(cfg.MTU)))
}

// rooms are how many packets each direction has room for, and the bytes of one: twice
// what is under way when every packet is as large as it may be, and room for small
// ones; forward also what waits in the buffer.
func rooms(cfg trace.Link) (forward, back, slot int) {
	back = 2*int(cfg.Rate*cfg.RTT/2/8/float64(cfg.MTU)) + 4096
	return back + trainBuffer(cfg), back, headroom + cfg.MTU
}

// Memory returns the most that a Link of this kind takes for packets, in bytes.
func Memory(cfg trace.Link) int64 {
	forward, back, slot := rooms(cfg)
	return int64(lineRoom(forward)+lineRoom(back)) * int64(slot)
}

// New sets up the path between two fresh namespaces. id makes the names of its
// devices unique. Until Begin it neither loses packets on purpose nor marks them,
// and its buffer is large enough for a train of packets that measures it.
func New(sender, receiver *netns.NS, id string, cfg trace.Link) (_ *Link, err error) {
	l := &Link{cfg: cfg}
	if l.clock, err = newClock(); err != nil {
		return nil, fmt.Errorf("link: clock: %w", err)
	}
	if _, err := NewQueue(cfg, 0, 0); err != nil {
		return nil, err // now rather than in Begin
	}
	plain := cfg
	plain.Loss, plain.ECN = trace.Loss{}, 0
	plain.Buffer = trainBuffer(cfg)
	q, err := NewQueue(plain, 0, l.clock.now())
	if err != nil {
		return nil, err
	}
	delay := int64(cfg.RTT * 1e9 / 2)
	forward, back, slot := rooms(cfg)
	if need := Memory(cfg); need > MaxMemory {
		return nil, fmt.Errorf("link: %d MiB of memory for packets: at most %d MiB", need>>20, int64(MaxMemory)>>20)
	}
	defer func() {
		if err != nil {
			l.Close()
		}
	}()
	if l.sender, err = openTUN(sender, "cc"+id+"s", netip.PrefixFrom(SenderAddr, 30), cfg.MTU); err != nil {
		return nil, err
	}
	if cfg.Burst > 0 {
		if err := l.sender.setBurst(cfg.Burst); err != nil {
			return nil, err
		}
	}
	if l.recver, err = openTUN(receiver, "cc"+id+"r", netip.PrefixFrom(ReceiverAddr, 30), cfg.MTU); err != nil {
		return nil, err
	}
	// The link's threads must find a P free whenever they come back from the
	// kernel, while those that an ordinary thread holds may have to wait for a CPU.
	l.procs = runtime.GOMAXPROCS(max(runtime.GOMAXPROCS(0), 4*4))
	l.forward = newLine(l.sender.fd, l.recver.fd, forward, slot)
	l.back = newLine(l.recver.fd, l.sender.fd, back, slot)
	l.current = &run{queue: q}
	l.forward.admit = func(now int64, packet []byte) (int64, bool) {
		leaves, ok := l.arrive(now, packet)
		return leaves + delay, ok
	}
	l.back.admit = func(now int64, _ []byte) (int64, bool) { return now + delay, true }
	if runtime.NumCPU() == 1 {
		l.thread(l.forward, l.back)
	} else {
		l.thread(l.forward)
		l.thread(l.back)
	}
	return l, nil
}

// Now is the link's clock: CLOCK_MONOTONIC in ns.
func (l *Link) Now() int64 { return l.clock.now() }

// Begin starts the counters, loss and marking afresh at the time start and sends
// the state of the queue to rows from then on: at the given interval and at each
// drop and mark. Close closes the channel. The queue should be empty.
func (l *Link) Begin(start int64, seed uint64, every time.Duration, rows chan<- []trace.LinkSample) error {
	q, err := NewQueue(l.cfg, seed, start)
	if err != nil {
		return err
	}
	l.next.Store(&run{queue: q, start: start, every: int64(every), due: start, rows: rows})
	for _, line := range []*line{l.forward, l.back} {
		line.lateness.reset()
		line.overdue.Store(NewOverdue(start, 0, stalls(l.cfg.RTT)))
	}
	return nil
}

// Threads are the numbers of those that move the packets.
func (l *Link) Threads() []int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.tids)
}

// End is what a link tells when it has ended.
type End struct {
	Counters
	Lateness *trace.Lateness // nil: the link does not tell
	Late     []*Overdue      // by direction, since Begin; none: the link does not tell
	Unseen   uint64          // packets that never reached the emulator: the machine was too slow
	Warnings []string
}

// Finish ends the recording at a time, which must not lie ahead, stops the link
// and tells what it counted.
func (l *Link) Finish(at int64) (*End, error) {
	unseen, err := l.Unseen()
	if err := errors.Join(err, l.Close()); err != nil {
		return nil, fmt.Errorf("link: %w", err)
	}
	l.begin()
	r := l.current
	r.record(at)
	r.queue.Advance(max(at, r.queue.since))
	if r.rows != nil {
		r.flush()
		close(r.rows)
	}
	return &End{
		Counters: r.queue.Counters, Lateness: summary(&l.forward.lateness, &l.back.lateness),
		Late: []*Overdue{l.forward.overdue.Load(), l.back.overdue.Load()}, Unseen: unseen,
	}, nil
}

// Unseen counts the packets that were lost between the kernel and the emulator.
func (l *Link) Unseen() (uint64, error) {
	n := l.forward.overrun.Load() + l.back.overrun.Load()
	for _, t := range []*tun{l.sender, l.recver} {
		d, err := dropped(t.ns, t.name)
		if err != nil {
			return 0, err
		}
		n += d
	}
	return n, nil
}

// Offloads tells which offloads the link's devices have on.
func (l *Link) Offloads() (map[string]bool, error) { return offloads(l.sender.ns, l.sender.name) }

// Close takes the link down. It may be called again.
func (l *Link) Close() error {
	l.once.Do(func() {
		l.stopped.Store(true)
		l.threads.Wait()
		if l.procs > 0 {
			runtime.GOMAXPROCS(l.procs)
		}
		for _, t := range []*tun{l.sender, l.recver} {
			if t != nil {
				l.err = errors.Join(l.err, t.close())
			}
		}
	})
	return l.err
}

// nap is how long a thread may sleep before it looks whether it is to end.
const nap = 50 * time.Millisecond

// thread moves the packets of some lines on a thread of its own, whose timers are
// not put off to be merged with others'. The thread ends with its work, for it has
// been changed.
//
// It has no real-time priority: much of TCP's work for both ends is done in the
// system calls of these threads, so the kernel's bound on real-time work
// (sched(7)) would stop them for tens of milliseconds.
//
// Its system calls are not announced to Go's scheduler, which would be woken to
// hand the thread's place on while it sleeps and again to give it back, a few
// times for each packet.
func (l *Link) thread(lines ...*line) {
	l.threads.Go(func() {
		runtime.LockOSThread()
		unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0)
		l.mu.Lock()
		l.tids = append(l.tids, unix.Gettid())
		l.mu.Unlock()
		fds := make([]unix.PollFd, len(lines))
		for i, line := range lines {
			fds[i] = unix.PollFd{Fd: int32(line.from), Events: unix.POLLIN}
		}
		for !l.stopped.Load() {
			next := l.clock.now() + int64(nap)
			for _, line := range lines {
				next = min(next, l.deliver(line))
			}
			ts := unix.NsecToTimespec(max(0, next-l.clock.now()))
			n, _, errno := unix.RawSyscall6(unix.SYS_PPOLL,
				uintptr(unsafe.Pointer(&fds[0])), uintptr(len(fds)), uintptr(unsafe.Pointer(&ts)), 0, 0, 0)
			if errno != 0 || n == 0 {
				continue
			}
			for i, line := range lines {
				if fds[i].Revents != 0 && !l.collect(line) {
					return
				}
			}
		}
	})
}

// deliver hands on the packets that are due, and tells when the next is.
func (l *Link) deliver(line *line) (next int64) {
	for {
		p, due, ok := line.head()
		if !ok {
			return math.MaxInt64
		}
		now := l.clock.now()
		if now < due {
			return due
		}
		line.late(due, now)
		// The kernel takes a packet or drops it as a device would.
		unix.RawSyscall(unix.SYS_WRITE, uintptr(line.to), uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)))
		line.pop()
	}
}

// batch is how many packets are taken from a device before those that are due get
// their turn.
const batch = 16

// collect takes in the packets that have come; it is false when the device is gone.
func (l *Link) collect(line *line) bool {
	for range batch {
		p := line.free()
		n, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(line.from), uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)))
		switch errno {
		case 0:
		case unix.EAGAIN, unix.EINTR:
			return true
		default:
			return false
		}
		if n <= headroom {
			continue
		}
		if due, ok := line.admit(l.clock.now(), p[headroom:n]); ok {
			line.put(int(n), due)
		}
	}
	return true
}

// begin goes over to the run that Begin has set up.
func (l *Link) begin() {
	if r := l.next.Swap(nil); r != nil {
		l.current = r
	}
}

// arrive puts a packet through the bottleneck and records what there is to.
func (l *Link) arrive(now int64, packet []byte) (leaves int64, ok bool) {
	l.begin()
	r := l.current
	now = max(now, r.queue.since)
	r.record(now)
	leaves, fate := r.queue.Arrive(now, packet)
	if fate != Passed {
		r.row(now)
	}
	return leaves, fate == Passed || fate == Marked
}

// record adds the rows that are due by now. The queue tells its state at each
// exactly, even if nothing has arrived since.
func (r *run) record(now int64) {
	if r.rows == nil {
		return
	}
	for ; r.due <= now; r.due += r.every {
		r.queue.Advance(max(r.due, r.queue.since))
		r.row(r.due)
	}
}

// chunkRows is how many rows are handed on together: a quarter of a second's.
const chunkRows = 256

func (r *run) row(at int64) {
	if r.rows == nil {
		return
	}
	if r.chunk == nil {
		r.chunk = make([]trace.LinkSample, 0, chunkRows)
	}
	q := r.queue
	r.chunk = append(r.chunk, trace.LinkSample{
		Time: float64(at-r.start) / 1e9, Queue: int32(q.Len()), QueueBytes: q.Bytes(),
		Enqueued: q.Enqueued, Delivered: q.Delivered, Drops: q.Drops, Losses: q.Losses, Marks: q.Marks,
	})
	if len(r.chunk) == chunkRows {
		r.flush()
	}
}

func (r *run) flush() {
	if len(r.chunk) > 0 {
		r.rows <- r.chunk
		r.chunk = nil
	}
}
