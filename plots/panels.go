// SPDX-License-Identifier: Apache-2.0

package plots

import (
	"image/color"
	"math"
	"slices"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"

	"ccload/harness/trace"
)

var (
	alarmColor   = color.NRGBA{0xb0, 0x3a, 0x00, 0xff}
	dropColor    = color.NRGBA{0xd5, 0x5e, 0x00, 0xff} // vermillion
	lossColor    = color.NRGBA{0x33, 0x33, 0x33, 0xff}
	markColor    = color.NRGBA{0x77, 0x77, 0x77, 0xff}
	spoiledColor = color.NRGBA{0xfb, 0xe4, 0xd7, 0xff}
)

var cutStyle = draw.LineStyle{Color: alarmColor, Width: vg.Points(1), Dashes: []vg.Length{vg.Points(2), vg.Points(2)}}

// events are what happens to packets at the bottleneck, each with a mark of its own.
var events = []struct {
	name  string
	count func(trace.LinkSample) uint64
	mark  func(c draw.Canvas, x, y vg.Length)
}{
	{"CE marks", func(l trace.LinkSample) uint64 { return l.Marks }, func(c draw.Canvas, x, y vg.Length) {
		c.DrawGlyph(draw.GlyphStyle{Color: markColor, Radius: 0.5 * vg.Millimeter, Shape: draw.CircleGlyph{}}, vg.Point{X: x, Y: y})
	}},
	{"injected losses", func(l trace.LinkSample) uint64 { return l.Losses }, func(c draw.Canvas, x, y vg.Length) {
		const r = 0.6 * vg.Millimeter
		ls := draw.LineStyle{Color: lossColor, Width: vg.Points(0.7)}
		c.StrokeLine2(ls, x-r, y-r, x+r, y+r)
		c.StrokeLine2(ls, x-r, y+r, x+r, y-r)
	}},
	{"drops", func(l trace.LinkSample) uint64 { return l.Drops }, func(c draw.Canvas, x, y vg.Length) {
		c.StrokeLine2(draw.LineStyle{Color: dropColor, Width: vg.Points(0.8)}, x, y-0.8*vg.Millimeter, x, y+0.8*vg.Millimeter)
	}},
}

// lineStyle is that of a curve of a series. The first's are thicker, so that where two
// lie upon each other both can be seen; many are thin, and can be seen through.
func (p *picture) lineStyle(c color.NRGBA, s *series) draw.LineStyle {
	switch {
	case s.many:
		return thinStyle(c, len(s.flows))
	case s.nth == 0 && len(p.series) > 1:
		return draw.LineStyle{Color: c, Width: vg.Points(2.2)}
	}
	return draw.LineStyle{Color: c, Width: vg.Points(1.1), Dashes: s.dashes()}
}

func thinStyle(c color.NRGBA, of int) draw.LineStyle {
	c.A = uint8(max(0x40, 0xb0-4*of))
	return draw.LineStyle{Color: c, Width: vg.Points(0.6)}
}

func (s *series) medianStyle() draw.LineStyle {
	return draw.LineStyle{Color: s.color, Width: vg.Points(1.8), Dashes: s.dashes()}
}

// dashes tell series apart that share a colour, for there are no more.
func (s *series) dashes() []vg.Length {
	if s.nth < len(palette) {
		return nil
	}
	return []vg.Length{vg.Points(7), vg.Points(2)}
}

func ssthreshStyle(c color.NRGBA) draw.LineStyle {
	return draw.LineStyle{Color: lighten(c, 0.25), Width: vg.Points(0.9), Dashes: []vg.Length{vg.Points(4), vg.Points(2)}}
}

// theoryStyle is that of what a theory expects: dark, and thin enough to show what
// was measured beneath it.
var theoryStyle = draw.LineStyle{
	Color: color.NRGBA{0x22, 0x22, 0x22, 0xff}, Width: vg.Points(1), Dashes: []vg.Length{vg.Points(5), vg.Points(1.5), vg.Points(1), vg.Points(1.5)},
}

