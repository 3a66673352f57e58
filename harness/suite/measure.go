// SPDX-License-Identifier: Apache-2.0

package suite

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"sort"

	"ccload/harness/analysis"
	"ccload/harness/trace"
)

// quantity is something that can be measured in a result.
type quantity struct {
	name string
	unit unit
	// ofLink: it is of the bottleneck, not of each flow.
	ofLink  bool
	measure func(*view) (float64, error)
}

// quantities by their names. What each is stands in Quantities' doc comment.
var quantities = func() map[string]quantity {
	m := map[string]quantity{}
	for _, q := range []quantity{
		{"cwnd_mean", segments, false, (*view).cwndMean},
		{"cwnd_max", segments, false, (*view).cwndMax},
		{"cwnd_peak", segments, false, func(v *view) (float64, error) {
			return v.overCuts(1, func(c []cut) float64 { return float64(c[0].peak) })
		}},
		{"cwnd_low", segments, false, func(v *view) (float64, error) {
			return v.overCuts(1, func(c []cut) float64 { return float64(c[0].low) })
		}},
		{"period", second, false, func(v *view) (float64, error) {
			return v.overCuts(2, func(c []cut) float64 { return c[1].begin - c[0].begin })
		}},
		{"alpha", ratio, false, (*view).alpha},
		{"alpha_cut", ratio, false, func(v *view) (float64, error) {
			return v.overCuts(1, func(c []cut) float64 { return 2 * (1 - float64(c[0].low)/float64(c[0].peak)) })
		}},
		{"throughput", bitRate, false, (*view).throughput},
		{"srtt_p50", second, false, func(v *view) (float64, error) { return v.srtt(.5) }},
		{"srtt_p95", second, false, func(v *view) (float64, error) { return v.srtt(.95) }},
		{"retransmits", segments, false, (*view).retransmits},
		{"loss_episodes", count, false, func(v *view) (float64, error) {
			return v.atLeast(v.losses().Episodes(), uint64(v.flow.LossEpisodes)), nil
		}},
		{"timeouts", count, false, func(v *view) (float64, error) {
			return v.atLeast(v.losses().Timeouts(), uint64(v.flow.Timeouts)), nil
		}},
		{"utilisation", ratio, true, func(v *view) (float64, error) {
			bytes, err := v.linkRise(func(l *trace.LinkSample) uint64 { return l.Delivered })
			return bytes * 8 / v.result.Run.Link.Rate / (v.until - v.from), err
		}},
		{"queue_mean", packets, true, (*view).queueMean},
		{"queue_max", packets, true, func(v *view) (float64, error) { return v.queueExtreme(v.from, v.until, math.Max) }},
		{"queue_peak", packets, true, func(v *view) (float64, error) { return v.queueCycle(math.Max) }},
		{"queue_low", packets, true, func(v *view) (float64, error) { return v.queueCycle(math.Min) }},
		{"drops", packets, true, func(v *view) (float64, error) {
			return v.linkRise(func(l *trace.LinkSample) uint64 { return l.Drops })
		}},
		{"losses", packets, true, func(v *view) (float64, error) {
			return v.linkRise(func(l *trace.LinkSample) uint64 { return l.Losses })
		}},
		{"marks", packets, true, func(v *view) (float64, error) {
			return v.linkRise(func(l *trace.LinkSample) uint64 { return l.Marks })
		}},
	} {
		m[q.name] = q
	}
	return m
}()

