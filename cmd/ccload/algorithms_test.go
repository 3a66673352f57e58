// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"math"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"ccload/cc"
	"ccload/harness"
	"ccload/harness/trace"
	"ccload/internal/kerneltest"
	"ccload/internal/netns"
	"ccload/structops"
)

// attach registers an algorithm of the catalogue for the time of a test.
func attach(t *testing.T, name string) {
	t.Helper()
	kerneltest.Privileged(t)
	spec, err := structops.Parse(cc.Lookup(name).Object())
	if err != nil {
		t.Fatal(err)
	}
	obj, err := spec.Load(name)
	if err != nil {
		t.Fatal(err)
	}
	link, err := obj.Attach(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { link.Close(); obj.Close() })
}

func measure(t *testing.T, e trace.Experiment) *trace.Result {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "run")
	if _, err := harness.Run(context.Background(), e, harness.Options{Dir: dir}); err != nil {
		t.Fatal(err)
	}
	r, err := trace.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: %+v\n%+v", e.Flows[0].CC, r.Run.Flows, r.Run.Bottleneck)
	return r
}

// A user who puts bpf_cubic in the place of cubic sees no difference, nor with
// reno and bpf_reno. Slow start hangs on each moment's noise, so the windows are
// compared from the first loss on.
func TestLikeTheKernels(t *testing.T) {
	for kernels, ours := range map[string]string{"cubic": "bpf_cubic", "reno": "bpf_reno"} {
		t.Run(ours, func(t *testing.T) {
			attach(t, ours)
			mean := map[string]float64{}
			for _, name := range []string{kernels, ours} {
				r := measure(t, trace.Experiment{
					Duration: 8, PerAck: true, Seed: 1, Flows: []trace.Flow{{CC: name}},
					Link: trace.Link{Rate: 20e6, RTT: 0.020, BufferBDP: 1},
				})
				mean[name] = meanCwnd(r)
				if r.Run.Bottleneck.Utilisation < 0.95 || r.Run.Flows[0].LossEpisodes < 2 {
					t.Errorf("%s: %+v, %+v", name, r.Run.Bottleneck, r.Run.Flows[0])
				}
			}
			if ratio := mean[ours] / mean[kernels]; math.Abs(ratio-1) > 0.05 {
				t.Errorf("mean window %.1f, the kernel's %.1f: ratio %.3f", mean[ours], mean[kernels], ratio)
			}
		})
	}
}

// meanCwnd is weighted by time, from the end of the first recovery to that of the last.
func meanCwnd(r *trace.Result) float64 {
	var sum, since, until, area float64
	var last *trace.Sample
	for i := range r.Samples {
		s := &r.Samples[i]
		if s.Source != trace.Ack {
			continue
		}
		if last != nil && since > 0 {
			area += float64(last.Cwnd) * (s.Time - last.Time)
		}
		if last != nil && last.CAState == trace.CARecovery && s.CAState == trace.CAOpen {
			if since == 0 {
				since = s.Time
			} else {
				until, sum = s.Time, area
			}
		}
		last = s
	}
	return sum / (until - since)
}

// RFC 8257: the receiver echoes each mark once, the sender keeps the queue at
// the threshold without a loss, and the window is BDP + K.
func TestDCTCP(t *testing.T) {
	attach(t, "bpf_dctcp")
	const bdp, k = 41.7, 8
	r := measure(t, trace.Experiment{
		Duration: 5, PerAck: true, Seed: 1, Flows: []trace.Flow{{CC: "bpf_dctcp"}},
		Link: trace.Link{Rate: 50e6, RTT: 0.010, BufferBDP: 4, ECN: k},
	})
	if b := r.Run.Bottleneck; b.Drops != 0 || b.Marks < 100 || b.Utilisation < 0.9 {
		t.Errorf("bottleneck %+v", b)
	}
	var last trace.Sample
	var area, since float64
	for _, s := range r.Samples {
		if s.Source != trace.Ack {
			continue
		}
		if s.Time > 2 {
			if since == 0 {
				since = s.Time
			} else {
				area += float64(last.Cwnd) * (s.Time - last.Time)
			}
		}
		last = s
	}
	// Without the state machine of §3.2 every segment until the sender's CWR would count.
	if marks := float64(r.Run.Bottleneck.Marks); math.Abs(float64(last.DeliveredCE)-marks) > 0.02*marks+2*k {
		t.Errorf("%d segments delivered with an echo, %g were marked", last.DeliveredCE, marks)
	}
	if mean := area / (last.Time - since); math.Abs(mean/(bdp+k)-1) > 0.15 {
		t.Errorf("mean window %.1f, want about BDP + K = %.1f", mean, bdp+k)
	}
}

// Where the other end does not agree to ECN, the socket is the kernel's reno, and
// is not marked ECN-capable any more.
func TestDCTCPWithoutECN(t *testing.T) {
	attach(t, "bpf_dctcp")
	for listener, want := range map[string]string{"reno": "reno", "bpf_dctcp": "bpf_dctcp"} {
		ns, err := netns.New()
		if err != nil {
			t.Fatal(err)
		}
		defer ns.Close()
		var got string
		var tos int
		err = ns.Do(func() error {
			if err := loopbackUp(); err != nil {
				return err
			}
			// Without a need of its own this end takes no ECN.
			if err := os.WriteFile("/proc/sys/net/ipv4/tcp_ecn", []byte("0"), 0); err != nil {
				return err
			}
			lc := net.ListenConfig{Control: choose(listener)}
			l, err := lc.Listen(t.Context(), "tcp4", "127.0.0.1:0")
			if err != nil {
				return err
			}
			defer l.Close()
			d := net.Dialer{Control: choose("bpf_dctcp")}
			conn, err := d.Dial("tcp4", l.Addr().String())
			if err != nil {
				return err
			}
			defer conn.Close()
			raw, err := conn.(*net.TCPConn).SyscallConn()
			if err != nil {
				return err
			}
			raw.Control(func(fd uintptr) {
				if got, err = unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION); err == nil {
					tos, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TOS)
				}
			})
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		if got != want || (tos&3 != 0) != (want == "bpf_dctcp") {
			t.Errorf("a listener with %s: the socket runs %q, traffic class %#x; want %q", listener, got, tos, want)
		}
	}
}

// choose sets the congestion control of a socket before it is used.
func choose(name string) func(string, string, syscall.RawConn) error {
	return func(_, _ string, raw syscall.RawConn) (err error) {
		cerr := raw.Control(func(fd uintptr) {
			err = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, name)
		})
		return errors.Join(err, cerr)
	}
}

// loopbackUp sets the loopback device of the thread's namespace up.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	r, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	r.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, r)
}
