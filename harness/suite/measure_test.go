// SPDX-License-Identifier: Apache-2.0

package suite

import (
	"math"
	"testing"

	"ccload/harness/trace"
)

// A flow that ends in timeouts, of which no ACK tells: they count, the window that it
// had then holds until its end, and what is not known is an error, not 0.
func TestStalled(t *testing.T) {
	r := &run{until: 10, experiment: trace.Experiment{Flows: []trace.Flow{{CC: underTest}, {CC: underTest}, {CC: underTest}}}}
	res := &trace.Result{
		Run: &trace.Run{
			Experiment: trace.Experiment{Duration: 10},
			Flows:      []trace.FlowResult{{ID: 1, Start: 0.5, Duration: 10, Retransmits: 4, LossEpisodes: 1, Timeouts: 3}, {ID: 2, Start: 0.5, Duration: 10}, {ID: 3, Start: 5}},
		},
		Samples: []trace.Sample{
			{Time: 0.5, Source: trace.Ack, Flow: 1, Cwnd: 10, SRTT: 0.1},
			{Time: 2.5, Source: trace.Ack, Flow: 1, Cwnd: 20, SRTT: 0.1, Delivered: 20},
			{Time: 2.6, Source: trace.Diag, Flow: 1, Cwnd: 20, SRTT: 0.1, Delivered: 20},
			{Time: 4.5, Source: trace.Event, Flow: 1, Cwnd: 1, SRTT: 0.1, CAState: trace.CALoss, Delivered: 20},
			{Time: 6.5, Source: trace.Event, Flow: 1, Cwnd: 1, SRTT: 0.1, CAState: trace.CALoss, Delivered: 20, Retrans: 2},
		},
	}
	views := r.look(res)
	for name, want := range map[string]float64{
		"cwnd_mean": (20*2 + 20*2 + 1*6) / 10.0, "cwnd_max": 20, "srtt_p50": 0.1, "loss_episodes": 1, "timeouts": 3, "retransmits": 4,
	} {
		got, err := views[0].measure(quantities[name])
		if err != nil || math.Abs(got-want) > 1e-9 {
			t.Errorf("%s: %g, %v; want %g", name, got, err, want)
		}
	}
	for _, name := range []string{"cwnd_mean", "cwnd_max", "srtt_p50"} {
		if got, err := views[1].measure(quantities[name]); err == nil {
			t.Errorf("%s of a flow without samples: %g", name, got)
		}
	}
	for _, name := range []string{"throughput", "utilisation", "timeouts"} {
		if got, err := views[2].measure(quantities[name]); err == nil {
			t.Errorf("%s of a flow that never began: %g", name, got)
		}
	}
	// In a part of the time only what happened in it counts.
	r.from, r.until = 5, 8
	for name, want := range map[string]float64{"timeouts": 1, "loss_episodes": 0, "retransmits": 2, "cwnd_mean": 1} {
		got, err := r.look(res)[0].measure(quantities[name])
		if err != nil || math.Abs(got-want) > 1e-9 {
			t.Errorf("from 5 s until 8 s, %s: %g, %v; want %g", name, got, err, want)
		}
	}
}
