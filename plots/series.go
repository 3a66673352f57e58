// SPDX-License-Identifier: Apache-2.0

package plots

import (
	"fmt"
	"image/color"
	"path/filepath"
	"slices"
	"strings"
	"unicode"

	"ccload/harness/trace"
)

// Colours that people who see few can tell apart, and that differ in grey too: the
// first six are of Okabe and Ito ("Color Universal Design", 2008). Vermillion is kept
// for what went wrong.
var palette = []color.NRGBA{
	{0x00, 0x72, 0xb2, 0xff}, // blue
	{0xe6, 0x9f, 0x00, 0xff}, // orange
	{0x00, 0x9e, 0x73, 0xff}, // bluish green
	{0xcc, 0x79, 0xa7, 0xff}, // reddish purple
	{0x56, 0xb4, 0xe9, 0xff}, // sky blue
	{0x00, 0x00, 0x00, 0xff},
	{0x7a, 0x43, 0x1d, 0xff}, // brown
	{0x5b, 0x2a, 0x9d, 0xff}, // violet
	{0xa3, 0xa9, 0x1c, 0xff}, // olive
	{0x99, 0x11, 0x55, 0xff}, // wine
}

// shades is how many flows of one colour can be told apart.
const shades = 4

// series are lines of one colour with one entry in the legend: the flows of one
// congestion control in one result or, where there are too many results to tell
// apart, in all of them. Those of a series with many flows are thin, with their
// median over them; where there is but one series, each of few flows has a colour
// and an entry of its own.
type series struct {
	cc    string
	color color.NRGBA
	nth   int // the first has thicker lines
	many  bool
	label string
	flows []*flow
	runs  int
}

// flow is one flow of one result, ready to be drawn.
type flow struct {
	of         *series
	id         int
	color      color.NRGBA
	samples    []trace.Sample // of the window, in order of time; the last holds until the end
	acks       []trace.Sample // those from which the RTT and what was delivered are told
	start, end float64        // s
}

// queue is the bottleneck of one result.
type queue struct {
	color color.NRGBA
	nth   int
	many  bool
	links []trace.LinkSample
}

// makeSeries puts all flows into series and gives them their colours, which depend on
// what the results are of alone, not on what was measured.
func (p *picture) makeSeries(results []*trace.Result) {
	type key struct {
		result int
		cc     string
	}
	var keys []key
	with := map[string][]int{} // the results with a congestion control
	for i, r := range results {
		for _, f := range r.Run.Experiment.Flows {
			if k := (key{i, f.CC}); !slices.Contains(keys, k) {
				keys = append(keys, k)
				with[f.CC] = append(with[f.CC], i)
			}
		}
	}
	merged := len(keys) > len(palette)
	byKey := map[key]*series{}
	for _, k := range keys {
		at := k
		if merged {
			at.result = 0
		}
		s := byKey[at]
		if s == nil {
			s = &series{cc: k.cc, nth: len(p.series), color: palette[len(p.series)%len(palette)]}
			p.series = append(p.series, s)
			byKey[at] = s
		}
		byKey[k] = s
		s.runs++
	}
	for i, r := range results {
		for _, e := range r.Run.Experiment.Flows {
			s := byKey[key{i, e.CC}]
			s.flows = append(s.flows, newFlow(r, e, s))
		}
	}
	most := shades
	if len(p.series) == 1 {
		most = len(palette)
	}
	for _, s := range p.series {
		s.many = len(s.flows) > most
		s.label = s.cc
		if dirs := with[s.cc]; s.runs == 1 && len(dirs) > 1 {
			// Which of the results it is of.
			i := keys[slices.IndexFunc(keys, func(k key) bool { return byKey[k] == s })].result
			s.label += " (" + runLabel(results, dirs, i) + ")"
		}
		for n, f := range s.flows {
			switch {
			case s.many:
				f.color = s.color
			case len(p.series) == 1:
				f.color = palette[n]
			default:
				f.color = lighten(s.color, 0.2*float64(n))
			}
		}
	}
	for i, r := range results {
		if len(r.Links) == 0 {
			continue
		}
		q := queue{links: r.Links, color: queueColor}
		// The one queue that lines of several colours share is nobody's.
		if s := byKey[key{i, r.Run.Experiment.Flows[0].CC}]; len(results) > 1 || len(p.series) == 1 && (s.many || len(s.flows) == 1) {
			q.color, q.nth, q.many = s.color, s.nth, s.runs > shades
		}
		p.queues = append(p.queues, q)
	}
}

// queueColor is that of the one queue of several lines.
var queueColor = color.NRGBA{0x44, 0x44, 0x44, 0xff}

