// SPDX-License-Identifier: Apache-2.0

package link

import (
	"testing"
	"time"
)

func TestOverdue(t *testing.T) {
	const start, ms = int64(5e9), int64(time.Millisecond)
	o := NewOverdue(start, 4*time.Second, time.Millisecond)
	at := func(ms int64) int64 { return start + ms*1e6 }
	o.Note(at(-10), at(-5))        // before it began
	o.Note(at(-2), at(3))          // across
	o.Note(at(100), at(100)+ms)    // may be
	o.Note(at(200), at(210))       // 10 ms,
	o.Note(at(205), at(212))       // and 2 more: the rest is the same time
	o.Note(at(900), at(3100))      // a stop
	o.Note(at(901), at(3100)+ms/2) // and what came late because of it
	for i, want := range []Late{
		{2200 * time.Millisecond, (3 + 12 + 100) * time.Millisecond}, {2200 * time.Millisecond, time.Second}, {2200 * time.Millisecond, time.Second},
		{2200 * time.Millisecond, 100*time.Millisecond + time.Millisecond/2}, {}, {},
	} {
		if got := o.Second(i); got != want {
			t.Errorf("second %d: %+v, want %+v", i, got, want)
		}
	}
	if got := (*Overdue)(nil).Second(0); got != (Late{}) {
		t.Errorf("none: %+v", got)
	}
}

func TestMayBeLate(t *testing.T) {
	for rtt, want := range map[float64]time.Duration{
		0.2: 2 * time.Millisecond, 0.01: 150 * time.Microsecond, 0.0004: 100 * time.Microsecond, 50e-6: 12500, 0: 150 * time.Microsecond,
	} {
		if got := MayBeLate(rtt); got != want {
			t.Errorf("RTT of %g s: %v, want %v", rtt, got, want)
		}
	}
}
