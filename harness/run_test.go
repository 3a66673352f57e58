// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ccload/harness/trace"
	"ccload/internal/fault"
	"ccload/internal/kerneltest"
)

// run runs one experiment for a test and reads its results back.
func run(t testing.TB, e trace.Experiment, opt Options) *trace.Result {
	t.Helper()
	opt.Dir = filepath.Join(t.TempDir(), "result")
	r, err := Run(t.Context(), e, opt)
	if err != nil {
		t.Fatal(err)
	}
	res, err := trace.Open(opt.Dir)
	if err != nil {
		t.Fatal(err)
	}
	returned, _ := json.Marshal(r)
	read, _ := json.Marshal(res.Run)
	if string(returned) != string(read) {
		t.Errorf("run.json is not what was returned:\n%s\n%s", read, returned)
	}
	t.Cleanup(func() {
		if t.Failed() {
			b, _ := json.MarshalIndent(r, "", " ")
			t.Logf("%s", b)
		}
	})
	return res
}

func flows(ccs ...string) (flows []trace.Flow) {
	for _, cc := range ccs {
		flows = append(flows, trace.Flow{CC: cc})
	}
	return flows
}

// between checks a value.
func between(t *testing.T, what string, got, lo, hi float64) {
	t.Helper()
	if !(got >= lo && got <= hi) {
		t.Errorf("%s: %.6g, want from %.6g to %.6g", what, got, lo, hi)
	}
}

// of a flow and a source, the samples.
func of(r *trace.Result, flow int32, source trace.Source) (s []trace.Sample) {
	for _, v := range r.Samples {
		if v.Flow == flow && v.Source == source {
			s = append(s, v)
		}
	}
	return s
}

// One cubic flow fills the link, and all that is measured fits together.
func TestRun(t *testing.T) {
	kerneltest.Privileged(t)
	var calls int
	res := run(t, trace.Experiment{Link: trace.Link{Rate: 20e6, RTT: 0.02}, Flows: flows("cubic"), Duration: 4, PerAck: true}, Options{
		Progress: func(elapsed, total time.Duration) {
			if elapsed > 0 && total == 4*time.Second {
				calls++
			}
		},
		Versions: map[string]string{"ccload": "test"},
	})
	r := res.Run
	f, b := r.Flows[0], r.Bottleneck
	packet := 1500 * 8 / 20e6 // s
	buffer := 33.0            // packets: 1 BDP
	if r.Link.Buffer != 33 || r.Incomplete || len(r.Checks) < 6 || calls < 10 || r.Versions["ccload"] != "test" || r.Offloads["tcp-segmentation-offload"] {
		t.Errorf("buffer %d, incomplete %v, %d checks, %d calls of Progress", r.Link.Buffer, r.Incomplete, len(r.Checks), calls)
	}
	for _, c := range r.Checks {
		// How exact the link is depends on how busy the machine is.
		if !c.OK && !strings.HasPrefix(c.Name, "link ") && c.Name != "seconds spoiled by the machine" {
			t.Errorf("check %+v", c)
		}
	}
	between(t, "measured rate", *r.Link.Measured.Rate, 19e6, 21e6)
	between(t, "measured RTT", *r.Link.Measured.RTT, 0.020, 0.025)
	between(t, "utilisation", *b.Utilisation, 0.9, 1.0001)
	between(t, "throughput", *f.Throughput, 0.85*20e6, 20e6*1448/1500)
	between(t, "duration", f.Duration, 4, 4.2)
	between(t, "srtt p50", *f.SRTTp50, 0.020, 0.020+buffer*packet+0.005)
	between(t, "srtt p95", *f.SRTTp95, *f.SRTTp50, 0.020+buffer*packet+0.010)
	between(t, "largest queue", float64(b.QueueMax), buffer, buffer)
	between(t, "largest window", *f.CwndMax, 2*buffer, 4.5*buffer) // slow start may double once more before it knows
	between(t, "mean window", *f.CwndMean, buffer, 2.2*buffer)
	if b.Drops == 0 || f.Retransmits < b.Drops || f.LossEpisodes == 0 || *r.Jain != 1 || b.Losses != 0 || b.Marks != 0 {
		t.Errorf("drops %d, retransmits %d, episodes %d, Jain %g, losses %d, marks %d", b.Drops, f.Retransmits, f.LossEpisodes, *r.Jain, b.Losses, b.Marks)
	}
	// Little's law: what is under way is the rate times how long it takes. The window
	// is not all in use while a loss is being repaired.
	inQueue := *b.QueueMean * packet
	between(t, "queueing delay by the queue and by the RTT", *f.SRTTp50-0.020-inQueue, -0.010, 0.010)

	ack, diag := of(res, 1, trace.Ack), of(res, 1, trace.Diag)
	if uint64(len(ack)) != r.Sampling.Ack || uint64(len(diag)) != r.Sampling.Diag || r.Sampling.Lost != 0 {
		t.Errorf("%d and %d samples, %+v", len(ack), len(diag), r.Sampling)
	}
	between(t, "samples at the interval", float64(len(diag)), 300, 400)
	between(t, "samples on ACKs", float64(len(ack)), float64(f.Bytes)/1448/2*0.9, float64(f.Bytes)/1448*1.1)
	for _, s := range res.Samples {
		if s.Time < 0 || s.Time > 4.2 || s.Cwnd == 0 || s.Cwnd > 200 || s.SRTT > 0.2 || s.MinRTT > 0 && s.MinRTT < 0.020 || s.Inflight > 250 ||
			s.CAState > trace.CALoss || s.BytesAcked > f.Bytes+1 {
			t.Fatalf("an odd sample: %+v", s)
		}
	}
	last := ack[len(ack)-1]
	if last.Ssthresh == trace.InfiniteSsthresh || last.Delivered < uint32(f.Bytes/1448*9/10) || uint64(last.Retrans) != f.Retransmits || last.PacingRate != 0 {
		t.Errorf("the last sample: %+v", last)
	}
	// The two sources see one socket: each value of the window at an interval is one
	// of those on the ACKs around it.
	for _, d := range diag {
		at, _ := slices.BinarySearchFunc(ack, d.Time, func(s trace.Sample, at float64) int { return int(math.Copysign(1, s.Time-at)) })
		around := ack[max(0, at-3):min(len(ack), at+4)]
		if !slices.ContainsFunc(around, func(a trace.Sample) bool { return a.Cwnd == d.Cwnd }) && at > 3 && at < len(ack)-4 {
			t.Errorf("at %g s the window is %d at the interval, not so on the ACKs around", d.Time, d.Cwnd)
			break
		}
	}

	var drops int
	var before trace.LinkSample
	for i, l := range res.Links {
		if l.Time < before.Time || l.Delivered < before.Delivered || l.Drops < before.Drops || l.Queue < 0 || l.Queue > 33 || l.QueueBytes > 33*1500 {
			t.Fatalf("row %d of the link: %+v after %+v", i, l, before)
		}
		drops += int(l.Drops - before.Drops)
		before = l
	}
	between(t, "rows of the link", float64(len(res.Links)), 4000+float64(drops), 4100+float64(drops))
	if before.Drops != b.Drops {
		t.Errorf("the last row of the link: %+v", before)
	}
}

