// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"ccload/internal/fault"
	"ccload/internal/netns"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Where the kernel refuses iterators over TCP sockets, these are reached through the
// processes that hold them, one after the other: a duplicate of the descriptor
// (pidfd_getfd(2)) takes socket options as the original does, and leads to what the
// socket remembers. Sockets that no process holds cannot be reached: those that are
// closed but still sending, and those that nobody has accepted yet.

// hold calls visit with a duplicate of the descriptor of each wanted socket that a
// process holds, TCP or not, or why there is none. A socket may come several times.
// Threads with descriptors of their own are passed over.
func hold(wanted func(inode uint32) bool, visit func(inode uint32, fd int, err error)) error {
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return err
	}
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil {
			continue
		}
		dir := "/proc/" + p.Name() + "/fd/"
		fds, _ := os.ReadDir(dir) // none of those that may not be looked into
		for _, f := range fds {
			to, _ := os.Readlink(dir + f.Name())
			number, ok := strings.CutPrefix(to, "socket:[")
			inode, err := strconv.ParseUint(strings.TrimSuffix(number, "]"), 10, 32)
			if !ok || err != nil || !wanted(uint32(inode)) {
				continue
			}
			target, _ := strconv.Atoi(f.Name())
			fd, err := duplicate(pid, target)
			if err != nil {
				visit(uint32(inode), -1, err)
				continue
			}
			var st unix.Stat_t
			if unix.Fstat(fd, &st) == nil && st.Ino == inode { // not another by now
				visit(uint32(inode), fd, nil)
			}
			unix.Close(fd)
		}
	}
	return nil
}

func duplicate(pid, fd int) (int, error) {
	if err := fault.At("pidfd_getfd"); err != nil {
		return -1, err
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(pidfd)
	return unix.PidfdGetfd(pidfd, fd, 0)
}

// throughHolders does to sockets, through the processes that hold them, what iterate
// does.
func throughHolders(ns *netns.NS, sockets []socket, do *order) (*Moved, error) {
	spec, err := moveSpec()
	if err != nil {
		return nil, err
	}
	former, made, err := openFormer(spec.Maps["former"])
	if err != nil {
		return nil, err
	}
	defer former.Close()
	var remembered uint64
	var lasting int
	index := map[uint32][]int{} // several: the subflows of one MPTCP connection
	outcomes := make([]outcome, len(sockets))
	for i, s := range sockets {
		outcomes[i].State = notHeld
		if s.inode != 0 {
			outcomes[i].State = wasPending
			index[s.inode] = append(index[s.inode], i)
		}
	}
	waiting := func(inode uint32) bool {
		return slices.ContainsFunc(index[inode], func(i int) bool {
			return outcomes[i].State == wasPending || outcomes[i].State == notReached
		})
	}
	err = hold(waiting, func(inode uint32, fd int, err error) {
		is := outcome{State: notReached, Error: negative(err)}
		mine := index[inode]
		if err == nil {
			if mine, err = matching(fd, mine, sockets); err != nil || len(mine) == 0 {
				return
			}
			is = do.apply(fd, former)
			if former.Lookup(int32(fd), &formerly{}) == nil {
				remembered++
			}
			if is.State == wasMoved && !do.restore && multipath(fd) && listens(fd) {
				lasting++
			}
		}
		for _, i := range mine {
			outcomes[i] = is
		}
	})
	if err == nil {
		err = missed(ns, sockets, outcomes)
	}
	if err != nil {
		return nil, err
	}
	m := &Moved{}
	if do.restore { // who knows whether those were moved
		var passed int
		for i, o := range outcomes {
			if o.State == notHeld || o.State == notReached || o.State == notSeen {
				outcomes[i].State = neverMoved
				passed++
			}
		}
		if passed > 0 {
			m.Warnings = append(m.Warnings, fmt.Sprintf("%d sockets cannot be reached through a process: those that were moved are left as they are", passed))
		}
	}
	if lasting > 0 {
		m.Warnings = append(m.Warnings, fmt.Sprintf("%d of the sockets that listen are MPTCP's: what they accept cannot be put back", lasting))
	}
	m.count(outcomes)
	m.remembered = remembered
	if made && remembered == 0 {
		err = unpin(formerPath)
	}
	return m, err
}

// matching are those of the chosen sockets that a descriptor stands for. That of MPTCP
// (Go's listeners are, where the kernel has it) has a cookie other than those of the TCP
// sockets below it, for which it takes options.
func matching(fd int, of []int, sockets []socket) ([]int, error) {
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil || multipath(fd) {
		return of, err
	}
	return slices.DeleteFunc(slices.Clone(of), func(i int) bool { return sockets[i].cookie != cookie }), nil
}

func multipath(fd int) bool {
	protocol, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	return err == nil && protocol == unix.IPPROTO_MPTCP
}

func listens(fd int) bool {
	yes, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	return err == nil && yes == 1
}

// missed looks which of the sockets that no process seems to hold are still open.
func missed(ns *netns.NS, sockets []socket, outcomes []outcome) error {
	open := map[uint64]bool{}
	now, err := choose(ns, nil, anyState)
	for _, s := range now {
		open[s.cookie] = true
	}
	for i := range outcomes {
		switch o := &outcomes[i]; {
		case o.State != wasPending && o.State != notHeld && o.State != notReached:
		case !open[sockets[i].cookie]:
			o.State = wasPending // closed meanwhile
		case o.State == wasPending:
			o.State = notSeen
		}
	}
	return err
}

// formerly is what a socket remembers, as move.bpf.c has it.
type formerly struct{ Before, Ours ccName }

// apply does to a socket what the programs of move.bpf.c do.
func (do *order) apply(fd int, former *ebpf.Map) outcome {
	failed := func(err error) outcome { return outcome{State: hasFailed, Error: negative(err)} }
	congestion := func() (ccName, error) {
		name, err := unix.GetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION)
		return nameOf(name), err
	}
	set := func(name ccName) error {
		return unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, name.String())
	}
	now, err := congestion()
	if err != nil {
		return failed(err)
	}
	key := int32(fd)
	var f formerly
	had := true
	if err := former.Lookup(key, &f); errors.Is(err, ebpf.ErrKeyNotExist) {
		had = false
	} else if err != nil {
		return failed(err)
	}
	if do.restore {
		if !had {
			return outcome{State: neverMoved}
		}
		state := wasLeft
		if now == f.Ours {
			if err := set(f.Before); err != nil {
				return failed(err)
			}
			state = wasMoved
		}
		former.Delete(key)
		return outcome{State: state}
	}

	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return failed(err)
	}
	const agreed = 8 // TCPI_OPT_ECN
	is := stateSet(1) << info.State
	if do.replacing && listens(fd) {
		return outcome{State: cannotTell}
	}
	if do.ecn && is&(listenState|closedState) == 0 && info.Options&agreed == 0 {
		return outcome{State: hadNoECN}
	}
	if now == do.to { // another map may have the name by now
		if err := set(do.to); err != nil {
			return failed(err)
		}
		if do.replacing {
			return outcome{State: wasMoved}
		}
		return outcome{State: wasKept}
	}
	was := f
	if f.Ours != now { // new, or somebody has moved it since
		f.Before = now
	}
	f.Ours = do.to
	if err := former.Put(key, &f); err != nil {
		return failed(err)
	}
	if err := set(do.to); err != nil {
		if had {
			former.Put(key, &was)
		} else {
			former.Delete(key)
		}
		return failed(err)
	}
	o := outcome{State: wasMoved}
	if now, err = congestion(); err == nil && now != do.to {
		o.State = fellBack
		f.Ours = now
		former.Put(key, &f)
	}
	if f.Before == f.Ours {
		former.Delete(key)
	}
	return o
}

// negative is an error's number as the kernel gives it.
func negative(err error) int32 {
	var errno unix.Errno
	if !errors.As(err, &errno) {
		errno = unix.EIO
	}
	return -int32(errno)
}

// anyHeld says whether a socket that a process holds remembers what it had.
func anyHeld(former *ebpf.Map) (some bool, err error) {
	err = hold(func(uint32) bool { return !some }, func(_ uint32, fd int, err error) {
		some = some || err == nil && former.Lookup(int32(fd), &formerly{}) == nil
	})
	return some, err
}

// ccName is a name as the kernel has it.
type ccName [maxName + 1]byte

func nameOf(s string) (n ccName) {
	copy(n[:maxName], s)
	return n
}

func (n ccName) String() string { return unix.ByteSliceToString(n[:]) }

// withoutIterator is the warning that goes with it.
func withoutIterator(err error) string {
	return fmt.Sprintf("%v; only sockets that a process holds are reached, and windows that were set anew are not counted", err)
}
