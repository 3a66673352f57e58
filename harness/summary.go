// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"ccload/harness/analysis"
	"ccload/harness/link"
	"ccload/harness/trace"
)

// seen sums up the samples of one flow, each value weighted by the time for which
// it held (see analysis.Holds), from the first sample to the flow's end.
type seen struct {
	sampled  trace.Sampling
	late     []trace.Sample // at intervals, which may have been taken after what has yet to come
	last     trace.Sample
	begun    bool               // last is one
	time     float64            // s that the sums cover
	cwnd     float64            // segments × s
	cwndMax  uint32             // segments
	srtt     map[uint32]float64 // µs → s for which it held
	srttTime float64            // s for which it was known
	losses   analysis.Losses
}

func newSeen() *seen { return &seen{srtt: map[uint32]float64{}} }

// patience is how much later than a sample at an interval an earlier one on an ACK
// may come out of the ring buffer, in s.
const patience = 1

func (w *seen) add(s trace.Sample) {
	w.losses.Add(&s)
	w.cwndMax = max(w.cwndMax, s.Cwnd)
	switch s.Source {
	case trace.Diag:
		w.sampled.Diag++
		w.late = append(w.late, s)
		w.until(s.Time - patience)
		return
	case trace.Ack:
		w.sampled.Ack++
	case trace.Event:
		w.sampled.Events++
	}
	w.until(s.Time)
	w.follow(s)
}

// until lets those at intervals follow that are older than a time.
func (w *seen) until(t float64) {
	n := 0
	for n < len(w.late) && w.late[n].Time < t {
		w.follow(w.late[n])
		n++
	}
	w.late = slices.Delete(w.late, 0, n)
}

// follow takes a sample that is the next in time.
func (w *seen) follow(s trace.Sample) {
	if w.begun {
		w.held(analysis.Holds(&w.last, &s), s.Time-w.last.Time)
	}
	w.last, w.begun = s, true
}

func (w *seen) held(s *trace.Sample, d float64) {
	d = max(d, 0)
	w.time += d
	w.cwnd += d * float64(s.Cwnd)
	if s.SRTT > 0 { // there is none before the first round trip
		w.srtt[uint32(math.Round(s.SRTT*1e6))] += d
		w.srttTime += d
	}
}

// end says when the flow ended: what is known last has held until then.
func (w *seen) end(at float64) {
	w.until(math.Inf(1))
	if w.begun {
		// The one sample of a flow that ended with it has its say, too.
		w.held(&w.last, max(at-w.last.Time, 1e-9))
	}
}

