// SPDX-License-Identifier: Apache-2.0

package link

import (
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"ccload/harness/trace"
	"ccload/internal/kerneltest"
	"ccload/internal/netns"
)

// netemEnds makes two namespaces with a netem link between them and a UDP socket
// at each end. Where the kernel has no netem, which is no fault, it skips the test.
func netemEnds(t *testing.T, cfg trace.Link) (l *NetemLink, s, r *net.UDPConn, again func() *NetemLink) {
	t.Helper()
	kerneltest.Privileged(t)
	if err := HasNetem(); err != nil {
		t.Skip(err)
	}
	var ns [2]*netns.NS
	for i := range ns {
		var err error
		if ns[i], err = netns.New(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ns[i].Close() })
	}
	again = func() *NetemLink {
		l, err := NewNetem(ns[0], ns[1], "test", cfg)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return l
	}
	l = again()
	listen := func(ns *netns.NS, ip net.IP) (c *net.UDPConn) {
		if err := ns.Do(func() (err error) { c, err = net.ListenUDP("udp4", &net.UDPAddr{IP: ip, Port: 9}); return err }); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(30 * time.Second))
		if err := c.SetReadBuffer(1 << 20); err != nil { // or a train of 100 is lost while its reader waits for a processor
			t.Fatal(err)
		}
		return c
	}
	return l, listen(ns[0], SenderAddr.AsSlice()), listen(ns[1], ReceiverAddr.AsSlice()), again
}

// train sends full packets all at once and returns, of as many as are expected,
// how long after the first was sent each came. Others than full ones do not count.
func train(t *testing.T, s, r *net.UDPConn, send, expect int) (came []time.Duration) {
	t.Helper()
	start := time.Now()
	for range send {
		if _, err := s.WriteToUDP(make([]byte, 1472), r.LocalAddr().(*net.UDPAddr)); err != nil {
			t.Fatal(err)
		}
	}
	var b [2000]byte
	for len(came) < expect {
		n, _, err := r.ReadFromUDP(b[:])
		if err != nil {
			t.Fatalf("after %d packets of %d: %v", len(came), expect, err)
		}
		if n == 1472 {
			came = append(came, time.Since(start))
		}
	}
	return came
}

// What is sent at once comes out one serialization apart, after half the RTT: as
// much of it as the buffer holds, the packet being sent included, as in user
// space. The counters say so.
func TestNetem(t *testing.T) {
	const buffer, sent = 20, 30
	l, s, r, again := netemEnds(t, trace.Link{Rate: 12e6, RTT: 0.040, Buffer: buffer, MTU: 1500})
	on, err := l.Offloads()
	if err != nil || on["tcp-segmentation-offload"] || on["generic-receive-offload"] {
		t.Errorf("offloads %v, %v", on, err)
	}
	rows := make(chan []trace.LinkSample, 10)
	start := l.Now()
	if err := l.Begin(start, 1, time.Millisecond, rows); err != nil {
		t.Fatal(err)
	}
	for i, at := range train(t, s, r, sent, buffer) {
		if exact := 20*time.Millisecond + time.Duration(i+1)*time.Millisecond; at < exact {
			t.Errorf("packet %d came after %v, wanted no sooner than %v", i, at, exact)
		}
	}
	back := time.Now()
	if _, err := r.WriteToUDP([]byte("back"), s.LocalAddr().(*net.UDPAddr)); err != nil {
		t.Fatal(err)
	}
	var b [10]byte
	if _, _, err := s.ReadFromUDP(b[:]); err != nil || time.Since(back) < 20*time.Millisecond {
		t.Errorf("the way back: %v after %v", err, time.Since(back))
	}
	end, err := l.Finish(l.Now())
	if err != nil {
		t.Fatal(err)
	}
	c := end.Counters
	if c.Enqueued != buffer || c.Delivered != buffer*1500 || c.Drops != sent-buffer || c.Losses != 0 || c.Max != buffer || c.Area == 0 {
		t.Errorf("counters: %+v", c)
	}
	if end.Unseen != 0 || end.Warnings != nil || end.Lateness != nil {
		t.Errorf("unseen %d, warnings %q, lateness %+v", end.Unseen, end.Warnings, end.Lateness)
	}
	all := slices.Concat(drain(rows)...)
	for i, row := range all[1:] {
		if before := all[i]; row.Time < before.Time || row.Delivered < before.Delivered || row.Queue > buffer || row.QueueBytes != 1500*int64(row.Queue) {
			t.Errorf("row %d: %+v after %+v", i+1, row, before)
		}
	}
	if last := all[len(all)-1]; last.Enqueued != buffer || last.Drops != sent-buffer || last.Queue != 0 {
		t.Errorf("the last of %d rows: %+v", len(all), last)
	}
	if on, err := l.Offloads(); err == nil {
		t.Errorf("a closed link tells its offloads: %v", on)
	}
	again() // nothing of the first is in its way
}

func drain(rows chan []trace.LinkSample) (chunks [][]trace.LinkSample) {
	for chunk := range rows {
		chunks = append(chunks, chunk)
	}
	return chunks
}