// addTheory draws what theories expect of a quantity, and tells the highest of it.
func (p *picture) addTheory(pl *plot.Plot, quantity string) float64 {
	top := 0.
	for _, t := range p.theory {
		if t.Quantity != quantity {
			continue
		}
		pieces := make([][]point, len(t.Pieces))
		for i, piece := range t.Pieces {
			for _, q := range piece {
				pieces[i] = append(pieces[i], point{q[0], q[1]})
			}
		}
		top = max(top, highest(pieces))
		pl.Add(curve{pieces, theoryStyle})
	}
	return top
}

// line is what is drawn of one flow, or of several, in a panel.
type line struct {
	of   *series
	flow *flow // nil: the median of the series
	curve
}

// lines draws a quantity of all flows: pieces of a line for each, and for a series of
// many their median.
func (p *picture) lines(pieces func(*flow) [][]point) (all []line) {
	for _, s := range p.series {
		var of [][][]point
		for _, f := range s.flows {
			c := curve{pieces(f), p.lineStyle(f.color, s)}
			all = append(all, line{s, f, c})
			of = append(of, c.pieces)
		}
		if s.many {
			all = append(all, line{s, nil, curve{median(of, p.end), s.medianStyle()}})
		}
	}
	// The medians lie over all that they are of.
	slices.SortStableFunc(all, func(a, b line) int {
		switch {
		case a.flow != nil && b.flow == nil:
			return -1
		case a.flow == nil && b.flow != nil:
			return 1
		}
		return 0
	})
	return all
}

// add adds lines to a panel and tells how high the highest goes.
func add(pl *plot.Plot, lines []line) float64 {
	top := 0.
	for _, l := range lines {
		top = max(top, highest(l.pieces))
		pl.Add(l.curve)
	}
	return top
}

// columns is how many places along the time axis are told apart for a flow: more than
// the widest picture has, or fewer where the lines are many.
func (f *flow) columns() int {
	if f.of.many {
		return max(200, columns*len(palette)/len(f.of.flows))
	}
	return columns
}

func (p *picture) windows() []line {
	return p.lines(func(f *flow) [][]point {
		return steps(f.samples, func(s trace.Sample) (float64, float64, bool) { return s.Time, float64(s.Cwnd), true }, p.end, f.columns())
	})
}

func (p *picture) ssthreshs() (all []line) {
	for _, s := range p.series {
		if s.many {
			continue // lines enough
		}
		for _, f := range s.flows {
			if !f.usesSsthresh() {
				continue
			}
			pieces := steps(f.samples, func(s trace.Sample) (float64, float64, bool) {
				return s.Time, float64(s.Ssthresh), s.Ssthresh < trace.InfiniteSsthresh
			}, p.end, columns)
			all = append(all, line{s, f, curve{pieces, ssthreshStyle(f.color)}})
		}
	}
	return all
}

// rtts end at the flow's last ACK: nothing tells them any more.
func (p *picture) rtts() []line {
	return p.lines(func(f *flow) [][]point {
		return steps(f.acks, func(s trace.Sample) (float64, float64, bool) { return s.Time, s.SRTT * 1e3, s.SRTT > 0 }, p.end, f.columns())
	})
}

func (p *picture) throughputs(factor float64) []line {
	w := p.window()
	return p.lines(func(f *flow) [][]point {
		pts := f.throughput(w, p.end)
		for i := range pts {
			pts[i].y /= factor
		}
		return [][]point{pts}
	})
}

func (p *picture) windowPanel() *plot.Plot {
	pl := p.panel()
	add(pl, p.ssthreshs())
	lines := p.windows()
	top := add(pl, lines)
	top = max(top, p.addTheory(pl, "cwnd"))
	bdp := p.bdp()
	pl.Y.Max = 1.08 * max(top, 1)
	// Where the flow fills the link the two are a sawtooth's lower and upper bound.
	pl.Add(level{y: bdp, name: "BDP", over: lines}, level{y: bdp + float64(p.link.Buffer), name: "BDP + buffer", over: lines})
	return pl
}

