// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"fmt"
	"math"
	"slices"

	"ccload/harness/trace"
)

// seen sums up the samples that one source has taken of one flow. Each value
// holds for a time: a sample on an ACK tells what has held since the one before,
// one at an interval what holds until the next.
type seen struct {
	n        uint64
	last     trace.Sample
	time     float64            // s that the sums cover
	cwnd     float64            // segments × s
	cwndMax  uint32             // segments
	srtt     map[uint32]float64 // µs → s for which it held
	episodes int
}

func newSeen() *seen { return &seen{srtt: map[uint32]float64{}} }

func (w *seen) add(s trace.Sample) {
	if w.n > 0 {
		holds, d := &w.last, s.Time-w.last.Time
		if s.Source == trace.Ack {
			holds = &s
		}
		w.time += d
		w.cwnd += d * float64(holds.Cwnd)
		w.srtt[uint32(math.Round(holds.SRTT*1e6))] += d
	}
	if s.CAState >= trace.CARecovery && s.CAState != w.last.CAState {
		w.episodes++
	}
	w.cwndMax = max(w.cwndMax, s.Cwnd)
	w.last = s
	w.n++
}

// quantiles of the smoothed round-trip time, in s, weighted by time. The
// quantities asked for rise.
func (w *seen) quantiles(of ...float64) []float64 {
	values := make([]uint32, 0, len(w.srtt))
	for v := range w.srtt {
		values = append(values, v)
	}
	slices.Sort(values)
	out := make([]float64, len(of))
	i, sum := 0, 0.0
	for _, v := range values {
		sum += w.srtt[v]
		for i < len(of) && sum >= of[i]*w.time {
			out[i] = float64(v) / 1e6
			i++
		}
	}
	return out
}

// summarise works out what the Run tells besides its samples.
func (x *experiment) summarise() {
	r, ran := x.run, x.ran.Seconds()
	var throughputs []float64
	for i, f := range x.Flows {
		ack, diag := x.seen[trace.Ack][int32(f.ID)], x.seen[trace.Diag][int32(f.ID)]
		r.Sampling.Ack += ack.n
		r.Sampling.Diag += diag.n
		w := diag
		if ack.n > 0 {
			w = ack
		}
		end := x.results[i]
		res := trace.FlowResult{
			ID: f.ID, CC: f.CC, Start: f.Start, Duration: end.Duration.Seconds(),
			Bytes: end.Bytes, Retransmits: end.Retransmits,
			Unconnected: !end.Connected, LossEpisodes: w.episodes,
		}
		if res.Duration > 0 {
			res.Throughput = new(float64(res.Bytes) * 8 / res.Duration)
			throughputs = append(throughputs, *res.Throughput)
		}
		if w.time > 0 {
			q := w.quantiles(.5, .95)
			res.CwndMean, res.CwndMax = new(w.cwnd/w.time), new(float64(w.cwndMax))
			res.SRTTp50, res.SRTTp95 = &q[0], &q[1]
		}
		r.Flows = append(r.Flows, res)
		if !end.Connected {
			x.warn("flow %d was over before it was connected", f.ID)
		}
	}
	r.Jain = jain(throughputs)

	r.Warnings = append(r.Warnings, x.end.Warnings...)
	c := x.end.Counters
	r.Link.Lateness = x.end.Lateness
	r.Bottleneck = &trace.Bottleneck{Drops: c.Drops, Losses: c.Losses, Marks: c.Marks, QueueMax: c.Max}
	if ran > 0 {
		r.Bottleneck.QueueMean = new(float64(c.Area) / 1e9 / ran)
		r.Bottleneck.Utilisation = new(float64(c.Delivered) * 8 / (x.Link.Rate * ran))
	}
	x.check()
	if r.Sampling.Ack == 0 {
		x.warn("loss episodes are counted from samples %g ms apart, which may miss some", x.Interval*1e3)
	}
}

// jain is Jain's fairness index (Jain, Chiu and Hawe, DEC-TR-301, 1984): 1/n to
// 1; nil if nobody got anything.
func jain(x []float64) *float64 {
	var sum, squares float64
	for _, v := range x {
		sum += v
		squares += v * v
	}
	if squares == 0 {
		return nil
	}
	return new(sum * sum / (float64(len(x)) * squares))
}

// What the checks allow.
const (
	rateError   = 0.01   // of the rate
	rttError    = 0.02   // of the RTT
	rttLeast    = 1e-3   // s: less than this is never too much
	lateError   = 0.01   // of the RTT, of the median lateness
	lateLeast   = 150e-6 // s: likewise
	limitedMost = 0.05   // of the time that a flow had something to send
)

// check makes the claims that a run has to stand up to. One that fails is a
// warning as well.
func (x *experiment) check() {
	r, l := x.run, x.Link
	claim := func(name string, ok bool, want, got string) {
		r.Checks = append(r.Checks, trace.Check{Name: name, Want: want, Got: got, OK: ok})
		if !ok {
			x.warn("%s: %s, wanted %s", name, got, want)
		}
	}
	ms := func(s float64) string { return fmt.Sprintf("%.3f ms", s*1e3) }
	mbit := func(v float64) string { return fmt.Sprintf("%.6g Mbit/s", v/1e6) }

	m := r.Link.Measured
	if m.Rate != nil {
		claim("link rate", math.Abs(*m.Rate-l.Rate) <= rateError*l.Rate, mbit(l.Rate)+" ± 1 %", mbit(*m.Rate))
	}
	most := max(rttError*l.RTT, rttLeast)
	claim("link rtt", math.Abs(*m.RTT-l.RTT) <= most, ms(l.RTT)+" ± "+ms(most), ms(*m.RTT))
	most = max(lateError*l.RTT, lateLeast)
	if r.Link.Lateness != nil { // the kernel does not tell how late its netem is
		claim("link lateness", r.Link.Lateness.P50 <= most, "median ≤ "+ms(most), ms(r.Link.Lateness.P50))
	}
	claim("packets lost outside the link", x.end.Unseen == 0, "0", fmt.Sprint(x.end.Unseen))
	if x.ack != nil {
		claim("samples lost", r.Sampling.Lost == 0, "0", fmt.Sprint(r.Sampling.Lost))
	}
	limited := 0.0
	for _, end := range x.results {
		limited = max(limited, end.Limited)
	}
	claim("held back by socket buffers", limited <= limitedMost, fmt.Sprintf("≤ %g %%", limitedMost*100), fmt.Sprintf("%.2g %%", limited*100))
}
