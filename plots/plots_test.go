// SPDX-License-Identifier: Apache-2.0

package plots

import (
	"bytes"
	"compress/zlib"
	"encoding/xml"
	"errors"
	"image/color"
	"image/png"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/vgpdf"

	"ccload/harness/trace"
)

// result is a sawtooth between half of the window w and w over 20 s, with a
// sample each millisecond, a drop at each of its peaks, and 1448 bytes a segment.
func result(cc string, w uint32) *trace.Result {
	r := &trace.Result{Run: &trace.Run{}}
	r.Run.Link.Link = trace.Link{Rate: 20e6, RTT: 0.04, Buffer: 67, BufferBDP: 1, MTU: 1500}
	r.Run.Experiment.Duration = 20
	r.Run.Experiment.Flows = []trace.Flow{{ID: 1, CC: cc}}
	ssthresh := uint32(trace.InfiniteSsthresh)
	drops := uint64(0)
	for i := range 20000 {
		phase := float64(i%5000) / 5000
		cwnd := uint32(float64(w) * (0.5 + phase/2))
		r.Samples = append(r.Samples, trace.Sample{
			Time: float64(i) / 1e3, Flow: 1, Source: trace.Ack, Cwnd: cwnd, Ssthresh: ssthresh, SRTT: 0.04 + phase*0.04,
			Delivered: uint32(i * 2), BytesAcked: uint64(i * 2 * 1448),
		})
		if i%5000 == 4999 {
			ssthresh = w / 2
			drops++
		}
		r.Links = append(r.Links, trace.LinkSample{Time: float64(i) / 1e3, Queue: int32(67 * phase), Drops: drops})
	}
	return r
}

