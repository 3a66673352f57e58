// SPDX-License-Identifier: Apache-2.0

// Package sampler watches the senders of one network namespace: at an interval
// through sock_diag(7) (Diag), which needs nothing, and at each segment that they
// receive and each change of state, through tracepoints (Ack), which needs BPF.
//
// Both tell flows apart by the sender's port and give samples to a function, from
// a goroutine of their own each.
package sampler

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"

	"ccload/harness/trace"
	"ccload/internal/bpfload"
	"ccload/internal/fault"
	"ccload/internal/netns"
)

// Target says what to make of what is seen.
type Target struct {
	Start int64              // ns of CLOCK_MONOTONIC: the samples' time 0
	Flows map[uint16]int32   // the sender's port → Sample.Flow; others are passed over
	Sink  func(trace.Sample) // may be called by several samplers at a time
}

//go:embed tcp_probe.bpf.o
var tcpProbe []byte

// DefaultRing is the size of the ring buffer between the kernel and Ack, in
// bytes: room for 100 000 segments.
const DefaultRing = 8 << 20

// emptied is how often the ring buffer is emptied.
const emptied = 20 * time.Millisecond

// The programs. Without the second there are no samples between segments.
const (
	probeProgram = "tcp_probe"
	stateProgram = "tcp_state"
)

// Ack samples at each segment that reaches a sender, and where the kernel lets it
// whenever the state of its congestion machine is set.
type Ack struct {
	// Warnings says what is not sampled, and why.
	Warnings []string

	coll   *ebpf.Collection
	links  []link.Link
	reader *ringbuf.Reader
	stop   chan struct{}
	done   chan struct{} // nil until Start
	once   sync.Once
	lost   uint64
	err    error
}

// OpenAck attaches to the tracepoint, for the sockets of one namespace with local
// ports from first to last. ring is the size of the ring buffer, a power of two from the size of a page; 0 means
// DefaultRing. It needs CAP_BPF and CAP_PERFMON, and the kernel's BTF. Where BPF
// does not work the error says why.
func OpenAck(ns *netns.NS, first, last uint16, ring int) (_ *Ack, err error) {
	a := &Ack{}
	defer func() {
		if err != nil {
			a.Close()
			err = fmt.Errorf("sample on every ACK: %w", err)
		}
	}()
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(tcpProbe))
	if err != nil {
		return nil, err
	}
	inode, err := ns.Inode()
	if err != nil {
		return nil, err
	}
	if err := errors.Join(
		spec.Variables["netns"].Set(uint32(inode)),
		spec.Variables["first_port"].Set(first),
		spec.Variables["last_port"].Set(last),
	); err != nil {
		return nil, err
	}
	if ring > 0 {
		spec.Maps["events"].MaxEntries = uint32(ring)
	}
	without := func(err error) {
		a.Warnings = append(a.Warnings, fmt.Sprintf("sample between ACKs: %v; what happens there is seen at the interval only", err))
	}
	a.coll, err = bpfload.Load(spec, nil)
	if refused, ok := errors.AsType[*bpfload.RefusedError](err); ok {
		delete(spec.Programs, stateProgram)
		if a.coll, err = bpfload.Load(spec, nil); err == nil {
			without(refused)
		}
	}
	if err != nil {
		return nil, err
	}
	if a.reader, err = ringbuf.NewReader(a.coll.Maps["events"]); err != nil {
		return nil, err
	}
	for _, name := range []string{probeProgram, stateProgram} {
		p := a.coll.Programs[name]
		if p == nil {
			continue
		}
		l, err := attach(name, p)
		if err != nil && name == probeProgram {
			return nil, err
		}
		if err != nil {
			without(err)
			continue
		}
		a.links = append(a.links, l)
	}
	return a, nil
}

func attach(name string, p *ebpf.Program) (l link.Link, err error) {
	if err = fault.At("attach program " + name); err == nil {
		l, err = link.AttachTracing(link.TracingOptions{Program: p, AttachType: ebpf.AttachTraceRawTp})
	}
	if err != nil {
		return nil, &bpfload.RefusedError{Program: name, Kind: "tp_btf", Err: bpfload.Plain(err)}
	}
	return l, nil
}

// event is struct event of tcp_probe.bpf.c.
type event struct {
	Time, BytesAcked, PacingRate         uint64
	Cwnd, Ssthresh                       uint32
	SRTT, MinRTT                         uint32
	PacketsOut, Sacked, Lost, RetransOut uint32
	Delivered, DeliveredCE, Retrans      uint32
	Port                                 uint16
	CAState, Flags                       uint8
}

// Flags of an event.
const (
	paced   = 1
	between = 2 // not for a segment that has come
)

// Start begins to give samples to the target.
func (a *Ack) Start(t Target) {
	a.stop, a.done = make(chan struct{}), make(chan struct{})
	go func() {
		defer close(a.done)
		a.err = a.run(t)
	}()
}

func (a *Ack) run(t Target) error {
	var rec ringbuf.Record
	// It is never waited for: Go's scheduler would look after a thread that sleeps in
	// the kernel some hundred times.
	a.reader.SetDeadline(time.Unix(1, 0))
	tick := time.NewTicker(emptied)
	defer tick.Stop()
	for last := false; !last; {
		select {
		case <-tick.C:
		case <-a.stop:
			last = true
		}
		for {
			err := a.reader.ReadInto(&rec)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return fmt.Errorf("ring buffer: %w", err)
			}
			if len(rec.RawSample) < int(unsafe.Sizeof(event{})) {
				return fmt.Errorf("ring buffer: event of %d bytes", len(rec.RawSample))
			}
			e := (*event)(unsafe.Pointer(&rec.RawSample[0]))
			flow, ours := t.Flows[e.Port]
			if !ours {
				continue
			}
			s := trace.Sample{
				Time: float64(int64(e.Time)-t.Start) / 1e9, Flow: flow, Source: trace.Ack,
				Cwnd: e.Cwnd, Ssthresh: e.Ssthresh,
				SRTT: float64(e.SRTT) / 8 / 1e6, MinRTT: rtt(e.MinRTT),
				Inflight:   e.PacketsOut - e.Sacked - e.Lost + e.RetransOut,
				BytesAcked: e.BytesAcked, Delivered: e.Delivered, DeliveredCE: e.DeliveredCE,
				Retrans: e.Retrans, Lost: e.Lost, CAState: trace.CAState(e.CAState),
			}
			if e.Flags&paced != 0 {
				s.PacingRate = pacing(e.PacingRate)
			}
			if e.Flags&between != 0 {
				s.Source = trace.Event
			}
			t.Sink(s)
		}
	}
	return nil
}

// Lost tells how many events did not fit into the ring buffer until now.
func (a *Ack) Lost() (n uint64, err error) {
	return n, a.coll.Variables["lost"].Get(&n)
}

// Close detaches, hands on what is still in the ring buffer and tells how many
// events did not fit into it. It may be called again.
func (a *Ack) Close() (lost uint64, err error) {
	a.once.Do(func() {
		var errs []error
		for _, l := range a.links {
			errs = append(errs, l.Close())
		}
		if a.done != nil {
			close(a.stop)
			<-a.done
			errs = append(errs, a.err)
		}
		if a.coll != nil {
			errs = append(errs, a.coll.Variables["lost"].Get(&a.lost))
			a.coll.Close()
		}
		if a.reader != nil {
			errs = append(errs, a.reader.Close())
		}
		a.err = errors.Join(errs...)
	})
	return a.lost, a.err
}
