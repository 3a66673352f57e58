// SPDX-License-Identifier: Apache-2.0

package link

import "time"

// Overdue sums up, for each second from a start on, the time in which something
// that was due had not been done. It is not safe for use by several goroutines.
type Overdue struct {
	start, may int64 // ns
	until      int64 // ns: up to which time has been summed up
	seconds    []Late
}

// Late is of one second.
type Late struct {
	Max time.Duration // the most that something was late which was due or done in it, or between
	Sum time.Duration // the time in which something was due
}

// NewOverdue is for about so much time from start, in ns, on. What is late by may at
// most does not count.
func NewOverdue(start int64, about, may time.Duration) *Overdue {
	return &Overdue{start: start, until: start, may: int64(may), seconds: make([]Late, 0, 2+int(about/time.Second))}
}

// Note says when something was due, and when it has been done. It is to be called in
// order of the latter.
func (o *Overdue) Note(due, done int64) {
	late := done - due
	if late <= o.may || done < o.start {
		return
	}
	due = max(due, o.start)
	last := int((done - o.start) / int64(time.Second))
	for len(o.seconds) <= last {
		o.seconds = append(o.seconds, Late{})
	}
	for i := int((due - o.start) / int64(time.Second)); i <= last; i++ {
		begin := o.start + int64(i)*int64(time.Second)
		s := &o.seconds[i]
		s.Max = max(s.Max, time.Duration(late))
		s.Sum += time.Duration(max(0, min(done, begin+int64(time.Second))-max(due, o.until, begin)))
	}
	o.until = max(o.until, done)
}

// Second is what was noted of one, counted from 0.
func (o *Overdue) Second(i int) Late {
	if o == nil || i >= len(o.seconds) {
		return Late{}
	}
	return o.seconds[i]
}

// What a link may be late, of the RTT: a hundredth is within what the RTT may be off
// by, and what a machine with high-resolution timers keeps on any longer link. On a
// short one its wake-ups, 85 µs late at the median where this was measured, must not
// count; but they do where they are no longer small beside the RTT.
const (
	lateShare    = 0.01
	lateLeast    = 150 * time.Microsecond
	lateAtMostOf = 0.25
)

// MayBeLate is how late the packets of a link with that RTT, in s, may be handed on.
func MayBeLate(rtt float64) time.Duration {
	d := time.Duration(rtt * float64(time.Second))
	if d == 0 {
		return lateLeast // there is nothing that it could be a share of
	}
	return max(time.Duration(lateShare*float64(d)), min(lateLeast, time.Duration(lateAtMostOf*float64(d))))
}

// stallShare is of the RTT: what is late by less adds less to it than the queue
// differs by from one moment to the next.
const stallShare = 0.1

// stalls is from when on a packet that is late counts as held up by the machine, for
// the sums over each second.
func stalls(rtt float64) time.Duration {
	return max(MayBeLate(rtt), time.Duration(stallShare*rtt*float64(time.Second)))
}
