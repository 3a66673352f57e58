// SPDX-License-Identifier: Apache-2.0

// Package harness runs experiments: TCP flows, each with a congestion control
// chosen by its name, over one emulated link, watched while they run.
//
// Run makes two fresh network namespaces with the link between them (package
// link), measures the empty link, lets the flows send (package flow), samples
// them (package sampler) and writes what it saw (package trace). Whatever
// happens, also when the process is killed, nothing of it stays: the namespaces
// have no name, the devices are not persistent, and the sockets are ours.
//
// The harness knows congestion controls only by the names that the kernel has
// for them. It neither puts them there nor cares what they are made of.
package harness

import (
	"context"
	crand "crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ccload/harness/flow"
	"ccload/harness/link"
	"ccload/harness/sampler"
	"ccload/harness/trace"
	"ccload/internal/netns"
)

// Sink takes what a run sees, as it comes, and in the end the Run, which makes the
// result whole. Sample and Link may be called from different goroutines.
// *trace.Writer is one.
type Sink interface {
	Sample(trace.Sample) error
	Link(trace.LinkSample) error
	Finish(*trace.Run) error
	Close() error // without Finish before it the result is not whole; may be called again
}

// Options say how an experiment is run, other than what is to be run.
type Options struct {
	// Dir is the result directory to make; see trace.Create.
	Dir string
	// Sink, if it is set, takes the results in place of a directory.
	Sink Sink
	// Progress is called a few times a second while the flows run.
	Progress func(elapsed, total time.Duration)
	// Ring is the size of the buffer for samples on ACKs; see sampler.OpenAck.
	Ring int
	// Objects and Versions are noted in the Run as they are.
	Objects, Versions map[string]string
}

// Run runs one experiment, its defaults filled in (see Defaults), and returns
// what is also in Options.Dir. It needs CAP_NET_ADMIN and CAP_SYS_ADMIN, and
// /dev/net/tun or netem; for samples on every ACK also CAP_BPF and CAP_PERFMON.
//
// What makes the run less trustworthy is no error but a check that failed, and a
// warning. If the context ends the run, what was measured until then is kept,
// Run.Incomplete is set and the error is nil; if it does so before the flows have
// begun, the error is the context's. What was measured before a flow broke or the
// disk was full is kept likewise, but with an error.
//
// One run at a time in a process: two on one machine would measure each other.
func Run(ctx context.Context, e trace.Experiment, opt Options) (*trace.Run, error) {
	e, err := Defaults(e)
	if err != nil {
		return nil, err
	}
	if err := known(e.Flows); err != nil {
		return nil, err
	}
	var why string
	if e.Link.Kind, why, err = link.Choose(e.Link); err != nil {
		return nil, err
	}
	if err := Fits(Memory(e)); err != nil {
		return nil, err
	}
	for _, line := range link.Rounded(e.Link) {
		rounded(&e, "%s", line)
	}
	one.Lock()
	defer one.Unlock()

	// The threads of the link must never wait for a processor of the Go scheduler
	// or for its garbage collector.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(max(8, runtime.GOMAXPROCS(0))))
	defer debug.SetGCPercent(debug.SetGCPercent(400))
	// With many packets under way, a multiple of what they take would be too much.
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(128<<20 + link.Memory(e.Link)))
	priority(-20)
	defer priority(0)

	x, err := setUp(e, opt)
	if err != nil {
		return nil, err
	}
	defer x.close()
	measured, err := probe(ctx, x.sender, x.receiver, e.Link)
	if err != nil {
		return nil, err
	}
	if x.out = opt.Sink; x.out == nil {
		if x.out, err = trace.Create(opt.Dir); err != nil {
			return nil, err
		}
	}
	defer x.out.Close()
	x.run.Link.Why, x.run.Link.Measured = why, measured
	if err = x.send(ctx); err != nil {
		x.run.Incomplete = true
		x.warn("%v", err)
	}
	if x.end != nil {
		x.summarise()
	}
	return x.run, errors.Join(err, x.out.Finish(x.run))
}

var one sync.Mutex

// priority sets the nice value of all the process's threads, from which those to
// come have theirs: what else a machine does must not slow a link down that stands
// for hardware. Where it may not, others disturb the run.
func priority(nice int) {
	tasks, _ := os.ReadDir("/proc/self/task")
	for _, t := range tasks {
		if tid, err := strconv.Atoi(t.Name()); err == nil {
			unix.Setpriority(unix.PRIO_PROCESS, tid, nice)
		}
	}
}

