// SPDX-License-Identifier: Apache-2.0

package link

import (
	"encoding/binary"
	"math"
	"testing"

	"ccload/harness/trace"
)

const ms = int64(1e6)

func queue(t *testing.T, cfg trace.Link, seed uint64) *Queue {
	t.Helper()
	q, err := NewQueue(cfg, seed, 0)
	if err != nil {
		t.Fatal(err)
	}
	return q
}

// ipv4 is a packet of n bytes with a correct header checksum.
func ipv4(n int, ecn byte) []byte {
	p := make([]byte, n)
	p[0], p[1], p[8], p[9] = 0x45, ecn, 64, 6
	binary.BigEndian.PutUint16(p[2:], uint16(n))
	copy(p[12:], []byte{198, 18, 0, 1, 198, 18, 0, 2})
	binary.BigEndian.PutUint16(p[10:], ^headerSum(p))
	return p
}

// headerSum is the ones' complement sum of an IPv4 header; all ones if its checksum holds.
func headerSum(p []byte) uint16 {
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(p[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

func TestSerialization(t *testing.T) {
	q := queue(t, trace.Link{Rate: 12e6, Buffer: 10}, 1) // 1500 bytes take 1 ms
	for i := range 3 {
		if at, fate := q.Arrive(5*ms, ipv4(1500, 0)); at != (6+int64(i))*ms || fate != Passed {
			t.Errorf("packet %d: leaves at %d, %v", i, at, fate)
		}
	}
	q.Advance(7*ms - 1)
	if q.Len() != 2 || q.Bytes() != 3000 || q.Delivered != 1500 {
		t.Errorf("just before 7 ms: %d packets, %d bytes wait, %d delivered", q.Len(), q.Bytes(), q.Delivered)
	}
	q.Advance(7 * ms)
	if q.Len() != 1 || q.Delivered != 3000 {
		t.Errorf("at 7 ms: %d packets wait, %d delivered", q.Len(), q.Delivered)
	}
	// 3 packets for 6-5, 2 for 7-6: 5 ms × packets since the start.
	if q.Max != 3 || q.Area != uint64(5*ms) {
		t.Errorf("at 7 ms: at most %d waited, %d packet-ns", q.Max, q.Area)
	}
	// An idle link does not save up: half a packet after an hour takes half a millisecond.
	if at, _ := q.Arrive(3600e9, ipv4(750, 0)); at != 3600e9+ms/2 {
		t.Errorf("after idling: leaves at %d", at)
	}
}

// 3 bytes at 7 bit/s take 24/7 s: over many packets not a nanosecond is lost.
func TestFractionsOfNanoseconds(t *testing.T) {
	q := queue(t, trace.Link{Rate: 7, Buffer: 7000}, 1)
	var at int64
	for range 7000 {
		at, _ = q.Arrive(0, make([]byte, 3))
	}
	if at != 24000e9 {
		t.Errorf("7000 packets: the last leaves at %d ns, want %d", at, int64(24000e9))
	}
}

func TestDropTail(t *testing.T) {
	q := queue(t, trace.Link{Rate: 12e6, Buffer: 3}, 1)
	var fates []Fate
	for range 5 {
		_, f := q.Arrive(0, ipv4(1500, 0))
		fates = append(fates, f)
	}
	if fates[2] != Passed || fates[3] != Dropped || fates[4] != Dropped || q.Drops != 2 || q.Enqueued != 3 || q.Len() != 3 {
		t.Errorf("fates %v, counters %+v", fates, q.Counters)
	}
	if at, f := q.Arrive(ms, ipv4(1500, 0)); f != Passed || at != 4*ms {
		t.Errorf("when one has left: %v, leaves at %d", f, at)
	}
}

func TestMarkingIsAStep(t *testing.T) {
	q := queue(t, trace.Link{Rate: 12e6, Buffer: 10, ECN: 2}, 1)
	for i, c := range []struct {
		ecn  byte
		want Fate
	}{{2, Passed}, {2, Passed}, {2, Passed}, {2, Marked}, {1, Marked}, {0, Passed}, {3, Marked}} {
		p := ipv4(1500, 0x28|c.ecn)
		_, fate := q.Arrive(0, p)
		if fate != c.want {
			t.Errorf("packet %d, ECN %d, found %d waiting: %v, want %v", i, c.ecn, i, fate, c.want)
		}
		want := c.ecn
		if c.want == Marked {
			want = ce
		}
		if p[1] != 0x28|want || headerSum(p) != 0xffff {
			t.Errorf("packet %d: traffic class %#x, header sum %#x", i, p[1], headerSum(p))
		}
	}
	if q.Marks != 3 {
		t.Errorf("%d marks", q.Marks)
	}
	v6 := make([]byte, 60)
	v6[0], v6[1] = 0x6b, 0x2f // traffic class 0xb2, flow label f…
	if _, fate := q.Arrive(0, v6); fate != Marked || v6[0] != 0x6b || v6[1] != 0x3f {
		t.Errorf("IPv6: %v, header % x", fate, v6[:2])
	}
}

// The incremental checksum holds for every header.
func FuzzMark(f *testing.F) {
	f.Add([]byte{0x45, 2, 0, 20, 0, 0, 0, 0, 64, 6, 0xff, 0xff, 1, 2, 3, 4, 5, 6, 7, 8})
	f.Fuzz(func(t *testing.T, p []byte) {
		if len(p) < 20 || p[0]>>4 != 4 {
			mark(p)
			return
		}
		p[10], p[11] = 0, 0
		binary.BigEndian.PutUint16(p[10:], ^headerSum(p))
		marked := mark(p)
		if headerSum(p) != 0xffff {
			t.Errorf("% x: sum %#x", p[:20], headerSum(p))
		}
		if marked != (p[1]&3 == ce) {
			t.Errorf("% x: marked %v", p[:20], marked)
		}
	})
}

func TestLossOfEveryNth(t *testing.T) {
	q := queue(t, trace.Link{Rate: 1e9, Buffer: 1000, Loss: trace.Loss{Every: 10}}, 1)
	for i := 1; i <= 100; i++ {
		if _, f := q.Arrive(int64(i)*ms, ipv4(100, 0)); (f == Lost) != (i%10 == 0) {
			t.Errorf("packet %d: %v", i, f)
		}
	}
	if q.Losses != 10 || q.Drops != 0 {
		t.Errorf("%+v", q.Counters)
	}
}

func TestRandomLoss(t *testing.T) {
	const n, p = 100000, 0.01
	lost := func(seed uint64) (which []int) {
		q := queue(t, trace.Link{Rate: 1e9, Buffer: 1000, Loss: trace.Loss{Probability: p}}, seed)
		for i := range n {
			if _, f := q.Arrive(int64(i)*ms, ipv4(100, 0)); f == Lost {
				which = append(which, i)
			}
		}
		return which
	}
	a, again, b := lost(1), lost(1), lost(2)
	if len(a) != len(again) || a[len(a)-1] != again[len(again)-1] {
		t.Error("the same seed loses other packets")
	}
	if len(a) == len(b) && a[0] == b[0] && a[1] == b[1] {
		t.Error("another seed loses the same packets")
	}
	// Five standard deviations of the binomial distribution.
	if sd := math.Sqrt(n * p * (1 - p)); math.Abs(float64(len(a))-n*p) > 5*sd {
		t.Errorf("%d of %d lost, want about %g", len(a), n, n*p)
	}
}