func (p *picture) rttPanel() *plot.Plot {
	pl := p.panel()
	lines := p.rtts()
	top := add(pl, lines)
	pl.Y.Max = 1.08 * max(top, p.link.RTT*1e3)
	pl.Add(level{y: p.link.RTT * 1e3, name: "RTT of the empty link", below: true, over: lines})
	return pl
}

func (p *picture) throughputPanel() (pl *plot.Plot, unit string) {
	unit, factor := "Mbit/s", 1e6
	if p.link.Rate < 1e6 {
		unit, factor = "kbit/s", 1e3
	}
	pl = p.panel()
	lines := p.throughputs(factor)
	top := add(pl, lines)
	pl.Y.Max = max(1.12*p.link.Rate/factor, 1.05*top)
	if share := p.share(); share > 0 { // each of a hundred flows has a hundredth
		pl.Y.Max = 1.12 * max(top, share/factor)
		pl.Add(level{y: share / factor, name: "fair share", over: lines})
	}
	if p.measured != nil {
		pl.Add(level{y: *p.measured / factor, name: "measured", below: *p.measured < p.link.Rate, color: alarmColor, over: lines})
	}
	pl.Add(level{y: p.link.Rate / factor, name: "rate", over: lines})
	return pl, unit
}

// window is over how long the throughput is taken, in seconds: long enough for
// some round trips with a full buffer, short enough for a picture.
func (p *picture) window() float64 {
	full := p.link.RTT + float64(p.link.Buffer*p.link.MTU*8)/p.link.Rate
	return max(2*full, p.end/150)
}

// share is what each of many flows would have, in bit/s, if all had the same; 0: they
// are few, or not as many in each result.
func (p *picture) share() float64 {
	n := p.flowsEach
	if n == 0 || slices.ContainsFunc(p.series, func(s *series) bool { return !s.many }) || n <= shades {
		return 0
	}
	return p.link.Rate / float64(n)
}

func (p *picture) queuePanel() *plot.Plot {
	pl := p.panel()
	top := float64(p.link.Buffer)
	var all [][][]point
	for _, q := range p.queues {
		ls := draw.LineStyle{Color: q.color, Width: vg.Points(1.1)}
		if q.nth == 0 && len(p.queues) > 1 {
			ls.Width = vg.Points(2.2)
		}
		if q.many {
			ls = thinStyle(q.color, len(p.queues))
		}
		s := steps(q.links, func(l trace.LinkSample) (float64, float64, bool) { return l.Time, float64(l.Queue), true }, p.end, columns)
		top = max(top, highest(s))
		all = append(all, s)
		pl.Add(curve{s, ls})
	}
	for _, s := range p.series {
		var of [][][]point
		for i, q := range p.queues {
			if q.many && q.color == s.color && q.nth == s.nth {
				of = append(of, all[i])
			}
		}
		if len(of) > 0 {
			pl.Add(curve{median(of, p.end), s.medianStyle()})
		}
	}
	expected := p.addTheory(pl, "queue")
	// A queue far below a large buffer would be a line at the bottom.
	if used := max(p.queueUsed(), expected); used < top/4 && used > 0 {
		top = 1.4 * used
	}
	rugs := p.rugs()
	pl.Y.Max = top * (1.1 + 0.09*float64(len(rugs)))
	pl.Add(level{y: float64(p.link.Buffer), name: "buffer"})
	if p.link.ECN > 0 {
		pl.Add(level{y: float64(p.link.ECN)}) // the title tells what it is
	}
	for _, r := range rugs {
		pl.Add(r)
	}
	return pl
}

