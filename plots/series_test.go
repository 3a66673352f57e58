// SPDX-License-Identifier: Apache-2.0

package plots

import (
	"fmt"
	"image/color"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/recorder"

	"ccload/harness/trace"
)

func mustPicture(t *testing.T, results ...*trace.Result) *picture {
	t.Helper()
	p, err := newPicture(results)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *picture) names() (names []string) {
	for _, e := range p.legend() {
		names = append(names, e.name)
	}
	return names
}

// saved are the words of the results' SVG.
func saved(t *testing.T, results ...*trace.Result) map[string]bool {
	t.Helper()
	path := filepath.Join(t.TempDir(), "x.svg")
	if _, err := Save(path, results); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return words(t, b)
}

func in(dir string, r *trace.Result) *trace.Result {
	r.Dir = dir
	return r
}

// flows is a result of n flows of each congestion control.
func flows(n int, ccs ...string) *trace.Result {
	r := result(ccs[0], 100)
	one := r.Samples
	r.Run.Experiment.Flows, r.Samples = nil, nil
	for range n {
		for _, cc := range ccs {
			r.Run.Experiment.Flows = append(r.Run.Experiment.Flows, trace.Flow{ID: len(r.Run.Experiment.Flows) + 1, CC: cc})
		}
	}
	for i := 0; i < len(one); i += 20 {
		for _, f := range r.Run.Experiment.Flows {
			s := one[i]
			s.Flow, s.Cwnd = int32(f.ID), uint32(10*f.ID)
			r.Samples = append(r.Samples, s)
		}
	}
	return r
}