// Exactly each 300th packet is lost, nothing else, and TCP repairs just that.
func TestLoss(t *testing.T) {
	kerneltest.Privileged(t)
	res := run(t, trace.Experiment{
		Link:  trace.Link{Rate: 20e6, RTT: 0.02, BufferBDP: 20, Loss: trace.Loss{Every: 300}},
		Flows: flows("reno"), Duration: 3, PerAck: true,
	}, Options{})
	b, f := res.Run.Bottleneck, res.Run.Flows[0]
	last := res.Links[len(res.Links)-1]
	if got := (last.Enqueued + last.Losses) / 300; b.Losses != got || b.Losses < 5 || b.Drops != 0 {
		t.Errorf("%d losses of %d packets, %d drops", b.Losses, last.Enqueued+last.Losses, b.Drops)
	}
	if f.Retransmits > b.Losses+2 || f.Retransmits+1 < b.Losses || f.LossEpisodes == 0 {
		t.Errorf("%d losses, %d retransmits, %d episodes", b.Losses, f.Retransmits, f.LossEpisodes)
	}
}

// With ECN and room in the buffer the flow is slowed down by marks alone.
func TestECN(t *testing.T) {
	kerneltest.Privileged(t)
	res := run(t, trace.Experiment{
		Link:  trace.Link{Rate: 20e6, RTT: 0.02, BufferBDP: 20, ECN: 20},
		Flows: flows("cubic"), Duration: 3, PerAck: true,
	}, Options{})
	b, f := res.Run.Bottleneck, res.Run.Flows[0]
	if b.Marks == 0 || b.Drops != 0 || b.Losses != 0 || f.Retransmits != 0 || res.Run.Sysctls["net.ipv4.tcp_ecn"] != "1" {
		t.Errorf("%+v, %d retransmits", b, f.Retransmits)
	}
	between(t, "utilisation", *b.Utilisation, 0.85, 1.0001)
	ack := of(res, 1, trace.Ack)
	if s := ack[len(ack)-1]; s.DeliveredCE == 0 || uint64(s.DeliveredCE) > uint64(s.Delivered) {
		t.Errorf("the last sample: %+v", s)
	}
	if f.LossEpisodes != 0 {
		t.Errorf("%d loss episodes", f.LossEpisodes)
	}
}

