// SPDX-License-Identifier: Apache-2.0

// Package plots draws what package trace holds: the congestion window with
// ssthresh, the smoothed RTT, the throughput and the bottleneck's queue, stacked
// over one axis of time. Several results are laid over each other, one colour a
// congestion control. It reads nothing and measures nothing.
package plots

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"image/color"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"codeberg.org/go-pdf/fpdf"
	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgimg"
	"gonum.org/v1/plot/vg/vgpdf"
	"gonum.org/v1/plot/vg/vgsvg"

	"ccload/harness/trace"
	"ccload/internal/atomicfile"
)

// ErrFormat says that a file's ending is none of .png, .svg and .pdf.
var ErrFormat = errors.New("not a kind of picture that can be drawn: .png, .svg or .pdf")

// Size of the picture: it fits a page of A4, and a README at 900 pixels.
const (
	width  = 8.2 * vg.Inch
	height = 9.4 * vg.Inch
	dpi    = 180 // of a PNG
)

// Save draws the results into a file of the kind that its ending tells. What a
// reader of the picture should know besides is in the warnings. The same results
// give the same bytes.
func Save(path string, results []*trace.Result) (warnings []string, err error) {
	draw := map[string]func(*picture) (io.WriterTo, error){".png": drawPNG, ".svg": drawSVG, ".pdf": drawPDF}[strings.ToLower(filepath.Ext(path))]
	if draw == nil {
		return nil, fmt.Errorf("picture %q: %w", path, ErrFormat)
	}
	fail := func(err error) ([]string, error) { return nil, fmt.Errorf("picture %q: %w", path, err) }
	p, err := newPicture(results)
	if err != nil {
		return fail(err)
	}
	w, err := draw(p)
	if err != nil {
		return fail(err)
	}
	var b bytes.Buffer
	if _, err := w.WriteTo(&b); err != nil {
		return fail(err)
	}
	dir, err := os.OpenRoot(filepath.Dir(path))
	if err != nil {
		return fail(err)
	}
	defer dir.Close()
	if err := atomicfile.Write(dir, filepath.Base(path), b.Bytes()); err != nil {
		return fail(err)
	}
	return p.warnings, nil
}

func drawPNG(p *picture) (io.WriterTo, error) {
	c := vgimg.NewWith(vgimg.UseWH(width, height), vgimg.UseDPI(dpi))
	return vgimg.PngCanvas{Canvas: c}, p.draw(draw.New(c))
}

func drawSVG(p *picture) (io.WriterTo, error) {
	c := vgsvg.New(width, height)
	return c, p.draw(draw.New(c))
}

func drawPDF(p *picture) (io.WriterTo, error) {
	// The time of drawing is not a part of the picture.
	fpdf.SetDefaultCreationDate(time.Unix(0, 0))
	fpdf.SetDefaultModificationDate(time.Unix(0, 0))
	fpdf.SetDefaultCatalogSort(true)
	c := vgpdf.New(width, height)
	return c, p.draw(draw.New(c))
}

// Colours that people who see few can tell apart, and that differ in grey too
// (Okabe and Ito, "Color Universal Design", 2008). Vermillion is kept for drops.
var palette = []color.NRGBA{
	{0x00, 0x72, 0xb2, 0xff}, // blue
	{0xe6, 0x9f, 0x00, 0xff}, // orange
	{0x00, 0x9e, 0x73, 0xff}, // bluish green
	{0xcc, 0x79, 0xa7, 0xff}, // reddish purple
	{0x56, 0xb4, 0xe9, 0xff}, // sky blue
	{0x00, 0x00, 0x00, 0xff},
}

var grey = color.NRGBA{0x77, 0x77, 0x77, 0xff}

// lighten mixes a colour with white: 0 leaves it, 1 is white.
func lighten(c color.NRGBA, by float64) color.NRGBA {
	mix := func(v uint8) uint8 { return uint8(math.Round(float64(v) + (255-float64(v))*by)) }
	return color.NRGBA{mix(c.R), mix(c.G), mix(c.B), c.A}
}

func init() {
	plot.DefaultFont = font.Font{Typeface: "Liberation", Variant: "Sans"}
}

// flow is one flow of one result, ready to be drawn.
type flow struct {
	cc      string
	color   color.NRGBA
	samples []trace.Sample
}

