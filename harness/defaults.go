// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"fmt"
	"math"
	"slices"

	"ccload/harness/link"
	"ccload/harness/trace"
)

// MaxFlows is how many flows an experiment may have.
const MaxFlows = 1000

// What else it may ask for.
const (
	minRate, maxRate         = 10e3, 10e9 // bit/s
	minOffered               = 8.0        // bit/s that an application has to send
	maxRTT                   = 10.0       // s
	maxBuffer                = 1 << 20    // packets
	minMTU, maxMTU           = 576, 9000  // bytes
	maxBurst                 = 65535      // segments
	maxDuration              = 86400.0    // s
	maxJitter                = 3600.0     // s
	minInterval, maxInterval = 1e-3, 60.0
)

// Defaults fills in what an experiment leaves out and refuses one that makes no
// sense; the error says what is wrong with which value. It is pure: whether the
// kernel knows the congestion controls is found out by Run.
//
//	Link.Kind      auto, from which Run makes another; see link.Choose
//	Link.MTU       1500
//	Link.Buffer    of Link.BufferBDP, rounded, or of Link.BufferBytes, rounded down; at
//	               least one packet. By default it is 1 BDP. If it is set, it counts
//	Duration       20 s
//	Interval       10 ms
//	Flow.ID        1, 2, … if none has one
//	Flow.Duration  to the end of the experiment
//
// What is not as it was asked for, by more than 1 %, is added to Rounded.
//
// The bounds: rates from 10 kbit/s to 10 Gbit/s, an RTT of at most 10 s, at most
// 2^20 packets of buffer, MTUs from 576 to 9000, 1 to 1000 flows, at most a day,
// sampling intervals from 1 ms.
func Defaults(e trace.Experiment) (trace.Experiment, error) {
	fail := func(format string, args ...any) (trace.Experiment, error) {
		what := "experiment"
		if e.Name != "" {
			what = fmt.Sprintf("experiment %q", e.Name)
		}
		return e, fmt.Errorf(what+": "+format, args...)
	}

	l := &e.Link
	switch l.Kind {
	case "":
		l.Kind = link.Auto
	case link.Auto, link.Userspace:
	case link.Netem:
		if err := link.CanNetem(*l); err != nil {
			return fail("%w", err)
		}
	default:
		return fail("link of kind %q: there are %s, %s and %s", l.Kind, link.Auto, link.Userspace, link.Netem)
	}
	if l.Rate == 0 {
		return fail("the link has no rate")
	}
	if !within(l.Rate, minRate, maxRate) {
		return fail("rate of %g bit/s: from 10 kbit/s to 10 Gbit/s", l.Rate)
	}
	if !within(l.RTT, 0, maxRTT) {
		return fail("RTT of %g s: from 0 to %g s", l.RTT, maxRTT)
	}
	if l.MTU == 0 {
		l.MTU = 1500
	}
	if l.MTU < minMTU || l.MTU > maxMTU {
		return fail("MTU of %d bytes: from %d to %d", l.MTU, minMTU, maxMTU)
	}
	if l.Burst < 0 || l.Burst > maxBurst {
		return fail("bursts of %d segments: from 1 to %d, or 0 for as TCP likes", l.Burst, maxBurst)
	}
	bdp := l.Rate * l.RTT / 8 / float64(l.MTU) // packets
	switch {
	case l.Buffer == 0 && l.BufferBytes != 0:
		packets := l.BufferBytes / float64(l.MTU)
		if !within(packets, 0, maxBuffer) {
			return fail("buffer of %g bytes: more than 0 and at most %d packets of %d bytes", l.BufferBytes, maxBuffer, l.MTU)
		}
		l.Buffer = max(1, int(packets))
		if off(float64(l.Buffer), packets) {
			rounded(&e, "buffer: %g bytes were asked for, %.3g packets: it is %s of %d bytes", l.BufferBytes, packets, counted(l.Buffer, "packet"), l.MTU)
		}
	case l.Buffer == 0:
		if l.BufferBDP == 0 {
			l.BufferBDP = 1
		}
		packets := l.BufferBDP * bdp
		if !within(l.BufferBDP, 0, math.MaxFloat64) || packets > maxBuffer {
			return fail("buffer of %g BDP: more than 0 and at most %d packets (a BDP is %.1f)", l.BufferBDP, maxBuffer, bdp)
		}
		l.Buffer = max(1, int(math.Round(packets)))
		if off(float64(l.Buffer), packets) {
			rounded(&e, "buffer: %g BDP was asked for, %.3g packets: it is %s", l.BufferBDP, packets, counted(l.Buffer, "packet"))
		}
	}
	if l.BufferBytes != 0 || l.BufferBDP == 0 || off(float64(l.Buffer), l.BufferBDP*bdp) {
		l.BufferBDP = 0 // what it is of a link without a delay
		if bdp > 0 {
			l.BufferBDP = float64(l.Buffer) / bdp
		}
	}
	if l.Buffer < 1 || l.Buffer > maxBuffer {
		return fail("buffer of %d packets: from 1 to %d", l.Buffer, maxBuffer)
	}
	if need := link.Memory(*l); l.Kind != link.Netem && need > link.MaxMemory {
		return fail("%g bit/s, an RTT of %g s and a buffer of %d packets: the link needs %d MiB of memory for them, at most %d MiB", l.Rate, l.RTT, l.Buffer, need>>20, int64(link.MaxMemory)>>20)
	}
	switch {
	case l.Loss.Every != 0 && l.Loss.Probability != 0:
		return fail("loss of every %dth packet and with probability %g: one of them", l.Loss.Every, l.Loss.Probability)
	case l.Loss.Every != 0 && l.Loss.Every < 2:
		return fail("loss of every %dth packet: from 2", l.Loss.Every)
	case !within(l.Loss.Probability, 0, 1) || l.Loss.Probability == 1:
		return fail("loss with probability %g: from 0 to less than 1", l.Loss.Probability)
	}
	if l.ECN < 0 {
		return fail("marking when more than %d packets wait: from 1, or 0 for none", l.ECN)
	}
	if l.ECN > 0 && l.ECN+1 >= l.Buffer {
		rounded(&e, "ecn: marking above %s was asked for, and the buffer holds %d: nothing will be marked", counted(l.ECN, "packet"), l.Buffer)
	}

	if e.Duration == 0 {
		e.Duration = 20
	}
	if !within(e.Duration, 0.001, maxDuration) {
		return fail("duration of %g s: from 1 ms to a day", e.Duration)
	}
	if e.Interval == 0 {
		e.Interval = 0.01
	}
	if !within(e.Interval, minInterval, maxInterval) {
		return fail("sampling interval of %g s: from %g to %g s", e.Interval, minInterval, maxInterval)
	}
	if !within(e.Jitter, 0, maxJitter) {
		return fail("jitter of %g s: from 0 to %g s", e.Jitter, maxJitter)
	}

	if len(e.Flows) < 1 || len(e.Flows) > MaxFlows {
		return fail("%d flows: from 1 to %d", len(e.Flows), MaxFlows)
	}
	e.Flows = append([]trace.Flow(nil), e.Flows...)
	numbered := false
	for _, f := range e.Flows {
		numbered = numbered || f.ID != 0
	}
	seen := map[int]bool{}
	for i := range e.Flows {
		f := &e.Flows[i]
		if !numbered {
			f.ID = i + 1
		}
		if f.ID < 0 || f.ID > math.MaxInt32 || seen[f.ID] {
			return fail("flow %d: its number is taken or out of range", f.ID)
		}
		seen[f.ID] = true
		if f.CC == "" {
			return fail("flow %d has no congestion control", f.ID)
		}
		if !within(f.Start, 0, e.Duration) || f.Start == e.Duration {
			return fail("flow %d starts at %g s: the experiment lasts %g s", f.ID, f.Start, e.Duration)
		}
		if f.Duration == 0 {
			f.Duration = e.Duration - f.Start
		}
		// Sums of decimal fractions are off by a little.
		if !(f.Duration > 0) || f.Start+f.Duration > e.Duration*(1+1e-9) {
			return fail("flow %d lasts %g s from %g s on: the experiment lasts %g s", f.ID, f.Duration, f.Start, e.Duration)
		}
		if f.Bytes < 0 {
			return fail("flow %d has %d bytes to send", f.ID, f.Bytes)
		}
		if f.Rate != 0 && !within(f.Rate, minOffered, maxRate) {
			return fail("flow %d is offered %g bit/s: from %g to %g, or 0 for as much as it takes", f.ID, f.Rate, minOffered, maxRate)
		}
	}
	return e, nil
}

// off says whether a value is another than what was asked for: by more than the
// rounding that nobody minds.
func off(is, asked float64) bool { return math.Abs(is-asked) > 0.01*asked }

// rounded notes that something is not as it was asked for, once.
func rounded(e *trace.Experiment, format string, args ...any) {
	if s := fmt.Sprintf(format, args...); !slices.Contains(e.Rounded, s) {
		e.Rounded = append(slices.Clip(e.Rounded), s)
	}
}

// counted is a number of things.
func counted(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

// within is false for what is not a number.
func within(v, lo, hi float64) bool { return v >= lo && v <= hi }
