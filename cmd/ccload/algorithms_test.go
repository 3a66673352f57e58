// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"ccload/cc"
	"ccload/internal/kerneltest"
	"ccload/internal/netns"
	"ccload/internal/vmtest"
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

// A user who puts a BPF algorithm in the place of the kernel's own sees no
// difference. In virtual time it is the algorithms that differ, or nothing does; the
// whole comparison is experiments/equivalence.yaml.
func TestLikeTheKernels(t *testing.T) {
	vmtest.Kernel(t, "debian-6.12")
	file := filepath.Join(t.TempDir(), "like.yaml")
	if err := os.WriteFile(file, []byte(`
name: like
defaults:
  checks:
    - {compare: cwnd_mean, within: 1%, why: the same windows}
    - {compare: throughput, within: 0.5%, why: the same share of the link}
    - {compare: loss_episodes, within: 1, why: one more may just be beginning}
runs:
  - name: losses
    pairs: [[bpf_cubic, cubic], [bpf_reno, reno]]
    link: {rate: 20mbit, rtt: 20ms, buffer: 1bdp}
    duration: 8s
  - name: marks # from when the first reductions are over: how low they go hangs on a microsecond
    cc: [bpf_dctcp, dctcp]
    link: {rate: 50mbit, rtt: 10ms, buffer: 4bdp, ecn: 8p, burst: 1p}
    duration: 6s
    from: 1.5s
    checks:
      - {measure: drops, is: 0}
      - {measure: marks, least: 100}
      - {measure: utilisation, least: 90%}
`), 0o644); err != nil {
		t.Fatal(err)
	}
	program := vmtest.Program(t, "ccload/cmd/ccload")
	out, err := exec.CommandContext(t.Context(), program, "run", file, "--vm", "debian-6.12", "-o", filepath.Join(t.TempDir(), "results")).CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
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
