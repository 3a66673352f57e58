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
	"unicode"

	"codeberg.org/go-pdf/fpdf"
	"golang.org/x/text/encoding"
	"golang.org/x/text/encoding/charmap"
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
	height = 9.4 * vg.Inch // with a legend of one line
	dpi    = 180           // of a PNG
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
	c := vgimg.NewWith(vgimg.UseWH(width, p.height()), vgimg.UseDPI(dpi))
	return vgimg.PngCanvas{Canvas: c}, p.draw(draw.New(c))
}

func drawSVG(p *picture) (io.WriterTo, error) {
	c := vgsvg.New(width, p.height())
	return wellFormed{c}, p.draw(draw.New(c))
}

// wellFormed is an SVG without the control characters that XML has no place for: the
// names in results come from anybody.
type wellFormed struct{ io.WriterTo }

func (svg wellFormed) WriteTo(w io.Writer) (int64, error) {
	var b bytes.Buffer
	if _, err := svg.WriterTo.WriteTo(&b); err != nil {
		return 0, err
	}
	n, err := w.Write(bytes.Map(func(r rune) rune {
		if unicode.IsControl(r) && r != '\n' && r != '\t' || r == 0xfffe || r == 0xffff {
			return unicode.ReplacementChar
		}
		return r
	}, b.Bytes()))
	return int64(n), err
}

func drawPDF(p *picture) (io.WriterTo, error) {
	// The time of drawing is not a part of the picture.
	fpdf.SetDefaultCreationDate(time.Unix(0, 0))
	fpdf.SetDefaultModificationDate(time.Unix(0, 0))
	fpdf.SetDefaultCatalogSort(true)
	c := pdfCanvas{vgpdf.New(width, p.height())}
	return c, p.draw(draw.New(c))
}

// pdfCanvas mends two things of vgpdf: it takes a colour that can be seen through for
// a darker one, and writes UTF-8 where its fonts have Windows-1252.
type pdfCanvas struct{ *vgpdf.Canvas }

func (c pdfCanvas) SetColor(clr color.Color) {
	if n, ok := clr.(color.NRGBA); ok {
		clr = straight{n}
	}
	c.Canvas.SetColor(clr)
}

func (c pdfCanvas) FillString(f font.Face, at vg.Point, s string) {
	if b, err := encoding.ReplaceUnsupported(charmap.Windows1252.NewEncoder()).String(s); err == nil {
		s = b
	}
	c.Canvas.FillString(f, at, s)
}

// straight is a colour whose parts are not diminished by its alpha.
type straight struct{ color.NRGBA }

