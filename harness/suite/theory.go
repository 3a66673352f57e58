// SPDX-License-Identifier: Apache-2.0

package suite

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"

	"ccload/harness/trace"
)

// model is a theory: what it expects on a link, in closed form.
type model struct {
	name string
	of   func(l trace.Link, flows int) (*expectation, error)
}

// expectation is what a theory says of one link.
type expectation struct {
	values map[string]float64 // by the quantity's name
	// epoch is the window from the end of a reduction to the next one, as points of
	// time and segments; nil if the theory has none.
	epoch  [][2]float64
	levels []level // to be drawn across
}

type level struct {
	quantity string // of trace.Curve
	value    float64
}

var models = func() map[string]*model {
	m := map[string]*model{}
	for _, t := range []model{
		{"reno-window", windowModel(reno, func(p, _ float64) (float64, bool) { return renoWindow(p), true })},
		{"cubic-window", windowModel(cubic, func(p, rtt float64) (float64, bool) { return cubicWindow(p, rtt, cubic) })},
		{"highspeed-window", windowModel(growth{}, func(p, _ float64) (float64, bool) { return highSpeedWindow(p), false })},
		{"reno-sawtooth", sawtoothModel(reno)},
		{"cubic-sawtooth", sawtoothModel(cubic)},
		{"dctcp", dctcpModel},
		{"dctcp-linux", dctcpLinuxModel},
	} {
		m[t.name] = &t
	}
	return m
}()

// Theories are the names of what results can be held against, sorted:
//
//	reno-window       the mean window under the loss of exactly every Nth packet
//	cubic-window
//	highspeed-window
//	reno-sawtooth     one flow that fills a drop-tail link
//	cubic-sawtooth
//	dctcp             flows of DCTCP on a link that marks above a threshold
//	dctcp-linux       where they reduce their window over a round trip
func Theories() []string { return slices.Sorted(maps.Keys(models)) }

// renoWindow is Reno's mean window in segments where exactly one packet in 1/p is
// lost: 1.2/√p (RFC 3649 §2; RFC 9438 §5.1 compares with it). More exactly it is
// √(3/2)/√p: between two losses the window grows from W/2 to W by one a round trip,
// so that 3/8·W² packets are sent, which is 1/p.
func renoWindow(p float64) float64 { return 1.2 / math.Sqrt(p) }

// highSpeedWindow is HighSpeed TCP's: 0.12/p^0.835 above 38 segments, and Reno's
// below (RFC 3649 §5).
func highSpeedWindow(p float64) float64 {
	if w := 0.12 / math.Pow(p, 0.835); w > 38 {
		return w
	}
	return renoWindow(p)
}

// cubicWindow is CUBIC's mean window (RFC 8312 §5.1, equation 5; RFC 9438 §5.1):
//
//	[C(3+β)/(4(1-β))]^¼ · RTT^¾ / p^¾
//
// or Reno's, where that is larger: there CUBIC follows its estimate of Reno's
// window (RFC 9438 §4.3). The second result says that it is so.
func cubicWindow(p, rtt float64, g growth) (w float64, friendly bool) {
	w = math.Pow(g.c*(3+g.beta)/(4*(1-g.beta)), .25) * math.Pow(rtt/p, .75)
	if r := renoWindow(p); r > w {
		return r, true
	}
	return w, false
}

// growth is how a window grows between two losses.
type growth struct {
	beta  float64 // what a loss leaves of the window
	slope float64 // segments a round trip, of Reno or of CUBIC's estimate of it (RFC 9438 §4.3)
	c     float64 // segments/s³: CUBIC's steepness; 0: it is no CUBIC
}

var (
	reno  = growth{beta: .5, slope: 1}                              // RFC 5681 §3.1
	cubic = growth{beta: .7, slope: 3 * (1 - .7) / (1 + .7), c: .4} // RFC 9438 §4.3, §4.6, §5
)

// k is the time in s from the start of an epoch to the window before the loss
// (RFC 9438 §4.2, equation 2).
func (g growth) k(wmax float64) float64 { return math.Cbrt(wmax * (1 - g.beta) / g.c) }

// epoch is the window from βW to W, where a round trip takes rtt(w) seconds, as
// about a hundred points; how long that takes; and its mean over the time.
func (g growth) epoch(wmax float64, rtt func(w float64) float64) (points [][2]float64, period, mean float64) {
	w := g.beta * wmax
	friendly := w
	longest := (wmax - w) / g.slope * rtt(wmax)
	const steps = 20000
	dt := longest / steps
	k := math.Inf(1)
	if g.c > 0 {
		k = g.k(wmax)
	}
	every := max(1, int(min(k, longest)/dt/100))
	area := 0.0
	for i := 0; ; i++ {
		if i%every == 0 {
			points = append(points, [2]float64{period, w})
		}
		if period >= k || friendly >= wmax {
			break
		}
		area += w * dt
		period += dt
		friendly += g.slope * dt / rtt(w)
		w = friendly
		if g.c > 0 {
			w = max(w, wmax+g.c*math.Pow(period-k, 3)) // RFC 9438 §4.2, equation 1
		}
	}
	return append(points, [2]float64{period, wmax}), period, area / period
}

// bdp is the bandwidth-delay product in packets.
func bdp(l trace.Link) float64 { return l.Rate * l.RTT / 8 / float64(l.MTU) }