// Quantities are the names of what can be measured, sorted. All are of the
// measuring window. Of each flow:
//
//	cwnd_mean      segments, weighted by time
//	cwnd_max       segments
//	cwnd_peak      segments, before a reduction: the mean over the reductions
//	cwnd_low       segments, after it
//	period         s from a reduction to the next
//	alpha          DCTCP's estimate of the share of marked segments, weighted by time.
//	               The samples do not tell it, so it is worked out from what was
//	               delivered with and without an echo, window by window, as RFC 8257
//	               §3.3 does, with g = 1/16
//	alpha_cut      the same as the window shows it: 2(1 - low/peak), since a reduction
//	               takes α/2 of the window; the mean over the reductions
//	throughput     bit/s of payload delivered
//	srtt_p50       s, weighted by time
//	srtt_p95
//	retransmits    segments
//	loss_episodes  times that the sender entered Recovery or Loss
//	timeouts       times that the retransmission timer ran out, the handshake's included
//
// Of the bottleneck:
//
//	utilisation    share of the rate
//	queue_mean     packets, weighted by time
//	queue_max      packets
//	queue_peak     packets, the most between two reductions of the first flow: the mean over these
//	queue_low      packets, likewise the least
//	drops          packets for which the buffer had no room
//	losses         packets dropped on purpose
//	marks          packets marked
func Quantities() []string { return slices.Sorted(maps.Keys(quantities)) }

// view is one flow of a result in the measuring window.
type view struct {
	result      *trace.Result
	flow        trace.FlowResult
	all         []trace.Sample // of the flow, from all sources
	samples     []trace.Sample // of these, from the one source; see ofFlow
	from, until float64        // s
	whole       bool           // all of the flow's time is in it
	cuts        []cut          // the reductions that begin and end in it
	err         error          // there is no such window
}

// cut is a reduction of the window: from the ACK that brought it about to the
// first after it is over.
type cut struct {
	begin, end float64 // s
	peak, low  uint32  // segments, before and after
}

var errNoSamples = errors.New("no samples in the measuring window")

// look prepares what is measured of the flows under test, in the order of the flows.
func (r *run) look(result *trace.Result) []*view {
	var views []*view
	for i, f := range result.Run.Flows {
		if i >= len(r.experiment.Flows) || r.experiment.Flows[i].CC != underTest {
			continue
		}
		end := f.Start + f.Duration
		v := &view{result: result, flow: f, from: max(r.from, f.Start), until: min(r.until, end)}
		if r.until >= result.Run.Experiment.Duration {
			v.until = end // which the jitter puts off
		}
		v.whole = !r.epochs && v.from == f.Start && v.until == end
		v.all, v.samples = ofFlow(result.Samples, int32(f.ID))
		v.cuts = slices.DeleteFunc(cuts(v.samples), func(c cut) bool { return c.begin < v.from || c.end > v.until })
		if n := len(v.cuts); r.epochs && n < 2 {
			v.err = fmt.Errorf("%d reductions of the window: no whole epoch", n)
		} else if r.epochs {
			v.from, v.until = v.cuts[0].end, v.cuts[n-1].end
		}
		views = append(views, v)
	}
	return views
}

// ofFlow are a flow's samples, and of these those on ACKs with what comes after the
// last ACK; or where there are none on ACKs, those at intervals.
func ofFlow(samples []trace.Sample, flow int32) (all, main []trace.Sample) {
	last := math.Inf(-1) // time of an ACK
	for i := range samples {
		if s := &samples[i]; s.Flow == flow {
			all = append(all, *s)
			if s.Source == trace.Ack {
				last = s.Time
			}
		}
	}
	for i := range all {
		if s := &all[i]; s.Source == trace.Ack || s.Time > last {
			main = append(main, *s)
		}
	}
	return all, main
}

// cuts finds the reductions: times in which the state is CWR, Recovery or Loss.
func cuts(samples []trace.Sample) []cut {
	var out []cut
	reducing := false
	for i := 1; i < len(samples); i++ {
		before, s := &samples[i-1], &samples[i]
		switch in := s.CAState >= trace.CACWR; {
		case in && !reducing:
			out = append(out, cut{begin: before.Time, end: math.Inf(1), peak: before.Cwnd})
			reducing = true
		case !in && reducing:
			out[len(out)-1].end, out[len(out)-1].low = s.Time, s.Cwnd
			reducing = false
		}
	}
	return out
}