// Two flows, the second of which begins later, share the link; their samples are
// told apart.
func TestTwoFlows(t *testing.T) {
	kerneltest.Privileged(t)
	e := trace.Experiment{Link: trace.Link{Rate: 20e6, RTT: 0.01}, Flows: flows("reno", "cubic"), Duration: 5, PerAck: true}
	e.Flows[1].Start = 1
	e.Flows[1].Duration = 3
	r := run(t, e, Options{})
	a, b := r.Run.Flows[0], r.Run.Flows[1]
	between(t, "Jain's index", *r.Run.Jain, 0.55, 1)
	if want := jain([]float64{*a.Throughput, *b.Throughput}); *r.Run.Jain != *want {
		t.Errorf("Jain's index %g, want %g", *r.Run.Jain, *want)
	}
	between(t, "bytes of both", float64(a.Bytes+b.Bytes)*8, 0.85*20e6*5, 20e6*5)
	between(t, "duration of the second", b.Duration, 2.8, 3.2) // it ends on time, also when it begins late
	if a.CC != "reno" || b.CC != "cubic" || b.Start < 1 || b.Bytes < 1e6 {
		t.Errorf("got %+v, %+v", a, b)
	}
	for _, s := range r.Samples {
		if s.Flow != 1 && s.Flow != 2 || s.Flow == 2 && (s.Time < 1 || s.Time > 4.3 || s.BytesAcked > b.Bytes+1) {
			t.Fatalf("not a sample of the flow: %+v", s)
		}
	}
	for _, flow := range []int32{1, 2} {
		for _, source := range []trace.Source{trace.Ack, trace.Diag} {
			if n := len(of(r, flow, source)); n < 100 {
				t.Errorf("flow %d: %d samples from %s", flow, n, source)
			}
		}
	}
}

// A flow of so many bytes ends with the last of them, and the run with it.
func TestFixedVolume(t *testing.T) {
	kerneltest.Privileged(t)
	e := trace.Experiment{Link: trace.Link{Rate: 20e6, RTT: 0.02}, Flows: flows("cubic"), Duration: 20}
	e.Flows[0].Bytes = 250_000
	r := run(t, e, Options{}).Run
	f := r.Flows[0]
	// At least its serialization, its round trip and the handshake's; at most that and slow start's.
	between(t, "completion time", f.Duration, 0.100+0.040, 0.5)
	if f.Bytes != 250_000 || r.Incomplete {
		t.Errorf("%+v, incomplete %v", f, r.Incomplete)
	}
	if !slices.ContainsFunc(r.Warnings, func(w string) bool { return strings.Contains(w, "may miss some") }) {
		t.Errorf("without samples on ACKs the warnings are %q", r.Warnings)
	}
}

// What was measured until the context was done is kept.
func TestCancelKeepsResults(t *testing.T) {
	kerneltest.Privileged(t)
	dir := filepath.Join(t.TempDir(), "result")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	start := time.Now()
	r, err := Run(ctx, trace.Experiment{Link: trace.Link{Rate: 20e6, RTT: 0.02}, Flows: flows("cubic"), Duration: 60}, Options{
		Dir: dir,
		Progress: func(elapsed, _ time.Duration) {
			if elapsed > time.Second {
				cancel()
			}
		},
	})
	if err != nil || !r.Incomplete || time.Since(start) > 10*time.Second {
		t.Fatalf("after %v: %+v, %v", time.Since(start), r, err)
	}
	res, err := trace.Open(dir)
	if err != nil || !res.Run.Incomplete || len(res.Samples) < 50 || len(res.Links) < 900 || res.Run.Flows[0].Bytes < 1e6 {
		t.Errorf("%v, %+v", err, res)
	}
	between(t, "utilisation of the time that it ran", *res.Run.Bottleneck.Utilisation, 0.8, 1.0001)
}

func TestRunRefuses(t *testing.T) {
	kerneltest.Privileged(t)
	e := valid()
	e.Flows[1].CC = "no_such_cc"
	dir := filepath.Join(t.TempDir(), "result")
	_, err := Run(t.Context(), e, Options{Dir: dir})
	if err == nil || err.Error() != `congestion control "no_such_cc": the kernel has none of that name` {
		t.Errorf("unknown congestion control: %v", err)
	}
	e = valid()
	e.Link.Rate = 1
	if _, err := Run(t.Context(), e, Options{Dir: dir}); err == nil || !strings.Contains(err.Error(), "rate of 1 bit/s") {
		t.Errorf("rate of 1 bit/s: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Run(ctx, valid(), Options{Dir: dir}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled before: %v", err)
	}
	if _, err := Run(t.Context(), valid(), Options{Dir: "/dev/null/x"}); err == nil || !strings.Contains(err.Error(), "/dev/null/x") {
		t.Errorf("a directory that cannot be: %v", err)
	}
	if m, err := filepath.Glob(dir); err != nil || m != nil {
		t.Errorf("a run that was refused left %q", m)
	}
}

