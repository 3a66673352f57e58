// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"fmt"
	"regexp"
	"strings"
	"testing"

	"ccload/harness/trace"
)

// fakeRun is of n flows; every other one of them has sent nothing.
func fakeRun(name, cc string, n int) *trace.Run {
	link := trace.Link{Kind: "netem", Rate: 20e6, RTT: 0.02, Buffer: 1, MTU: 1500}
	r := &trace.Run{
		Experiment: trace.Experiment{Name: name, Link: link, Duration: 5}, Link: trace.LinkResult{Link: link},
		Bottleneck: &trace.Bottleneck{QueueMean: new(1.5), QueueMax: 33, Drops: 7, Utilisation: new(.9)}, Jain: new(.5),
	}
	r.Link.Measured = trace.Measured{Rate: new(20e6), RTT: new(.0201)}
	for i := range n {
		r.Experiment.Flows = append(r.Experiment.Flows, trace.Flow{ID: i + 1, CC: cc})
		f := trace.FlowResult{ID: i + 1, CC: cc, Unconnected: true, Throughput: new(0.)}
		if i%2 == 0 {
			f = trace.FlowResult{
				ID: i + 1, CC: cc, Throughput: new(1e6 * float64(i+1)), CwndMean: new(float64(i)), CwndMax: new(10.),
				SRTTp50: new(.02), SRTTp95: new(.04), Retransmits: uint64(i),
			}
		} else {
			r.Warnings = append(r.Warnings, fmt.Sprintf("flow %d was over before it was connected", i+1))
		}
		r.Flows = append(r.Flows, f)
	}
	return r
}

// printed is what printRuns says, its columns one blank apart.
func printed(t *testing.T, runs []*trace.Run, all bool) (out, talk []string) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	a := &app{out: bufio.NewWriter(&stdout), err: &stderr}
	if err := a.printRuns("results", runs, all); err != nil {
		t.Fatal(err)
	}
	a.out.Flush()
	return strings.Split(regexp.MustCompile(" +").ReplaceAllString(stdout.String(), " "), "\n"), strings.Split(stderr.String(), "\n")
}

func expectLines(t *testing.T, got []string, want ...string) {
	t.Helper()
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// What is not known is a dash, one packet is one, and what failed is said.
func TestFewFlows(t *testing.T) {
	r := fakeRun("reno", "reno", 2)
	r.Incomplete = true
	r.Link.Measured.Rate = new(15e6)
	r.Checks = []trace.Check{{Name: "link rate"}}
	out, talk := printed(t, []*trace.Run{r}, false)
	expectLines(t, out,
		"RUN FLOW CC THROUGHPUT CWND MEAN MAX SRTT P50 P95 RETRANSMITS LOSS EPISODES TIMEOUTS",
		"reno (interrupted) 1 reno 1.000 Mbit/s 0.0 10 20.00 ms 40.00 ms 0 0 0",
		"reno (interrupted) 2 reno 0 bit/s - - - - 0 0 0",
		"",
		"RUN LINK KIND MEASURED QUEUE MEAN MAX DROPS LOSSES MARKS UTILISATION JAIN",
		"reno (interrupted) 20 Mbit/s, 20 ms, 1 packet netem 15.00 Mbit/s, 20.10 ms FAILED 1.5 33 7 0 0 90.0 % 0.500",
		"")
	expectLines(t, talk, "ccload: warning: reno: flow 2 was over before it was connected", "")
}

// A hundred flows are told by quantiles, of values that were measured, and their
// warnings on one line.
func TestManyFlows(t *testing.T) {
	runs := []*trace.Run{fakeRun("reno 1", "reno", 50), fakeRun("reno 2", "reno", 50)}
	out, talk := printed(t, runs, false)
	expectLines(t, out,
		"RUN CC FLOWS QUANTITY MIN P25 MEDIAN P75 MAX",
		"reno 1 … reno 2 reno 100 throughput 0 bit/s 0 bit/s 0 bit/s 25.00 Mbit/s 49.00 Mbit/s",
		"reno 1 … reno 2 reno 50 of 100 cwnd mean 0.0 12.0 24.0 36.0 48.0",
		"reno 1 … reno 2 reno 50 of 100 cwnd max 10 10 10 10 10",
		"reno 1 … reno 2 reno 50 of 100 srtt p50 20.00 ms 20.00 ms 20.00 ms 20.00 ms 20.00 ms",
		"reno 1 … reno 2 reno 50 of 100 srtt p95 40.00 ms 40.00 ms 40.00 ms 40.00 ms 40.00 ms",
		"reno 1 … reno 2 reno 100 retransmits 0 0 0 24 48",
		"reno 1 … reno 2 reno 100 loss episodes 0 0 0 0 0",
		"reno 1 … reno 2 reno 100 timeouts 0 0 0 0 0",
		"",
		"RUN LINK KIND MEASURED QUEUE MEAN MAX DROPS LOSSES MARKS UTILISATION JAIN",
		"reno 1 20 Mbit/s, 20 ms, 1 packet netem 20.00 Mbit/s, 20.10 ms 1.5 33 7 0 0 90.0 % 0.500",
		"reno 2 20 Mbit/s, 20 ms, 1 packet netem 20.00 Mbit/s, 20.10 ms 1.5 33 7 0 0 90.0 % 0.500",
		"")
	expectLines(t, talk,
		"ccload: warning: reno 1: flow 2 was over before it was connected; reno 1: flow 4 was over before it was connected; "+
			"reno 1: flow 6 was over before it was connected; … (50 like this)",
		"quantiles of 100 flows; --all prints a row for each", "")
	if out, _ := printed(t, runs, true); len(out) != 1+100+1+1+2+1 {
		t.Errorf("all: %d lines", len(out))
	}
}

// Many runs of one flow each are told likewise, their links too; those of two
// algorithms apart.
func TestManyRuns(t *testing.T) {
	var runs []*trace.Run
	for _, cc := range []string{"reno", "cubic"} {
		for i := range 15 {
			runs = append(runs, fakeRun(fmt.Sprintf("%s %d", cc, i+1), cc, 1))
		}
	}
	out, _ := printed(t, runs, false)
	if len(out) != 1+2*len(flowColumns)+1+1+2*len(linkColumns)+1 {
		t.Fatalf("%d lines", len(out))
	}
	expectLines(t, []string{out[1], out[9], out[25]},
		"reno 1 … reno 15 reno 15 throughput 1.000 Mbit/s 1.000 Mbit/s 1.000 Mbit/s 1.000 Mbit/s 1.000 Mbit/s",
		"cubic 1 … cubic 15 cubic 15 throughput 1.000 Mbit/s 1.000 Mbit/s 1.000 Mbit/s 1.000 Mbit/s 1.000 Mbit/s",
		"reno 1 … reno 15 20 Mbit/s, 20 ms, 1 packet netem 0 of 15 Jain's index - - - - -")
}

func TestShellWord(t *testing.T) {
	for path, want := range map[string]string{
		"results/a-1": "results/a-1", "my results": "'my results'", "-r": "./-r", "it's; rm": `'it'\''s; rm'`, "größe": "größe",
	} {
		if got := shellWord(path); got != want {
			t.Errorf("%s: %s, want %s", path, got, want)
		}
	}
}
