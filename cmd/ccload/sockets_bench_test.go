// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os/exec"
	"slices"
	"testing"
	"time"

	"ccload/internal/kerneltest"
	"ccload/internal/netns"

	"golang.org/x/sys/unix"
)

// BenchmarkSockets is the wall time of whole processes in a network namespace with
// 100,000 connected sockets: counting them by their congestion control, by turns
// with ss, which shows each with its own and is spared the look-up of the ports'
// names; and moving all of them to another, and back.
func BenchmarkSockets(b *testing.B) {
	kerneltest.Privileged(b)
	ss, err := exec.LookPath("ss")
	if err != nil {
		b.Skip(err)
	}
	ccload := built(b)
	ns, err := netns.New()
	if err != nil {
		b.Fatal(err)
	}
	defer ns.Close()
	const n = 100_000
	if err := ns.Do(func() error { return crowd(b, n) }); err != nil {
		b.Fatal(err)
	}
	run := func(b *testing.B, args ...string) (out []byte, seconds float64) {
		cmd := exec.Command(args[0], args[1:]...)
		var stdout bytes.Buffer
		if args[0] == ccload { // what ss has to say is worth 30 MB
			cmd.Stdout = &stdout
		}
		begin := time.Now()
		if err := ns.Do(cmd.Run); err != nil {
			b.Fatalf("%q: %v", args, err)
		}
		return stdout.Bytes(), time.Since(begin).Seconds()
	}
	b.Run("list", func(b *testing.B) {
		var ours, theirs, ratios []float64
		for b.Loop() {
			out, a := run(b, ccload, "list", "--json")
			_, t := run(b, ss, "-tin")
			var entries []struct{ Sockets int }
			if err := json.Unmarshal(out, &entries); err != nil {
				b.Fatal(err)
			}
			counted := 0
			for _, e := range entries {
				counted += e.Sockets
			}
			if counted < n {
				b.Fatalf("counted %d of %d", counted, n)
			}
			ours, theirs, ratios = append(ours, a), append(theirs, t), append(ratios, a/t)
		}
		b.ReportMetric(median(ours)*1000, "ccload-ms")
		b.ReportMetric(median(theirs)*1000, "ss-ms")
		b.ReportMetric(median(ratios), "ratio")
	})
	b.Run("move", func(b *testing.B) {
		var there, back []float64
		for b.Loop() {
			for i, args := range [2][]string{{ccload, "use", "reno"}, {ccload, "use", "--restore"}} {
				out, t := run(b, append(args, "--sockets", "state established", "--json")...)
				var m struct{ Moved int }
				if err := json.Unmarshal(out, &m); err != nil || m.Moved != n {
					b.Fatalf("%q: %s, %v", args, out, err)
				}
				times := [2]*[]float64{&there, &back}[i]
				*times = append(*times, t)
			}
		}
		b.ReportMetric(median(there)*1000, "move-ms")
		b.ReportMetric(median(back)*1000, "restore-ms")
	})
}

func median(x []float64) float64 {
	x = slices.Sorted(slices.Values(x))
	return (x[(len(x)-1)/2] + x[len(x)/2]) / 2
}

// perListener is how many connections one address takes: fewer than there are ports
// to come from.
const perListener = 10_000

// crowd connects n sockets to each other, over loopback of the network namespace
// that the thread is in, until the end of the benchmark. There are more than a
// process may have open: they are on their way to nobody (SCM_RIGHTS, unix(7)).
func crowd(b *testing.B, n int) error {
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(socket)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(socket, unix.SIOCSIFFLAGS, lo); err != nil {
		return err
	}
	const batch = 125 // pairs; a message takes 253 descriptors
	for done := 0; done < n/2; done += perListener {
		way, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		b.Cleanup(func() { unix.Close(way[0]); unix.Close(way[1]) })
		l, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(l)
		at := &unix.SockaddrInet4{Addr: [4]byte{127, 0, 1, byte(done / perListener)}, Port: 7000}
		if err := errors.Join(unix.Bind(l, at), unix.Listen(l, batch)); err != nil {
			return err
		}
		for range perListener / batch {
			if err := connectTo(at, l, way[0], batch); err != nil {
				return err
			}
		}
	}
	return nil
}

// connectTo connects some sockets, and sends both ends of each away.
func connectTo(at unix.Sockaddr, listener, way, n int) error {
	var fds []int
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	for range n {
		c, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		fds = append(fds, c)
		if err := unix.Connect(c, at); err != nil {
			return err
		}
		s, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
		if err != nil {
			return err
		}
		fds = append(fds, s)
		for _, fd := range []int{c, s} { // no TIME-WAIT
			if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
				return err
			}
		}
	}
	return unix.Sendmsg(way, []byte{0}, unix.UnixRights(fds...), nil, unix.MSG_DONTWAIT)
}