// rugs are rows of events: one for each kind of them and each queue, or for all queues
// of a colour where they are many.
func (p *picture) rugs() (all []rug) {
	type key struct {
		color color.NRGBA
		kind  int
	}
	at := map[key]int{}
	for _, q := range p.queues {
		for kind, e := range events {
			times := increases(q.links, e.count)
			if len(times) == 0 {
				continue
			}
			k := key{q.color, kind}
			i, there := at[k]
			if !there {
				i, at[k] = len(all), len(all)
				all = append(all, rug{row: i, mark: e.mark, line: q.color})
			}
			all[i].times = append(all[i].times, times...)
			slices.Sort(all[i].times)
		}
	}
	return all
}

func (p *picture) queueUsed() float64 {
	used := 0.
	for _, q := range p.queues {
		for _, l := range q.links {
			used = max(used, float64(l.Queue))
		}
	}
	return used
}

type point struct{ x, y float64 }

// columns is how many places along the time axis are told apart: more than the
// widest picture has.
const columns = 2000

// steps makes a line out of values that hold until the next: pieces, where it is
// interrupted. Of all the values in one column it keeps the first, the
// smallest, the largest and the last, so that no peak is lost.
func steps[T any](v []T, value func(T) (x, y float64, ok bool), end float64, columns int) (pieces [][]point) {
	var piece []point
	var lo, hi, last point
	inColumn := false
	column := -1
	flush := func() {
		if !inColumn {
			return
		}
		a, b := lo, hi
		if b.x < a.x {
			a, b = b, a
		}
		for _, q := range []point{a, b, last} {
			if n := len(piece); n > 0 && piece[n-1] != q {
				if piece[n-1].y != q.y {
					piece = append(piece, point{q.x, piece[n-1].y}) // until then the old value held
				}
				piece = append(piece, q)
			}
		}
		inColumn = false
	}
	end = max(end, math.SmallestNonzeroFloat64)
	for _, e := range v {
		x, y, ok := value(e)
		if c := int(x / end * float64(columns)); c != column || !ok {
			flush()
			column = c
		}
		q := point{x, y}
		switch {
		case !ok:
			if len(piece) > 0 {
				pieces = append(pieces, piece)
				piece = nil
			}
			continue
		case !inColumn:
			lo, hi, inColumn = q, q, true
			if len(piece) == 0 {
				piece = append(piece, q)
			}
		case y < lo.y:
			lo = q
		case y > hi.y:
			hi = q
		}
		last = q
	}
	flush()
	if len(piece) > 0 {
		pieces = append(pieces, piece)
	}
	return pieces
}

func highest(pieces [][]point) float64 {
	top := 0.
	for _, p := range pieces {
		for _, q := range p {
			top = max(top, q.y)
		}
	}
	return top
}

// throughput in bit/s over windows of w seconds, drawn at their middle. It is of
// what was delivered: the bytes acknowledged in a row stand still while a hole is
// mended, and jump then, though the path never paused. The kernel counts what is
// delivered in segments, so the mean size of a segment makes bytes of it. Counts
// at a window's edge are interpolated.
//
// Until the flow is over it delivers, if nothing else nothing.
func (f *flow) throughput(w, end float64) (out []point) {
	var first, last trace.Sample
	if n := len(f.acks); n > 0 {
		first, last = f.acks[0], f.acks[n-1]
	}
	size := 0.
	if last.Delivered != first.Delivered {
		size = float64(last.BytesAcked-first.BytesAcked) / float64(last.Delivered-first.Delivered)
	}
	at := func(t float64) float64 {
		i := byTime(f.acks, func(s trace.Sample) float64 { return s.Time }, t)
		switch {
		case i == 0:
			return float64(first.Delivered)
		case i == len(f.acks):
			return float64(last.Delivered)
		}
		a, b := f.acks[i-1], f.acks[i]
		return float64(a.Delivered) + (t-a.Time)/(b.Time-a.Time)*(float64(b.Delivered)-float64(a.Delivered))
	}
	stop := min(f.end, end)
	for t := f.start; t+w <= stop+1e-9; t += w / 2 { // windows overlap by half
		out = append(out, point{t + w/2, (at(t+w) - at(t)) * size * 8 / w})
	}
	return out
}

