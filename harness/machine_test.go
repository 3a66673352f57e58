// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"ccload/harness/link"
	"ccload/harness/trace"
)

// watched is what was seen of a run of four seconds: readings at its seconds' ends,
// each of two processors that are busy by half.
func watched() *machine {
	m := &machine{gaps: link.NewOverdue(0, 4*time.Second, 20*time.Millisecond)}
	for i := range 5 {
		m.readings = append(m.readings, reading{
			at: int64(i) * int64(time.Second), busy: uint64(i) * 100, total: uint64(i) * 200, waits: []time.Duration{0, 0},
		})
	}
	return m
}

func TestDisturbances(t *testing.T) {
	const rtt, sec, ms = 0.04, int64(time.Second), int64(time.Millisecond)
	for name, c := range map[string]struct {
		spoil func(*machine, *link.Overdue)
		want  map[int]string // what is said of a second
	}{
		"nothing": {func(*machine, *link.Overdue) {}, nil},
		"a little late, often": {func(m *machine, o *link.Overdue) {
			for i := range int64(200) {
				o.Note(i*20*ms, i*20*ms+2*ms)
			}
		}, nil},
		// A quarter of a second in each: the median shows nothing of it.
		"five stops": {func(m *machine, o *link.Overdue) {
			o.Note(sec/2, sec/2+250*ms)
			m.gaps.Note(3*sec+sec/2, 3*sec+sec/2+250*ms)
		}, map[int]string{0: "packets up to 250 ms late, packets late 25 % of the time", 3: "ccload did not run for 250 ms, ccload did not run 25 % of the time"}},
		"short stops, often": {func(m *machine, o *link.Overdue) {
			for i := range int64(20) {
				o.Note(sec+i*50*ms, sec+i*50*ms+10*ms)
			}
		}, map[int]string{1: "packets late 20 % of the time"}},
		"stolen": {func(m *machine, o *link.Overdue) {
			for i := 3; i < len(m.readings); i++ {
				m.readings[i].steal, m.readings[i].busy = 30, m.readings[i].busy-30
			}
		}, map[int]string{2: "15 % of the processors' time stolen"}},
		"others had the processor": {func(m *machine, o *link.Overdue) {
			for i := 2; i < len(m.readings); i++ {
				m.readings[i].waits = []time.Duration{0, 400 * time.Millisecond}
				m.readings[i].preempted = 7
			}
		}, map[int]string{1: "the link waited for a processor for 400 ms"}},
		"lost": {func(m *machine, o *link.Overdue) {
			m.readings[4].unseen, m.readings[4].lost = 3, 5
		}, map[int]string{3: "3 packets lost outside the link, 5 samples lost"}},
		// The watch stood still as well: nobody knows more than for all of the time.
		"no readings": {func(m *machine, o *link.Overdue) {
			m.readings = slices.Delete(m.readings, 2, 4)
			m.readings[2].steal, m.readings[2].busy = 120, 300
		}, map[int]string{1: "20 % of the processors' time stolen", 2: "20 % of the processors' time stolen", 3: "20 % of the processors' time stolen"}},
	} {
		m, o := watched(), link.NewOverdue(0, 0, 4*time.Millisecond)
		c.spoil(m, o)
		got, sum := m.disturbances(2, rtt, 4*time.Second, []*link.Overdue{o, nil})
		said := map[int]string{}
		for _, d := range got {
			said[d.Second] = strings.Join(d.Why, ", ")
		}
		if len(said) != len(c.want) {
			t.Errorf("%s: %v, want %v", name, said, c.want)
		}
		for i, want := range c.want {
			if said[i] != want {
				t.Errorf("%s: second %d: %q, want %q", name, i, said[i], want)
			}
		}
		if name == "nothing" && (sum.Processors != 2 || sum.Busy != 0.5 || *sum.BusyMax != 0.5 || sum.Steal != 0) {
			t.Errorf("%s: %+v", name, sum)
		}
	}
}

// The only processor of a guest is at its limit; one of several is not known by that.
func TestDisturbancesBusy(t *testing.T) {
	for _, processors := range []int{1, 2} {
		m := watched()
		for i := range m.readings {
			m.readings[i].tasks = time.Duration(i*processors) * 970 * time.Millisecond
		}
		got, sum := m.disturbances(processors, 0.04, 4*time.Second, nil)
		if want := map[int]int{1: 4, 2: 0}[processors]; len(got) != want || *sum.BusyMax < 0.969 || *sum.BusyMax > 0.971 {
			t.Errorf("%d processors: %+v, %+v", processors, got, sum)
		}
	}
}

