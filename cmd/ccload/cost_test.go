// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"testing"

	"ccload/harness"
	"ccload/harness/trace"
	"ccload/harness/vm"
	"ccload/internal/vmtest"
)

// costVerb makes a guest measure what a congestion control costs.
const costVerb = "test-cost"

// cost is what a flow took from its second second on. In a guest each instruction
// takes a nanosecond of its time.
type cost struct{ Instructions, Segments uint64 }

// perACK is of ACKs for two segments each, as receivers send them (RFC 5681 §4.2).
func (c cost) perACK() float64 { return 2 * float64(c.Instructions) / float64(c.Segments) }

// meter is a sink that counts segments, and reads how long the processor was busy
// when each count was taken.
type meter struct {
	at [2]cost // after the first second, and now
}

func (m *meter) Sample(s trace.Sample) error {
	busy, err := busy()
	m.at[1] = cost{busy, uint64(s.Delivered)}
	if s.Time < 1 {
		m.at[0] = m.at[1]
	}
	return err
}

func (m *meter) Link(trace.LinkSample) error { return nil }
func (m *meter) Finish(*trace.Run) error     { return nil }
func (m *meter) Close() error                { return nil }

// busy is how long, in ns, the only processor has run tasks (proc(5):
// /proc/schedstat).
func busy() (uint64, error) {
	b, err := os.ReadFile("/proc/schedstat")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) >= 8 && f[0] == "cpu0" {
			return strconv.ParseUint(f[7], 10, 64)
		}
	}
	return 0, errors.New("/proc/schedstat has no cpu0")
}

func costInGuest(name string, out io.Writer) error {
	if err := provide(name, nil); err != nil {
		return err
	}
	e := trace.Experiment{
		Duration: 5, Flows: []trace.Flow{{CC: name}}, Interval: 0.1,
		Link: trace.Link{Rate: 100e6, RTT: 0.01, BufferBDP: 1},
	}
	if strings.HasSuffix(name, "dctcp") {
		e.Link.ECN = 20
	}
	m := &meter{}
	if _, err := harness.Run(context.Background(), e, harness.Options{Sink: m}); err != nil {
		return err
	}
	return json.NewEncoder(out).Encode(cost{m.at[1].Instructions - m.at[0].Instructions, m.at[1].Segments - m.at[0].Segments})
}

// inGuest is a guest that a test has booted: ccload, and measuring.
func inGuest() {
	vm.Init(nil, func(args []string, stdout, stderr io.Writer) int {
		if args[0] != costVerb {
			return run(context.Background(), args, strings.NewReader(""), stdout, stderr)
		}
		if err := costInGuest(args[1], stdout); err != nil {
			fmt.Fprintln(stderr, err)
			return exitFailed
		}
		return exitDone
	})
}

// What a BPF algorithm costs against the kernel's own, over the whole path of a
// segment: the same each time, to the instruction.
func BenchmarkCost(b *testing.B) {
	kernel := vmtest.Kernel(b, "debian-6.12")
	program := vmtest.Test(b, "ccload/cmd/ccload")
	run := func(name string, seed uint32) (c cost) {
		var out, errs bytes.Buffer
		g := &vm.Guest{
			Kernel: kernel, Binary: program, Args: []string{costVerb, name}, Seed: seed,
			Modules: []string{"tun", "inet_diag", "tcp_diag"}, Optional: []string{"tcp_" + name},
		}
		status, err := g.Run(b.Context(), &out, &errs, nil)
		if err != nil || status != 0 {
			b.Fatalf("%s: status %d, %v\n%s", name, status, err, errs.String())
		}
		if err := json.Unmarshal(out.Bytes(), &c); err != nil {
			b.Fatal(err)
		}
		return c
	}
	// One seed's bursts and marks differ a little from another's.
	measure := func(name string) (sum cost) {
		for seed := range uint32(4) {
			c := run(name, seed)
			sum.Instructions += c.Instructions
			sum.Segments += c.Segments
		}
		return sum
	}
	for _, name := range []string{"cubic", "dctcp", "reno"} {
		b.Run(name, func(b *testing.B) {
			kernels, ours := measure(name), cost{}
			for b.Loop() {
				ours = measure("bpf_" + name)
			}
			if again, one := run(name, 1), run(name, 1); again != one {
				b.Errorf("%+v, and again %+v", one, again)
			}
			b.ReportMetric(0, "ns/op") // the host's time says nothing
			b.ReportMetric(kernels.perACK(), "kernel-instructions/ACK")
			b.ReportMetric(ours.perACK(), "bpf-instructions/ACK")
			b.ReportMetric(ours.perACK()/kernels.perACK(), "ratio")
		})
	}
}
