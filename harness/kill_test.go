// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"ccload/harness/link"
	"ccload/harness/trace"
	"ccload/internal/inetdiag"
	"ccload/internal/kerneltest"
	"ccload/internal/netns"
)

// childDir tells the test binary that it is the child of a test that kills or stops it,
// and where its results go; childKind, what its link is to be, and childTime how long
// it runs, in s.
const (
	childDir  = "CCLOAD_TEST_KILL"
	childKind = "CCLOAD_TEST_KILL_KIND"
	childTime = "CCLOAD_TEST_KILL_TIME"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childDir); dir != "" {
		duration, err := strconv.ParseFloat(os.Getenv(childTime), 64)
		if err != nil {
			panic(err)
		}
		e := trace.Experiment{Link: trace.Link{Kind: os.Getenv(childKind), Rate: 20e6, RTT: 0.02}, Flows: flows("cubic"), Duration: duration, PerAck: true}
		_, err = Run(context.Background(), e, Options{Dir: dir})
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// A process that is killed in the middle of a run leaves no device, no namespace and no
// connection, and its results say that they are not whole.
func TestKill(t *testing.T) {
	kerneltest.Privileged(t)
	cmd, dir := child(t, "", 60)
	children := map[string]*netns.NS{} // by the child's descriptors
	for path := range descriptors(t, cmd.Process.Pid) {
		ns, err := netns.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer ns.Close()
		if devices := devices(t, ns); strings.Contains(devices, "cc") {
			children[path] = ns
		}
	}
	if len(children) != 2 {
		t.Fatalf("the child has %d namespaces with devices of ours, want 2", len(children))
	}

	cmd.Process.Kill()
	cmd.Wait()
	// We hold the namespaces ourselves now, so they can be looked into: the devices must
	// go with their descriptors, and nobody else may hold the namespaces.
	for path, ns := range children {
		deadline := time.Now().Add(5 * time.Second)
		for strings.Contains(devices(t, ns), "cc") {
			if time.Now().After(deadline) {
				t.Errorf("%s: the devices are still there: %s", path, devices(t, ns))
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		if open := sockets(t, ns); open > 0 {
			t.Errorf("%s: %d sockets are left", path, open)
		}
		ino, err := ns.Inode()
		if err != nil {
			t.Fatal(err)
		}
		visible, err := netns.List("/")
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range visible {
			if v.Inode == ino {
				t.Errorf("%s: still in use: %+v", path, v)
			}
		}
	}
	if _, err := trace.Open(dir); err == nil || !strings.Contains(err.Error(), "the run did not end") {
		t.Errorf("the results of a killed run: %v", err)
	}
}

// sockets counts the TCP sockets of a namespace.
func sockets(t *testing.T, ns *netns.NS) (n int) {
	t.Helper()
	err := ns.Do(func() error {
		conn, err := inetdiag.Dial()
		if err != nil {
			return err
		}
		defer conn.Close()
		return conn.Dump(0, false, func(*inetdiag.Socket) error { n++; return nil })
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// child starts a run in a process of its own and returns once it sends.
func child(t *testing.T, kind string, seconds float64) (cmd *exec.Cmd, dir string) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir = filepath.Join(t.TempDir(), "result")
	cmd = exec.Command(exe)
	cmd.Env = append(os.Environ(), childDir+"="+dir, childKind+"="+kind, fmt.Sprint(childTime, "=", seconds))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })

	deadline := time.Now().Add(20 * time.Second)
	for {
		if _, err := os.Stat(dir); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the child does not begin")
		}
		time.Sleep(50 * time.Millisecond)
	}
	time.Sleep(300 * time.Millisecond)
	return cmd, dir
}

// descriptors finds a process's open network namespaces, a path for each.
func descriptors(t *testing.T, pid int) map[string]bool {
	t.Helper()
	paths, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	found, seen := map[string]bool{}, map[string]bool{}
	for _, p := range paths {
		if to, err := os.Readlink(p); err == nil && strings.HasPrefix(to, "net:[") && !seen[to] {
			seen[to], found[p] = true, true
		}
	}
	return found
}

func devices(t *testing.T, ns *netns.NS) (list string) {
	t.Helper()
	if err := ns.Do(func() error {
		b, err := os.ReadFile("/proc/thread-self/net/dev")
		list = string(b)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return list
}

// A run whose process stood still for a while says when, and does not pass: not by its
// median, which a stop of a part of the time leaves as it is.
func TestStopped(t *testing.T) {
	kerneltest.Privileged(t)
	for _, kind := range []string{link.Userspace, link.Netem} {
		t.Run(kind, func(t *testing.T) {
			if kind == link.Netem {
				if err := link.HasNetem(); err != nil {
					t.Skip(err)
				}
			}
			cmd, dir := child(t, kind, 4)
			time.Sleep(time.Second)
			const stop = 1200 * time.Millisecond
			cmd.Process.Signal(syscall.SIGSTOP)
			time.Sleep(stop)
			cmd.Process.Signal(syscall.SIGCONT)
			cmd.Wait()
			res, err := trace.Open(dir)
			if err != nil {
				t.Fatal(err)
			}
			r := res.Run
			failed := slices.ContainsFunc(r.Checks, func(c trace.Check) bool { return c.Name == "seconds spoiled by the machine" && !c.OK })
			var seconds []int
			var longest, latest float64
			for _, d := range r.Disturbances {
				longest = max(longest, d.Gap)
				if d.LatenessMax != nil {
					latest = max(latest, *d.LatenessMax)
				}
				if d.Gap > 0.9*stop.Seconds() {
					seconds = append(seconds, d.Second)
				}
			}
			if !failed || longest < 0.9*stop.Seconds() || len(seconds) < 2 || kind == link.Userspace && latest < 0.9*stop.Seconds() {
				t.Errorf("check failed: %v, no run for %g s, packets %g s late, in the seconds %v of %+v", failed, longest, latest, seconds, r.Disturbances)
			}
			if l := r.Link.Lateness; l != nil && (l.P50 > l.P99 || l.P99 > l.Max) {
				t.Errorf("lateness %+v", l)
			}
		})
	}
}