// Loss with a probability: none before Begin, then about as much as it says, told
// apart from what the buffer drops; the same each time where the kernel takes a
// seed, and with another seed another.
func TestNetemLoss(t *testing.T) {
	const n, p, buffer = 2000, 0.05, 100
	cfg := trace.Link{Rate: 1e9, RTT: 0.010, Buffer: buffer, MTU: 1500, Loss: trace.Loss{Probability: p}}
	l, s, r, again := netemEnds(t, cfg)
	lost := func(l *NetemLink, seed uint64) (which []byte, warnings []string) {
		train(t, s, r, buffer, buffer)
		rows := make(chan []trace.LinkSample, 100)
		if err := l.Begin(l.Now(), seed, 10*time.Millisecond, rows); err != nil {
			t.Fatal(err)
		}
		which = make([]byte, n)
		got := make(chan int)
		go func() {
			var b [10]byte
			for i := 0; ; i++ {
				_, _, err := r.ReadFromUDP(b[:])
				if err != nil || b[0] == 0xff {
					got <- i
					return
				}
				which[int(b[0])<<8|int(b[1])] = 1
			}
		}()
		to := r.LocalAddr().(*net.UDPAddr)
		for i := range n {
			s.WriteToUDP([]byte{byte(i >> 8), byte(i)}, to)
			if i%20 == 19 {
				time.Sleep(time.Millisecond) // the buffer is not what this is about
			}
		}
		var came int
		for over := false; !over; {
			s.WriteToUDP([]byte{0xff}, to) // more than one, for it may get lost
			select {
			case came = <-got:
				over = true
			case <-time.After(20 * time.Millisecond):
			}
		}
		end, err := l.Finish(l.Now())
		if err != nil {
			t.Fatal(err)
		}
		missing := uint64(n - came)
		if c := end.Counters; c.Losses+c.Drops < missing || c.Losses+c.Drops > missing+5 || c.Losses < n*p/2 || c.Losses > n*p*2 || end.Unseen != 0 {
			t.Errorf("%d of %d came: %+v, unseen %d", came, n, c, end.Unseen)
		}
		drain(rows)
		return which, end.Warnings
	}
	first, warnings := lost(l, 1)
	second, _ := lost(again(), 1)
	third, _ := lost(again(), 2)
	same := slices.Equal(first, second)
	if len(warnings) == 0 && (!same || slices.Equal(first, third)) {
		t.Errorf("seeds 1, 1 and 2: the first two the same %v, all of them %v", same, slices.Equal(first, third))
	}
	if len(warnings) > 0 && !strings.Contains(warnings[0], "no seed") {
		t.Errorf("warnings %q", warnings)
	}
}

func TestNetemRefuses(t *testing.T) {
	for want, cfg := range map[string]trace.Link{
		"each 7th packet": {Rate: 1e6, Buffer: 1, MTU: 1500, Loss: trace.Loss{Every: 7}},
		"cannot mark":     {Rate: 1e6, Buffer: 1, MTU: 1500, ECN: 5},
		"at least 1":      {Rate: 1e6, MTU: 1500},
	} {
		if l, err := NewNetem(nil, nil, "x", cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, %v", want, l, err)
		}
	}
}

func TestChoose(t *testing.T) {
	kerneltest.Privileged(t)
	for _, asked := range []string{Userspace, Netem} {
		if kind, why, err := Choose(trace.Link{Kind: asked}); kind != asked || why != "" || err != nil {
			t.Errorf("%s: %q, %q, %v", asked, kind, why, err)
		}
	}
	tun, netem := HasTUN(), HasNetem()
	kind, why, err := Choose(trace.Link{})
	switch {
	case tun == nil && (kind != Userspace || why == "" || err != nil),
		tun != nil && netem == nil && (kind != Netem || !strings.Contains(why, tun.Error()) || err != nil),
		tun != nil && netem != nil && (err == nil || !strings.Contains(err.Error(), tun.Error()) || !strings.Contains(err.Error(), netem.Error())):
		t.Errorf("TUN %v, netem %v: %q, %q, %v", tun, netem, kind, why, err)
	}
}

// Answers of the kernel that are not what they should be are errors or nothing,
// never a panic.
func FuzzParseNetem(f *testing.F) {
	f.Add(make([]byte, sizeTC))
	f.Add(append(make([]byte, sizeTC), 24, 0, 7, 0, 20, 0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 1, 0, 0, 0, 9, 9, 9, 9))
	f.Add(append(make([]byte, sizeTC), 3, 0, 7, 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		var n netem
		if err := n.parse(b); err == nil && len(b) < sizeTC {
			t.Errorf("%d bytes were enough", len(b))
		}
	})
}

// What a kind of link cannot do as exactly as it was asked for is told.
func TestRounded(t *testing.T) {
	for name, c := range map[string]struct {
		cfg  trace.Link
		want string
	}{
		"user space":      {trace.Link{Kind: Userspace, Rate: 12345.9, RTT: 0.04, Loss: trace.Loss{Probability: 1e-12}}, ""},
		"netem":           {trace.Link{Kind: Netem, Rate: 20e6, RTT: 0.04, Loss: trace.Loss{Probability: 1e-4}}, ""},
		"too seldom":      {trace.Link{Kind: Netem, Rate: 20e6, RTT: 0.04, Loss: trace.Loss{Probability: 1e-10}}, "loss: 1e-10 was asked for: it is 0"},
		"parts of a ns":   {trace.Link{Kind: Userspace, Rate: 20e6, RTT: 3e-9}, "rtt: 3e-09 s was asked for: it is 2e-09 s"},
		"bytes by second": {trace.Link{Kind: Netem, Rate: 100, RTT: 0.04}, "rate: 100 bit/s was asked for: it is 104 bit/s"},
	} {
		if got := strings.Join(Rounded(c.cfg), "; "); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

// A packet that is in none of the kernel's counters for a moment is not taken back.
func TestNetemAccepted(t *testing.T) {
	var l NetemLink
	for i, c := range []struct {
		queue netem
		want  uint64
	}{{netem{packets: 10, waiting: 5}, 15}, {netem{packets: 10, waiting: 4}, 15}, {netem{packets: 11, waiting: 5}, 16}} {
		l.last.queue = c.queue
		if got := l.counters().Enqueued; got != c.want {
			t.Errorf("%d: %d packets, want %d", i, got, c.want)
		}
	}
}