func TestRunRefusesTakenDirectory(t *testing.T) {
	kerneltest.Privileged(t)
	dir := t.TempDir()
	w, err := trace.Create(dir)
	if err != nil {
		t.Fatal(err)
	}
	w.Close()
	if _, err := Run(t.Context(), valid(), Options{Dir: dir}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("got %v", err)
	}
}

// Where BPF does not work there are samples at the interval, and a warning.
func TestWithoutBPF(t *testing.T) {
	kerneltest.Privileged(t)
	e := trace.Experiment{Link: trace.Link{Rate: 5e6, RTT: 0.01}, Flows: flows("reno"), Duration: 0.5, PerAck: true}
	res := run(t, e, Options{Ring: 3}) // not a size that a ring buffer may have
	if !strings.Contains(strings.Join(res.Run.Warnings, "\n"), "sample on every ACK: ") || res.Run.Sampling.Ack != 0 || res.Run.Sampling.Diag < 20 {
		t.Errorf("warnings %q, %+v", res.Run.Warnings, res.Run.Sampling)
	}
}

// A kernel that takes no program for what happens between ACKs is sampled on ACKs.
func TestWithoutEvents(t *testing.T) {
	kerneltest.Privileged(t)
	defer fault.Set(func(step string) error {
		if step == "load program tcp_state" {
			return unix.EPERM
		}
		return nil
	})()
	e := trace.Experiment{Link: trace.Link{Rate: 5e6, RTT: 0.01}, Flows: flows("reno"), Duration: 0.5, PerAck: true}
	r := run(t, e, Options{}).Run
	if s := r.Sampling; s.Ack < 50 || s.Events != 0 || !strings.Contains(strings.Join(r.Warnings, "\n"), "sample between ACKs: ") {
		t.Errorf("warnings %q, %+v", r.Warnings, s)
	}
}

// Half of all packets are lost: most of what happens shows on no ACK. Nothing that a
// sample shows is missing from the summary.
func TestHeavyLoss(t *testing.T) {
	kerneltest.Privileged(t)
	res := run(t, trace.Experiment{
		Link:  trace.Link{Rate: 5e6, RTT: 0.02, Loss: trace.Loss{Probability: 0.5}},
		Flows: flows("reno"), Duration: 4, PerAck: true, Seed: 1,
	}, Options{})
	f := res.Run.Flows[0]
	episodes, timeouts := 0, 0
	for _, source := range []trace.Source{trace.Ack, trace.Diag, trace.Event} {
		before, e, l := trace.CAOpen, 0, 0
		for _, s := range of(res, 1, source) {
			if s.CAState != before && s.CAState >= trace.CARecovery {
				e++
			}
			if s.CAState == trace.CALoss && (s.CAState != before || source == trace.Event) {
				l++
			}
			before = s.CAState
		}
		episodes, timeouts = max(episodes, e), max(timeouts, l)
	}
	if timeouts == 0 || f.LossEpisodes < episodes || f.Timeouts < timeouts {
		t.Errorf("the summary has %d episodes, %d timeouts; samples of one source show %d, %d", f.LossEpisodes, f.Timeouts, episodes, timeouts)
	}
	// To its end, not to its last ACK.
	var last float64
	for _, s := range of(res, 1, trace.Ack) {
		last = s.Time
	}
	if f.Start+f.Duration < last || f.Duration < 4 {
		t.Errorf("it began at %g s and lasted %g s; its last ACK was at %g s", f.Start, f.Duration, last)
	}
}

// A ring buffer that is too small loses events; they are counted, and a check fails.
func TestLostSamples(t *testing.T) {
	kerneltest.Privileged(t)
	e := trace.Experiment{Link: trace.Link{Rate: 200e6, RTT: 0.002, BufferBDP: 4}, Flows: flows("reno"), Duration: 1, PerAck: true}
	res := run(t, e, Options{Ring: 4096})
	s := res.Run.Sampling
	failed := slices.ContainsFunc(res.Run.Checks, func(c trace.Check) bool { return c.Name == "samples lost" && !c.OK })
	if s.Lost == 0 || s.Ack == 0 || !failed || !strings.Contains(strings.Join(res.Run.Warnings, "\n"), "samples lost") {
		t.Errorf("%+v, check failed: %v", s, failed)
	}
}
