// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"math"
	"reflect"
	"strings"
	"testing"

	"ccload/harness/trace"
)

// valid is an experiment with nothing but what is required.
func valid() trace.Experiment {
	return trace.Experiment{Link: trace.Link{Rate: 20e6, RTT: 0.04}, Flows: []trace.Flow{{CC: "cubic"}, {CC: "reno", Start: 5}}}
}

func TestDefaults(t *testing.T) {
	in := valid()
	e, err := Defaults(in)
	if err != nil {
		t.Fatal(err)
	}
	want := trace.Experiment{
		Link: trace.Link{
			Kind: "auto", Rate: 20e6, RTT: 0.04, MTU: 1500,
			Buffer: 67, BufferBDP: 1, // 20 Mbit/s × 40 ms are 66.7 packets
		},
		Flows:    []trace.Flow{{ID: 1, CC: "cubic", Duration: 20}, {ID: 2, CC: "reno", Start: 5, Duration: 15}},
		Duration: 20, Interval: 0.01,
	}
	if !reflect.DeepEqual(e, want) {
		t.Errorf("got  %+v\nwant %+v", e, want)
	}
	if in.Flows[0].ID != 0 {
		t.Error("the caller's flows were changed")
	}
	again, err := Defaults(e)
	if err != nil || again.Link != e.Link || !reflect.DeepEqual(again.Flows, e.Flows) {
		t.Errorf("once more: %+v, %v", again, err)
	}

	for name, c := range map[string]struct {
		link    trace.Link
		packets int
		bdp     float64
	}{
		"two BDP":       {trace.Link{Rate: 12e6, RTT: 0.1, BufferBDP: 2}, 200, 2},
		"packets":       {trace.Link{Rate: 12e6, RTT: 0.1, Buffer: 50}, 50, 0.5},
		"at least one":  {trace.Link{Rate: 12e6, RTT: 0.1, BufferBDP: 1e-6}, 1, 0.01},
		"no delay":      {trace.Link{Rate: 12e6, Buffer: 50}, 50, 0},
		"nor a buffer":  {trace.Link{Rate: 12e6}, 1, 0},
		"bytes":         {trace.Link{Rate: 12e6, RTT: 0.1, BufferBytes: 4500}, 3, 0.03},
		"smaller MTU":   {trace.Link{Rate: 12e6, RTT: 0.1, MTU: 750}, 200, 1},
		"packets count": {trace.Link{Rate: 12e6, RTT: 0.1, Buffer: 50, BufferBDP: 7}, 50, 0.5},
	} {
		e := valid()
		e.Link = c.link
		if got, err := Defaults(e); err != nil || got.Link.Buffer != c.packets || got.Link.BufferBDP != c.bdp {
			t.Errorf("%s: %d packets, %g BDP, %v; want %d, %g", name, got.Link.Buffer, got.Link.BufferBDP, err, c.packets, c.bdp)
		}
	}
}

// What is not as it was asked for is told with both values, and once.
func TestRounded(t *testing.T) {
	for name, c := range map[string]struct {
		link trace.Link
		want string
	}{
		"whole":             {trace.Link{Rate: 12e6, RTT: 0.1}, ""},
		"within 1 %":        {trace.Link{Rate: 20e6, RTT: 0.04}, ""}, // 66.67 packets
		"a part of one":     {trace.Link{Rate: 20e6, RTT: 50e-6}, "buffer: 1 BDP was asked for, 0.0833 packets: it is 1 packet"},
		"two and a half":    {trace.Link{Rate: 12e6, RTT: 0.1, BufferBDP: 0.025}, "buffer: 0.025 BDP was asked for, 2.5 packets: it is 3 packets"},
		"bytes, whole":      {trace.Link{Rate: 12e6, RTT: 0.1, BufferBytes: 150_000}, ""},
		"bytes":             {trace.Link{Rate: 12e6, RTT: 0.1, BufferBytes: 700}, "buffer: 700 bytes were asked for, 0.467 packets: it is 1 packet of 1500 bytes"},
		"bytes, a part off": {trace.Link{Rate: 12e6, RTT: 0.1, BufferBytes: 4000}, "buffer: 4000 bytes were asked for, 2.67 packets: it is 2 packets of 1500 bytes"},
		"no mark":           {trace.Link{Rate: 12e6, RTT: 0.1, Buffer: 20, ECN: 19}, "ecn: marking above 19 packets was asked for, and the buffer holds 20: nothing will be marked"},
		"a mark":            {trace.Link{Rate: 12e6, RTT: 0.1, Buffer: 20, ECN: 18}, ""},
	} {
		e := valid()
		e.Link = c.link
		e, err := Defaults(e)
		if err == nil {
			e, err = Defaults(e)
		}
		if got := strings.Join(e.Rounded, "; "); err != nil || got != c.want {
			t.Errorf("%s: %q, %v; want %q", name, got, err, c.want)
		}
	}
}