// experiment is one that is set up.
type experiment struct {
	trace.Experiment
	run *trace.Run
	out Sink

	sender, receiver *netns.NS
	link             emulated
	senders          []*flow.Sender   // by index of the flow
	receivers        []*flow.Receiver // likewise
	diag             *sampler.Diag
	ack              *sampler.Ack // nil: not asked for, or not possible

	start   int64 // ns: time 0
	ran     time.Duration
	starts  []time.Duration // of the flows, since time 0
	results []flow.Result
	end     *link.End
	machine *machine

	progress func(elapsed, total time.Duration)
	cancel   context.CancelCauseFunc

	mu      sync.Mutex
	seen    map[int32]*seen
	failure error // of writing what was seen
}

// The flows' ports, from the first flow's on.
const (
	senderPort   = 10000
	receiverPort = 20000
)

// emulated is a link of any kind.
type emulated interface {
	Now() int64
	Begin(start int64, seed uint64, every time.Duration, rows chan<- []trace.LinkSample) error
	Threads() []int
	Unseen() (uint64, error)
	Finish(at int64) (*link.End, error)
	Offloads() (map[string]bool, error)
	Close() error
}

// open makes the link of the kind that it says.
func open(sender, receiver *netns.NS, id string, l trace.Link) (emulated, error) {
	if l.Kind == link.Netem {
		return link.NewNetem(sender, receiver, id, l)
	}
	return link.New(sender, receiver, id, l)
}

// setUp makes everything but the flows.
func setUp(e trace.Experiment, opt Options) (_ *experiment, err error) {
	x := &experiment{Experiment: e, progress: opt.Progress, run: &trace.Run{
		Format: trace.Format, Dir: opt.Dir, Seed: e.Seed, Experiment: e,
		Objects: opt.Objects, Versions: opt.Versions,
		Link: trace.LinkResult{Link: e.Link}, Flows: []trace.FlowResult{}, Checks: []trace.Check{}, Warnings: append([]string{}, e.Rounded...),
	}}
	defer func() {
		if err != nil {
			x.close()
		}
	}()
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return nil, fmt.Errorf("uname: %w", err)
	}
	x.run.Kernel = unix.ByteSliceToString(uts.Release[:])

	if x.sender, err = namespace(e.Link); err != nil {
		return nil, err
	}
	if x.receiver, err = namespace(e.Link); err != nil {
		return nil, err
	}
	if x.run.Sysctls, err = sysctls(x.sender); err != nil {
		return nil, err
	}
	var id [3]byte
	crand.Read(id[:])
	if x.link, err = open(x.sender, x.receiver, hex.EncodeToString(id[:]), e.Link); err != nil {
		return nil, err
	}
	if x.run.Offloads, err = x.link.Offloads(); err != nil {
		return nil, err
	}
	for i, f := range e.Flows {
		r, err := flow.Listen(x.receiver, x.to(i), f.CC)
		if err != nil {
			return nil, fmt.Errorf("flow %d: %w", f.ID, err)
		}
		x.receivers = append(x.receivers, r)
		s, err := flow.Open(x.sender, x.from(i), f.CC)
		if err != nil {
			return nil, fmt.Errorf("flow %d: %w", f.ID, err)
		}
		x.senders = append(x.senders, s)
	}
	if x.diag, err = sampler.OpenDiag(x.sender); err != nil {
		return nil, err
	}
	if e.PerAck {
		if x.ack, err = sampler.OpenAck(x.sender, x.from(0).Port(), x.from(len(e.Flows)-1).Port(), opt.Ring); err != nil {
			x.warn("%v; there are samples at the interval only, and what happens in between may be missed", err)
			x.ack = nil
		} else {
			x.run.Warnings = append(x.run.Warnings, x.ack.Warnings...)
		}
	}
	return x, nil
}

func (x *experiment) from(i int) netip.AddrPort {
	return netip.AddrPortFrom(link.SenderAddr, senderPort+uint16(i))
}

func (x *experiment) to(i int) netip.AddrPort {
	return netip.AddrPortFrom(link.ReceiverAddr, receiverPort+uint16(i))
}

func (x *experiment) warn(format string, args ...any) {
	x.run.Warnings = append(x.run.Warnings, fmt.Sprintf(format, args...))
}

