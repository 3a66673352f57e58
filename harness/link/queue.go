// SPDX-License-Identifier: Apache-2.0

// Package link emulates a path in user space: a bottleneck with a rate, a
// drop-tail buffer, ECN marking and loss on purpose, then a delay; and the same
// delay back.
//
// Queue is the bottleneck as arithmetic: it works out from a packet's arrival
// exactly when it leaves, in whatever time it is told, so it can be tested
// without a clock, and a late wake-up never changes the rate. Link is the engine
// around it that moves the packets between two TUN devices.
package link

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"

	"ccload/harness/trace"
)

// Queue is a bottleneck. Times are nanoseconds of any clock and must not go
// back. It is not safe for use by several goroutines.
type Queue struct {
	cfg trace.Link
	rnd *rand.Rand

	busyUntil int64  // ns: when the packet last accepted will have been sent
	remainder uint64 // and the fraction of a nanosecond that was cut, in 1/rate ns
	rate      uint64 // bit/s

	waiting ring // departures, of all packets that have not left
	bytes   int64
	seen    int   // packets, for loss of every nth
	since   int64 // ns: until when area is summed up

	Counters
}

// Counters of a Queue, from its start or the last Reset.
type Counters struct {
	Enqueued  uint64 // packets accepted
	Delivered uint64 // bytes that have left
	Drops     uint64 // packets: buffer full
	Losses    uint64 // packets: on purpose
	Marks     uint64 // packets marked CE
	Max       int    // most packets that waited
	Area      uint64 // packets × ns: the queue's length, summed over time
}

// departure is a packet that waits or is being sent.
type departure struct {
	at    int64 // ns
	bytes int
}

// NewQueue makes a bottleneck of cfg.Rate, cfg.Buffer, cfg.Loss and cfg.ECN that
// is empty at the time now. The seed makes random loss repeatable.
func NewQueue(cfg trace.Link, seed uint64, now int64) (*Queue, error) {
	if cfg.Rate < 1 || cfg.Buffer < 1 {
		return nil, fmt.Errorf("link: rate %g bit/s, buffer %d packets: both must be at least 1", cfg.Rate, cfg.Buffer)
	}
	return &Queue{
		cfg: cfg, rate: uint64(cfg.Rate), since: now, rnd: rand.New(rand.NewPCG(seed, seed)),
		waiting: ring{buf: make([]departure, cfg.Buffer)},
	}, nil
}

// Advance lets leave what has left by now. Len and Bytes hold for that time.
func (q *Queue) Advance(now int64) {
	for q.waiting.n > 0 && q.waiting.first().at <= now {
		q.sum(q.waiting.first().at)
		d := q.waiting.pop()
		q.bytes -= int64(d.bytes)
		q.Delivered += uint64(d.bytes)
	}
	q.sum(now)
}

func (q *Queue) sum(until int64) {
	q.Area += uint64(q.waiting.n) * uint64(until-q.since)
	q.since = until
}

// Len is the number of packets that wait, the one being sent included.
func (q *Queue) Len() int { return q.waiting.n }

// Bytes is their size.
func (q *Queue) Bytes() int64 { return q.bytes }

// Fate is what happened to a packet that arrived.
type Fate uint8

const (
	Passed  Fate = iota
	Marked       // passed, with CE
	Dropped      // the buffer was full
	Lost         // on purpose
)

// Arrive takes an IP packet that arrives now and says when its last bit will
// have been sent. A packet that is marked is changed in place: CE in its IP
// header, and the header's checksum with it.
func (q *Queue) Arrive(now int64, packet []byte) (leaves int64, fate Fate) {
	q.Advance(now)
	q.seen++
	// Loss is the path's, not the buffer's: it comes first and leaves no trace in the queue.
	if every := q.cfg.Loss.Every; every > 0 && q.seen%every == 0 ||
		q.cfg.Loss.Probability > 0 && q.rnd.Float64() < q.cfg.Loss.Probability {
		q.Losses++
		return 0, Lost
	}
	if q.waiting.n >= q.cfg.Buffer {
		q.Drops++
		return 0, Dropped
	}
	// A step at K packets, on what the packet finds (RFC 8257 §3.1).
	if q.cfg.ECN > 0 && q.waiting.n > q.cfg.ECN && mark(packet) {
		q.Marks++
		fate = Marked
	}
	if q.busyUntil < now {
		q.busyUntil, q.remainder = now, 0
	}
	bits := uint64(len(packet))*8*1e9 + q.remainder
	q.busyUntil += int64(bits / q.rate)
	q.remainder = bits % q.rate
	q.waiting.push(departure{q.busyUntil, len(packet)})
	q.bytes += int64(len(packet))
	q.Enqueued++
	q.Max = max(q.Max, q.waiting.n)
	return q.busyUntil, fate
}

// ECN in the two low bits of the traffic class (RFC 3168 §5).
const (
	notECT = 0
	ce     = 3
)

// mark sets CE where the packet is ECN-capable and says whether it is.
func mark(p []byte) bool {
	switch {
	case len(p) >= 20 && p[0]>>4 == 4:
		if p[1]&3 == notECT {
			return false
		}
		// Incremental update of the header checksum (RFC 1624, equation 3).
		old := binary.BigEndian.Uint16(p)
		p[1] |= ce
		sum := uint32(^binary.BigEndian.Uint16(p[10:])) + uint32(^old) + uint32(binary.BigEndian.Uint16(p))
		sum = sum>>16 + sum&0xffff
		sum += sum >> 16
		binary.BigEndian.PutUint16(p[10:], ^uint16(sum))
		return true
	case len(p) >= 40 && p[0]>>4 == 6:
		if p[1]>>4&3 == notECT {
			return false
		}
		p[1] |= ce << 4
		return true
	}
	return false
}

// ring is a first-in-first-out queue that was made large enough.
type ring struct {
	buf     []departure
	head, n int
}

func (r *ring) first() departure { return r.buf[r.head] }

func (r *ring) pop() departure {
	d := r.buf[r.head]
	if r.head++; r.head == len(r.buf) {
		r.head = 0
	}
	r.n--
	return d
}

func (r *ring) push(d departure) {
	at := r.head + r.n
	if at >= len(r.buf) {
		at -= len(r.buf)
	}
	r.buf[at] = d
	r.n++
}
