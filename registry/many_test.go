// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"ccload/internal/kerneltest"
	"ccload/internal/tcpca"
	"ccload/structops"

	"golang.org/x/sys/unix"
)

// More names than the kernel's list has room for are all seen, and each can be used,
// without a look at that list, of which the kernel would warn.
func TestManyNames(t *testing.T) {
	kerneltest.Privileged(t)
	n, allowed := 200, 150
	if testing.Short() { // a guest is slow
		n, allowed = 150, 140
	}
	own, err := available()
	if err != nil {
		t.Fatal(err)
	}
	warned := warnings(t)
	name := func(i int) string { return fmt.Sprintf("ccr_%03d.abcdefg", i) }
	obj, err := reno(t).Load()
	if err != nil {
		t.Fatal(err)
	}
	defer obj.Close()
	info, err := obj.Info("")
	if err != nil {
		t.Fatal(err)
	}
	held := map[string]*structops.Link{}
	defer func() {
		for _, l := range held {
			if err := l.Close(); err != nil {
				t.Error(err)
			}
		}
	}()
	for i := range n {
		if info.Flags &^= nonRestricted; i < allowed {
			info.Flags |= nonRestricted
		}
		l, err := info.Copy(name(i), func(*structops.Link) error { return nil })
		if err != nil {
			t.Fatal(err)
		}
		held[name(i)] = l
	}
	var want []string
	for i := range n {
		want = append(want, name(i))
	}

	names, err := available()
	slices.Sort(names)
	if all := slices.Sorted(slices.Values(slices.Concat(own, want))); err != nil || !slices.Equal(names, all) {
		t.Errorf("%d names, %v; want %d\n%q", len(names), err, len(all), names)
	}
	entries, more, err := List()
	if err != nil || len(more) != 1 || !strings.Contains(more[0], "only well-known ones") || len(entries) != len(own)+n {
		t.Errorf("%d listed, %q, %v", len(entries), more, err)
	}
	for _, e := range entries {
		if ours := strings.HasPrefix(e.Name, "ccr_"); ours != (e.Kind == BPF) && ours {
			t.Errorf("%+v", e)
		}
	}
	last := name(n - 1)
	var taken *TakenError
	if _, err := Register(reno(t), Options{Name: last}); !errors.As(err, &taken) || taken.Kind != BPF {
		t.Errorf("a name that is taken: %v", err)
	}
	if err := Require(last); err != nil {
		t.Error(err)
	}
	var missing *NotFoundError
	if err := Require(name(n)); !errors.As(err, &missing) || !strings.HasPrefix(missing.Nearest, "ccr_") {
		t.Errorf("a name that is not there: %v", err)
	}
	if d, _, err := Lookup(last); err != nil || d.Kind != BPF || d.Allowed {
		t.Errorf("%+v, %v", d, err)
	}

	// The list of allowed ones cannot be changed any more, for it would be cut. What is
	// in it can be used.
	ns := newNS(t)
	kerneltest.Name(t, ns, "ccr_many")
	before := state(t, ns)
	if _, err := SetDefault(ns, last, true); err == nil || !strings.Contains(err.Error(), "allowed") {
		t.Errorf("one more that is allowed: %v", err)
	}
	if now := state(t, ns); now != before {
		t.Errorf("it was %q, is %q", before, now)
	}
	if _, err := SetDefault(ns, name(0), false); err != nil {
		t.Error(err)
	}
	if _, err := Replace(name(0), reno(t), ReplaceOptions{}); err != nil {
		t.Error(err)
	}
	defer Unregister(name(0), UnregisterOptions{}) // it is another map, and pinned, since then
	if now, _ := Default(ns); now != name(0) {
		t.Errorf("the default is %s", now)
	}
	if r, err := RestoreDefault(ns); err != nil || len(r.Restored) != 1 {
		t.Errorf("%+v, %v", r, err)
	}
	if now := state(t, ns); now != before {
		t.Errorf("it was %q, is %q", before, now)
	}
	if _, err := Unregister(last, UnregisterOptions{}); err != nil {
		t.Error(err)
	}
	if there, _, err := tcpca.Ask(last); there || err != nil {
		t.Errorf("it is still there, %v", err)
	}
	held[last].Close()
	delete(held, last)
	if now := warnings(t); now != warned {
		t.Errorf("the kernel has warned: %s", now)
	}
}

// warnings are those of the kernel's log about its list of names.
func warnings(t *testing.T) string {
	t.Helper()
	b := make([]byte, 1<<20)
	n, err := unix.Klogctl(unix.SYSLOG_ACTION_READ_ALL, b)
	if err != nil {
		t.Log("the kernel's log:", err)
		return ""
	}
	var lines []string
	for line := range strings.Lines(string(b[:n])) {
		if strings.Contains(line, "WARNING") && strings.Contains(line, "tcp_cong.c") {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "")
}