// What is not known is absent: how late a kernel's link is, and how busy the machine
// was in a moment.
func TestDisturbancesUnknown(t *testing.T) {
	m := &machine{gaps: link.NewOverdue(0, time.Second, 20*time.Millisecond), readings: []reading{{}, {at: 3e8, busy: 30, total: 60, unseen: 1}}}
	got, sum := m.disturbances(2, 0.04, 300*time.Millisecond, nil)
	if len(got) != 1 || sum.BusyMax != nil || sum.Busy != 0.5 {
		t.Fatalf("%+v, %+v", got, sum)
	}
	b, err := json.Marshal(got[0])
	if want := `{"second":0,"why":["1 packet lost outside the link"],"gap":0,"gap_share":0,"unseen":1,"samples_lost":0}`; err != nil || string(b) != want {
		t.Errorf("%s, %v, want %s", b, err, want)
	}
}

func TestParseMachine(t *testing.T) {
	busy, steal, total, err := parseStat([]byte("cpu  10 1 20 300 4 5 6 7 8 9\ncpu0 1 1 1 1\n"))
	if err != nil || busy != 42 || steal != 7 || total != 353 {
		t.Errorf("%d, %d, %d, %v", busy, steal, total, err)
	}
	for _, s := range []string{"", "cpu 1 2", "intr 1 2 3 4 5 6 7 8 9", "cpu a b c d e f g h"} {
		if _, _, _, err := parseStat([]byte(s)); err == nil {
			t.Errorf("%q was taken", s)
		}
	}
	if got := parseTasks([]byte("version 17\ncpu0 0 0 0 0 0 0 500 3 4\ndomain0 3 9 9 9 9 9 9 9\ncpu1 0 0 0 0 0 0 70 3 4\n")); got != 570 {
		t.Errorf("tasks ran for %d ns", got)
	}
	if got := parseWaited([]byte("10 2000 3\n")); got != 2000 {
		t.Errorf("waited for %d ns", got)
	}
	if got := parsePreempted([]byte("Name:\tx\nvoluntary_ctxt_switches:\t5\nnonvoluntary_ctxt_switches:\t17\n")); got != 17 {
		t.Errorf("preempted %d times", got)
	}
}

// An RTT that is a multiple of what was asked for is never within what is allowed.
func TestRTTMayBeOff(t *testing.T) {
	for rtt, want := range map[float64]float64{0.2: 0.004, 0.04: 1e-3, 0.004: 1e-3, 0.002: 0.5e-3, 50e-6: 12.5e-6, 0: 1e-3} {
		if got := rttMayBeOff(rtt); got < want*0.999 || got > want*1.001 {
			t.Errorf("%g s: %g s, want %g", rtt, got, want)
		}
	}
}

// Flows start within the jitter, each elsewhere, by the seed alone.
func TestStartTimes(t *testing.T) {
	e := trace.Experiment{Seed: 1, Jitter: 0.02, Flows: make([]trace.Flow, 100)}
	e.Flows[7].Start = 5
	a, again := startTimes(e), startTimes(e)
	if !slices.Equal(a, again) {
		t.Error("the same seed gives other times")
	}
	for i, v := range a {
		if d := v - seconds(e.Flows[i].Start); d < 0 || d >= 20*time.Millisecond {
			t.Errorf("flow %d starts %v late", i, d)
		}
	}
	slices.Sort(a)
	if len(slices.Compact(a)) != 100 {
		t.Error("some start at once")
	}
	e.Seed = 2
	if b := startTimes(e); slices.Equal(again, b) {
		t.Error("another seed gives the same times")
	}
	e.Jitter = 0
	if b := startTimes(e); b[0] != 0 || b[7] != 5*time.Second {
		t.Errorf("without jitter: %v", b)
	}
}

func TestSome(t *testing.T) {
	for want, n := range map[string][]int{"": nil, "3": {3}, "3, 5, 7": {3, 5, 7}, "3, 5, 7, …": {3, 5, 7, 9}} {
		if got := some(n); got != want {
			t.Errorf("%v: %q, want %q", n, got, want)
		}
	}
}

// Warnings of one kind are one line, and a check; unless it is expected, or there was
// no time.
func TestCheckSilent(t *testing.T) {
	run := func(silent, incomplete bool) *experiment {
		x := &experiment{Experiment: trace.Experiment{Silent: silent, Flows: make([]trace.Flow, 5)}, run: &trace.Run{Incomplete: incomplete}}
		for i := range x.Flows {
			x.run.Flows = append(x.run.Flows, trace.FlowResult{ID: i + 1, Unconnected: i > 0, Bytes: uint64(i), Duration: 1})
		}
		x.run.Flows = append(x.run.Flows, trace.FlowResult{ID: 6}) // its turn never came
		x.checkSilent()
		return x
	}
	x := run(false, false)
	const want = "4 of 5 flows never connected: 2, 3, 4, …; 1 of 5 flows had nothing acknowledged: 1"
	if c := x.run.Checks; len(c) != 1 || c[0].OK || c[0].Got != want || len(x.run.Warnings) != 1 {
		t.Errorf("%+v, %q", c, x.run.Warnings)
	}
	for _, x := range []*experiment{run(true, false), run(false, true)} {
		if len(x.run.Checks) != 0 || len(x.run.Warnings) != 1 || x.run.Warnings[0] != want {
			t.Errorf("%+v, %q", x.run.Checks, x.run.Warnings)
		}
	}
}
