// SPDX-License-Identifier: Apache-2.0

package netns_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ccload/internal/kerneltest"
	"ccload/internal/netns"
)

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

func fresh(t *testing.T) *netns.NS {
	t.Helper()
	kerneltest.Privileged(t)
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

// A new namespace is another one, empty but for its loopback device, and Do
// works inside it and nowhere else.
func TestNewAndDo(t *testing.T) {
	ns := fresh(t)
	here := inode(t, "/proc/self/ns/net")
	there, err := ns.Inode()
	if err != nil || there == here {
		t.Fatalf("inode %d, %v; ours is %d", there, err, here)
	}
	fail := errors.New("fail")
	err = ns.Do(func() error {
		if got := inode(t, "/proc/thread-self/ns/net"); got != there {
			t.Errorf("inside Do: namespace %d, want %d", got, there)
		}
		b, err := os.ReadFile("/proc/thread-self/net/dev")
		if err != nil || strings.Count(string(b), ":") != 1 || !strings.Contains(string(b), "lo:") {
			t.Errorf("devices %q, %v", b, err)
		}
		return fail
	})
	if err != fail {
		t.Errorf("the error of fn: got %v", err)
	}
	// No thread may have stayed behind in there.
	tasks, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil || len(tasks) == 0 {
		t.Fatal(tasks, err)
	}
	for _, p := range tasks {
		var st unix.Stat_t
		if unix.Stat(p, &st) == nil && st.Ino == there {
			t.Errorf("%s is still in the namespace", p)
		}
	}
	if err := errors.Join(ns.Close(), ns.Close()); err != nil {
		t.Errorf("closed twice: %v", err)
	}
}

// A descriptor opened inside stays there.
func TestSocketStays(t *testing.T) {
	ns := fresh(t)
	var fd int
	if err := ns.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	r, err := unix.NewIfreq("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, r); err != nil || r.Uint16()&unix.IFF_UP != 0 {
		t.Errorf("loopback of a new namespace: flags %#x, %v", r.Uint16(), err)
	}
}

func TestOpenAndFind(t *testing.T) {
	ns := fresh(t)
	want, err := ns.Inode()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{ns.Path(), "/proc/self/fd/" + strconv.Itoa(ns.FD())} {
		found, err := netns.Find(name)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := found.Inode(); err != nil || got != want {
			t.Errorf("%s: namespace %d, %v; want %d", name, got, err, want)
		}
		found.Close()
	}
	found, err := netns.Find(strconv.Itoa(os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	defer found.Close()
	if got, err := found.Inode(); err != nil || got != inode(t, "/proc/self/ns/net") {
		t.Errorf("by our process: namespace %d, %v", got, err)
	}

	for _, name := range []string{"no-such-namespace", "2147483647", "/no/such/path"} {
		if ns, err := netns.Find(name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v, %v", name, ns, err)
		}
	}
	// A file that is no namespace would only be noticed when it is entered.
	if ns, err := netns.Open("/dev/null"); err == nil || !strings.Contains(err.Error(), "not a namespace") {
		t.Errorf("/dev/null: %v, %v", ns, err)
	}
}

// List from a tree made of links: which process is where, and by which names.
func TestList(t *testing.T) {
	root := t.TempDir()
	write := func(path, as string) {
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if as == "" {
			as = path + ".file"
			if err := os.WriteFile(as, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Link(as, path); err != nil {
			t.Fatal(err)
		}
	}
	write("proc/1/ns/net", "")
	first := filepath.Join(root, "proc/1/ns/net")
	write("proc/30/ns/net", first)
	write("proc/7/ns/net", "")
	second := filepath.Join(root, "proc/7/ns/net")
	write("run/netns/blue", second)
	write("run/netns/apple", second)
	write("run/netns/zoo", "")
	if err := os.Remove(filepath.Join(root, "run/netns/zoo.file")); err != nil {
		t.Fatal(err)
	}
	os.MkdirAll(filepath.Join(root, "proc/99"), 0o755) // has ended
	os.MkdirAll(filepath.Join(root, "proc/sys"), 0o755)

	list, err := netns.List(root)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, v := range list {
		got = append(got, fmt.Sprintf("%v %v %s", v.PIDs, v.Names, v.Label()))
	}
	want := []string{"[1 30] [] pid 1", "[7] [apple blue] apple", "[] [zoo] zoo"}
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	if _, err := netns.List(filepath.Join(root, "nowhere")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without proc: %v", err)
	}
}

func TestListSeesOurs(t *testing.T) {
	list, err := netns.List("/")
	if err != nil {
		t.Fatal(err)
	}
	here := inode(t, "/proc/self/ns/net")
	if !slices.ContainsFunc(list, func(v netns.Visible) bool { return v.Inode == here && slices.Contains(v.PIDs, os.Getpid()) }) {
		t.Errorf("our namespace %d is not in %+v", here, list)
	}
}