// quantiles of the smoothed round-trip time, in s, weighted by time; nil if none is
// known. The quantities asked for rise.
func (w *seen) quantiles(of ...float64) []*float64 {
	out := make([]*float64, len(of))
	i, sum := 0, 0.0
	for _, v := range slices.Sorted(maps.Keys(w.srtt)) {
		sum += w.srtt[v]
		// The last is not missed for what sums of fractions are off by.
		for i < len(of) && sum >= of[i]*w.srttTime*(1-1e-12) {
			out[i] = new(float64(v) / 1e6)
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
		w, end := x.seen[int32(f.ID)], x.results[i]
		r.Sampling.Ack += w.sampled.Ack
		r.Sampling.Diag += w.sampled.Diag
		r.Sampling.Events += w.sampled.Events
		res := trace.FlowResult{
			ID: f.ID, CC: f.CC, Start: x.starts[i].Seconds(), Duration: end.Duration.Seconds(),
			Bytes: end.Bytes, Retransmits: end.Retransmits, Unconnected: !end.Connected && end.Duration > 0,
			LossEpisodes: w.losses.Episodes(), Timeouts: max(w.losses.Timeouts(), end.Timeouts),
		}
		w.end(res.Start + res.Duration)
		if res.Duration > 0 {
			res.Throughput = new(float64(res.Bytes) * 8 / res.Duration)
			throughputs = append(throughputs, *res.Throughput)
		}
		if w.time > 0 {
			q := w.quantiles(.5, .95)
			res.CwndMean, res.CwndMax = new(w.cwnd/w.time), new(float64(w.cwndMax))
			res.SRTTp50, res.SRTTp95 = q[0], q[1]
		}
		r.Flows = append(r.Flows, res)
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
	if x.Link.Loss != (trace.Loss{}) && c.Losses == 0 {
		x.warn("loss was asked for, but none of %s was lost", counted(int(c.Enqueued), "packet"))
	}
	disturbances, machine := x.machine.disturbances(x.machine.processors, x.Link.RTT, x.ran, x.end.Late)
	r.Disturbances, r.Machine = disturbances, &machine
	x.check()
	if x.ack == nil {
		x.warn("loss episodes are counted from samples %g ms apart, which may miss some", x.Interval*1e3)
	}
	// The first comes one interval after the start, the last may be just about to come.
	if n, asked := x.diag.Rounds(), ran/x.Interval; float64(n+2) < asked*0.99 && n > 0 {
		x.warn("interval: samples every %g ms were asked for: they came every %.3g ms", x.Interval*1e3, ran/float64(n)*1e3)
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
	rateError = 0.01 // of the rate
	// The RTT may be off by a fiftieth, and on a short link by what the wake-ups of a
	// machine add, but by no more than a quarter: an RTT that is a multiple of what was
	// asked for is another link.
	rttError  = 0.02
	rttLeast  = 1e-3 // s
	rttAtMost = 0.25
	// Of the time that a flow had something to send.
	limitedMost = 0.05
)

// rttMayBeOff is by how much the RTT may be off, in s.
func rttMayBeOff(rtt float64) float64 {
	if rtt == 0 {
		return rttLeast // there is nothing that it could be a multiple of
	}
	return max(rttError*rtt, min(rttLeast, rttAtMost*rtt))
}

// check makes the claims that a run has to stand up to. One that fails is a
// warning as well.
func (x *experiment) check() {
	r, l, claim := x.run, x.Link, x.claim
	ms := func(s float64) string { return fmt.Sprintf("%.3f ms", s*1e3) }
	mbit := func(v float64) string { return fmt.Sprintf("%.6g Mbit/s", v/1e6) }

	m := r.Link.Measured
	if m.Rate != nil {
		claim("link rate", math.Abs(*m.Rate-l.Rate) <= rateError*l.Rate, mbit(l.Rate)+" ± 1 %", mbit(*m.Rate))
	}
	off := rttMayBeOff(l.RTT)
	claim("link rtt", math.Abs(*m.RTT-l.RTT) <= off, ms(l.RTT)+" ± "+ms(off), ms(*m.RTT))
	if r.Link.Lateness != nil { // the kernel does not tell how late its netem is
		late := link.MayBeLate(l.RTT).Seconds()
		claim("link lateness", r.Link.Lateness.P50 <= late, "median ≤ "+ms(late), ms(r.Link.Lateness.P50))
	}
	spoiled, got := r.Disturbances, "0"
	if len(spoiled) > 0 {
		var which []int
		for _, d := range spoiled {
			which = append(which, d.Second)
		}
		got = fmt.Sprintf("%d of %.0f (%s): %s", len(spoiled), math.Ceil(x.ran.Seconds()), some(which), strings.Join(worst(spoiled).Why, ", "))
	}
	claim("seconds spoiled by the machine", len(spoiled) == 0, "0", got)
	claim("packets lost outside the link", x.end.Unseen == 0, "0", fmt.Sprint(x.end.Unseen))
	if x.ack != nil {
		claim("samples lost", r.Sampling.Lost == 0, "0", fmt.Sprint(r.Sampling.Lost))
	}
	limited := 0.0
	for _, end := range x.results {
		limited = max(limited, end.Limited)
	}
	claim("held back by socket buffers", limited <= limitedMost, fmt.Sprintf("≤ %g %%", limitedMost*100), fmt.Sprintf("%.2g %%", limited*100))
	x.checkSilent()
}

func (x *experiment) claim(name string, ok bool, want, got string) {
	x.run.Checks = append(x.run.Checks, trace.Check{Name: name, Want: want, Got: got, OK: ok})
	if !ok {
		x.warn("%s: %s, wanted %s", name, got, want)
	}
}

// checkSilent looks for flows that got nothing through. Those of a run that was ended early
// may not have had the time.
func (x *experiment) checkSilent() {
	var unconnected, nothing []int
	for _, f := range x.run.Flows {
		switch {
		case f.Duration == 0: // its turn never came
		case f.Unconnected:
			unconnected = append(unconnected, f.ID)
		case f.Bytes == 0:
			nothing = append(nothing, f.ID)
		}
	}
	var parts []string
	if n := len(unconnected); n > 0 {
		parts = append(parts, fmt.Sprintf("%d of %s never connected: %s", n, counted(len(x.Flows), "flow"), some(unconnected)))
	}
	if n := len(nothing); n > 0 {
		parts = append(parts, fmt.Sprintf("%d of %s had nothing acknowledged: %s", n, counted(len(x.Flows), "flow"), some(nothing)))
	}
	got := strings.Join(parts, "; ")
	switch {
	case !x.Silent && !x.run.Incomplete:
		x.claim("flows that got nothing through", got == "", "none", cmp.Or(got, "none"))
	case got != "":
		x.warn("%s", got)
	}
}

// some are the first few of numbers.
func some(n []int) string {
	const few = 3
	var b strings.Builder
	for i, v := range n[:min(few, len(n))] {
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprint(&b, v)
	}
	if len(n) > few {
		b.WriteString(", …")
	}
	return b.String()
}

// worst is the second with the latest packet, or the longest gap.
func worst(d []trace.Disturbance) trace.Disturbance {
	return slices.MaxFunc(d, func(a, b trace.Disturbance) int {
		return cmp.Compare(*most(a.LatenessMax, a.Gap), *most(b.LatenessMax, b.Gap))
	})
}