// queue is the bottleneck of one result.
type queue struct {
	cc    string // of the first flow
	color color.NRGBA
	links []trace.LinkSample
}

// picture is what is common to the panels.
type picture struct {
	title    string
	link     trace.Link
	end      float64 // s
	ccs      []string
	colors   map[string]color.NRGBA
	flows    []flow
	queues   []queue
	theory   []trace.Curve
	warnings []string
}

func newPicture(results []*trace.Result) (*picture, error) {
	p := &picture{colors: map[string]color.NRGBA{}}
	names := map[string]int{} // results in which a congestion control is
	for i, r := range results {
		link := r.Run.Link.Link
		if i == 0 {
			p.link, p.title = link, describe(link)
		} else if link != p.link && len(p.warnings) == 0 {
			p.warnings = append(p.warnings, "the results are of different links; the picture's lines for BDP, buffer and RTT are the first's")
			p.title = "different links; the first is " + p.title
		}
		p.end = max(p.end, r.Run.Experiment.Duration)
		p.addFlows(r, names)
		p.theory = append(p.theory, r.Run.Theory...)
	}
	if len(p.flows) == 0 {
		return nil, errors.New("there are no samples to draw")
	}
	return p, nil
}

// addFlows takes over the flows of a result that have samples. Those of one
// congestion control get shades of its colour.
func (p *picture) addFlows(r *trace.Result, names map[string]int) {
	byFlow := map[int32][]trace.Sample{}
	for _, s := range r.Samples {
		byFlow[s.Flow] = append(byFlow[s.Flow], s)
	}
	shade := map[string]int{}
	for _, f := range r.Run.Experiment.Flows {
		if p.colors[f.CC] == (color.NRGBA{}) {
			p.colors[f.CC] = palette[len(p.ccs)%len(palette)]
			p.ccs = append(p.ccs, f.CC)
		}
		c := p.colors[f.CC]
		samples := preferred(byFlow[int32(f.ID)])
		if len(samples) == 0 {
			p.warnings = append(p.warnings, fmt.Sprintf("flow %d of %s has no samples", f.ID, f.CC))
			continue
		}
		by := min(0.18*float64(names[f.CC]+shade[f.CC]), 0.7)
		shade[f.CC]++
		p.flows = append(p.flows, flow{f.CC, lighten(c, by), samples})
	}
	for cc := range shade {
		names[cc]++
	}
	if len(r.Links) > 0 && len(r.Run.Experiment.Flows) > 0 {
		cc := r.Run.Experiment.Flows[0].CC
		p.queues = append(p.queues, queue{cc, p.colors[cc], r.Links})
	}
}

// preferred keeps the samples taken on ACKs where there are any, for those at
// intervals tell the same later.
func preferred(samples []trace.Sample) []trace.Sample {
	if slices.ContainsFunc(samples, func(s trace.Sample) bool { return s.Source == trace.Ack }) {
		return slices.DeleteFunc(samples, func(s trace.Sample) bool { return s.Source != trace.Ack })
	}
	return samples
}

// describe says in a line what link it is.
func describe(l trace.Link) string {
	parts := []string{siUnit(l.Rate, "bit/s"), "RTT " + siUnit(l.RTT, "s")}
	buffer := fmt.Sprintf("buffer %d packets", l.Buffer)
	if l.BufferBDP > 0 {
		buffer += fmt.Sprintf(" (%.3g BDP)", l.BufferBDP)
	}
	parts = append(parts, buffer)
	if l.Loss.Every > 0 {
		parts = append(parts, fmt.Sprintf("loss of every %dth packet", l.Loss.Every))
	}
	if l.Loss.Probability > 0 {
		parts = append(parts, fmt.Sprintf("random loss %.3g %%", l.Loss.Probability*100))
	}
	if l.ECN > 0 {
		parts = append(parts, fmt.Sprintf("CE above %d packets", l.ECN))
	}
	return strings.Join(parts, " · ")
}

// siUnit writes a quantity with the prefix that makes it short.
func siUnit(v float64, unit string) string {
	for _, p := range []struct {
		factor float64
		prefix string
	}{{1e9, "G"}, {1e6, "M"}, {1e3, "k"}, {1, ""}, {1e-3, "m"}, {1e-6, "µ"}} {
		if math.Abs(v) >= p.factor*0.9999 {
			return fmt.Sprintf("%.4g %s%s", v/p.factor, p.prefix, unit)
		}
	}
	return "0 " + unit
}

