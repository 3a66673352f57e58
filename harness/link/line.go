// SPDX-License-Identifier: Apache-2.0

package link

import (
	"fmt"
	"math/bits"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"ccload/harness/trace"
)

// line holds the packets that are under way in one direction, in order of when
// they are due. One thread puts, one takes; neither allocates.
type line struct {
	mem  []byte
	slot int
	n    []int32
	due  []int64
	mask uint64

	tail, taken atomic.Uint64 // packets put and taken, ever
	sleeping    atomic.Bool   // the taker waits for the bell
	bell        int           // eventfd: it wakes the taker's thread at once, where a channel leaves that to Go's scheduler
	spare       []byte        // where a packet is read to when there is no room

	overrun  atomic.Uint64 // packets that there was no room for
	lateness lateness
}

func newLine(packets, slot int) (*line, error) {
	bell, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("link: eventfd: %w", err)
	}
	n := 1 << bits.Len(uint(packets))
	return &line{
		mem: make([]byte, n*slot), slot: slot, n: make([]int32, n), due: make([]int64, n), mask: uint64(n - 1),
		bell: bell, spare: make([]byte, slot),
	}, nil
}

func (l *line) at(i uint64) []byte {
	off := int(i&l.mask) * l.slot
	return l.mem[off : off+l.slot]
}

func (l *line) full() bool { return l.tail.Load()-l.taken.Load() > l.mask }

// free is where the next packet goes.
func (l *line) free() []byte {
	if l.full() {
		return l.spare
	}
	return l.at(l.tail.Load())
}

// put sends the packet of n bytes that free's memory holds on its way.
func (l *line) put(n int, due int64) {
	if l.full() {
		l.overrun.Add(1)
		return
	}
	i := l.tail.Load()
	l.n[i&l.mask], l.due[i&l.mask] = int32(n), due
	l.tail.Store(i + 1)
	if l.sleeping.Load() {
		l.ring()
	}
}

func (l *line) ring() { unix.Write(l.bell, []byte{1, 0, 0, 0, 0, 0, 0, 0}) }

// head waits for the first packet; false once stopped is set.
func (l *line) head(stopped *atomic.Bool) (packet []byte, due int64, ok bool) {
	i := l.taken.Load()
	for l.tail.Load() == i {
		l.sleeping.Store(true)
		if l.tail.Load() == i && !stopped.Load() {
			var b [8]byte
			unix.Read(l.bell, b[:])
		}
		l.sleeping.Store(false)
		if stopped.Load() {
			return nil, 0, false
		}
	}
	return l.at(i)[:l.n[i&l.mask]], l.due[i&l.mask], true
}

func (l *line) pop() { l.taken.Add(1) }

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

// summary of the packets that several lines have handed on.
func summary(lines ...*lateness) trace.Lateness {
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
	return trace.Lateness{P50: quantile(.5), P99: quantile(.99), Max: float64(longest) / 1e9}
}
