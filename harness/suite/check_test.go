// SPDX-License-Identifier: Apache-2.0

package suite

import (
	"errors"
	"math"
	"strings"
	"testing"

	"ccload/harness/trace"
)

// result is of flows whose window, sampled each 10 ms, rises from 10 by one segment
// each 100 ms for a second, which then takes a reduction of 100 ms, again and again
// for ten seconds. Each segment is of 1000 bytes, each second 1000 are delivered.
func result(ccs ...string) *trace.Result {
	r := &trace.Result{Run: &trace.Run{}}
	r.Run.Experiment.Duration = 10
	r.Run.Link.Rate = 10e6
	for i, cc := range ccs {
		r.Run.Flows = append(r.Run.Flows, trace.FlowResult{ID: i + 1, CC: cc, Duration: 10})
		r.Run.Experiment.Flows = append(r.Run.Experiment.Flows, trace.Flow{ID: i + 1, CC: cc})
	}
	for n := 1; n <= 1000; n++ {
		in := n % 110 // the sample tells what has held for the last 10 ms
		s := trace.Sample{
			Time: float64(n) / 100, Source: trace.Ack, Cwnd: 10 + uint32(in/10), SRTT: .02, Inflight: 20,
			Delivered: uint32(10 * n), BytesAcked: uint64(10000 * n), Retrans: uint32(n / 110),
		}
		if in >= 100 {
			s.Cwnd, s.CAState = 15, trace.CARecovery
		}
		for i := range ccs {
			s.Flow = int32(i + 1)
			r.Samples = append(r.Samples, s)
		}
		r.Links = append(r.Links, trace.LinkSample{
			Time: s.Time, Queue: int32(in / 10), Delivered: uint64(n) * 12500, Drops: uint64(n / 110), Marks: uint64(2 * n), Losses: 5,
		})
	}
	return r
}

