// SPDX-License-Identifier: Apache-2.0

package main

import (
	"math"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"ccload/harness"
	"ccload/harness/trace"
	"ccload/internal/kerneltest"
)

// On one connection the share of the window that is kept after a loss is first the
// algorithm's, then the extension's, and then the algorithm's again.
func TestExtendLive(t *testing.T) {
	for _, c := range []struct {
		alg, how string
		own      float64
	}{
		{"bpf_cubic", "tail-call", 0.7},
		{"bpf_cubic", "freplace", 0.7},
		{"bpf_dctcp", "freplace", 0.5},
	} {
		t.Run(c.alg+" "+c.how, func(t *testing.T) {
			kerneltest.Privileged(t)
			ccload := func(args ...string) (talk string, ok bool) {
				var out strings.Builder
				status := run(t.Context(), args, nil, &out, &out)
				return out.String(), status == exitDone
			}
			const name = "cct_live"
			if talk, ok := ccload("register", c.alg, "--as", name); !ok {
				t.Fatal(talk)
			}
			defer ccload("unregister", name)
			extend := []string{"extend", name, "backoff", "../../bpf/examples/gentle.bpf.o", "--how", c.how}
			remove := []string{"extend", name, "--remove", "backoff"}
			if talk, ok := ccload(extend...); !ok && c.how == "freplace" && strings.Contains(talk, "no capability is missing") {
				t.Skip(talk)
			} else if !ok {
				t.Fatal(talk)
			}
			if talk, ok := ccload(remove...); !ok {
				t.Fatal(talk)
			}

			const phase, phases, settle = 3, 3, 0.5 // s
			steps := [][]string{extend, remove}
			dir := filepath.Join(t.TempDir(), "run")
			_, err := harness.Run(t.Context(), trace.Experiment{
				Duration: phase * phases, PerAck: true, Seed: 1, Flows: []trace.Flow{{CC: name}},
				Link: trace.Link{Kind: "userspace", Rate: 20e6, RTT: 0.04, Buffer: 200, ECN: 1000, Loss: trace.Loss{Every: 300}},
			}, harness.Options{Dir: dir, Progress: func(elapsed, _ time.Duration) {
				if done := phases - 1 - len(steps); len(steps) > 0 && elapsed.Seconds() > float64(phase*(done+1)) {
					if talk, ok := ccload(steps[0]...); !ok {
						t.Error(talk)
					}
					steps = steps[1:]
				}
			}})
			if err != nil {
				t.Fatal(err)
			}
			r, err := trace.Open(dir)
			if err != nil {
				t.Fatal(err)
			}
			var kept [phases][]float64
			var last trace.Sample
			for _, s := range r.Samples {
				if s.Source != trace.Ack {
					continue
				}
				in, since := math.Modf(s.Time / phase)
				if s.CAState == trace.CARecovery && last.CAState < trace.CARecovery && since*phase > settle && in < phases && last.Cwnd > 10 {
					kept[int(in)] = append(kept[int(in)], float64(s.Ssthresh)/float64(last.Cwnd))
				}
				last = s
			}
			for i, want := range []float64{c.own, 0.85, c.own} {
				slices.Sort(kept[i])
				if n := len(kept[i]); n < 3 || math.Abs(kept[i][n/2]-want) > 0.04 {
					t.Errorf("phase %d: of the windows is kept %.3f, want %g", i, kept[i], want)
				}
			}
		})
	}
}