// spans calls a function for each time in the window in which a sample holds (see
// analysis.Holds). What the last one tells holds until the flow's end.
func (v *view) spans(each func(d float64, s *trace.Sample)) error {
	covered := false
	span := func(from, until float64, s *trace.Sample) {
		if from, until = max(from, v.from), min(until, v.until); from < until {
			covered = true
			each(until-from, s)
		}
	}
	for i := range v.all {
		s := &v.all[i]
		if i > 0 {
			span(v.all[i-1].Time, s.Time, analysis.Holds(&v.all[i-1], s))
		}
		if i == len(v.all)-1 {
			span(s.Time, v.flow.Start+v.flow.Duration, s)
		}
	}
	if !covered {
		return errNoSamples
	}
	return nil
}

// mean of what holds, weighted by time.
func (v *view) mean(of func(*trace.Sample) float64) (float64, error) {
	var sum, time float64
	err := v.spans(func(d float64, s *trace.Sample) { sum, time = sum+d*of(s), time+d })
	return sum / time, err
}

func (v *view) cwndMean() (float64, error) {
	return v.mean(func(s *trace.Sample) float64 { return float64(s.Cwnd) })
}

func (v *view) cwndMax() (most float64, err error) {
	err = v.spans(func(_ float64, s *trace.Sample) { most = max(most, float64(s.Cwnd)) })
	return most, err
}

func (v *view) srtt(q float64) (float64, error) {
	held := map[float64]float64{} // s → s
	total := 0.0
	if err := v.spans(func(d float64, s *trace.Sample) {
		if s.SRTT > 0 { // there is none before the first round trip
			held[s.SRTT] += d
			total += d
		}
	}); err != nil {
		return 0, err
	}
	if total == 0 {
		return 0, errors.New("no RTT was measured in the measuring window")
	}
	sum := 0.0
	var rtt float64
	for _, rtt = range slices.Sorted(maps.Keys(held)) {
		if sum += held[rtt]; sum >= q*total {
			break
		}
	}
	return rtt, nil
}

// at is the value of a counter at a time, between two samples interpolated.
func (v *view) at(t float64, of func(*trace.Sample) float64) float64 {
	i := sort.Search(len(v.samples), func(i int) bool { return v.samples[i].Time >= t })
	switch i {
	case 0:
		return of(&v.samples[0])
	case len(v.samples):
		return of(&v.samples[i-1])
	}
	a, b := &v.samples[i-1], &v.samples[i]
	return of(a) + (t-a.Time)/(b.Time-a.Time)*(of(b)-of(a))
}

func (v *view) rise(of func(*trace.Sample) float64) (float64, error) {
	if len(v.samples) == 0 {
		return 0, errNoSamples
	}
	return v.at(v.until, of) - v.at(v.from, of), nil
}

// segment is the mean size of a segment's payload, in bytes.
func (v *view) segment() float64 {
	a, b := &v.samples[0], &v.samples[len(v.samples)-1]
	if a.Delivered == b.Delivered {
		return 0
	}
	return float64(b.BytesAcked-a.BytesAcked) / float64(b.Delivered-a.Delivered)
}

// throughput is of what was delivered: the bytes acknowledged in a row stand still
// while a hole is mended.
func (v *view) throughput() (float64, error) {
	n, err := v.rise(func(s *trace.Sample) float64 { return float64(s.Delivered) })
	if err != nil || n == 0 {
		return 0, err
	}
	return n * v.segment() * 8 / (v.until - v.from), nil
}

// retransmits is a counter: it is never fewer than a sample has shown.
func (v *view) retransmits() (float64, error) {
	if len(v.all) == 0 && !v.whole {
		return 0, errNoSamples
	}
	var before, most uint32
	for i := range v.all {
		switch s := &v.all[i]; {
		case s.Time <= v.from:
			before = max(before, s.Retrans)
		case s.Time <= v.until:
			most = max(most, s.Retrans)
		}
	}
	return v.atLeast(int(max(before, most)-before), v.flow.Retransmits), nil
}

// losses are counted in the window.
func (v *view) losses() *analysis.Losses {
	var l, before analysis.Losses
	for i := range v.all {
		if v.all[i].Time > v.until {
			break
		}
		l.Add(&v.all[i])
		if v.all[i].Time <= v.from {
			before = l
		}
	}
	l = l.Since(before)
	return &l
}