// newFlow takes a flow's samples out of a result.
func newFlow(r *trace.Result, e trace.Flow, of *series) *flow {
	f := &flow{of: of, id: e.ID, start: e.Start, end: lasted(r)}
	for _, res := range r.Run.Flows {
		if res.ID == e.ID {
			f.start, f.end = res.Start, res.Start+res.Duration
		}
	}
	var diag []trace.Sample
	for _, s := range r.Samples {
		switch {
		case s.Flow != int32(e.ID):
		case s.Source == trace.Diag:
			diag = append(diag, s)
		default:
			f.samples = append(f.samples, s)
			if s.Source == trace.Ack {
				f.acks = append(f.acks, s)
			}
		}
	}
	if len(f.acks) == 0 {
		f.acks = progress(diag)
	}
	f.samples = fill(f.samples, diag, r.Run.Experiment.Interval)
	if n := len(f.samples); n > 0 {
		// A window holds until the flow is over, also one that waits for an ACK.
		last := f.samples[n-1]
		if f.end = max(f.end, last.Time); f.end > last.Time {
			last.Time = f.end
			f.samples = append(f.samples, last)
		}
	}
	return f
}

// usesSsthresh says whether there is a threshold to draw. BBR has none, but it sets
// the kernel's once, for others to see; what never changes it when it loses is no other.
func (f *flow) usesSsthresh() bool {
	if strings.Contains(f.of.cc, "bbr") {
		return false
	}
	var first, last trace.Sample // that have one
	values, losses := 0, 0
	for _, s := range f.samples {
		if s.Ssthresh >= trace.InfiniteSsthresh {
			continue
		}
		if values == 0 {
			first, values = s, 1
		} else if s.Ssthresh != first.Ssthresh {
			return true
		} else if s.CAState >= trace.CARecovery && last.CAState < trace.CARecovery {
			losses++
		}
		last = s
	}
	return values > 0 && losses < 2
}

// progress are the samples up to the last by which something had been acknowledged:
// what comes after tells the RTT of long ago.
func progress(diag []trace.Sample) []trace.Sample {
	for n := len(diag); n > 1; n-- {
		if a, b := diag[n-2], diag[n-1]; a.Delivered != b.Delivered || a.BytesAcked != b.BytesAcked {
			return diag[:n]
		}
	}
	return diag[:min(1, len(diag))]
}

// fill adds samples taken at intervals where there are no others, which tell the same
// later: before the first ACK, and while none comes.
func fill(samples, diag []trace.Sample, interval float64) []trace.Sample {
	var out []trace.Sample
	for _, d := range diag {
		i := byTime(samples, func(s trace.Sample) float64 { return s.Time }, d.Time)
		near := i > 0 && d.Time-samples[i-1].Time <= interval || i < len(samples) && samples[i].Time-d.Time <= interval
		if !near {
			out = append(out, d)
		}
	}
	out = append(out, samples...)
	slices.SortStableFunc(out, func(a, b trace.Sample) int {
		switch {
		case a.Time < b.Time:
			return -1
		case a.Time > b.Time:
			return 1
		}
		return 0
	})
	return out
}

// lasted is how long a run was, in s.
func lasted(r *trace.Result) float64 {
	var end float64
	for _, f := range r.Run.Flows {
		if f.Duration > 0 { // or its turn never came
			end = max(end, f.Start+f.Duration)
		}
	}
	if n := len(r.Samples); n > 0 {
		end = max(end, r.Samples[n-1].Time)
	}
	if n := len(r.Links); n > 0 {
		end = max(end, r.Links[n-1].Time)
	}
	// Some milliseconds more than it was to last are no part of it.
	if d := r.Run.Experiment.Duration; !r.Run.Incomplete && end < 1.02*d {
		return d
	}
	return end
}

// runLabel tells one of some results from the others: what differs in their
// directories, or else their number.
func runLabel(results []*trace.Result, among []int, i int) string {
	parts := func(i int) []string {
		dir := results[i].Dir
		if dir == "" {
			dir = results[i].Run.Dir
		}
		return strings.Split(filepath.ToSlash(filepath.Clean(dir)), "/")
	}
	mine := parts(i)
	same := func(at func(p []string) string) bool {
		for _, j := range among {
			if p := parts(j); len(p) != len(mine) || at(p) != at(mine) {
				return false
			}
		}
		return true
	}
	from, to := 0, len(mine)
	for from < to && same(func(p []string) string { return p[from] }) {
		from++
	}
	for to > from && same(func(p []string) string { return p[to-1] }) {
		to--
	}
	if from == to {
		return fmt.Sprint(slices.Index(among, i) + 1)
	}
	return printable(strings.Join(mine[from:to], "/"))
}

// resultName is how a note about a result begins: nothing where there is but one.
func resultName(results []*trace.Result, i int) string {
	if len(results) == 1 {
		return ""
	}
	name := results[i].Run.Experiment.Name
	var among []int
	for j, r := range results {
		if r.Run.Experiment.Name == name {
			among = append(among, j)
		}
	}
	if len(among) > 1 {
		name = strings.TrimSpace(name + " (" + runLabel(results, among, i) + ")")
	}
	return name + ": "
}

// printable is a name without what is not to be seen.
func printable(name string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, name)
}
