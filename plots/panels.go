// SPDX-License-Identifier: Apache-2.0

package plots

import (
	"image/color"
	"math"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"

	"ccload/harness/trace"
)

var (
	dropColor = color.NRGBA{0xd5, 0x5e, 0x00, 0xff} // vermillion
	markColor = color.NRGBA{0x77, 0x77, 0x77, 0xff}
)

// lineStyle is that of a curve. The later ones are thinner, so that where two lie
// upon each other both can be seen.
func (p *picture) lineStyle(cc string, c color.NRGBA) draw.LineStyle {
	width := 1.1
	if cc == p.ccs[0] && len(p.ccs) > 1 {
		width = 2.2
	}
	return draw.LineStyle{Color: c, Width: vg.Points(width)}
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

func (p *picture) windowPanel() *plot.Plot {
	pl := panel()
	top := 0.
	for _, f := range p.flows {
		s := steps(f.samples, func(s trace.Sample) (float64, float64, bool) {
			return s.Time, float64(s.Ssthresh), s.Ssthresh < trace.InfiniteSsthresh
		}, p.end)
		pl.Add(curve{s, ssthreshStyle(f.color)})
	}
	for _, f := range p.flows {
		s := steps(f.samples, func(s trace.Sample) (float64, float64, bool) { return s.Time, float64(s.Cwnd), true }, p.end)
		top = max(top, highest(s))
		pl.Add(curve{s, p.lineStyle(f.cc, f.color)})
	}
	top = max(top, p.addTheory(pl, "cwnd"))
	bdp := p.bdp()
	pl.Y.Max = 1.08 * top
	// Where the flow fills the link the two are a sawtooth's lower and upper bound.
	pl.Add(level{y: bdp, name: "BDP"}, level{y: bdp + float64(p.link.Buffer), name: "BDP + buffer"})
	return pl
}

func (p *picture) rttPanel() *plot.Plot {
	pl := panel()
	top := 0.
	for _, f := range p.flows {
		s := steps(f.samples, func(s trace.Sample) (float64, float64, bool) { return s.Time, s.SRTT * 1e3, s.SRTT > 0 }, p.end)
		top = max(top, highest(s))
		pl.Add(curve{s, p.lineStyle(f.cc, f.color)})
	}
	pl.Y.Max = 1.08 * max(top, p.link.RTT*1e3)
	pl.Add(level{p.link.RTT * 1e3, "RTT of the empty link", true})
	return pl
}

func (p *picture) throughputPanel() (pl *plot.Plot, unit string) {
	top := p.link.Rate
	unit, factor := "Mbit/s", 1e6
	if p.link.Rate < 1e6 {
		unit, factor = "kbit/s", 1e3
	}
	pl = panel()
	for _, f := range p.flows {
		pts := throughput(f.samples, p.window(), p.end)
		for i := range pts {
			pts[i].y /= factor
		}
		pl.Add(curve{[][]point{pts}, p.lineStyle(f.cc, f.color)})
	}
	pl.Y.Max = 1.12 * top / factor
	pl.Add(level{y: p.link.Rate / factor, name: "rate"})
	return pl, unit
}

// window is over how long the throughput is taken, in seconds: long enough for
// some round trips with a full buffer, short enough for a picture.
func (p *picture) window() float64 {
	full := p.link.RTT + float64(p.link.Buffer*p.link.MTU*8)/p.link.Rate
	return max(2*full, p.end/150)
}

func (p *picture) queuePanel() *plot.Plot {
	pl := panel()
	top := float64(p.link.Buffer)
	for _, q := range p.queues {
		s := steps(q.links, func(l trace.LinkSample) (float64, float64, bool) { return l.Time, float64(l.Queue), true }, p.end)
		top = max(top, highest(s))
		pl.Add(curve{s, p.lineStyle(q.cc, q.color)})
	}
	expected := p.addTheory(pl, "queue")
	// A queue far below a large buffer would be a line at the bottom.
	if used := max(p.queueUsed(), expected); used < top/4 && used > 0 {
		top = 1.4 * used
	}
	rows := 0
	for _, q := range p.queues {
		for _, e := range []struct {
			count func(trace.LinkSample) uint64
			color color.NRGBA
		}{
			{func(l trace.LinkSample) uint64 { return l.Marks }, markColor},
			{func(l trace.LinkSample) uint64 { return l.Drops + l.Losses }, dropColor},
		} {
			if times := increases(q.links, e.count); len(times) > 0 {
				pl.Add(rug{times, rows, e.color, q.color})
				rows++
			}
		}
	}
	pl.Y.Max = top * (1.1 + 0.09*float64(rows))
	pl.Add(level{y: float64(p.link.Buffer), name: "buffer"})
	if p.link.ECN > 0 {
		pl.Add(level{y: float64(p.link.ECN)}) // the title tells what it is
	}
	return pl
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
func steps[T any](v []T, value func(T) (x, y float64, ok bool), end float64) (pieces [][]point) {
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
		if c := int(x / end * columns); c != column || !ok {
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
func throughput(samples []trace.Sample, w, end float64) (out []point) {
	if len(samples) < 2 {
		return nil
	}
	first, last := samples[0], samples[len(samples)-1]
	if last.Delivered == first.Delivered {
		return nil
	}
	size := float64(last.BytesAcked-first.BytesAcked) / float64(last.Delivered-first.Delivered)
	at := func(t float64) float64 {
		i := byTime(samples, func(s trace.Sample) float64 { return s.Time }, t)
		switch {
		case i == 0:
			return float64(first.Delivered)
		case i == len(samples):
			return float64(last.Delivered)
		}
		a, b := samples[i-1], samples[i]
		return float64(a.Delivered) + (t-a.Time)/(b.Time-a.Time)*(float64(b.Delivered)-float64(a.Delivered))
	}
	stop := min(last.Time, end)
	for t := first.Time; t+w <= stop+1e-9; t += w / 2 { // windows overlap by half
		out = append(out, point{t + w/2, (at(t+w) - at(t)) * size * 8 / w})
	}
	return out
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

// level is a thin line across with its name.
type level struct {
	y     float64
	name  string
	below bool // the name stands below the line, where no curve goes
}

func (l level) Plot(c draw.Canvas, p *plot.Plot) {
	if l.y > p.Y.Max || l.y <= p.Y.Min {
		return
	}
	_, y := p.Transforms(&c)
	at := y(l.y)
	c.StrokeLine2(draw.LineStyle{Color: grey, Width: vg.Points(0.6)}, c.Min.X, at, c.Max.X, at)
	st := style(8, grey, text.XRight, text.YBottom)
	if l.below {
		st.YAlign = text.YTop
		at -= 2
	}
	c.FillText(st, vg.Point{X: c.Max.X - 2, Y: at + 1}, l.name)
}

// rug is a row of ticks along the top, one for each event, with the colour of
// the line that it belongs to at its left end.
type rug struct {
	times       []float64
	row         int
	color, line color.NRGBA
}

func (r rug) Plot(c draw.Canvas, p *plot.Plot) {
	x, _ := p.Transforms(&c)
	const h, rowH = 1.6 * vg.Millimeter, 2.3 * vg.Millimeter
	top := c.Max.Y - vg.Length(r.row)*rowH - 0.4*vg.Millimeter
	last := vg.Length(-1)
	for _, t := range r.times {
		if at := x(t); at-last >= 0.3 { // one a column is enough
			c.StrokeLine2(draw.LineStyle{Color: r.color, Width: vg.Points(0.7)}, at, top-h, at, top)
			last = at
		}
	}
	c.SetColor(r.line)
	c.Fill(vg.Rectangle{Min: vg.Point{X: c.Min.X + 0.5, Y: top - h}, Max: vg.Point{X: c.Min.X + 3, Y: top}}.Path())
}
