// SPDX-License-Identifier: Apache-2.0

package suite

import (
	"math"
	"strings"
	"testing"

	"ccload/harness/trace"
)

// The tables of RFC 8312 §5.1 (RTT 0.1 s and 0.01 s), cell by cell.
func TestWindows(t *testing.T) {
	for _, row := range []struct {
		p, reno, highspeed float64
		cubic              map[float64][3]float64 // by RTT: C of 0.04, 0.4 and 4
	}{
		{1e-2, 12, 12, map[float64][3]float64{.1: {12, 12, 12}, .01: {12, 12, 12}}},
		{1e-3, 38, 38, map[float64][3]float64{.1: {38, 38, 59}, .01: {38, 38, 38}}},
		{1e-4, 120, 263, map[float64][3]float64{.1: {120, 187, 333}, .01: {120, 120, 120}}},
		{1e-5, 379, 1795, map[float64][3]float64{.1: {593, 1054, 1874}, .01: {379, 379, 379}}},
	} {
		if got := renoWindow(row.p); math.Round(got) != row.reno {
			t.Errorf("p %g: Reno %.2f, want %g", row.p, got, row.reno)
		}
		if got := highSpeedWindow(row.p); math.Round(got) != row.highspeed {
			t.Errorf("p %g: HighSpeed %.2f, want %g", row.p, got, row.highspeed)
		}
		for rtt, cells := range row.cubic {
			for i, c := range []float64{.04, .4, 4} {
				g := cubic
				g.c = c
				if got, _ := cubicWindow(row.p, rtt, g); math.Round(got) != cells[i] {
					t.Errorf("p %g, RTT %g, C %g: CUBIC %.2f, want %g", row.p, rtt, c, got, cells[i])
				}
			}
		}
	}
}

// The closed forms are what the growth they stand for comes to: a packet in 1/p.
func TestWindowsOfGrowth(t *testing.T) {
	for name, c := range map[string]struct {
		g            growth
		p, rtt, mean float64
	}{
		"Reno":           {reno, 1e-4, .1, math.Sqrt(1.5) * 100},
		"CUBIC":          {cubic, 1e-4, .1, 187.4},
		"Reno-friendly":  {cubic, 1e-4, .01, math.Sqrt(1.5) * 100},
		"steeper CUBIC":  {growth{.7, 3 * .3 / 1.7, 4}, 1e-5, .1, 1874},
		"flatter, lower": {growth{.7, 3 * .3 / 1.7, .04}, 1e-5, .1, 593},
	} {
		lo, hi := 1., 1e4
		var mean float64
		for range 40 {
			var period float64
			w := (lo + hi) / 2
			_, period, mean = c.g.epoch(w, func(float64) float64 { return c.rtt })
			if mean*period/c.rtt < 1/c.p {
				lo = w
			} else {
				hi = w
			}
		}
		if math.Abs(mean/c.mean-1) > 0.003 {
			t.Errorf("%s: %.2f segments, the formula has %.2f", name, mean, c.mean)
		}
	}
}

// A window that is drawn is the one that the mean is of: Reno-friendly or not.
func TestWindowEpochs(t *testing.T) {
	for range 2 { // one does not change the other
		for _, c := range []struct{ rtt, half float64 }{
			{.01, .85}, // of the largest, in the middle of a line from 0.7
			{.1, .9625},
		} {
			x, err := models["cubic-window"].of(trace.Link{Rate: 1e9, RTT: c.rtt, MTU: 1500, Loss: trace.Loss{Every: 10000}}, 1)
			if err != nil {
				t.Fatal(err)
			}
			last := x.epoch[len(x.epoch)-1]
			for i, p := range x.epoch {
				if p[0] >= last[0]/2 {
					if got := p[1] / last[1]; math.Abs(got-c.half) > .01 {
						t.Errorf("RTT %g: %.4f of the largest window at point %d of %d, want %g", c.rtt, got, i, len(x.epoch), c.half)
					}
					break
				}
			}
		}
	}
}

func expected(t *testing.T, theory string, l trace.Link, flows int, quantity string) float64 {
	t.Helper()
	x, err := models[theory].of(l, flows)
	if err != nil {
		t.Fatal(err)
	}
	v, ok := x.values[quantity]
	if !ok {
		t.Fatalf("%s has no %s", theory, quantity)
	}
	return v
}