// close takes everything down. It may be called again, and at any time after
// setUp has begun.
func (x *experiment) close() {
	for _, s := range x.senders {
		s.Close()
	}
	for _, r := range x.receivers {
		r.Close()
	}
	if x.diag != nil {
		x.diag.Close()
	}
	if x.ack != nil {
		x.ack.Close()
	}
	if x.link != nil {
		x.link.Close()
	}
	for _, ns := range []*netns.NS{x.sender, x.receiver} {
		if ns != nil {
			ns.Close()
		}
	}
}

// send lets the flows run and collects what there is to see.
func (x *experiment) send(ctx context.Context) (err error) {
	x.seen = map[int32]*seen{}
	t := sampler.Target{Flows: map[uint16]int32{}, Sink: x.sample}
	peers := map[uint16]netip.AddrPort{}
	for i, f := range x.Flows {
		t.Flows[x.from(i).Port()], peers[x.from(i).Port()] = int32(f.ID), x.to(i)
		x.seen[int32(f.ID)] = newSeen()
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	x.cancel = cancel
	rows := make(chan []trace.LinkSample, 256)
	written := make(chan struct{})
	go func() {
		defer close(written)
		for chunk := range rows {
			for _, r := range chunk {
				x.wrote(x.out.Link(r))
			}
		}
	}()

	x.run.Started = time.Now().UTC().Format(time.RFC3339)
	begun := time.Now()
	x.start = x.link.Now()
	t.Start = x.start
	if x.machine, err = watchMachine(x); err != nil {
		close(rows)
		return err
	}
	if err = x.link.Begin(x.start, x.Seed, rowInterval(x.Duration), rows); err != nil {
		close(rows)
		return errors.Join(err, x.machine.close())
	}
	x.diag.Start(t, link.SenderAddr, peers, seconds(x.Interval), x.link.Now)
	if x.ack != nil {
		x.ack.Start(t)
	}

	errs := make([]error, len(x.Flows))
	x.results = make([]flow.Result, len(x.Flows))
	x.starts = startTimes(x.Experiment)
	var flows sync.WaitGroup
	for i, f := range x.Flows {
		flows.Go(func() {
			select {
			case <-time.After(time.Until(begun.Add(x.starts[i]))):
			case <-ctx.Done():
				return
			}
			x.starts[i] = time.Since(begun)
			if x.results[i], errs[i] = x.senders[i].Send(ctx, x.to(i), flow.Load{Duration: seconds(f.Duration), Bytes: f.Bytes, Rate: f.Rate}); errs[i] != nil {
				cancel(errs[i])
			}
		})
	}
	over := make(chan struct{})
	go func() { flows.Wait(); close(over) }()
	x.watch(over, begun)
	at := x.link.Now()
	x.ran = time.Duration(at - x.start)
	x.run.Incomplete = ctx.Err() != nil

	errs = append(errs, x.machine.close(), x.diag.Close())
	if x.ack != nil {
		lost, err := x.ack.Close()
		x.run.Sampling.Lost = lost
		errs = append(errs, err)
	}
	if x.end, err = x.link.Finish(at); err != nil {
		close(rows)
	}
	<-written
	return errors.Join(append(errs, err, x.failure)...)
}

// startTimes are those of the flows, each put off by its jitter. What that is does
// not hang on what else comes from the seed: the link's losses are another stream.
func startTimes(e trace.Experiment) (starts []time.Duration) {
	rnd := rand.New(rand.NewPCG(e.Seed, jitterStream))
	for _, f := range e.Flows {
		starts = append(starts, seconds(f.Start+e.Jitter*rnd.Float64()))
	}
	return starts
}

const jitterStream = 0x6a697474657273 // "jitters": any number but the link's

// watch waits until all flows are over and tells how far they are.
func (x *experiment) watch(over <-chan struct{}, begun time.Time) {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-over:
			return
		case <-tick.C:
		}
		if x.progress != nil {
			x.progress(time.Since(begun), seconds(x.Duration))
		}
	}
}

// sample takes a sample from any of the samplers.
func (x *experiment) sample(s trace.Sample) {
	x.wrote(x.out.Sample(s))
	x.mu.Lock()
	defer x.mu.Unlock()
	x.seen[s.Flow].add(s)
}

// wrote notes the first error of writing and ends the run for it: what cannot be
// kept need not be measured.
func (x *experiment) wrote(err error) {
	if err == nil {
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.failure == nil {
		x.failure = err
		x.cancel(err)
	}
}

// rowInterval is the time between two rows of the link's state: 1 ms, or more
// where a run is so long that there would be more than 100 000 of them.
func rowInterval(duration float64) time.Duration {
	return max(time.Millisecond, seconds(duration/1e5))
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }
