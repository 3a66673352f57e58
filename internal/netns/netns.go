// Package netns enters, makes and finds network namespaces (network_namespaces(7)).
//
// A namespace made by New has no name in the file system: it lives as long as
// something holds it (this process's descriptor, a socket, a device) and is
// gone when the process is, however it ended. Entering a namespace is a
// property of a thread, so Do works on a thread of its own; where the way back
// fails, that thread dies with the goroutine.
package netns

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// NS is an open network namespace.
type NS struct{ f *os.File }

// New makes a fresh network namespace with its loopback device down. It needs
// CAP_SYS_ADMIN. The namespace ends with Close, or with the process, once no
// socket or device in it is left.
func New() (*NS, error) {
	var ns *NS
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make a network namespace: %w", err)
		}
		var err error
		ns, err = Open("/proc/thread-self/ns/net")
		return err
	})
	return ns, err
}

// Open opens the namespace behind a path such as /run/netns/NAME or
// /proc/PID/ns/net.
func Open(path string) (*NS, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("network namespace: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil || st.Type != unix.NSFS_MAGIC {
		f.Close()
		return nil, fmt.Errorf("network namespace %q: not a namespace", path)
	}
	return &NS{f}, nil
}

// Find opens a namespace by what a user calls it: a name under /run/netns, a
// path, or the id of a process that is in it.
func Find(name string) (*NS, error) {
	if strings.ContainsRune(name, '/') {
		return Open(name)
	}
	ns, err := Open(filepath.Join("/run/netns", name))
	if !errors.Is(err, fs.ErrNotExist) {
		return ns, err
	}
	if _, perr := strconv.Atoi(name); perr == nil {
		return Open(filepath.Join("/proc", name, "ns/net"))
	}
	return nil, err
}

// FD is the descriptor, valid until Close.
func (n *NS) FD() int { return int(n.f.Fd()) }

// Path leads to the namespace from any process that may look into this one,
// for nsenter(1). It is valid until Close.
func (n *NS) Path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.FD()) }

// Inode tells namespaces apart: two descriptors with one inode are one namespace.
func (n *NS) Inode() (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(n.FD(), &st); err != nil {
		return 0, fmt.Errorf("network namespace: %w", err)
	}
	return st.Ino, nil
}

// Close lets go of the namespace. It may be called twice.
func (n *NS) Close() error {
	if err := n.f.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

// Do runs fn on a thread inside the namespace and returns its error. What fn
// opens there (sockets, files under /proc/sys/net) stays in that namespace.
// Goroutines that fn starts do not run there.
func (n *NS) Do(fn func() error) error {
	return onThread(func() error {
		if err := unix.Setns(n.FD(), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return fn()
	})
}

// onThread runs fn on a goroutine that owns its thread and puts the thread back
// into the namespace it came from; a thread that cannot go back stays locked
// and ends with its goroutine.
func onThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			done <- fmt.Errorf("network namespace of this thread: %w", err)
			return
		}
		defer home.Close()
		err = fn()
		if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// Visible is a network namespace that this process can reach.
type Visible struct {
	Inode uint64
	Path  string   // one way in
	Names []string // under /run/netns, sorted; may be empty
	PIDs  []int    // processes in it, sorted; may be empty
}

// Label is the shortest thing a user would call it: its name, or a process in it.
func (v Visible) Label() string {
	if len(v.Names) > 0 {
		return v.Names[0]
	}
	if len(v.PIDs) > 0 {
		return "pid " + strconv.Itoa(v.PIDs[0])
	}
	return v.Path
}

// List finds every network namespace that a process or a name under
// run/netns leads to, the initial one (if it is visible) first. root is where
// proc/ and run/ are, "/" outside tests. Processes that end meanwhile are
// passed over; so are those that the caller may not look into.
func List(root string) ([]Visible, error) {
	byInode := map[uint64]*Visible{}
	see := func(path string) *Visible {
		var st unix.Stat_t
		if unix.Stat(path, &st) != nil {
			return nil
		}
		ino := st.Ino
		if byInode[ino] == nil {
			byInode[ino] = &Visible{Inode: ino, Path: path}
		}
		return byInode[ino]
	}
	procs, err := os.ReadDir(filepath.Join(root, "proc"))
	if err != nil {
		return nil, fmt.Errorf("list network namespaces: %w", err)
	}
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil {
			continue
		}
		if v := see(filepath.Join(root, "proc", p.Name(), "ns/net")); v != nil {
			v.PIDs = append(v.PIDs, pid)
		}
	}
	names, err := os.ReadDir(filepath.Join(root, "run/netns"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list network namespaces: %w", err)
	}
	for _, n := range names {
		if v := see(filepath.Join(root, "run/netns", n.Name())); v != nil {
			v.Names = append(v.Names, n.Name())
		}
	}
	out := make([]Visible, 0, len(byInode))
	for _, v := range byInode {
		slices.Sort(v.PIDs)
		slices.Sort(v.Names)
		out = append(out, *v)
	}
	first := func(v Visible) int {
		if len(v.PIDs) > 0 {
			return v.PIDs[0]
		}
		return math.MaxInt
	}
	slices.SortFunc(out, func(a, b Visible) int {
		return cmp.Or(cmp.Compare(first(a), first(b)), strings.Compare(a.Label(), b.Label()))
	})
	return out, nil
}