func TestDefaultsRefuses(t *testing.T) {
	for want, spoil := range map[string]func(*trace.Experiment){
		"no rate":                   func(e *trace.Experiment) { e.Link.Rate = 0 },
		"rate of 9999 bit/s":        func(e *trace.Experiment) { e.Link.Rate = 9999 },
		"rate of 1e+11 bit/s":       func(e *trace.Experiment) { e.Link.Rate = 1e11 },
		"rate of NaN":               func(e *trace.Experiment) { e.Link.Rate = math.NaN() },
		"RTT of -1 s":               func(e *trace.Experiment) { e.Link.RTT = -1 },
		"RTT of 11 s":               func(e *trace.Experiment) { e.Link.RTT = 11 },
		"MTU of 100":                func(e *trace.Experiment) { e.Link.MTU = 100 },
		"MTU of 65535":              func(e *trace.Experiment) { e.Link.MTU = 65535 },
		"buffer of -1 packets":      func(e *trace.Experiment) { e.Link.Buffer = -1 },
		"buffer of -1 BDP":          func(e *trace.Experiment) { e.Link.BufferBDP = -1 },
		"buffer of NaN BDP":         func(e *trace.Experiment) { e.Link.BufferBDP = math.NaN() },
		"buffer of 1e+06 BDP":       func(e *trace.Experiment) { e.Link.BufferBDP = 1e6 },
		"buffer of 2000000 packets": func(e *trace.Experiment) { e.Link.Buffer = 2000000 },
		"one of them":               func(e *trace.Experiment) { e.Link.Loss = trace.Loss{Every: 10, Probability: 0.1} },
		"every 1th packet":          func(e *trace.Experiment) { e.Link.Loss.Every = 1 },
		"probability 1":             func(e *trace.Experiment) { e.Link.Loss.Probability = 1 },
		"bursts of -1 segments":     func(e *trace.Experiment) { e.Link.Burst = -1 },
		"bursts are of 1 segment":   func(e *trace.Experiment) { e.Link.Kind, e.Link.Burst = "netem", 2 },
		"probability -0.1":          func(e *trace.Experiment) { e.Link.Loss.Probability = -0.1 },
		"more than -1 packets":      func(e *trace.Experiment) { e.Link.ECN = -1 },
		`kind "tc"`:                 func(e *trace.Experiment) { e.Link.Kind = "tc" },
		"each 9th packet":           func(e *trace.Experiment) { e.Link.Kind, e.Link.Loss.Every = "netem", 9 },
		"cannot mark":               func(e *trace.Experiment) { e.Link.Kind, e.Link.ECN = "netem", 9 },
		"duration of -1 s":          func(e *trace.Experiment) { e.Duration = -1 },
		"duration of 100000 s":      func(e *trace.Experiment) { e.Duration = 1e5 },
		"jitter of -2 s":            func(e *trace.Experiment) { e.Jitter = -2 },
		"buffer of 1e+12 bytes":     func(e *trace.Experiment) { e.Link.BufferBytes = 1e12 },
		"interval of 0.0001 s":      func(e *trace.Experiment) { e.Interval = 1e-4 },
		"0 flows":                   func(e *trace.Experiment) { e.Flows = nil },
		"1001 flows":                func(e *trace.Experiment) { e.Flows = make([]trace.Flow, 1001) },
		"no congestion control":     func(e *trace.Experiment) { e.Flows[1].CC = "" },
		"number is taken":           func(e *trace.Experiment) { e.Flows[0].ID, e.Flows[1].ID = 3, 3 },
		"starts at 20 s":            func(e *trace.Experiment) { e.Flows[1].Start = 20 },
		"starts at -1 s":            func(e *trace.Experiment) { e.Flows[1].Start = -1 },
		"lasts 16 s from 5 s on":    func(e *trace.Experiment) { e.Flows[1].Duration = 16 },
		"offered 1 bit/s":           func(e *trace.Experiment) { e.Flows[1].Rate = 1 },
		"offered NaN bit/s":         func(e *trace.Experiment) { e.Flows[1].Rate = math.NaN() },
		"-5 bytes to send":          func(e *trace.Experiment) { e.Flows[1].Bytes = -5 },
		`experiment "slow": `:       func(e *trace.Experiment) { e.Name, e.Link.Rate = "slow", 0 },
	} {
		e := valid()
		spoil(&e)
		if _, err := Defaults(e); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want one with %q", err, want)
		}
	}
}