// atLeast is what the samples show, or what the kernel has counted where the window
// is all of the flow's time.
func (v *view) atLeast(shown int, counted uint64) float64 {
	if v.whole {
		return max(float64(shown), float64(counted))
	}
	return float64(shown)
}

// overCuts is the mean over all rows of n reductions.
func (v *view) overCuts(n int, of func([]cut) float64) (float64, error) {
	if len(v.cuts) < n {
		return 0, fmt.Errorf("%d reductions of the window, at least %d are needed", len(v.cuts), n)
	}
	sum := 0.0
	for i := 0; i+n <= len(v.cuts); i++ {
		sum += of(v.cuts[i : i+n])
	}
	return sum / float64(len(v.cuts)-n+1), nil
}

// dctcpG is the weight of a new sample (RFC 8257 §3.3, §4.2).
const dctcpG = 1. / 16

// alpha repeats the sender's estimate (RFC 8257 §3.3, equation 1): at the end of
// each window's worth of data the share that came back with an echo.
func (v *view) alpha() (float64, error) {
	if len(v.samples) < 2 || v.samples[0].Source != trace.Ack {
		return 0, errors.New("it needs samples on every ACK")
	}
	size := v.segment()
	alpha := 1.0
	alphas := make([]float64, len(v.samples))
	start, end := &v.samples[0], 0.0
	for i := range v.samples {
		s := &v.samples[i]
		if una := float64(s.BytesAcked); una >= end {
			if n := s.Delivered - start.Delivered; n > 0 {
				alpha += dctcpG * (float64(s.DeliveredCE-start.DeliveredCE)/float64(n) - alpha)
			}
			start, end = s, una+float64(s.Inflight)*size
		}
		alphas[i] = alpha
	}
	return v.mean(func(s *trace.Sample) float64 {
		i := sort.Search(len(v.samples), func(i int) bool { return v.samples[i].Time >= s.Time })
		return alphas[min(i, len(alphas)-1)]
	})
}

// linkAt is the last state of the link until a time; the counters start at 0.
func (v *view) linkAt(t float64) trace.LinkSample {
	links := v.result.Links
	i := sort.Search(len(links), func(i int) bool { return links[i].Time > t })
	if i == 0 {
		return trace.LinkSample{}
	}
	return links[i-1]
}

func (v *view) linkRise(of func(*trace.LinkSample) uint64) (float64, error) {
	if len(v.result.Links) == 0 {
		return 0, errNoSamples
	}
	a, b := v.linkAt(v.from), v.linkAt(v.until)
	return float64(of(&b) - of(&a)), nil
}

func (v *view) queueMean() (float64, error) {
	var sum, time float64
	for i := 1; i < len(v.result.Links); i++ {
		a, b := &v.result.Links[i-1], &v.result.Links[i]
		if d := min(b.Time, v.until) - max(a.Time, v.from); d > 0 {
			sum, time = sum+d*float64(a.Queue), time+d
		}
	}
	if time == 0 {
		return 0, errNoSamples
	}
	return sum / time, nil
}

// queueExtreme is the largest or smallest length of the queue in a time.
func (v *view) queueExtreme(from, until float64, which func(a, b float64) float64) (float64, error) {
	links := v.result.Links
	i := sort.Search(len(links), func(i int) bool { return links[i].Time >= from })
	if i == len(links) || links[i].Time > until {
		return 0, errNoSamples
	}
	extreme := float64(links[i].Queue)
	for ; i < len(links) && links[i].Time <= until; i++ {
		extreme = which(extreme, float64(links[i].Queue))
	}
	return extreme, nil
}

// queueCycle is the mean of the queue's extremes between reductions.
func (v *view) queueCycle(which func(a, b float64) float64) (float64, error) {
	var missing error
	mean, err := v.overCuts(2, func(c []cut) float64 {
		extreme, err := v.queueExtreme(c[0].begin, c[1].begin, which)
		missing = errors.Join(missing, err)
		return extreme
	})
	return mean, errors.Join(err, missing)
}