func parsed(t *testing.T, file string) *Suite {
	t.Helper()
	s, err := Parse("x", []byte(file))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestMeasure(t *testing.T) {
	s := parsed(t, "{name: x, cc: a, runs: [{name: y, link: {rate: 10mbit}, duration: 10s, from: 1.5s, epochs: whole}]}")
	v := s.runs[0].look(result("a"))[0]
	// Reductions begin at 0.99, 2.09, … and end a 0.11 s later.
	if math.Abs(v.from-2.2) > 1e-9 || math.Abs(v.until-9.9) > 1e-9 || len(v.cuts) != 8 {
		t.Errorf("from %g until %g, %+v", v.from, v.until, v.cuts)
	}
	whole := (14.5*1 + 15*.1) / 1.1
	for name, want := range map[string]float64{
		"cwnd_mean": whole, "cwnd_max": 19, "cwnd_peak": 19, "cwnd_low": 10, "period": 1.1,
		"alpha_cut": 2 * 9 / 19., "throughput": 8e6, "srtt_p50": .02, "srtt_p95": .02,
		"retransmits": 7, "loss_episodes": 7, "timeouts": 0,
		"utilisation": 1, "queue_mean": 5, "queue_max": 10, "queue_peak": 10, "queue_low": 0,
		"drops": 7, "losses": 0, "marks": 2 * 770,
	} {
		got, err := v.measure(quantities[name])
		if err != nil || math.Abs(got-want) > .006*want {
			t.Errorf("%s: %g, %v; want %g", name, got, err, want)
		}
	}
	for name := range quantities {
		empty := &view{result: &trace.Result{Run: &trace.Run{}}, until: 10}
		if got, err := empty.measure(quantities[name]); err == nil && got != 0 {
			t.Errorf("%s of nothing: %g", name, got)
		}
	}

	// At intervals a sample tells what holds from then on.
	r := result("a")
	for i := range r.Samples {
		r.Samples[i].Source = trace.Diag
	}
	s.runs[0].epochs, s.runs[0].from, s.runs[0].until = false, 1.1, 1.2
	if got, err := s.runs[0].look(r)[0].cwndMean(); err != nil || got != 10 {
		t.Errorf("at intervals: %g, %v", got, err)
	}
	if _, err := s.runs[0].look(r)[0].alpha(); err == nil {
		t.Error("alpha from samples at intervals")
	}
}

// A share of the segments of every window is marked: alpha goes there.
func TestAlpha(t *testing.T) {
	r := result("a")
	for i := range r.Samples {
		r.Samples[i].DeliveredCE = r.Samples[i].Delivered / 5
	}
	s := parsed(t, "{name: x, cc: a, runs: [{name: y, link: {rate: 10mbit}, duration: 10s, from: 5s}]}")
	if got, err := s.runs[0].look(r)[0].alpha(); err != nil || math.Abs(got-.2) > .001 {
		t.Errorf("%g, %v", got, err)
	}
	// Half of what is left of the first alpha, 1, is gone after ln 2/ln(16/15) = 10.7 windows of 20 segments.
	s.runs[0].from, s.runs[0].until = .21, .22
	if got, err := s.runs[0].look(r)[0].alpha(); err != nil || math.Abs(got-.6) > .03 {
		t.Errorf("at first: %g, %v", got, err)
	}
}

func TestCheck(t *testing.T) {
	p, err := parsed(t, `
name: x
cc: [a, b]
runs:
  - name: y
    link: {rate: 10mbit, rtt: 100ms, loss: 1/100}
    duration: 10s
    from: 1.5s
    flows: [{}, {cc: c}, {}]
    checks:
      - {compare: cwnd_max, within: 5%, why: so}
      - {compare: drops, within: 0}
      - {measure: cwnd_peak, is: 20 , within: 1}
      - {measure: cwnd_low, least: 10}
      - {measure: throughput, most: 7mbit}
      - {measure: throughput, flows: together, is: 16mbit}
      - {compare: cwnd_mean, flows: together, within: 0.1}
`).Plan(nil)
	if err != nil {
		t.Fatal(err)
	}
	opened := 0
	open := func(task Task) (*trace.Result, error) {
		opened++
		r := result("a", "c", "a")
		if strings.HasSuffix(task.Dir, "/b") {
			for i := range r.Samples {
				if r.Samples[i].Flow == 3 {
					r.Samples[i].Cwnd++ // of 19: 5.3 %
				}
			}
		}
		return r, nil
	}
	outcomes, err := p.Check(open)
	if err != nil || len(outcomes) != 2 || opened != 2 {
		t.Fatal(outcomes, err, opened)
	}
	var lines []string
	for _, o := range outcomes {
		for _, c := range o.Checks {
			lines = append(lines, strings.Join([]string{map[bool]string{true: "ok", false: "no"}[c.OK], c.Name, c.Want, c.Got, c.Why}, "; "))
		}
	}
	alone := []string{
		"ok; flow 1: cwnd_peak; 20 segments ± 1 segments; 19 segments; ",
		"ok; flow 3: cwnd_peak; 20 segments ± 1 segments; 19 segments; ",
		"ok; flow 1: cwnd_low; ≥ 10 segments; 10 segments; ",
		"ok; flow 3: cwnd_low; ≥ 10 segments; 10 segments; ",
		"no; flow 1: throughput; ≤ 7 Mbit/s; 8 Mbit/s; ",
		"no; flow 3: throughput; ≤ 7 Mbit/s; 8 Mbit/s; ",
		"ok; all flows: throughput; 16 Mbit/s ± 0 Mbit/s; 16 Mbit/s; ",
	}
	compared := []string{
		"ok; flow 1: cwnd_max like b; 19 segments ± 5 %; 19 segments (+0 %); so",
		"ok; flow 3: cwnd_max like b; 20 segments ± 5 %; 19 segments (-5 %); so",
		"ok; drops like b; 8 packets ± 0 packets; 8 packets; ",
		"no; all flows: cwnd_mean like b; 30.264 segments ± 0.1 segments; 29.264 segments; ",
	}
	other := strings.ReplaceAll(strings.Join(alone, "\n"), "flow 3: cwnd_peak; 20 segments ± 1 segments; 19", "flow 3: cwnd_peak; 20 segments ± 1 segments; 20")
	other = strings.ReplaceAll(other, "flow 3: cwnd_low; ≥ 10 segments; 10", "flow 3: cwnd_low; ≥ 10 segments; 11")
	want := strings.Join(append(alone, compared...), "\n") + "\n" + other
	if got := strings.Join(lines, "\n"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}

	// What cannot be measured is no success.
	outcomes, err = p.Check(func(Task) (*trace.Result, error) {
		r := result("a", "c", "a")
		r.Samples = nil
		return r, nil
	})
	for _, c := range outcomes[0].Checks {
		if c.OK && !strings.HasPrefix(c.Name, "drops") {
			t.Errorf("without samples: %+v, %v", c, err)
		}
	}
	missing := errors.New("missing")
	outcomes, err = p.Check(func(task Task) (*trace.Result, error) {
		if task.Dir == "y/b" {
			return nil, missing
		}
		return open(task)
	})
	if !errors.Is(err, missing) || len(outcomes[0].Checks) != 0 {
		t.Errorf("%+v, %v", outcomes, err)
	}
}

// A theory's epoch stands after each measured reduction, its levels over the whole window.
func TestCurves(t *testing.T) {
	p, err := parsed(t, `
name: x
cc: a
runs:
  - name: y
    link: {rate: 10mbit, rtt: 100ms, loss: 1/100}
    duration: 10s
    from: 1.5s
    epochs: whole
    checks: [{measure: cwnd_mean, theory: reno-window, within: 30%}, {measure: cwnd_mean, theory: reno-window, within: 1%}]
`).Plan(nil)
	if err != nil {
		t.Fatal(err)
	}
	r := result("a")
	r.Run.Experiment.Link = p.Tasks[0].Experiment.Link
	outcomes, err := p.Check(func(Task) (*trace.Result, error) { return r, nil })
	if err != nil {
		t.Fatal(err)
	}
	if c := outcomes[0].Checks; len(c) != 2 || !c[0].OK || c[1].OK {
		t.Errorf("%+v", c)
	}
	curves := outcomes[0].Theory
	if len(curves) != 2 || len(curves[0].Pieces) != 7 || curves[0].Name != "reno-window" || curves[0].Quantity != "cwnd" {
		t.Fatalf("%+v", curves)
	}
	for i, piece := range curves[0].Pieces {
		last := piece[len(piece)-1]
		if at := 2.2 + 1.1*float64(i); math.Abs(piece[0][0]-at) > 1e-9 || math.Abs(piece[0][1]-8) > 1e-9 || last[0] > at+1.1 {
			t.Errorf("%d: from %v to %v", i, piece[0], last)
		}
	}
	level := curves[1].Pieces[0]
	if math.Abs(level[0][0]-2.2) > 1e-9 || math.Abs(level[1][0]-9.9) > 1e-9 || math.Abs(level[0][1]-12) > 1e-9 || level[1][1] != level[0][1] {
		t.Errorf("%v", level)
	}
}