// bdp is the bandwidth-delay product in packets.
func (p *picture) bdp() float64 { return p.link.Rate * p.link.RTT / 8 / float64(max(p.link.MTU, 1)) }

// style is text of the picture.
func style(size vg.Length, c color.Color, x text.XAlignment, y text.YAlignment) text.Style {
	return text.Style{
		Color: c, Font: font.From(plot.DefaultFont, size), XAlign: x, YAlign: y, Handler: plot.DefaultTextHandler,
	}
}

const (
	margin  = 10 * vg.Millimeter / 2
	headerH = 15 * vg.Millimeter
	gap     = 3 * vg.Millimeter
)

// draw puts the panels below each other, their data exactly above each other.
func (p *picture) draw(c draw.Canvas) error {
	c.SetColor(color.White)
	c.Fill(c.Rectangle.Path())
	c = draw.Crop(c, margin, -margin, margin, -margin)
	p.header(draw.Crop(c, 0, 0, c.Max.Y-c.Min.Y-headerH, 0))
	c = draw.Crop(c, 0, 0, 0, -headerH)

	rate, unit := p.throughputPanel()
	panels := []struct {
		share float64
		label string
		plot  *plot.Plot
	}{
		{3.2, "cwnd (segments)", p.windowPanel()}, {2, "srtt (ms)", p.rttPanel()},
		{2, "throughput (" + unit + ")", rate}, {2.2, "queue (packets)", p.queuePanel()},
	}
	var shares float64
	for _, q := range panels {
		shares += q.share
	}
	last := panels[len(panels)-1].plot
	last.X.Label.Text = "time (s)"
	axis := c.Max.Y - c.Min.Y
	axis = axis - gap*vg.Length(len(panels)-1) - xAxisHeight
	top := c.Max.Y
	canvases := make([]draw.Canvas, len(panels))
	var left, right vg.Length
	for i, q := range panels {
		h := axis * vg.Length(q.share/shares)
		if q.plot == last {
			h += xAxisHeight
		}
		canvases[i] = draw.Canvas{Canvas: c.Canvas, Rectangle: vg.Rectangle{
			Min: vg.Point{X: c.Min.X, Y: top - h}, Max: vg.Point{X: c.Max.X, Y: top},
		}}
		top -= h + gap
		q.plot.X.Min, q.plot.X.Max = 0, p.end
		q.plot.X.Tick.Marker = ticks{about: 10, labels: q.plot == last}
		data := q.plot.DataCanvas(canvases[i])
		left, right = max(left, data.Min.X-c.Min.X+labelWidth), max(right, c.Max.X-data.Max.X)
	}
	for i, q := range panels {
		data := q.plot.DataCanvas(canvases[i])
		q.plot.Draw(draw.Crop(canvases[i], left-(data.Min.X-c.Min.X), -(right - (c.Max.X - data.Max.X)), 0, 0))
		// The label is drawn apart from its axis, so that all stand in one line.
		st := style(10, color.Black, text.XCenter, text.YTop)
		st.Rotation = math.Pi / 2
		c.FillText(st, vg.Point{X: c.Min.X, Y: (data.Min.Y + data.Max.Y) / 2}, q.label)
	}
	return nil
}

// labelWidth is what the label of an axis takes beside it.
const labelWidth = 6 * vg.Millimeter

// xAxisHeight is what the labels below the lowest panel take.
const xAxisHeight = 9 * vg.Millimeter

