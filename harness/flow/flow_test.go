// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"context"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ccload/internal/kerneltest"
	"ccload/internal/netns"
)

// loopback is a namespace of its own with its loopback device up.
func loopback(t *testing.T) *netns.NS {
	t.Helper()
	kerneltest.Privileged(t)
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	err = ns.Do(func() error {
		s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(s)
		r, err := unix.NewIfreq("lo")
		if err != nil {
			return err
		}
		r.SetUint16(unix.IFF_UP)
		return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, r)
	})
	if err != nil {
		t.Fatal(err)
	}
	return ns
}

var (
	from = netip.MustParseAddrPort("127.0.0.1:10000")
	to   = netip.MustParseAddrPort("127.0.0.1:20000")
)

func open(t *testing.T, ns *netns.NS, cc string) *Sender {
	t.Helper()
	s, err := Open(ns, from, cc)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func listen(t *testing.T, ns *netns.NS) *Receiver {
	t.Helper()
	r, err := Listen(ns, to, "reno")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func TestBytes(t *testing.T) {
	ns := loopback(t)
	r := listen(t, ns)
	const n = 3_000_001
	res, err := open(t, ns, "reno").Send(t.Context(), to, Load{Duration: 10 * time.Second, Bytes: n})
	if err != nil {
		t.Fatal(err)
	}
	if res.Bytes != n || !res.Connected || res.Duration > 5*time.Second {
		t.Errorf("got %+v", res)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if err := r.Close(); err != nil {
		t.Errorf("closed again: %v", err)
	}
}

func TestDuration(t *testing.T) {
	ns := loopback(t)
	listen(t, ns)
	s := open(t, ns, "cubic")
	start := time.Now()
	res, err := s.Send(t.Context(), to, Load{Duration: 300 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	if d := time.Since(start); d < 300*time.Millisecond || d > 600*time.Millisecond || res.Bytes < 1<<20 {
		t.Errorf("after %v: %+v", d, res)
	}
	if err := s.Close(); err != nil {
		t.Errorf("closed again: %v", err)
	}
}

// An application never sends what it does not have yet.
func TestRate(t *testing.T) {
	ns := loopback(t)
	const rate = 2e6
	for name, load := range map[string]Load{
		"bytes":    {Duration: 10 * time.Second, Bytes: 50_001, Rate: rate},
		"duration": {Duration: 205 * time.Millisecond, Rate: rate},
	} {
		r := listen(t, ns)
		res, err := open(t, ns, "reno").Send(t.Context(), to, load)
		if err != nil {
			t.Fatal(err)
		}
		if most := uint64(rate / 8 * res.Duration.Seconds()); res.Bytes == 0 || res.Bytes > most {
			t.Errorf("%s: %d bytes in %v, of %d that were due", name, res.Bytes, res.Duration, most)
		}
		if load.Bytes > 0 && res.Bytes != uint64(load.Bytes) {
			t.Errorf("%s: %d bytes", name, res.Bytes)
		}
		r.Close()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	listen(t, ns)
	res, err := open(t, ns, "reno").Send(ctx, to, Load{Duration: time.Minute, Rate: 8})
	if err != nil || res.Bytes > 1 || res.Duration > 2*time.Second {
		t.Errorf("cancelled: %+v, %v", res, err)
	}
}

func TestCancel(t *testing.T) {
	ns := loopback(t)
	listen(t, ns)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	start := time.Now()
	res, err := open(t, ns, "reno").Send(ctx, to, Load{Duration: time.Minute})
	if err != nil || res.Bytes == 0 || time.Since(start) > 2*time.Second {
		t.Errorf("after %v: %+v, %v", time.Since(start), res, err)
	}
}

// A receiver that does not answer must not keep the sender beyond its time.
func TestNoAnswer(t *testing.T) {
	ns := loopback(t)
	fd, err := socket(ns, to, "reno") // bound, listening, and its queue full: SYNs are dropped
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	first, err := Open(ns, netip.MustParseAddrPort("127.0.0.1:10001"), "reno")
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	if ok, err := first.connect(to); !ok || err != nil {
		t.Fatal(ok, err)
	}
	start := time.Now()
	res, err := open(t, ns, "reno").Send(t.Context(), to, Load{Duration: 200 * time.Millisecond})
	if err != nil || res.Connected || res.Bytes != 0 || time.Since(start) > 2*time.Second {
		t.Errorf("after %v: %+v, %v", time.Since(start), res, err)
	}
}

func TestErrors(t *testing.T) {
	ns := loopback(t)
	_, err := open(t, ns, "reno").Send(t.Context(), to, Load{Duration: time.Second})
	if err == nil || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("nobody listens: %v", err)
	}
	if _, err := Open(ns, from, "no_such_cc"); err == nil || !strings.Contains(err.Error(), `congestion control "no_such_cc": no such file`) {
		t.Errorf("unknown congestion control: %v", err)
	}
	listen(t, ns)
	if _, err := Listen(ns, to, "reno"); err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("the address is taken: %v", err)
	}
}

// A socket that was given another congestion control behind our back is noticed.
func TestReadBack(t *testing.T) {
	ns := loopback(t)
	listen(t, ns)
	s := open(t, ns, "cubic")
	if err := unix.SetsockoptString(s.fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, "reno"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Send(t.Context(), to, Load{Duration: time.Second}); err == nil || !strings.Contains(err.Error(), `"cubic": the socket has "reno"`) {
		t.Errorf("got %v", err)
	}
}