func TestSave(t *testing.T) {
	results := []*trace.Result{result("bpf_cubic", 133), result("cubic", 130)}
	dir := t.TempDir()
	for _, kind := range []string{".png", ".svg", ".pdf"} {
		var files [2][]byte
		for i := range files {
			path := filepath.Join(dir, "picture"+kind)
			warnings, err := Save(path, results)
			if err != nil || len(warnings) > 0 {
				t.Fatalf("%s: %v, %v", kind, warnings, err)
			}
			if files[i], err = os.ReadFile(path); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(files[0], files[1]) {
			t.Errorf("%s: the same results gave other bytes", kind)
		}
		switch b := files[0]; kind {
		case ".png":
			img, err := png.Decode(bytes.NewReader(b))
			if err != nil {
				t.Fatal(err)
			}
			if s := img.Bounds().Size(); s.X != 1476 || s.Y != 1692 {
				t.Errorf("PNG of %v", s)
			}
		case ".svg":
			text := words(t, b)
			for _, want := range []string{
				"20 Mbit/s · RTT 40 ms · buffer 67 packets (1 BDP)", "bpf_cubic", "cubic", "ssthresh", "drops",
				"cwnd (segments)", "srtt (ms)", "throughput (Mbit/s)", "queue (packets)", "time (s)", "BDP + buffer", "20",
			} {
				if !text[want] {
					t.Errorf("SVG without the words %q", want)
				}
			}
			if text["CE marks"] {
				t.Error("SVG with a legend for marks that are not there")
			}
			// 20,000 samples in four panels must not become as many points.
			if len(b) > 1<<20 {
				t.Errorf("SVG of %d bytes", len(b))
			}
		case ".pdf":
			if !bytes.HasPrefix(b, []byte("%PDF-")) || !bytes.Contains(b, []byte("%%EOF")) {
				t.Error("not a PDF")
			}
			// Its text is in Windows-1252.
			if text := inflated(t, b); !bytes.Contains(text, []byte("20 Mbit/s \xb7 RTT")) {
				t.Error("PDF without the title")
			}
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// inflated are the streams of a PDF.
func inflated(t *testing.T, b []byte) (all []byte) {
	t.Helper()
	for _, part := range bytes.Split(b, []byte("\nstream\n"))[1:] {
		if r, err := zlib.NewReader(bytes.NewReader(part)); err == nil {
			text, _ := io.ReadAll(r)
			all = append(all, text...)
		}
	}
	return all
}

// What can be seen through is so in a PDF too, and not darker.
func TestPDFColour(t *testing.T) {
	c := pdfCanvas{vgpdf.New(10, 10)}
	c.SetColor(color.NRGBA{0xff, 0x80, 0, 0x40})
	c.Fill(vg.Rectangle{Max: vg.Point{X: 5, Y: 5}}.Path())
	var b bytes.Buffer
	if _, err := c.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	if text := inflated(t, b.Bytes()); !bytes.Contains(text, []byte("1.000 0.502 0.000 rg")) {
		t.Errorf("%s", text)
	}
}

// words are the texts of an SVG, which must be well-formed.
func words(t *testing.T, b []byte) map[string]bool {
	t.Helper()
	all := map[string]bool{}
	d := xml.NewDecoder(bytes.NewReader(b))
	for {
		tok, err := d.Token()
		if err == io.EOF {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		if c, ok := tok.(xml.CharData); ok {
			all[strings.TrimSpace(string(c))] = true
		}
	}
}

// Whatever the names in a result are, an SVG is one.
func TestSaveNames(t *testing.T) {
	path := filepath.Join(t.TempDir(), "picture.svg")
	if _, err := Save(path, []*trace.Result{result("re\x1b[2J<b>&\u009b\xff\uffffno", 100)}); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if want := "re\ufffd[2J<b>&\ufffd\ufffd\ufffdno"; !words(t, b)[want] {
		t.Errorf("%q is not in it", want)
	}
}

func TestSaveRefuses(t *testing.T) {
	dir := t.TempDir()
	if _, err := Save(filepath.Join(dir, "x.gif"), []*trace.Result{result("cubic", 100)}); !errors.Is(err, ErrFormat) {
		t.Errorf("GIF: %v", err)
	}
	empty := result("cubic", 100)
	empty.Samples = nil
	if _, err := Save(filepath.Join(dir, "x.png"), []*trace.Result{empty}); err == nil || !strings.Contains(err.Error(), "no samples") {
		t.Errorf("no samples: %v", err)
	}
	other := result("reno", 100)
	other.Run.Link.Rate = 1e9
	warnings, err := Save(filepath.Join(dir, "x.png"), []*trace.Result{result("cubic", 100), other})
	if err != nil || len(warnings) != 1 || !strings.Contains(warnings[0], "different links") {
		t.Errorf("different links: %v, %v", warnings, err)
	}
	if _, err := Save(filepath.Join(dir, "no", "x.png"), []*trace.Result{result("cubic", 100)}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no such directory: %v", err)
	}
}

// One sample of a million is a peak: it must be in the line.
func TestStepsKeepPeaks(t *testing.T) {
	type v struct{ x, y float64 }
	var in []v
	for i := range 1000000 {
		in = append(in, v{float64(i) / 1e5, 50})
	}
	in[123456].y, in[654321].y = 99, 1
	pieces := steps(in, func(e v) (float64, float64, bool) { return e.x, e.y, true }, 10, columns)
	if len(pieces) != 1 || len(pieces[0]) > 6*columns {
		t.Fatalf("%d pieces, the first of %d points", len(pieces), len(pieces[0]))
	}
	var top, bottom bool
	last := math.Inf(-1)
	for _, q := range pieces[0] {
		top = top || q == point{1.23456, 99}
		bottom = bottom || q == point{6.54321, 1}
		if q.x < last {
			t.Fatalf("the line goes back from %g to %g", last, q.x)
		}
		last = q.x
	}
	if !top || !bottom || last < 9.99 {
		t.Errorf("peak %v, trough %v, ends at %g", top, bottom, last)
	}
}

// Where a value is not known the line is interrupted; between samples it holds.
func TestStepsHoldAndBreak(t *testing.T) {
	in := []float64{1, 1, 3, -1, -1, 2, 5}
	i := -1
	pieces := steps(in, func(y float64) (float64, float64, bool) { i++; return float64(i), y, y >= 0 }, 7, columns)
	want := [][]point{{{0, 1}, {1, 1}, {2, 1}, {2, 3}}, {{5, 2}, {6, 2}, {6, 5}}}
	if len(pieces) != len(want) {
		t.Fatalf("got %v", pieces)
	}
	for k := range want {
		if len(pieces[k]) != len(want[k]) {
			t.Fatalf("piece %d: got %v, want %v", k, pieces[k], want[k])
		}
		for j := range want[k] {
			if pieces[k][j] != want[k][j] {
				t.Errorf("piece %d: got %v, want %v", k, pieces[k], want[k])
			}
		}
	}
}

// A ramp of 2000 segments of 1448 bytes a second.
func TestThroughput(t *testing.T) {
	r := result("cubic", 100)
	pts := (&flow{acks: r.Samples, end: 19.999}).throughput(0.5, 20)
	if len(pts) < 70 {
		t.Fatalf("%d points", len(pts))
	}
	for _, q := range pts {
		if math.Abs(q.y-2000*1448*8) > 1 {
			t.Fatalf("at %g s: %g bit/s, want %d", q.x, q.y, 2000*1448*8)
		}
	}
	// Nothing was delivered as far as is known: nothing is drawn but that.
	for _, acks := range [][]trace.Sample{r.Samples[:1], nil} {
		for _, q := range (&flow{acks: acks, end: 20}).throughput(0.5, 20) {
			if q.y != 0 {
				t.Errorf("out of %d samples: %g bit/s", len(acks), q.y)
			}
		}
	}
}

func TestTicks(t *testing.T) {
	for _, c := range []struct {
		lo, hi float64
		about  int
		want   string
	}{
		{0, 150, 5, "0 50 100 150"},
		{0, 20, 10, "0 2 4 6 8 10 12 14 16 18 20"},
		{0, 0.1, 5, "0.00 0.02 0.04 0.06 0.08 0.10"},
		{0, 1700, 5, "0 500 1000 1500"},
	} {
		var labels []string
		for _, tick := range (ticks{about: c.about, labels: true}).Ticks(c.lo, c.hi) {
			labels = append(labels, tick.Label)
		}
		if got := strings.Join(labels, " "); got != c.want {
			t.Errorf("%g to %g: %s, want %s", c.lo, c.hi, got, c.want)
		}
	}
}