// medianColumns is at how many places a median is taken.
const medianColumns = 400

// median of lines, at each time of those that are there.
func median(lines [][][]point, end float64) (pieces [][]point) {
	at := make([]struct{ piece, point int }, len(lines))
	var piece []point
	for c := range medianColumns + 1 {
		t := end * float64(c) / medianColumns
		var values []float64
		for i, l := range lines {
			for at[i].piece < len(l) {
				p := l[at[i].piece]
				for at[i].point+1 < len(p) && p[at[i].point+1].x <= t {
					at[i].point++
				}
				if at[i].point+1 < len(p) || len(p) > 0 && t <= p[len(p)-1].x {
					break // it goes on
				}
				at[i].piece++
				at[i].point = 0
			}
			if at[i].piece == len(l) {
				continue // over
			}
			p := l[at[i].piece]
			a := p[at[i].point]
			if a.x > t {
				continue // not begun
			}
			y := a.y
			if at[i].point+1 < len(p) {
				b := p[at[i].point+1]
				y += (t - a.x) / (b.x - a.x) * (b.y - a.y)
			}
			values = append(values, y)
		}
		if len(values) == 0 {
			if len(piece) > 0 {
				pieces, piece = append(pieces, piece), nil
			}
			continue
		}
		slices.Sort(values)
		piece = append(piece, point{t, values[len(values)/2]})
	}
	if len(piece) > 0 {
		pieces = append(pieces, piece)
	}
	return pieces
}

// increases are the times at which a counter rose.
func increases(v []trace.LinkSample, count func(trace.LinkSample) uint64) (times []float64) {
	var before uint64
	for _, l := range v {
		if n := count(l); n > before {
			times = append(times, l.Time)
			before = n
		}
	}
	return times
}

// curve is a line in pieces.
type curve struct {
	pieces [][]point
	draw.LineStyle
}

func (l curve) Plot(c draw.Canvas, p *plot.Plot) {
	x, y := p.Transforms(&c)
	for _, piece := range l.pieces {
		pts := make([]vg.Point, len(piece))
		for i, q := range piece {
			pts[i] = vg.Point{X: x(q.x), Y: y(q.y)}
		}
		c.StrokeLines(l.LineStyle, c.ClipLinesXY(pts)...)
	}
}

// bands are spans of time that are shaded.
type bands []span

func (b bands) Plot(c draw.Canvas, p *plot.Plot) {
	x, _ := p.Transforms(&c)
	for _, s := range b {
		from, to := max(x(s.from), c.Min.X), min(x(s.to), c.Max.X)
		if from < to {
			c.SetColor(spoiledColor)
			c.Fill(vg.Rectangle{Min: vg.Point{X: from, Y: c.Min.Y}, Max: vg.Point{X: to, Y: c.Max.Y}}.Path())
		}
	}
}

// cuts are times at which results end before their runs would have.
type cuts []float64

func (u cuts) Plot(c draw.Canvas, p *plot.Plot) {
	x, _ := p.Transforms(&c)
	for _, t := range u {
		if at := x(t); at <= c.Max.X+0.1 {
			c.StrokeLine2(cutStyle, at, c.Min.Y, at, c.Max.Y)
		}
	}
}

// level is a thin line across with its name.
type level struct {
	y     float64
	name  string
	below bool // the name stands below the line, where no curve goes, if there is room
	color color.NRGBA
	over  []line // where it should not stand
}

