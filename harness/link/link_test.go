// SPDX-License-Identifier: Apache-2.0

package link

import (
	"net"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"ccload/harness/trace"
	"ccload/internal/kerneltest"
	"ccload/internal/netns"
)

// ends makes two namespaces with a link between them and a UDP socket at each end.
func ends(t testing.TB, cfg trace.Link) (l *Link, s, r *net.UDPConn) {
	t.Helper()
	kerneltest.Privileged(t)
	var ns [2]*netns.NS
	for i := range ns {
		var err error
		if ns[i], err = netns.New(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ns[i].Close() })
	}
	l, err := New(ns[0], ns[1], "test", cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	listen := func(ns *netns.NS, ip net.IP) (c *net.UDPConn) {
		if err := ns.Do(func() (err error) { c, err = net.ListenUDP("udp4", &net.UDPAddr{IP: ip, Port: 9}); return err }); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(10 * time.Second))
		return c
	}
	return l, listen(ns[0], SenderAddr.AsSlice()), listen(ns[1], ReceiverAddr.AsSlice())
}

// Ten full packets at once: the first arrives after its serialization and half
// the RTT, each of the others a serialization later; none is lost but the fifth,
// on purpose; and what is recorded says so.
func TestLink(t *testing.T) {
	cfg := trace.Link{Rate: 12e6, RTT: 0.040, Buffer: 100, MTU: 1500, Loss: trace.Loss{Every: 5}, ECN: 1}
	l, s, r := ends(t, cfg)
	rows := make(chan []trace.LinkSample, 10)
	start := l.Now()
	if err := l.Begin(start, 1, time.Millisecond, rows); err != nil {
		t.Fatal(err)
	}
	to := r.LocalAddr().(*net.UDPAddr)
	sent := time.Now()
	for i := range 10 {
		p := make([]byte, 1472)
		p[0] = byte(i)
		if _, err := s.WriteToUDP(p, to); err != nil {
			t.Fatal(err)
		}
	}
	var b [2000]byte
	for i, k := range []byte{0, 1, 2, 3, 5, 6, 7, 8} {
		n, _, err := r.ReadFromUDP(b[:])
		if err != nil {
			t.Fatal(err)
		}
		// Never early; how late depends on the machine.
		took, want := time.Since(sent), 20*time.Millisecond+time.Duration(i+1)*time.Millisecond
		if b[0] != k || n != 1472 || took < want || took > want+20*time.Millisecond {
			t.Errorf("packet %d: got %d of %d bytes after %v, want %d after %v", i, b[0], n, took, k, want)
		}
	}
	back := time.Now()
	if _, err := r.WriteToUDP([]byte("back"), s.LocalAddr().(*net.UDPAddr)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.ReadFromUDP(b[:]); err != nil || time.Since(back) < 20*time.Millisecond {
		t.Errorf("the way back: %v after %v", err, time.Since(back))
	}
	end, err := l.Finish(start + 100*ms)
	if err != nil {
		t.Fatal(err)
	}
	// UDP is not ECN-capable here, so nothing may be marked, full queue or not.
	if c := end.Counters; c.Enqueued != 8 || c.Delivered != 12000 || c.Losses != 2 || c.Drops != 0 || c.Marks != 0 || c.Max < 6 || c.Max > 8 {
		t.Errorf("counters: %+v", c)
	}
	if end.Unseen != 0 || end.Lateness.P50 <= 0 || end.Lateness.P50 > end.Lateness.P99 || end.Lateness.P99 > end.Lateness.Max+1e-6 {
		t.Errorf("unseen %d, lateness %+v", end.Unseen, end.Lateness)
	}
	n, losses := 0, 0
	var last trace.LinkSample
	for chunk := range rows {
		for _, row := range chunk {
			if row.Time < last.Time || row.Losses < last.Losses {
				t.Errorf("row %d goes back: %+v after %+v", n, row, last)
			}
			if row.Losses > last.Losses {
				losses++
			}
			last = row
			n++
		}
	}
	if n != 101+2 || losses != 2 || last.Delivered != 12000 || last.Queue != 0 {
		t.Errorf("%d rows, %d with a loss, the last %+v", n, losses, last)
	}
	if on, err := l.Offloads(); err == nil {
		t.Errorf("a closed link tells its offloads: %v", on)
	}
}

func TestNewRefuses(t *testing.T) {
	for name, cfg := range map[string]trace.Link{
		"no rate":   {RTT: 0.01, Buffer: 1, MTU: 1500},
		"no buffer": {Rate: 1e6, RTT: 0.01, MTU: 1500},
		"memory":    {Rate: 1e11, RTT: 10, Buffer: 1, MTU: 1500},
	} {
		if l, err := New(nil, nil, "x", cfg); err == nil {
			l.Close()
			t.Errorf("%s: no error", name)
		}
	}
}

// The kernel has taken the bound on bursts, and has its own where there is none.
func TestBurst(t *testing.T) {
	for _, burst := range []int{0, 1, 7} {
		l, _, _ := ends(t, trace.Link{Rate: 12e6, Buffer: 100, MTU: 1500, Burst: burst})
		c, err := netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{NetNS: l.sender.ns.FD()})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		devices, err := c.Execute(netlink.Message{
			Header: netlink.Header{Type: unix.RTM_GETLINK, Flags: netlink.Request | netlink.Dump}, Data: make([]byte, sizeLink),
		})
		if err != nil {
			t.Fatal(err)
		}
		segments := map[string]uint32{}
		for _, d := range devices {
			var name string
			var most uint32
			ad, err := netlink.NewAttributeDecoder(d.Data[sizeLink:])
			if err != nil {
				t.Fatal(err)
			}
			for ad.Next() {
				switch ad.Type() {
				case unix.IFLA_IFNAME:
					name = ad.String()
				case unix.IFLA_GSO_MAX_SEGS:
					most = ad.Uint32()
				}
			}
			segments[name] = most
		}
		got := segments[l.sender.name]
		if burst > 0 && got != uint32(burst) || burst == 0 && got < 1000 {
			t.Errorf("a burst of %d: %d segments", burst, got)
		}
		l.Close()
	}
}

// No quantile is beyond the largest, also where they are counted in coarse steps.
func TestLatenessSummary(t *testing.T) {
	var a, b lateness
	for range 97 {
		a.note(80_000)
	}
	for range 3 {
		b.note(213 * int64(time.Millisecond))
	}
	got := summary(&a, &b)
	if want := (trace.Lateness{P50: 80e-6, P99: 0.213, Max: 0.213}); *got != want {
		t.Errorf("%+v, want %+v", *got, want)
	}
	if got := summary(&lateness{}, &lateness{}); got != nil {
		t.Errorf("of nothing: %+v", *got)
	}
}