// windowModel is of the mean window under the loss of every Nth packet. mean says
// too whether the window grows as Reno's does.
func windowModel(g growth, mean func(p, rtt float64) (w float64, linear bool)) func(trace.Link, int) (*expectation, error) {
	return func(l trace.Link, flows int) (*expectation, error) {
		switch {
		case l.Loss.Every == 0:
			return nil, errors.New("the link does not lose exactly every Nth packet (loss: 1/N)")
		case l.RTT == 0:
			return nil, errors.New("the link has no RTT")
		case flows != 1:
			return nil, fmt.Errorf("it is of one flow, not %d", flows)
		}
		w, linear := mean(1/float64(l.Loss.Every), l.RTT)
		x := &expectation{
			values: map[string]float64{"cwnd_mean": w},
			levels: []level{{"cwnd", w}},
		}
		if g := g; g.slope > 0 {
			wmax := w * 4 / (3 + g.beta) // the mean of a cubic from βW to W,
			if linear {
				wmax = w * 2 / (1 + g.beta) // and of a line
				g.c = 0
			}
			x.epoch, _, _ = g.epoch(wmax, func(float64) float64 { return l.RTT })
		}
		return x, nil
	}
}

// sawtoothModel is of one flow that fills a drop-tail link: its window rises until
// the bandwidth-delay product and the buffer are full, loses a packet and goes on
// with β of it. The link is always full only if βW is at least the BDP.
func sawtoothModel(g growth) func(trace.Link, int) (*expectation, error) {
	return func(l trace.Link, flows int) (*expectation, error) {
		wmax := bdp(l) + float64(l.Buffer)
		switch {
		case l.Loss != (trace.Loss{}) || l.ECN > 0:
			return nil, errors.New("the link injects losses, or marks packets")
		case flows != 1:
			return nil, fmt.Errorf("it is of one flow, not %d", flows)
		case g.beta*wmax < 0.97*bdp(l):
			return nil, fmt.Errorf("the link runs empty: it needs a buffer of %.2f BDP", 1/g.beta-1)
		}
		pps := l.Rate / 8 / float64(l.MTU)
		x := &expectation{}
		var period, mean float64
		x.epoch, period, mean = g.epoch(wmax, func(w float64) float64 { return max(l.RTT, w/pps) })
		x.values = map[string]float64{
			"cwnd_peak": wmax, "cwnd_low": g.beta * wmax, "cwnd_mean": mean, "period": period,
		}
		return x, nil
	}
}

// dctcpModel is the steady state of DCTCP flows in step with each other, on a link
// of C packets a second that marks above K packets (Alizadeh et al., "Data Center
// TCP (DCTCP)", SIGCOMM 2010, §3.3, equations 4 to 10):
//
//	W* = (C·RTT + K)/N        the window at which marking begins
//	α²(1-α/4) = (2W*+1)/(W*+1)²,  about √(2/W*)
//	D = (W*+1)·α/2            what a flow's window loses, and round trips from one loss to the next
//	Qmax = K + N,  Qmin = Qmax - N·D
func dctcpModel(l trace.Link, flows int) (*expectation, error) {
	if l.ECN == 0 {
		return nil, errors.New("the link does not mark (ecn)")
	}
	n, k := float64(flows), float64(l.ECN)
	w := (bdp(l) + k) / n
	alpha := dctcpAlpha(w)
	d := (w + 1) * alpha / 2
	peak, low := k+n, k+n-n*d
	if low < 0 {
		return nil, fmt.Errorf("the link runs empty: the queue would fall to %.1f packets", low)
	}
	rtt := l.RTT + (peak+low)/2*float64(l.MTU)*8/l.Rate
	return &expectation{
		values: map[string]float64{
			"alpha": alpha, "alpha_cut": alpha, "cwnd_peak": w + 1, "cwnd_low": w + 1 - d, "cwnd_mean": w + 1 - d/2,
			"queue_peak": peak, "queue_low": low, "queue_mean": (peak + low) / 2, "period": d * rtt,
		},
		epoch:  [][2]float64{{0, w + 1 - d}, {d * rtt, w + 1}},
		levels: []level{{"queue", peak}, {"queue", low}},
	}, nil
}

// dctcpLinuxModel is the same for senders that spread a reduction over a round
// trip, as Linux does (proportional rate reduction, RFC 6937, also for ECN). What
// they send at its start still meets a queue above K, and its echo comes when the
// reduction is over, so that another follows at once: α of the window is lost in
// all, in two round trips, then regained at a segment a round trip; and of all
// these round trips one is marked:
//
//	α = 1/(α(W*+1) + 2)
func dctcpLinuxModel(l trace.Link, flows int) (*expectation, error) {
	x, err := dctcpModel(l, flows)
	if err != nil {
		return nil, err
	}
	w := x.values["cwnd_peak"]
	alpha := (math.Sqrt(1+w) - 1) / w
	rtt := l.RTT + x.values["queue_mean"]*float64(l.MTU)*8/l.Rate
	return &expectation{values: map[string]float64{"alpha": alpha, "period": (alpha*w + 2) * rtt}}, nil
}

// dctcpAlpha solves α²(1-α/4) = (2W+1)/(W+1)² (equation 6). The left side rises
// from 0 to 1.
func dctcpAlpha(w float64) float64 {
	right := (2*w + 1) / ((w + 1) * (w + 1))
	lo, hi := 0., 1.
	for range 60 {
		if a := (lo + hi) / 2; a*a*(1-a/4) < right {
			lo = a
		} else {
			hi = a
		}
	}
	return lo
}