func (l level) Plot(c draw.Canvas, p *plot.Plot) {
	if l.y > p.Y.Max || l.y <= p.Y.Min {
		return
	}
	if l.color == (color.NRGBA{}) {
		l.color = grey
	}
	_, y := p.Transforms(&c)
	at := y(l.y)
	c.StrokeLine2(draw.LineStyle{Color: l.color, Width: vg.Points(0.6)}, c.Min.X, at, c.Max.X, at)
	if l.name == "" {
		return
	}
	st := style(8, l.color, text.XLeft, text.YBottom)
	box := vg.Rectangle{Max: vg.Point{X: st.Width(l.name), Y: st.Height(l.name)}}
	foot := l.place(c, p, box.Max, at)
	// Over a curve the name could not be read.
	c.SetColor(color.NRGBA{0xff, 0xff, 0xff, 0xa0})
	c.Fill(box.Add(foot).Path())
	c.FillText(st, foot, l.name)
}

// place finds where a name of a size is to stand: at the right, on its side of the
// line, or where else no curve goes.
func (l level) place(c draw.Canvas, p *plot.Plot, size vg.Point, line vg.Length) vg.Point {
	x, y := p.Transforms(&c)
	above, below := line+1, line-size.Y-2
	sides := []vg.Length{above, below}
	if l.below {
		sides = []vg.Length{below, above}
	}
	sides = slices.DeleteFunc(sides, func(foot vg.Length) bool { return foot < c.Min.Y+1 || foot+size.Y > c.Max.Y })
	if len(sides) == 0 {
		sides = []vg.Length{above}
	}
	at := func(foot vg.Length) (vg.Point, bool) {
		const places = 24
		for i := range places {
			left := c.Max.X - 2 - size.X - (c.Max.X-c.Min.X-size.X-4)*vg.Length(i)/(places-1)
			if l.free(x, y, vg.Rectangle{Min: vg.Point{X: left - 1, Y: foot}, Max: vg.Point{X: left + size.X + 1, Y: foot + size.Y}}) {
				return vg.Point{X: left, Y: foot}, true
			}
		}
		return vg.Point{}, false
	}
	for _, foot := range sides {
		if p, free := at(foot); free {
			return p
		}
	}
	// Above the curves, with a stroke down to the line.
	for foot := above; foot+size.Y < c.Max.Y; foot += size.Y / 2 {
		if p, free := at(foot); free {
			c.StrokeLine2(draw.LineStyle{Color: l.color, Width: vg.Points(0.6)}, p.X+size.X/2, line, p.X+size.X/2, foot)
			return p
		}
	}
	return vg.Point{X: c.Max.X - 2 - size.X, Y: sides[0]}
}

// free says whether no curve goes through a place.
func (l level) free(x, y func(float64) vg.Length, box vg.Rectangle) bool {
	for _, o := range l.over {
		for _, piece := range o.pieces {
			for i := 1; i < len(piece); i++ {
				a, b := piece[i-1], piece[i]
				if x(b.x) >= box.Min.X && x(a.x) <= box.Max.X && y(max(a.y, b.y)) >= box.Min.Y && y(min(a.y, b.y)) <= box.Max.Y {
					return false
				}
			}
		}
	}
	return true
}

// rug is a row of marks along the top, one for each event, with the colour of
// the line that it belongs to at its left end.
type rug struct {
	times []float64
	row   int
	mark  func(c draw.Canvas, x, y vg.Length)
	line  color.NRGBA
}

func (r rug) Plot(c draw.Canvas, p *plot.Plot) {
	x, _ := p.Transforms(&c)
	const h, rowH = 1.6 * vg.Millimeter, 2.3 * vg.Millimeter
	top := c.Max.Y - vg.Length(r.row)*rowH - 0.4*vg.Millimeter
	last := vg.Length(-1)
	for _, t := range r.times {
		if at := x(t); at-last >= 0.3 && at <= c.Max.X { // one a column is enough
			r.mark(c, at, top-h/2)
			last = at
		}
	}
	c.SetColor(r.line)
	c.Fill(vg.Rectangle{Min: vg.Point{X: c.Min.X + 0.5, Y: top - h}, Max: vg.Point{X: c.Min.X + 3, Y: top}}.Path())
}