// header is the title and the legend.
func (p *picture) header(c draw.Canvas) {
	c.FillText(style(12, color.Black, text.XLeft, text.YTop), vg.Point{X: c.Min.X, Y: c.Max.Y}, p.title)
	x, y := c.Min.X, c.Max.Y-9*vg.Millimeter
	entry := func(name string, mark func(x0, x1, y vg.Length)) {
		st := style(10, color.Black, text.XLeft, text.YCenter)
		const w = 8 * vg.Millimeter
		mark(x, x+w, y)
		c.FillText(st, vg.Point{X: x + w + 1.5*vg.Millimeter, Y: y}, name)
		x += w + st.Width(name) + 7*vg.Millimeter
	}
	line := func(ls draw.LineStyle) func(x0, x1, y vg.Length) {
		return func(x0, x1, y vg.Length) { c.StrokeLine2(ls, x0, y, x1, y) }
	}
	for _, cc := range p.ccs {
		entry(cc, line(draw.LineStyle{Color: p.colors[cc], Width: vg.Points(2)}))
	}
	if p.has(func(s trace.Sample) bool { return s.Ssthresh < trace.InfiniteSsthresh }) {
		entry("ssthresh", line(ssthreshStyle(grey)))
	}
	var theories []string
	for _, t := range p.theory {
		if !slices.Contains(theories, t.Name) {
			theories = append(theories, t.Name)
			entry("theory: "+t.Name, line(theoryStyle))
		}
	}
	tick := func(col color.Color) func(x0, x1, y vg.Length) {
		return func(x0, x1, y vg.Length) {
			for i := range 3 {
				at := x0 + (x1-x0)*vg.Length(i+1)/4
				c.StrokeLine2(draw.LineStyle{Color: col, Width: vg.Points(0.8)}, at, y-vg.Millimeter, at, y+vg.Millimeter)
			}
		}
	}
	if p.counted(func(l trace.LinkSample) uint64 { return l.Drops + l.Losses }) {
		entry("drops", tick(dropColor))
	}
	if p.counted(func(l trace.LinkSample) uint64 { return l.Marks }) {
		entry("CE marks", tick(markColor))
	}
}

func (p *picture) has(which func(trace.Sample) bool) bool {
	return slices.ContainsFunc(p.flows, func(f flow) bool { return slices.ContainsFunc(f.samples, which) })
}

func (p *picture) counted(which func(trace.LinkSample) uint64) bool {
	return slices.ContainsFunc(p.queues, func(q queue) bool { return which(q.links[len(q.links)-1]) > 0 })
}

// panel is an empty one.
func panel() *plot.Plot {
	p := plot.New()
	p.X.Label.TextStyle.Font.Size = 10
	p.X.Tick.Label.Font.Size = 9
	p.Y.Tick.Label.Font.Size = 9
	p.X.Padding, p.Y.Padding = 0, 0
	p.Y.Tick.Marker = ticks{about: 5, labels: true}
	p.Y.Min, p.Y.Max = 0, 1
	for _, a := range []*plot.Axis{&p.X, &p.Y} {
		a.LineStyle.Width = vg.Points(0.5)
		a.Tick.LineStyle.Width = vg.Points(0.5)
	}
	p.Add(grid{})
	return p
}

// ticks are at round distances: 1, 2 or 5 times a power of ten.
type ticks struct {
	about  int
	labels bool
}

func (t ticks) Ticks(lo, hi float64) []plot.Tick {
	span := hi - lo
	if !(span > 0) {
		return []plot.Tick{{Value: lo, Label: fmt.Sprint(lo)}}
	}
	unit := math.Pow(10, math.Floor(math.Log10(span/float64(t.about))))
	step := unit
	for _, m := range []float64{1, 2, 5, 10} {
		if step = m * unit; span/step <= float64(t.about) {
			break
		}
	}
	digits := max(0, -int(math.Floor(math.Log10(step)+1e-9)))
	var out []plot.Tick
	for i := math.Ceil(lo/step-1e-9) + 0; i*step <= hi+step*1e-9; i++ {
		label := " " // a tick without a label would be a minor one
		if t.labels {
			label = fmt.Sprintf("%.*f", digits, i*step)
		}
		out = append(out, plot.Tick{Value: i * step, Label: label})
	}
	return out
}

// grid is a light line at each tick.
type grid struct{}

func (grid) Plot(c draw.Canvas, p *plot.Plot) {
	x, y := p.Transforms(&c)
	ls := draw.LineStyle{Color: color.NRGBA{0xe8, 0xe8, 0xe8, 0xff}, Width: vg.Points(0.5)}
	for _, t := range p.Y.Tick.Marker.Ticks(p.Y.Min, p.Y.Max) {
		c.StrokeLine2(ls, c.Min.X, y(t.Value), c.Max.X, y(t.Value))
	}
	for _, t := range p.X.Tick.Marker.Ticks(p.X.Min, p.X.Max) {
		c.StrokeLine2(ls, x(t.Value), c.Min.Y, x(t.Value), c.Max.Y)
	}
}

func byTime[T any](v []T, time func(T) float64, at float64) int {
	i, _ := slices.BinarySearchFunc(v, at, func(x T, at float64) int { return cmp.Compare(time(x), at) })
	return i
}
