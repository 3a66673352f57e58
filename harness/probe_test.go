// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"math"
	"testing"
)

// The rate of a train is that of its packets, whenever the first or the last of them
// was taken in: that one came a quarter of a millisecond late is not seen.
func TestGap(t *testing.T) {
	const each = 600_000 // ns: 1500 bytes at 20 Mbit/s
	train := func(late map[int]int64) (came []int64) {
		for i := range 250 {
			came = append(came, 1_800_000_000_000_000_000+int64(i)*each+late[i])
		}
		return came
	}
	for _, c := range []struct {
		name  string
		late  map[int]int64
		error float64
	}{
		{"exact", nil, 1e-12},
		{"the last late", map[int]int64{249: 255_000}, 1e-4},
		{"the first late", map[int]int64{0: 255_000}, 1e-4},
		{"a pause in the middle", map[int]int64{120: 900_000, 121: 300_000}, 1e-4},
	} {
		if got := gap(train(c.late)); math.Abs(got/each-1) > c.error {
			t.Errorf("%s: %.1f ns, want %d within %g", c.name, got, each, c.error)
		}
	}
	if got := gap([]int64{5, 105}); got != 100 {
		t.Errorf("two packets: %g", got)
	}
}
