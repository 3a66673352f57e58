// SPDX-License-Identifier: Apache-2.0

package analysis

import (
	"testing"

	"ccload/harness/trace"
)

// s is a sample of a source, by its first letter, in a state.
func s(source byte, state trace.CAState) trace.Sample {
	return trace.Sample{CAState: state, Source: map[byte]trace.Source{'a': trace.Ack, 'd': trace.Diag, 'e': trace.Event}[source]}
}

func TestLosses(t *testing.T) {
	const open, recovery, loss = trace.CAOpen, trace.CARecovery, trace.CALoss
	for name, c := range map[string]struct {
		samples            []trace.Sample
		episodes, timeouts int
	}{
		"none": {nil, 0, 0},
		"on ACKs: Recovery, Loss out of it, Loss": {
			[]trace.Sample{s('a', recovery), s('a', recovery), s('a', loss), s('a', open), s('a', trace.CACWR), s('a', loss), s('a', loss)}, 3, 2},
		// As at a loss of half of all packets: the timer runs out again and again, and few ACKs come.
		"timeouts in a row":            {[]trace.Sample{s('a', open), s('e', loss), s('e', loss), s('e', loss), s('a', loss), s('e', open)}, 1, 3},
		"ends in timeouts":             {[]trace.Sample{s('a', open), s('a', open), s('e', loss), s('d', loss), s('e', loss)}, 1, 2},
		"over between two ACKs":        {[]trace.Sample{s('a', open), s('e', recovery), s('e', open), s('a', open)}, 1, 0},
		"an interval stamped too late": {[]trace.Sample{s('a', open), s('e', recovery), s('d', open), s('a', recovery), s('e', open)}, 1, 0},
		"only the interval shows it":   {[]trace.Sample{s('a', open), s('d', loss), s('d', open), s('d', loss), s('a', open)}, 2, 2},
		"an event was lost":            {[]trace.Sample{s('e', open), s('a', loss), s('e', loss), s('a', loss)}, 1, 2},
	} {
		var l Losses
		for _, s := range c.samples {
			l.Add(&s)
		}
		if l.Episodes() != c.episodes || l.Timeouts() != c.timeouts {
			t.Errorf("%s: %d episodes, %d timeouts; want %d, %d", name, l.Episodes(), l.Timeouts(), c.episodes, c.timeouts)
		}
	}
}

func TestHolds(t *testing.T) {
	for pair, second := range map[string]bool{"aa": true, "ad": true, "ae": true, "da": true, "ea": true, "dd": false, "de": false, "ed": false} {
		a, b := s(pair[0], 0), s(pair[1], 0)
		if got := Holds(&a, &b) == &b; got != second {
			t.Errorf("%s: the second holds: %v", pair, got)
		}
	}
}