func TestLegend(t *testing.T) {
	for _, c := range []struct {
		name    string
		results []*trace.Result
		want    string
	}{
		{"one", []*trace.Result{in("x", result("cubic", 100))}, "cubic, ssthresh, drops"},
		{"two algorithms", []*trace.Result{in("x/cubic", result("cubic", 100)), in("x/reno", result("reno", 100))}, "cubic, reno, ssthresh, drops"},
		{"two results of one", []*trace.Result{in("x/a", result("cubic", 100)), in("x/b", result("cubic", 100)), in("x/c", result("reno", 100))},
			"cubic (a), cubic (b), reno, ssthresh, drops"},
		{"repeats", []*trace.Result{in("x/cubic/1", result("cubic", 100)), in("x/cubic/2", result("cubic", 100))}, "cubic (1), cubic (2), ssthresh, drops"},
		{"kernels", []*trace.Result{in("x/6.1/cubic", result("cubic", 100)), in("x/6.12/cubic", result("cubic", 100))}, "cubic (6.1), cubic (6.12), ssthresh, drops"},
		{"of one name", []*trace.Result{result("cubic", 100), result("cubic", 100)}, "cubic (1), cubic (2), ssthresh, drops"},
		{"escapes", []*trace.Result{in("x/\x1b[1m", result("cubic", 100)), in("x/b", result("cubic", 100))}, "cubic (\uFFFD[1m), cubic (b), ssthresh, drops"},
		{"a few flows", []*trace.Result{flows(3, "cubic")}, "cubic 1, cubic 2, cubic 3, ssthresh, drops"},
		{"few flows of two", []*trace.Result{flows(2, "cubic", "reno")}, "cubic, reno, ssthresh, drops"},
		{"many flows", []*trace.Result{flows(12, "cubic")}, "cubic: median of 12 flows, drops"},
		{"many flows of two", []*trace.Result{flows(5, "cubic", "reno")}, "cubic: median of 5 flows, reno: median of 5 flows, drops"},
		{"many results", slices.Repeat([]*trace.Result{result("cubic", 100)}, 12), "cubic: median of 12 flows of 12 runs, drops"},
		{"BBR", []*trace.Result{result("bbr", 100)}, "bbr, drops"},
	} {
		if got := strings.Join(mustPicture(t, c.results...).names(), ", "); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

// lab is a colour in CIELAB, in which distances are as people see them.
func lab(c color.NRGBA) [3]float64 {
	linear := func(v uint8) float64 {
		f := float64(v) / 255
		if f <= 0.04045 {
			return f / 12.92
		}
		return math.Pow((f+0.055)/1.055, 2.4)
	}
	f := func(v float64) float64 {
		if v > 216./24389 {
			return math.Cbrt(v)
		}
		return (24389./27*v + 16) / 116
	}
	r, g, b := linear(c.R), linear(c.G), linear(c.B)
	x, y, z := f((.4124*r+.3576*g+.1805*b)/.9505), f(.2126*r+.7152*g+.0722*b), f((.0193*r+.1192*g+.9505*b)/1.089)
	return [3]float64{116*y - 16, 500 * (x - y), 200 * (y - z)}
}

func apart(a, b color.NRGBA) float64 {
	p, q := lab(a), lab(b)
	return math.Sqrt((p[0]-q[0])*(p[0]-q[0]) + (p[1]-q[1])*(p[1]-q[1]) + (p[2]-q[2])*(p[2]-q[2]))
}

// Lines that have entries of their own have colours that can be told apart, from the
// paper too, and each queue has its result's.
func TestColours(t *testing.T) {
	const least = 20
	distinct := func(what string, colors []color.NRGBA) {
		for i, a := range append(colors, color.NRGBA{0xff, 0xff, 0xff, 0xff}) {
			for _, b := range colors[:min(i, len(colors))] {
				if d := apart(a, b); d < least {
					t.Errorf("%s: %v and %v are but %.1f apart", what, a, b, d)
				}
			}
		}
	}
	ten := mustPicture(t, flows(10, "cubic"))
	var colors []color.NRGBA
	for _, f := range ten.series[0].flows {
		colors = append(colors, f.color)
	}
	if len(colors) != 10 {
		t.Fatalf("%d flows", len(colors))
	}
	distinct("ten flows", colors)
	distinct("flow and drops", append(colors[:1:1], dropColor))

	var results []*trace.Result
	for i := range 8 {
		results = append(results, in(fmt.Sprintf("x/%d", i), result("cubic", 100)))
	}
	eight := mustPicture(t, results...)
	colors = nil
	for i, s := range eight.series {
		colors = append(colors, s.color)
		if q := eight.queues[i]; q.color != s.color {
			t.Errorf("the queue of %s is of another colour", s.label)
		}
	}
	distinct("eight results", colors)

	// A flow that was not measured takes its colour along.
	r := flows(3, "cubic")
	r.Samples = slices.DeleteFunc(r.Samples, func(s trace.Sample) bool { return s.Flow == 2 })
	p := mustPicture(t, r)
	if got := p.series[0].flows[2].color; got != ten.series[0].flows[2].color {
		t.Errorf("flow 3 is %v without flow 2", got)
	}
	if len(p.warnings) != 1 || p.warnings[0] != "1 of 3 cubic flows have no samples: 2" {
		t.Errorf("warnings: %q", p.warnings)
	}
}

// Many flows without samples are one warning.
func TestWarnings(t *testing.T) {
	r := flows(100, "cubic")
	r.Samples = slices.DeleteFunc(r.Samples, func(s trace.Sample) bool { return s.Flow%2 == 0 })
	if w := mustPicture(t, r).warnings; len(w) != 1 || w[0] != "50 of 100 cubic flows have no samples: 2, 4, 6, 8, 10, …" {
		t.Errorf("warnings: %q", w)
	}
}

// A flow that gets no more ACKs is drawn to its end: its window is held or, where a
// later sample tells another, that; its throughput is nothing; of its RTT nothing is
// known.
func TestStalledFlow(t *testing.T) {
	r := result("reno", 100)
	r.Samples = slices.DeleteFunc(r.Samples, func(s trace.Sample) bool { return s.Time > 8 })
	last := r.Samples[len(r.Samples)-1]
	rto := last
	rto.Time, rto.Source, rto.Cwnd, rto.CAState = 9, trace.Event, 1, trace.CALoss
	seen := rto
	seen.Time, seen.Source, seen.Cwnd = 15, trace.Diag, 2
	r.Samples = append(r.Samples, rto, seen)
	r.Run.Experiment.Interval = 0.01
	r.Run.Flows = []trace.FlowResult{{ID: 1, CC: "reno", Duration: 18}}
	p := mustPicture(t, r)
	end := func(l []line) point { piece := l[0].pieces[len(l[0].pieces)-1]; return piece[len(piece)-1] }
	at := func(l []line, t float64) (y float64) {
		for _, q := range l[0].pieces[0] {
			if q.x <= t {
				y = q.y
			}
		}
		return y
	}
	w := p.windows()
	if end(w) != (point{18, 2}) || at(w, 8.5) != float64(last.Cwnd) || at(w, 14) != 1 {
		t.Errorf("window: %g after the last ACK, %g after the timeout, ends at %v", at(w, 8.5), at(w, 14), end(w))
	}
	if q := end(p.rtts()); q.x != last.Time {
		t.Errorf("RTT: ends at %g, the last ACK is at %g", q.x, last.Time)
	}
	through := p.throughputs(1)
	if q := end(through); q.y != 0 || q.x < 17 || q.x > 18 {
		t.Errorf("throughput: ends at %v", q)
	}
	if y := at(through, 7); y < 20e6 {
		t.Errorf("throughput: %g at 7 s", y)
	}

	// The same is told at intervals only, where it is not sampled on ACKs.
	for i := range r.Samples {
		r.Samples[i].Source = trace.Diag
	}
	p = mustPicture(t, r)
	if q := end(p.rtts()); q.x != last.Time {
		t.Errorf("RTT at intervals: ends at %g, the last ACK is at %g", q.x, last.Time)
	}
	if q := end(p.windows()); q != (point{18, 2}) {
		t.Errorf("window at intervals: ends at %v", q)
	}
}

// Of many flows there is a median, at each time of those that are there.
func TestMedian(t *testing.T) {
	lines := [][][]point{
		{{{0, 1}, {10, 1}}},
		{{{0, 5}, {5, 5}}},
		{{{0, 2}, {10, 4}}},
		{},
	}
	got := median(lines, 10)
	if len(got) != 1 {
		t.Fatalf("%d pieces", len(got))
	}
	for _, q := range got[0] {
		want := 2 + q.x/5
		if math.Abs(q.y-want) > 1e-9 {
			t.Fatalf("at %g: %g, want %g", q.x, q.y, want)
		}
	}
	p := mustPicture(t, flows(12, "cubic"))
	all := p.windows()
	if l := all[len(all)-1]; len(all) != 13 || l.flow != nil || highest(l.pieces) != 70 {
		t.Errorf("%d lines, the last up to %g", len(all), highest(l.pieces))
	}
	if l := all[0]; l.Color.(color.NRGBA).A == 0xff {
		t.Error("the flows cannot be seen through")
	}
}

// Injected losses, drops and marks are three things.
func TestEvents(t *testing.T) {
	r := result("cubic", 100)
	for i := range r.Links {
		r.Links[i].Losses, r.Links[i].Marks = uint64(i/3000), uint64(i/4000)
	}
	w := saved(t, r)
	for _, want := range []string{"drops", "injected losses", "CE marks"} {
		if !w[want] {
			t.Errorf("no legend for %s", want)
		}
	}
	p := mustPicture(t, r)
	if rugs := p.rugs(); len(rugs) != 3 || len(rugs[0].times) != 4 || len(rugs[1].times) != 6 || len(rugs[2].times) != 4 {
		t.Errorf("rugs: %+v", rugs)
	}
	r = result("cubic", 100)
	for i := range r.Links {
		r.Links[i].Losses, r.Links[i].Drops = r.Links[i].Drops, 0
	}
	if w := saved(t, r); w["drops"] || !w["injected losses"] {
		t.Error("injected losses are called drops")
	}
}

// Nothing is marked beyond the right edge.
func TestRugEndsAtEdge(t *testing.T) {
	p := mustPicture(t, result("cubic", 100))
	pl := p.panel()
	pl.X.Min, pl.X.Max = 0, 20
	c := draw.NewCanvas(&recorder.Canvas{}, 100, 100)
	var at []vg.Length
	rug{times: []float64{0, 10, 20, 20.5, 30}, mark: func(_ draw.Canvas, x, _ vg.Length) { at = append(at, x) }}.Plot(c, pl)
	if !slices.Equal(at, []vg.Length{0, 50, 100}) {
		t.Errorf("marks at %v", at)
	}
}

// A threshold that is not used is not drawn, one that is is.
func TestSsthresh(t *testing.T) {
	set := func(cc string, value func(i int) uint32, lossy bool) int {
		r := result(cc, 100)
		for i := range r.Samples {
			r.Samples[i].Ssthresh = value(i)
			if lossy && i%5000 > 4900 {
				r.Samples[i].CAState = trace.CARecovery
			}
		}
		p := mustPicture(t, r)
		if n := len(p.ssthreshs()); p.hasSsthresh() != (n > 0) {
			t.Errorf("%s: %d lines, legend: %v", cc, n, p.hasSsthresh())
		}
		return len(p.ssthreshs())
	}
	infinite := func(int) uint32 { return trace.InfiniteSsthresh }
	constant := func(i int) uint32 {
		if i < 100 {
			return trace.InfiniteSsthresh
		}
		return 58
	}
	changing := func(i int) uint32 { return 50 + uint32(i/5000) }
	for _, c := range []struct {
		name  string
		got   int
		lines int
	}{
		{"never set", set("cubic", infinite, true), 0},
		{"BBR's", set("bbr", constant, false), 0},
		{"a BBR's", set("bpf_bbr2", changing, false), 0},
		{"set once, no loss", set("cubic", constant, false), 1},
		{"set once, losses", set("mine", constant, true), 0},
		{"changing", set("cubic", changing, true), 1},
	} {
		if c.got != c.lines {
			t.Errorf("%s: %d lines, want %d", c.name, c.got, c.lines)
		}
	}
}

// What was not as it should be stands below the title.
func TestNotes(t *testing.T) {
	r := result("cubic", 100)
	r.Run.Experiment.Name = "cubic"
	r.Run.Link.Rate, r.Run.Link.Measured.Rate = 1e9, new(615e6)
	r.Run.Checks = []trace.Check{{Name: "link rate"}, {Name: "link rtt", OK: true}, {Name: "link lateness"}, {Name: "seconds spoiled by the machine"}}
	r.Run.Disturbances = []trace.Disturbance{{Second: 3}, {Second: 4}, {Second: 9}}
	w := saved(t, r)
	for _, want := range []string{
		"asked for 1 Gbit/s, measured 615 Mbit/s; the machine spoiled 3 of 20 seconds; failed: link lateness",
		"measured", "rate", "spoiled by the machine",
	} {
		if !w[want] {
			t.Errorf("no words %q", want)
		}
	}
	p := mustPicture(t, r)
	if !slices.Equal(p.spoiled, []span{{3, 5}, {9, 10}}) {
		t.Errorf("spoiled: %v", p.spoiled)
	}

	// A run is over some milliseconds late.
	r.Run.Disturbances = append(r.Run.Disturbances, trace.Disturbance{Second: 20})
	if notes := mustPicture(t, r).notes; len(notes) != 1 || !strings.Contains(notes[0], "spoiled 4 of 21 seconds") {
		t.Errorf("notes: %q", notes)
	}

	cut := result("reno", 100)
	cut.Run.Experiment.Name, cut.Run.Experiment.Duration, cut.Run.Incomplete = "reno", 60, true
	if w := saved(t, cut); !w["interrupted after 20 of 60 s"] || !w["interrupted"] {
		t.Error("an interrupted run is not marked")
	}
	if end := mustPicture(t, cut).end; end > 20 {
		t.Errorf("an interrupted run has an axis up to %g, where it never came", end)
	}
	both := mustPicture(t, in("x/a", result("cubic", 100)), in("x/b", cut))
	if !slices.Equal(both.notes, []string{"reno: interrupted after 20 of 60 s"}) {
		t.Errorf("notes: %q", both.notes)
	}
	other := *cut
	twice := mustPicture(t, in("x/a", cut), in("x/b", &other))
	if !slices.Equal(twice.notes, []string{"reno (a): interrupted after 20 of 60 s", "reno (b): interrupted after 20 of 60 s"}) {
		t.Errorf("notes: %q", twice.notes)
	}
	if notes := mustPicture(t, slices.Repeat([]*trace.Result{cut}, 30)...).shownNotes(); len(notes) != notesMost || notes[notesMost-1] != "… and 26 more like this" {
		t.Errorf("notes: %q", notes)
	}
	if notes := mustPicture(t, result("cubic", 100)).notes; len(notes) > 0 {
		t.Errorf("notes on nothing: %q", notes)
	}
}

func TestDescribe(t *testing.T) {
	for _, c := range []struct {
		link trace.Link
		want string
	}{
		{trace.Link{Rate: 20e6, RTT: 50e-6, Buffer: 1, MTU: 1500}, "20 Mbit/s · RTT 50 µs · buffer 1 packet"},
		{trace.Link{Rate: 1e9, RTT: 1, Buffer: 2, ECN: 1, Loss: trace.Loss{Every: 1}}, "1 Gbit/s · RTT 1 s · buffer 2 packets · loss 1/1 · CE above 1 packet"},
	} {
		if got := describe(c.link); got != c.want {
			t.Errorf("%s, want %s", got, c.want)
		}
	}
}

// The name of a line stands beside it, off the axis and off the curves.
func TestLevelPlace(t *testing.T) {
	c := draw.NewCanvas(&recorder.Canvas{}, 400, 100)
	size := vg.Point{X: 80, Y: 8}
	busy := []line{{curve: curve{pieces: [][]point{{{0, 3}, {20, 3}}}}}}   // just above the line
	left := []line{{curve: curve{pieces: [][]point{{{0, 3}, {8, 3}}}}}}    // its right is free
	right := []line{{curve: curve{pieces: [][]point{{{12, 3}, {20, 3}}}}}} // its left is
	for _, e := range []struct {
		name        string
		l           level
		top         float64
		left, right bool // of the panel
		foot        vg.Length
	}{
		{"below", level{y: 20, below: true}, 100, false, true, 10},
		{"no room below", level{y: 2, below: true}, 100, false, true, 3},
		{"no room above", level{y: 98}, 100, false, true, 88},
		{"above, on the right", level{y: 2, below: true, over: left}, 100, false, true, 3},
		{"above, on the left", level{y: 2, below: true, over: right}, 100, true, false, 3},
		{"above the curve", level{y: 2, below: true, over: busy}, 100, false, true, 7},
	} {
		p := mustPicture(t, result("cubic", 100)).panel()
		p.X.Min, p.X.Max, p.Y.Min, p.Y.Max = 0, 20, 0, e.top
		at := e.l.place(c, p, size, vg.Length(e.l.y))
		if at.Y != e.foot || e.right && at.X != 400-2-80 || e.left && at.X > 240-80 {
			t.Errorf("%s: at %v, want foot %v", e.name, at, e.foot)
		}
	}
}
