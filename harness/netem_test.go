// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"math"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"ccload/harness/link"
	"ccload/harness/trace"
	"ccload/internal/kerneltest"
	"ccload/internal/netns"
)

// On one scenario both kinds of link give the same mean window within 3 %, the
// same throughput and the same drops.
//
// It runs in guests only: there time is virtual, so neither kind may blame the
// machine.
func TestKindsAgree(t *testing.T) {
	if _, err := os.Stat("/etc/ccload/args"); err != nil { // what package vm gives its guests
		t.Skip("not in a guest: time is not virtual")
	}
	kerneltest.Privileged(t)
	if err := link.HasNetem(); err != nil {
		t.Skip(err)
	}
	var runs []*trace.Run
	for _, kind := range []string{link.Userspace, link.Netem} {
		res := run(t, trace.Experiment{Link: trace.Link{Kind: kind, Rate: 20e6, RTT: 0.04}, Flows: flows("cubic"), Duration: 15}, Options{})
		r := res.Run
		if r.Link.Kind != kind || r.Experiment.Link.Kind != kind || r.Link.Why != "" {
			t.Errorf("%s: ran as %q, of %q, for %q", kind, r.Link.Kind, r.Experiment.Link.Kind, r.Link.Why)
		}
		for _, c := range r.Checks {
			if !c.OK {
				t.Errorf("%s: check %+v", kind, c)
			}
		}
		// The queue was full when it dropped, and its length over time fits the delay.
		b, f := r.Bottleneck, r.Flows[0]
		if b.QueueMax != 67 || b.Drops == 0 || b.Losses != 0 || len(res.Links) < 14000 {
			t.Errorf("%s: %+v, %d rows", kind, b, len(res.Links))
		}
		between(t, kind+": queueing delay by the queue and by the RTT", *f.SRTTp50-0.040-*b.QueueMean*1500*8/20e6, -0.005, 0.005)
		// Were the header of Ethernet counted, it would be 0.93 % less.
		between(t, kind+": rate of the probe", *r.Link.Measured.Rate, 0.999*20e6, 1.001*20e6)
		t.Logf("%s: mean window %.2f, throughput %.0f, mean queue %.2f, drops %d, rate %.0f", kind, *f.CwndMean, *f.Throughput, *b.QueueMean, b.Drops, *r.Link.Measured.Rate)
		runs = append(runs, r)
	}
	for what, of := range map[string]func(*trace.Run) float64{
		"mean window": func(r *trace.Run) float64 { return *r.Flows[0].CwndMean },
		"throughput":  func(r *trace.Run) float64 { return *r.Flows[0].Throughput },
		"mean queue":  func(r *trace.Run) float64 { return *r.Bottleneck.QueueMean },
	} {
		a, b := of(runs[0]), of(runs[1])
		if math.Abs(a-b) > 0.03*a {
			t.Errorf("%s: %g in user space, %g by netem", what, a, b)
		}
	}
	if a, b := runs[0].Flows[0].LossEpisodes, runs[1].Flows[0].LossEpisodes; a != b {
		t.Errorf("loss episodes: %d in user space, %d by netem", a, b)
	}
}

// A link of kind auto is of one that works here, and the run says why.
func TestAuto(t *testing.T) {
	kerneltest.Privileged(t)
	e := trace.Experiment{Link: trace.Link{Kind: link.Auto, Rate: 5e6, RTT: 0.01}, Flows: flows("reno"), Duration: 0.2}
	r := run(t, e, Options{}).Run
	if !slices.Contains([]string{link.Userspace, link.Netem}, r.Link.Kind) || r.Link.Kind != r.Experiment.Link.Kind || r.Link.Why == "" {
		t.Errorf("kind %q, of %q, for %q", r.Link.Kind, r.Experiment.Link.Kind, r.Link.Why)
	}
}

// With a link of netem, what is left of a killed process is nothing as well. We
// hold on to one end: the device there must go because the router does, which
// nothing but the process has held.
func TestKillNetem(t *testing.T) {
	kerneltest.Privileged(t)
	if err := link.HasNetem(); err != nil {
		t.Skip(err)
	}
	cmd, _ := child(t, link.Netem, 60)
	var end *netns.NS
	n := 0
	for path := range descriptors(t, cmd.Process.Pid) {
		ns, err := netns.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		switch strings.Count(devices(t, ns), "\ncc") {
		case 1:
			n++
			if end == nil {
				end = ns
				defer ns.Close()
				continue
			}
		case 2:
			n++
		}
		ns.Close()
	}
	if n != 3 || end == nil {
		t.Fatalf("the child has %d namespaces with devices of ours, want 3", n)
	}
	cmd.Process.Kill()
	cmd.Wait()
	deadline := time.Now().Add(20 * time.Second)
	for strings.Contains(devices(t, end), "cc") {
		if time.Now().After(deadline) {
			t.Fatalf("the device is still there: %s", devices(t, end))
		}
		time.Sleep(10 * time.Millisecond)
	}
}
