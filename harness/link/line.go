// SPDX-License-Identifier: Apache-2.0

package link

import (
	"math/bits"
	"sync/atomic"

	"ccload/harness/trace"
)

// line is one direction: it holds the packets that are under way, in order of
// when they are due. It belongs to one thread.
type line struct {
	from, to int // descriptors of the devices
	// admit says when a packet that has come now is due, or that it goes no further.
	admit func(now int64, packet []byte) (due int64, ok bool)

	mem         []byte
	slot        int
	n           []int32
	due         []int64
	mask        uint64
	tail, taken uint64 // packets put and taken, ever
	spare       []byte // where a packet is read to when there is no room

	overrun  atomic.Uint64 // packets that there was no room for
	lateness lateness
	overdue  atomic.Pointer[Overdue] // nil until Begin
}

// lineRoom is how many packets a line has room for that is to hold some.
func lineRoom(packets int) int { return 1 << bits.Len(uint(packets)) }

func newLine(from, to, packets, slot int) *line {
	n := lineRoom(packets)
	return &line{
		from: from, to: to, spare: make([]byte, slot),
		mem: make([]byte, n*slot), slot: slot, n: make([]int32, n), due: make([]int64, n), mask: uint64(n - 1),
	}
}

func (l *line) at(i uint64) []byte {
	off := int(i&l.mask) * l.slot
	return l.mem[off : off+l.slot]
}

func (l *line) full() bool { return l.tail-l.taken > l.mask }

// free is where the next packet goes.
func (l *line) free() []byte {
	if l.full() {
		return l.spare
	}
	return l.at(l.tail)
}

// put sends the packet of n bytes that free's memory holds on its way.
func (l *line) put(n int, due int64) {
	if l.full() {
		l.overrun.Add(1)
		return
	}
	l.n[l.tail&l.mask], l.due[l.tail&l.mask] = int32(n), due
	l.tail++
}

// head is the packet that is due first, if there is one.
func (l *line) head() (packet []byte, due int64, ok bool) {
	i := l.taken
	if l.tail == i {
		return nil, 0, false
	}
	return l.at(i)[:l.n[i&l.mask]], l.due[i&l.mask], true
}

func (l *line) pop() { l.taken++ }

// late notes when a packet was due and when it is handed on.
func (l *line) late(due, now int64) {
	l.lateness.note(now - due)
	if o := l.overdue.Load(); o != nil {
		o.Note(due, now)
	}
}

// lateness counts how late packets were handed on, by the microsecond up to 16
// ms and by the power of two above. One thread notes, others may read.
type lateness struct {
	fine   [1 << 14]atomic.Uint64
	coarse [64]atomic.Uint64
	max    atomic.Int64
}

func (l *lateness) note(ns int64) {
	ns = max(ns, 0)
	if us := ns / 1000; us < int64(len(l.fine)) {
		l.fine[us].Add(1)
	} else {
		l.coarse[bits.Len64(uint64(us))].Add(1)
	}
	if ns > l.max.Load() {
		l.max.Store(ns)
	}
}

func (l *lateness) reset() {
	for i := range l.fine {
		l.fine[i].Store(0)
	}
	for i := range l.coarse {
		l.coarse[i].Store(0)
	}
	l.max.Store(0)
}

// summary of the packets that several lines have handed on; nil if there were none.
func summary(lines ...*lateness) *trace.Lateness {
	var total uint64
	longest := int64(0)
	each := func(visit func(us float64, n uint64)) {
		for i := range lines[0].fine {
			for _, l := range lines {
				visit(float64(i), l.fine[i].Load())
			}
		}
		for i := range lines[0].coarse {
			for _, l := range lines {
				visit(float64(uint64(1)<<i), l.coarse[i].Load())
			}
		}
	}
	each(func(_ float64, n uint64) { total += n })
	if total == 0 {
		return nil
	}
	quantile := func(q float64) (at float64) {
		var seen uint64
		each(func(us float64, n uint64) {
			if float64(seen) < q*float64(total) {
				at = us
			}
			seen += n
		})
		return at / 1e6
	}
	for _, l := range lines {
		longest = max(longest, l.max.Load())
	}
	// The quantiles are those of buckets, named by their upper ends.
	most := float64(longest) / 1e9
	return &trace.Lateness{P50: min(quantile(.5), most), P99: min(quantile(.99), most), Max: most}
}
