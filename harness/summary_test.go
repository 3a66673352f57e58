// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"math"
	"testing"

	"ccload/harness/trace"
)

// The same windows mean something else by how they were sampled: at an interval
// a value holds until the next sample, on an ACK it has held since the one before.
func TestSeen(t *testing.T) {
	for source, want := range map[trace.Source]struct{ mean, p50, p95 float64 }{
		trace.Diag: {(10*1 + 20*3) / 4.0, 0.2, 0.2},
		trace.Ack:  {(20*1 + 40*3) / 4.0, 0.4, 0.4},
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
		q := w.quantiles(.5, .95)
		if got := w.cwnd / w.time; got != want.mean || q[0] != want.p50 || q[1] != want.p95 || w.cwndMax != 40 || w.episodes != 1 {
			t.Errorf("%s: mean %g, quantiles %v, max %d, %d episodes; want %+v", source, got, q, w.cwndMax, w.episodes, want)
		}
	}
}

func TestLossEpisodes(t *testing.T) {
	w := newSeen()
	for i, s := range []trace.CAState{
		trace.CAOpen, trace.CADisorder, trace.CARecovery, trace.CARecovery, trace.CALoss, trace.CAOpen, trace.CACWR, trace.CALoss, trace.CALoss,
	} {
		w.add(trace.Sample{Time: float64(i), CAState: s})
	}
	if w.episodes != 3 {
		t.Errorf("%d episodes, want 3: Recovery, Loss out of it, Loss", w.episodes)
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
