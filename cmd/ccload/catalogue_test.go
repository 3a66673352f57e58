// SPDX-License-Identifier: Apache-2.0

package main

import (
	"path/filepath"
	"testing"

	"ccload/cc"
	"ccload/harness"
	"ccload/harness/trace"
)

// Whatever the kernel, each algorithm of the catalogue carries a flow through
// losses and marks: all of it arrives, and the window follows what happened.
func TestCatalogue(t *testing.T) {
	for _, a := range cc.All() {
		t.Run(a.Name, func(t *testing.T) {
			attach(t, a.Name)
			const bytes, every = 600_000, 100
			dir := filepath.Join(t.TempDir(), "run")
			_, err := harness.Run(t.Context(), trace.Experiment{
				Duration: 60, PerAck: true, Seed: 1, Flows: []trace.Flow{{CC: a.Name, Bytes: bytes}},
				Link: trace.Link{Kind: "userspace", Rate: 20e6, RTT: 0.02, Buffer: 200, ECN: 2, Loss: trace.Loss{Every: every}},
			}, harness.Options{Dir: dir})
			if err != nil {
				t.Fatal(err)
			}
			r, err := trace.Open(dir)
			if err != nil {
				t.Fatal(err)
			}
			f, b := r.Run.Flows[0], r.Run.Bottleneck
			if f.CC != a.Name || f.Bytes != bytes || b.Drops != 0 || b.Marks == 0 || f.LossEpisodes == 0 {
				t.Errorf("%+v, %+v", f, b)
			}
			if b.Losses < bytes/1448/every || f.Retransmits < b.Losses {
				t.Errorf("%d losses, %d retransmissions", b.Losses, f.Retransmits)
			}
			var last *trace.Sample
			for i := range r.Samples {
				if r.Samples[i].Source == trace.Ack {
					last = &r.Samples[i]
				}
			}
			if last == nil || last.Ssthresh < 2 || last.Ssthresh > bytes/1448 || last.Cwnd < 2 || last.DeliveredCE == 0 {
				t.Errorf("the last sample: %+v", last)
			}
		})
	}
}
