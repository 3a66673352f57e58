// SPDX-License-Identifier: Apache-2.0

// Package analysis says what samples mean: what held between two of them, and what
// events they show. It is pure, and the one place for it: the summary of a run and
// the checks of experiment files must not count differently.
package analysis

import "ccload/harness/trace"

// Holds says which of two neighbouring samples of a flow tells what held between
// them. One on an ACK is taken before the ACK is processed, so it tells what has
// held until then; the others tell what holds from then on, for the window changes
// only by ACKs and by events, which have samples of their own.
func Holds(a, b *trace.Sample) *trace.Sample {
	if a.Source == trace.Ack || b.Source == trace.Ack {
		return b
	}
	return a
}

// Losses counts the loss episodes and timeouts of one flow. A loss episode is an
// entry into Recovery or Loss, from whatever other state; a timeout is one of the
// retransmission timer, each of a row of them.
//
// The samples of each source have to come in order of time. Those on ACKs and
// events are one sequence; those at intervals another, since they are stamped a
// little later than they were taken. Events miss nothing. Where there are none, or
// some were lost, the sequence that shows more is nearer to the truth.
type Losses struct{ acks, interval losses }

type losses struct {
	state              trace.CAState
	episodes, timeouts int
}

// Add takes a sample.
func (l *Losses) Add(s *trace.Sample) {
	if s.Source == trace.Diag {
		l.interval.add(s)
	} else {
		l.acks.add(s)
	}
}

func (l *losses) add(s *trace.Sample) {
	entered := s.CAState != l.state
	if s.CAState >= trace.CARecovery && entered {
		l.episodes++
	}
	if s.CAState == trace.CALoss && (entered || s.Source == trace.Event) {
		l.timeouts++
	}
	l.state = s.CAState
}

// Episodes is how many there were, at least.
func (l *Losses) Episodes() int { return max(l.acks.episodes, l.interval.episodes) }

// Timeouts is how many there were, at least.
func (l *Losses) Timeouts() int { return max(l.acks.timeouts, l.interval.timeouts) }

// Since is what was counted since an earlier state of the same Losses.
func (l Losses) Since(before Losses) Losses {
	l.acks.episodes -= before.acks.episodes
	l.acks.timeouts -= before.acks.timeouts
	l.interval.episodes -= before.interval.episodes
	l.interval.timeouts -= before.interval.timeouts
	return l
}
