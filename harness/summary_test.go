// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"math"
	"testing"

	"ccload/harness/trace"
)

// The same windows mean something else by how they were sampled: at an interval
// a value holds until the next sample, on an ACK it has held since the one before.
// What is known last holds until the flow's end.
func TestSeen(t *testing.T) {
	for source, want := range map[trace.Source]struct{ mean, p50, p95 float64 }{
		trace.Diag: {(10*1 + 20*3 + 40*4) / 8.0, 0.2, 0.4},
		trace.Ack:  {(20*1 + 40*3 + 40*4) / 8.0, 0.4, 0.4},
	} {
		w := newSeen()
		for _, s := range []trace.Sample{
			{Time: 1, Cwnd: 10, SRTT: 0.1},
			{Time: 2, Cwnd: 20, SRTT: 0.2, CAState: trace.CARecovery},
			{Time: 5, Cwnd: 40, SRTT: 0.4, CAState: trace.CARecovery},
		} {
			s.Source = source
			w.add(s)
		}
		w.end(9)
		q := w.quantiles(.5, .95)
		if got := w.cwnd / w.time; got != want.mean || *q[0] != want.p50 || *q[1] != want.p95 || w.cwndMax != 40 || w.losses.Episodes() != 1 {
			t.Errorf("%s: mean %g, quantiles %v, %v, max %d; want %+v", source, got, *q[0], *q[1], w.cwndMax, want)
		}
	}
}

// A flow that stalls has what it had then until its end, not only until its last ACK.
func TestSeenStalls(t *testing.T) {
	w := newSeen()
	add := func(source trace.Source, at float64, cwnd uint32, state trace.CAState) {
		w.add(trace.Sample{Source: source, Time: at, Cwnd: cwnd, SRTT: 0.1, CAState: state})
	}
	add(trace.Ack, 0, 10, trace.CAOpen)
	add(trace.Diag, 0.6, 12, trace.CAOpen) // comes out before the ACK at 0.5
	add(trace.Ack, 0.5, 10, trace.CAOpen)
	add(trace.Ack, 1, 12, trace.CAOpen)
	add(trace.Event, 2, 1, trace.CALoss)
	add(trace.Diag, 3, 1, trace.CALoss)
	add(trace.Event, 4, 1, trace.CALoss)
	w.end(10)
	// Between the last ACK and the timeout nobody knows: what comes next is taken.
	if want := 10*.5 + 12*.5 + 1*9.; math.Abs(w.cwnd-want) > 1e-9 || math.Abs(w.time-10) > 1e-9 {
		t.Errorf("%g segments × s in %g s, want %g in 10", w.cwnd, w.time, want)
	}
	if w.losses.Episodes() != 1 || w.losses.Timeouts() != 2 {
		t.Errorf("%d episodes, %d timeouts; want 1, 2", w.losses.Episodes(), w.losses.Timeouts())
	}
}

// A flow of one sample has its values, one without any has none.
func TestSeenLittle(t *testing.T) {
	for _, source := range []trace.Source{trace.Diag, trace.Ack} {
		w := newSeen()
		w.add(trace.Sample{Source: source, Time: 2, Cwnd: 10, SRTT: 0.1})
		w.end(2)
		if q := w.quantiles(.5); w.time == 0 || math.Abs(w.cwnd/w.time-10) > 1e-9 || q[0] == nil || *q[0] != 0.1 {
			t.Errorf("%s: %g segments × s in %g s, %v", source, w.cwnd, w.time, q)
		}
		w = newSeen()
		w.end(5)
		if q := w.quantiles(.5); w.time != 0 || q[0] != nil {
			t.Errorf("%s: without a sample: %g s, %v", source, w.time, q)
		}
		w.add(trace.Sample{Source: source, Time: 6, Cwnd: 10}) // before the first round trip
		w.end(7)
		if q := w.quantiles(.5); w.time == 0 || q[0] != nil {
			t.Errorf("%s: without an RTT: %g s, %v", source, w.time, q)
		}
	}
}

func TestJain(t *testing.T) {
	for _, c := range []struct {
		x    []float64
		want float64
	}{{[]float64{5}, 1}, {[]float64{3, 3, 3}, 1}, {[]float64{1, 0, 0, 0}, 0.25}, {[]float64{1, 3}, 0.8}} {
		if got := jain(c.x); math.Abs(*got-c.want) > 1e-15 {
			t.Errorf("%v: %g, want %g", c.x, *got, c.want)
		}
	}
	for _, x := range [][]float64{nil, {0, 0}} {
		if got := jain(x); got != nil {
			t.Errorf("%v: %g, want none", x, *got)
		}
	}
}