// The elementary sawtooth of one flow, with a buffer of one BDP.
func TestSawtooth(t *testing.T) {
	near := func(what string, got, want, off float64) {
		t.Helper()
		if math.Abs(got-want) > off {
			t.Errorf("%s: %.4g, want %g", what, got, want)
		}
	}
	for _, row := range []struct {
		rate, rtt, wmax, renoLow, renoPeriod, cubicLow, k float64
	}{
		{10e6, .04, 66.7, 33, 2.0, 46.7, 3.68},
		{50e6, .03, 250, 125, 5.6, 175, 5.72},
		{50e6, .04, 333, 167, 10, 233, 6.30},
		{100e6, .04, 667, 333, 20, 467, 7.94},
	} {
		bdp := row.rate * row.rtt / 8 / 1500
		l := trace.Link{Rate: row.rate, RTT: row.rtt, Buffer: int(math.Round(bdp)), MTU: 1500}
		for _, theory := range []string{"reno-sawtooth", "cubic-sawtooth"} {
			near(theory+" peak", expected(t, theory, l, 1, "cwnd_peak"), row.wmax, .7)
		}
		near("Reno low", expected(t, "reno-sawtooth", l, 1, "cwnd_low"), row.renoLow, .5)
		near("Reno period", expected(t, "reno-sawtooth", l, 1, "period"), row.renoPeriod, .03*row.renoPeriod)
		near("CUBIC low", expected(t, "cubic-sawtooth", l, 1, "cwnd_low"), row.cubicLow, .6)
		near("K", cubic.k(2*bdp), row.k, .005)
		if row.rate == 10e6 {
			// Were the window Reno-friendly all the time, it would take 2.57 s; since it
			// is the cubic's at first, round trips are longer.
			friendly := growth{beta: cubic.beta, slope: cubic.slope}
			_, period, _ := friendly.epoch(2*bdp, func(w float64) float64 { return w * 1500 * 8 / row.rate })
			near("Reno-friendly period", period, 2.57, .005)
			if got := expected(t, "cubic-sawtooth", l, 1, "period"); got < period || got > row.k {
				t.Errorf("period %.3f s", got)
			}
			continue
		}
		near("CUBIC period", expected(t, "cubic-sawtooth", l, 1, "period"), row.k, .01)
		near("CUBIC mean", expected(t, "cubic-sawtooth", l, 1, "cwnd_mean"), .925*row.wmax, .7)
	}
	// Where no round trip gets longer, Reno's mean is 3/4 of its peak.
	_, _, mean := reno.epoch(100, func(float64) float64 { return .1 })
	near("Reno mean", mean, 75, .01)
}

// SIGCOMM 2010 §3.3.
func TestDCTCP(t *testing.T) {
	for _, row := range []struct {
		rate, k, n, alpha, peak, low float64
	}{
		{100e6, 20, 1, .141, 21.0, 13.7},
		{100e6, 20, 2, .199, 22.0, 11.5},
		{50e6, 8, 1, .203, 9.0, 3.9},
	} {
		l := trace.Link{Rate: row.rate, RTT: .01, MTU: 1500, Buffer: 1000, ECN: int(row.k)}
		for _, c := range []struct {
			quantity  string
			want, off float64
		}{{"alpha", row.alpha, .0005}, {"queue_peak", row.peak, .05}, {"queue_low", row.low, .05}} {
			if got := expected(t, "dctcp", l, int(row.n), c.quantity); math.Abs(got-c.want) > c.off {
				t.Errorf("%+v: %s %.4f, want %g", row, c.quantity, got, c.want)
			}
		}
		a := expected(t, "dctcp", l, int(row.n), "alpha")
		w := (row.rate*.01/12000 + row.k) / row.n
		if approx := math.Sqrt(2 / w); math.Abs(a/approx-1) > .03 {
			t.Errorf("%+v: alpha %.4f, about %.4f", row, a, approx)
		}
		// Two reductions by α/2, and of the round trips between them and the next one is marked.
		a = expected(t, "dctcp-linux", l, int(row.n), "alpha")
		if got := a * (a*(w+1) + 2); math.Abs(got-1) > 1e-9 {
			t.Errorf("%+v: %.4f round trips are marked", row, got)
		}
	}
}

func TestTheoryRefuses(t *testing.T) {
	full := trace.Link{Rate: 10e6, RTT: .04, Buffer: 33, MTU: 1500}
	with := func(change func(*trace.Link)) trace.Link { l := full; change(&l); return l }
	for _, c := range []struct {
		theory string
		link   trace.Link
		flows  int
		want   string
	}{
		{"cubic-window", full, 1, "every Nth"},
		{"cubic-window", with(func(l *trace.Link) { l.Loss.Every = 9 }), 2, "one flow"},
		{"cubic-window", with(func(l *trace.Link) { l.Loss.Every = 9; l.RTT = 0 }), 1, "no RTT"},
		{"reno-sawtooth", full, 2, "one flow"},
		{"reno-sawtooth", with(func(l *trace.Link) { l.Buffer = 9 }), 1, "1.00 BDP"},
		{"cubic-sawtooth", with(func(l *trace.Link) { l.Buffer = 9 }), 1, "0.43 BDP"},
		{"cubic-sawtooth", with(func(l *trace.Link) { l.ECN = 9 }), 1, "marks"},
		{"dctcp", full, 1, "does not mark"},
		{"dctcp", with(func(l *trace.Link) { l.ECN = 1; l.RTT = .4 }), 1, "runs empty"},
	} {
		if _, err := models[c.theory].of(c.link, c.flows); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.theory, err, c.want)
		}
	}
}
