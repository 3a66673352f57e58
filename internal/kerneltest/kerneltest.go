// SPDX-License-Identifier: Apache-2.0

// Package kerneltest lets ordinary tests use the real kernel and proves that
// they leave it as it was: the names of its congestion controls, its network
// namespaces, its devices, the pins on bpffs and the sysctls that ccload
// touches.
package kerneltest

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"ccload/internal/netns"

	"golang.org/x/sys/unix"
)

// Require names the environment variable that turns skipped privileged tests
// into failures when it is 1.
const Require = "CCLOAD_REQUIRE_PRIVILEGED"

// settle is how long the kernel may take to finish what a test began to take
// down: namespaces are freed by a work queue, and the name of a congestion
// control lingers until its last program has left an RCU grace period.
const settle = 5 * time.Second

// Privileged skips the test unless it runs as root, and fails it if afterwards
// the kernel is not as it was before the call. Call it first, so that its check
// runs after every other cleanup. Tests that call it exclude each other, also
// across processes, for one's leftovers must not be taken for another's; they
// must not call t.Parallel. A subtest of such a test may call it again.
func Privileged(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		Skip(t, "needs root")
	}
	lock(t)
	Unchanged(t)
}

// Skip skips the test for want of something that the machine should have; where
// privileged tests are required it fails the test instead.
func Skip(t testing.TB, why string) {
	t.Helper()
	if os.Getenv(Require) == "1" {
		t.Fatalf("%s, and %s=1 forbids to skip", why, Require)
	}
	t.Skip(why)
}

// Unchanged takes a snapshot now and compares it at the end of the test.
func Unchanged(t testing.TB) {
	t.Helper()
	before, err := Take()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := before.Check(); err != nil {
			t.Error(err)
		}
	})
}

// held is this process's turn at the kernel. It is counted, so that a subtest
// does not wait for its parent.
var held struct {
	sync.Mutex
	n int
	f *os.File
}

func lock(t testing.TB) {
	t.Helper()
	held.Lock()
	defer held.Unlock()
	if held.n == 0 {
		f, err := os.OpenFile("/run/lock/ccload-test", os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
		if errors.Is(err, fs.ErrNotExist) {
			f, err = os.OpenFile("/run/ccload-test.lock", os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
			t.Fatalf("wait for other privileged tests: %v", err)
		}
		held.f = f
	}
	held.n++
	t.Cleanup(func() {
		held.Lock()
		defer held.Unlock()
		if held.n--; held.n == 0 {
			held.f.Close()
		}
	})
}

// Name gives a network namespace a name for the length of the test: only what a
// process is in, or what has a name, can be seen.
func Name(t testing.TB, ns *netns.NS, name string) {
	t.Helper()
	if err := os.MkdirAll("/run/netns", 0o755); err != nil {
		t.Fatal(err)
	}
	path := "/run/netns/" + name
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(path) })
	if err := unix.Mount(ns.Path(), path, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(path, 0) })
}

// More gives further lines for the snapshots of a package's tests. A package that
// structops does not import may count the congestion controls that are in the kernel:
// one that only the connection of a closed socket keeps has no name there.
var More func() ([]string, error)

// Snapshot is what the kernel holds, as a set of lines for people.
type Snapshot map[string]bool

// Take looks at the kernel.
func Take() (Snapshot, error) {
	s := Snapshot{}
	add := func(format string, args ...any) { s[fmt.Sprintf(format, args...)] = true }

	const sysctls = "/proc/sys/net/ipv4/"
	for _, f := range []string{"tcp_available_congestion_control", "tcp_allowed_congestion_control", "tcp_congestion_control"} {
		b, err := os.ReadFile(sysctls + f)
		if err != nil {
			return nil, fmt.Errorf("snapshot of the kernel: %w", err)
		}
		for name := range strings.FieldsSeq(string(b)) {
			add("%s: %s", f, name)
		}
	}

	visible, err := netns.List("/")
	if err != nil {
		return nil, fmt.Errorf("snapshot of the kernel: %w", err)
	}
	for _, v := range visible {
		// What other people's processes do in namespaces of theirs is not ours.
		if slices.ContainsFunc(v.PIDs, func(pid int) bool {
			group, err := unix.Getpgid(pid)
			return err == nil && group == unix.Getpgrp()
		}) {
			add("network namespace net:[%d]", v.Inode)
		}
		for _, n := range v.Names {
			add("network namespace net:[%d] named %s", v.Inode, n)
		}
	}
	// A namespace without a process or a name lives on in our descriptors.
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil, fmt.Errorf("snapshot of the kernel: %w", err)
	}
	for _, fd := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(to, "net:[") {
			add("network namespace %s", to)
		}
	}

	devices, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("snapshot of the kernel: %w", err)
	}
	for _, d := range devices {
		add("device %s", d.Name)
	}

	// bpffs itself may get mounted: its two standard files do not count.
	const bpffs = "/sys/fs/bpf"
	err = filepath.WalkDir(bpffs, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && path != bpffs && path != bpffs+"/maps.debug" && path != bpffs+"/progs.debug" {
			add("pin %s", path)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("snapshot of the kernel: %w", err)
	}

	if More != nil {
		lines, err := More()
		if err != nil {
			return nil, fmt.Errorf("snapshot of the kernel: %w", err)
		}
		for _, l := range lines {
			add("%s", l)
		}
	}
	return s, nil
}

// Check looks again until the kernel is as it was, and says what differs if it
// does not get there soon.
func (s Snapshot) Check() error {
	deadline := time.Now().Add(settle)
	for {
		now, err := Take()
		if err != nil {
			return err
		}
		if maps.Equal(s, now) {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the kernel is not as it was before:\n%s", diff(s, now))
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func diff(before, after Snapshot) string {
	var lines []string
	for l := range before {
		if !after[l] {
			lines = append(lines, "- "+l)
		}
	}
	for l := range after {
		if !before[l] {
			lines = append(lines, "+ "+l)
		}
	}
	slices.SortFunc(lines, func(a, b string) int { return strings.Compare(a[2:], b[2:]) })
	return strings.Join(lines, "\n")
}