func (s straight) RGBA() (r, g, b, a uint32) {
	wide := func(v uint8) uint32 { return uint32(v)<<8 | uint32(v) }
	return wide(s.R), wide(s.G), wide(s.B), wide(s.A)
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

// picture is what is common to the panels.
type picture struct {
	title     string
	notes     []string // what a reader must know, below the title
	link      trace.Link
	measured  *float64 // bit/s, of the one result, where the check of it failed
	end       float64  // s
	series    []*series
	flowsEach int // in each result; 0: not as many in each
	queues    []queue
	spoiled   []span    // s
	cut       []float64 // where results that were interrupted end
	theory    []trace.Curve
	warnings  []string
}

// span is a part of the time axis, in s.
type span struct{ from, to float64 }

func newPicture(results []*trace.Result) (*picture, error) {
	p := &picture{}
	p.makeSeries(results)
	samples := 0
	for i, r := range results {
		link := r.Run.Link.Link
		if i == 0 {
			p.link, p.title = link, describe(link)
		} else if link != p.link && len(p.warnings) == 0 {
			p.warnings = append(p.warnings, "the results are of different links; the picture's lines for BDP, buffer and RTT are the first's")
			p.title = "different links; the first is " + p.title
		}
		if n := len(r.Run.Experiment.Flows); i == 0 {
			p.flowsEach = n
		} else if n != p.flowsEach {
			p.flowsEach = 0
		}
		p.end = max(p.end, lasted(r))
		p.theory = append(p.theory, r.Run.Theory...)
		for _, d := range r.Run.Disturbances {
			p.spoiled = append(p.spoiled, span{float64(d.Second), float64(d.Second + 1)})
		}
		samples += len(r.Samples)
		p.note(r, resultName(results, i))
	}
	if samples == 0 {
		return nil, errors.New("there are no samples to draw")
	}
	if math.IsNaN(p.end) || p.end <= 0 {
		return nil, errors.New("the results are of no time")
	}
	p.spoiled = union(p.spoiled)
	for _, s := range p.series {
		var none []string
		for _, f := range s.flows {
			if len(f.samples) == 0 {
				none = append(none, fmt.Sprint(f.id))
			}
		}
		if n := len(none); n > 0 {
			const told = 5
			if n > told {
				none = append(none[:told], "…")
			}
			p.warnings = append(p.warnings, fmt.Sprintf("%d of %s have no samples: %s", n, counted(len(s.flows), s.label+" flow"), strings.Join(none, ", ")))
		}
	}
	return p, nil
}

// notesMost is how many lines the notes take.
const notesMost = 5

// note says what in a result was not as it should have been.
func (p *picture) note(r *trace.Result, name string) {
	var notes []string
	if r.Run.Incomplete {
		at := lasted(r)
		p.cut = append(p.cut, at)
		notes = append(notes, fmt.Sprintf("interrupted after %.3g of %.3g s", at, r.Run.Experiment.Duration))
	}
	var failed []string
	for _, c := range r.Run.Checks {
		switch m := r.Run.Link.Measured; {
		case c.OK, c.Name == "seconds spoiled by the machine" && len(r.Run.Disturbances) > 0: // said below
		case c.Name == "link rate" && m.Rate != nil:
			notes = append(notes, fmt.Sprintf("asked for %s, measured %s", siUnit(r.Run.Link.Rate, "bit/s"), siUnit(*m.Rate, "bit/s")))
			if name == "" {
				p.measured = m.Rate
			}
		case c.Name == "link rtt" && m.RTT != nil:
			notes = append(notes, fmt.Sprintf("asked for an RTT of %s, measured %s", siUnit(r.Run.Link.RTT, "s"), siUnit(*m.RTT, "s")))
		default:
			failed = append(failed, c.Name)
		}
	}
	if n := len(r.Run.Disturbances); n > 0 {
		seconds := max(int(math.Ceil(lasted(r))), r.Run.Disturbances[n-1].Second+1)
		notes = append(notes, fmt.Sprintf("the machine spoiled %d of %s", n, counted(seconds, "second")))
	}
	if len(failed) > 0 {
		const told = 3
		text := strings.Join(failed[:min(told, len(failed))], ", ")
		if n := len(failed) - told; n > 0 {
			text += fmt.Sprintf(" and %d more", n)
		}
		notes = append(notes, "failed: "+text)
	}
	if len(notes) == 0 {
		return
	}
	p.notes = append(p.notes, printable(name+strings.Join(notes, "; ")))
}

// union puts spans together that touch.
func union(spans []span) (out []span) {
	slices.SortFunc(spans, func(a, b span) int { return cmp.Compare(a.from, b.from) })
	for _, s := range spans {
		if n := len(out); n > 0 && s.from <= out[n-1].to {
			out[n-1].to = max(out[n-1].to, s.to)
		} else {
			out = append(out, s)
		}
	}
	return out
}

func counted(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// describe says in a line what link it is.
func describe(l trace.Link) string {
	parts := []string{siUnit(l.Rate, "bit/s"), "RTT " + siUnit(l.RTT, "s")}
	buffer := "buffer " + counted(l.Buffer, "packet")
	if l.BufferBDP > 0 {
		buffer += fmt.Sprintf(" (%.3g BDP)", l.BufferBDP)
	}
	parts = append(parts, buffer)
	if l.Loss.Every > 0 {
		parts = append(parts, fmt.Sprintf("loss 1/%d", l.Loss.Every))
	}
	if l.Loss.Probability > 0 {
		parts = append(parts, fmt.Sprintf("random loss %.3g %%", l.Loss.Probability*100))
	}
	if l.ECN > 0 {
		parts = append(parts, "CE above "+counted(l.ECN, "packet"))
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
	headerH = 15 * vg.Millimeter  // of a title and one line
	lineH   = 5.5 * vg.Millimeter // of each more
	gap     = 3 * vg.Millimeter
)

// draw puts the panels below each other, their data exactly above each other.
func (p *picture) draw(c draw.Canvas) error {
	c.SetColor(color.White)
	c.Fill(c.Rectangle.Path())
	c = draw.Crop(c, margin, -margin, margin, -margin)
	rows := p.legendRows()
	headerH := headerH + p.moreLines()*lineH
	p.header(draw.Crop(c, 0, 0, c.Max.Y-c.Min.Y-headerH, 0), rows)
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

// entry is one of the legend.
type entry struct {
	name string
	mark func(c draw.Canvas, x0, x1, y vg.Length)
}

// legend is what the lines and marks are.
func (p *picture) legend() (all []entry) {
	add := func(name string, mark func(c draw.Canvas, x0, x1, y vg.Length)) { all = append(all, entry{name, mark}) }
	line := func(ls draw.LineStyle) func(c draw.Canvas, x0, x1, y vg.Length) {
		return func(c draw.Canvas, x0, x1, y vg.Length) { c.StrokeLine2(ls, x0, y, x1, y) }
	}
	for _, s := range p.series {
		thick := draw.LineStyle{Color: s.color, Width: vg.Points(2), Dashes: s.dashes()}
		switch {
		case s.many:
			what := fmt.Sprintf("%d flows", len(s.flows))
			if s.runs > 1 {
				what += fmt.Sprintf(" of %d runs", s.runs)
			}
			add(fmt.Sprintf("%s: median of %s", s.label, what), line(thick))
		case len(s.flows) > 1 && len(p.series) == 1:
			for _, f := range s.flows {
				thick.Color = f.color
				add(fmt.Sprintf("%s %d", s.label, f.id), line(thick))
			}
		default:
			add(s.label, line(thick))
		}
	}
	if p.hasSsthresh() {
		add("ssthresh", line(ssthreshStyle(grey)))
	}
	var theories []string
	for _, t := range p.theory {
		if !slices.Contains(theories, t.Name) {
			theories = append(theories, t.Name)
			add("theory: "+printable(t.Name), line(theoryStyle))
		}
	}
	for _, e := range events {
		if p.counted(e.count) {
			add(e.name, func(c draw.Canvas, x0, x1, y vg.Length) {
				for i := range 3 {
					e.mark(c, x0+(x1-x0)*vg.Length(i+1)/4, y)
				}
			})
		}
	}
	if len(p.spoiled) > 0 {
		add("spoiled by the machine", func(c draw.Canvas, x0, x1, y vg.Length) {
			c.SetColor(spoiledColor)
			c.Fill(vg.Rectangle{Min: vg.Point{X: x0, Y: y - 1.5*vg.Millimeter}, Max: vg.Point{X: x1, Y: y + 1.5*vg.Millimeter}}.Path())
		})
	}
	if len(p.cut) > 0 {
		add("interrupted", func(c draw.Canvas, x0, x1, y vg.Length) {
			c.StrokeLine2(cutStyle, (x0+x1)/2, y-2*vg.Millimeter, (x0+x1)/2, y+2*vg.Millimeter)
		})
	}
	return all
}

const (
	sampleW = 8 * vg.Millimeter   // of the sample of a line in the legend
	textGap = 1.5 * vg.Millimeter // between it and its name
	nextGap = 7 * vg.Millimeter   // to the next
)

func legendStyle() text.Style { return style(10, color.Black, text.XLeft, text.YCenter) }

// legendRows breaks the legend into lines.
func (p *picture) legendRows() (rows [][]entry) {
	var x vg.Length
	for _, e := range p.legend() {
		w := sampleW + textGap + legendStyle().Width(e.name)
		if len(rows) == 0 || x+w > width-2*margin {
			rows, x = append(rows, nil), 0
		}
		rows[len(rows)-1] = append(rows[len(rows)-1], e)
		x += w + nextGap
	}
	return rows
}

// shownNotes are the lines of the notes, or of the first of them and how many more
// there are.
func (p *picture) shownNotes() (lines []string) {
	notes := p.notes
	if len(notes) > notesMost {
		notes = append(slices.Clone(notes[:notesMost-1]), fmt.Sprintf("… and %d more like this", len(notes)-notesMost+1))
	}
	for _, n := range notes {
		line := ""
		for word := range strings.SplitSeq(n, " ") {
			// An SVG may be shown with a font that is somewhat wider.
			if line != "" && noteStyle().Width(line+" "+word) > 0.9*(width-2*margin) {
				lines = append(lines, line)
				line = ""
			}
			line = strings.TrimLeft(line+" "+word, " ")
		}
		lines = append(lines, line)
	}
	return lines
}

func noteStyle() text.Style { return style(10, alarmColor, text.XLeft, text.YCenter) }

// moreLines is by how many lines the header is larger than one of a title and a line.
func (p *picture) moreLines() vg.Length {
	return vg.Length(max(0, len(p.legendRows())-1) + len(p.shownNotes()))
}

func (p *picture) height() vg.Length { return height + p.moreLines()*lineH }

// header is the title, the notes and the legend.
func (p *picture) header(c draw.Canvas, rows [][]entry) {
	c.FillText(style(12, color.Black, text.XLeft, text.YTop), vg.Point{X: c.Min.X, Y: c.Max.Y}, p.title)
	y := c.Max.Y - 9*vg.Millimeter
	for _, n := range p.shownNotes() {
		c.FillText(noteStyle(), vg.Point{X: c.Min.X, Y: y}, n)
		y -= lineH
	}
	for _, row := range rows {
		x := c.Min.X
		for _, e := range row {
			e.mark(c, x, x+sampleW, y)
			c.FillText(legendStyle(), vg.Point{X: x + sampleW + textGap, Y: y}, e.name)
			x += sampleW + textGap + legendStyle().Width(e.name) + nextGap
		}
		y -= lineH
	}
}

func (p *picture) hasSsthresh() bool {
	for _, s := range p.series {
		for _, f := range s.flows {
			if !s.many && f.usesSsthresh() {
				return true
			}
		}
	}
	return false
}

func (p *picture) counted(which func(trace.LinkSample) uint64) bool {
	return slices.ContainsFunc(p.queues, func(q queue) bool { return which(q.links[len(q.links)-1]) > 0 })
}

// panel is one without lines.
func (pic *picture) panel() *plot.Plot {
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
	p.Add(bands(pic.spoiled), grid{}, cuts(pic.cut))
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
