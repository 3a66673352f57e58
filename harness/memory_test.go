// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"errors"
	"strings"
	"testing"

	"ccload/harness/link"
	"ccload/harness/trace"
)

func TestMemory(t *testing.T) {
	need := func(kind string, rate, rtt, bdp float64, flows int) int64 {
		e := trace.Experiment{Link: trace.Link{Kind: kind, Rate: rate, RTT: rtt, BufferBDP: bdp}, Flows: make([]trace.Flow, flows)}
		for i := range e.Flows {
			e.Flows[i].CC = "reno"
		}
		e, err := Defaults(e)
		if err != nil {
			t.Fatal(err)
		}
		return Memory(e) >> 20
	}
	small := need(link.Userspace, 20e6, 0.04, 1, 2)
	if small > 200 {
		t.Errorf("20 Mbit/s, 40 ms: %d MiB", small)
	}
	if n := need(link.Userspace, 20e6, 0.02, 1, 100); n-small < 90 || n > 320 {
		t.Errorf("100 flows: %d MiB, two need %d", n, small)
	}
	// 393 MiB are on their way and in the buffer: in the link, and in TCP's queues.
	large, netem := need(link.Userspace, 300e6, 1, 10, 1), need(link.Netem, 300e6, 1, 10, 1)
	if large < 393*3 || netem < 393*2 || netem >= large {
		t.Errorf("300 Mbit/s, 1 s, 10 BDP: %d MiB, with netem %d", large, netem)
	}
}

func TestFits(t *testing.T) {
	if err := Fits(1 << 20); err != nil {
		t.Errorf("1 MiB: %v", err)
	}
	e, ok := errors.AsType[*NoMemoryError](Fits(1 << 60))
	if !ok || e.Need != 1<<60 || e.Have < 1<<20 {
		t.Errorf("an exbibyte: %+v", e)
	}
	if n, err := parseAvailable(strings.NewReader("MemTotal:       24676516 kB\nMemAvailable:   23981952 kB\n")); err != nil || n != 23981952<<10 {
		t.Errorf("available: %d, %v", n, err)
	}
	if _, err := parseAvailable(strings.NewReader("MemTotal: 1 kB\n")); err == nil {
		t.Error("no MemAvailable, and no error")
	}
}
