// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"slices"
	"syscall"
	"unsafe"

	"ccload/internal/bpfload"
	"ccload/internal/fault"
	"ccload/internal/inetdiag"
	"ccload/internal/netns"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

//go:embed move.bpf.o
var moveObject []byte

// formerPath pins what moved sockets had before: a map whose entries are with the
// sockets themselves, and end with them.
const formerPath = useDir + "/sockets"

// moving is what it takes to run an iterator that sets socket options.
var moving = []string{"CAP_NET_ADMIN", "CAP_BPF", "CAP_PERFMON"}

// Moved says what became of open sockets.
type Moved struct {
	Matched int            `json:"matched"`           // that the filter chose; to restore: of them, those that had been moved
	Moved   int            `json:"moved"`             // run other code now
	Kept    int            `json:"kept"`              // ran that code already
	Left    int            `json:"left,omitempty"`    // not restored, because somebody else has moved them since
	Gone    int            `json:"gone,omitempty"`    // closed meanwhile
	Failed  int            `json:"failed,omitempty"`  // run what they did, or what the new one handed them on to
	Reasons map[string]int `json:"reasons,omitempty"` // why, of the failed ones
	Window  int            `json:"window,omitempty"`  // of the moved ones, those whose window or threshold the new algorithm's init has set
	Undo    bool           `json:"undo,omitempty"`    // RestoreSockets puts back what they, or others before, had

	Warnings []string `json:"warnings,omitempty"`

	remembered uint64 // sockets seen that remember what they had
}

// MoveSockets gives the open TCP sockets of a network namespace that a filter
// chooses (nil: all connections) the congestion control that is registered under a
// name now, also where they run an earlier one of that name; nil is the namespace
// that the caller is in. What a moved listener accepts gets it, too. The list of
// allowed names does not matter.
//
// Their connections go on: the kernel starts the new algorithm with the window and
// the threshold that the old one had, and a BPF one sees in its init what it begins
// with. RestoreSockets takes it back. It needs CAP_NET_ADMIN, CAP_BPF and
// CAP_PERFMON, and for another namespace CAP_SYS_ADMIN. Where the kernel refuses
// iterators over TCP sockets, a warning says so, and only those that a process holds
// are reached; for those of other users' processes that takes CAP_SYS_PTRACE.
func MoveSockets(ns *netns.NS, f *Filter, to string) (*Moved, error) {
	var m *Moved
	err := need("/", moving...)
	if err == nil {
		err = locked(func() (err error) {
			if m, err = moveSockets(ns, f, unnamed, to, false); err != nil {
				m = &Moved{} // some may have been moved, or none
			}
			m.forget()
			m.Undo = isPinned(formerPath)
			return err
		})
	}
	if err != nil {
		return nil, fmt.Errorf("move sockets to %q: %w", to, err)
	}
	return m, nil
}

// RestoreSockets gives the sockets that MoveSockets moved what they had before,
// those of a network namespace that a filter chooses (nil: all, listening ones
// too), whichever process moved them. One that somebody has given yet another name
// since is left alone. It needs what MoveSockets needs.
func RestoreSockets(ns *netns.NS, f *Filter) (*Moved, error) {
	var m *Moved
	err := need("/", moving...)
	if err == nil {
		err = locked(func() (err error) {
			if m, err = restoreSockets(ns, f); err != nil {
				m = &Moved{}
			}
			m.forget()
			return err
		})
	}
	if err != nil {
		return nil, fmt.Errorf("restore sockets: %w", err)
	}
	return m, nil
}

// moveSockets is MoveSockets for who has the lock. Where the filter does not say of
// which states sockets are, without does. replacing says that to has other code than
// before; then of those that listen only those are meant that have chosen it: what the
// others accept has it already.
func moveSockets(ns *netns.NS, f *Filter, without stateSet, to string, replacing bool) (*Moved, error) {
	ecn, err := needsECN(to)
	if err != nil {
		return nil, err
	}
	sockets, err := choose(ns, f, without)
	if err != nil || len(sockets) == 0 {
		return &Moved{}, err
	}
	return carryOut(ns, sockets, &order{to: nameOf(to), ecn: ecn, replacing: replacing})
}

// restoreSockets is RestoreSockets for who has the lock.
func restoreSockets(ns *netns.NS, f *Filter) (*Moved, error) {
	if !isPinned(formerPath) {
		return &Moved{}, nil
	}
	sockets, err := choose(ns, f, anyState)
	if err != nil || len(sockets) == 0 {
		return &Moved{}, err
	}
	return carryOut(ns, sockets, &order{restore: true})
}

// allSockets restores sockets in every network namespace that can be seen. It is for
// who has the lock.
func (r *Restoration) allSockets() error {
	moved := func() bool { return isPinned(formerPath) }
	if !moved() {
		return nil
	}
	if err := need("/", moving...); err != nil {
		return fmt.Errorf("restore sockets: %w", err)
	}
	visible, err := netns.List("/")
	if err != nil {
		return err
	}
	total := &Moved{}
	var errs []error
	self := ownInode()
	for _, v := range visible {
		n := namespace{v, v.Inode == self}
		var m *Moved
		if err := n.do(func() (err error) { m, err = restoreSockets(nil, nil); return err }); err != nil {
			errs = append(errs, fmt.Errorf("restore sockets in network namespace %q: %w", n.label(), err))
			continue
		}
		total.add(m)
	}
	total.forget()
	r.Warnings = append(r.Warnings, total.Warnings...)
	total.Warnings = nil
	if total.Matched > 0 {
		r.Sockets = total
	}
	if moved() && total.Failed == 0 && errs == nil {
		r.Warnings = append(r.Warnings, "sockets in network namespaces that have no name and no process that can be seen are left as they are")
	}
	return errors.Join(errs...)
}

func (m *Moved) add(o *Moved) {
	m.Matched += o.Matched
	m.Moved += o.Moved
	m.Kept += o.Kept
	m.Left += o.Left
	m.Gone += o.Gone
	m.Failed += o.Failed
	m.Window += o.Window
	for _, w := range o.Warnings {
		if !slices.Contains(m.Warnings, w) {
			m.Warnings = append(m.Warnings, w)
		}
	}
	m.remembered += o.remembered
	for why, n := range o.Reasons {
		m.fail(why, n)
	}
}

func (m *Moved) fail(why string, n int) {
	if m.Reasons == nil {
		m.Reasons = map[string]int{}
	}
	m.Reasons[why] += n
}

// socket is one that was chosen.
type socket struct {
	cookie uint64
	inode  uint32 // 0: no process holds it
}

// choose lists the sockets that a filter chooses.
func choose(ns *netns.NS, f *Filter, without stateSet) (sockets []socket, err error) {
	var conn *inetdiag.Conn
	if err := in(ns, func() (err error) { conn, err = inetdiag.Dial(); return err }); err != nil {
		return nil, err
	}
	defer conn.Close()
	states := f.states(without) &^ bucketStates
	if states == 0 {
		return nil, nil
	}
	err = conn.Dump(uint32(states), false, func(s *inetdiag.Socket) error {
		if f.match(s) {
			sockets = append(sockets, socket{s.Cookie, s.Inode})
		}
		return nil
	})
	return sockets, err
}

// outcome is what became of a socket, as move.bpf.c has it.
type outcome struct {
	State  uint32
	Error  int32 // -errno
	Window uint32
}

const (
	wasPending uint32 = iota
	wasMoved
	wasKept
	hasFailed
	hadNoECN
	fellBack
	wasLeft
	neverMoved
	// Through holders only:
	notHeld    // no process holds it
	notReached // one does, and may not be looked into
	notSeen    // one does, and cannot be seen
	cannotTell // it listens, and may have chosen
)

// order says what is to be done to sockets.
type order struct {
	restore   bool   // else:
	to        ccName // move them to this
	ecn       bool   // which needs ECN
	replacing bool   // and has other code than before
}

// carryOut does it, in one way or the other.
func carryOut(ns *netns.NS, sockets []socket, do *order) (*Moved, error) {
	m, err := iterate(ns, sockets, do)
	refused, ok := errors.AsType[*bpfload.RefusedError](err)
	if !ok {
		return m, err
	}
	if m, err = throughHolders(ns, sockets, do); err == nil {
		m.Warnings = append(m.Warnings, withoutIterator(refused))
	}
	return m, err
}

// passes is how often the sockets are walked through until all that are meant were
// met: a walk may miss one while others come and go (before Linux 6.17).
const passes = 3

// iterate runs one of the programs over the sockets. A *bpfload.RefusedError says that
// the kernel does not take it.
func iterate(ns *netns.NS, sockets []socket, do *order) (m *Moved, err error) {
	program, variables := "move", map[string]any{"to": do.to, "needs_ecn": do.ecn, "replacing": do.replacing}
	if do.restore {
		program, variables = "restore", nil
	}
	cookies := make([]uint64, len(sockets))
	for i, s := range sockets {
		cookies[i] = s.cookie
	}
	coll, made, err := loadMover(program, variables, len(cookies))
	if err != nil {
		return nil, err
	}
	defer coll.Close()
	chosen := coll.Maps["chosen"]
	outcomes := make([]outcome, len(cookies))
	if _, err := chosen.BatchUpdate(cookies, outcomes, nil); err != nil {
		return nil, err
	}
	m = &Moved{}
	for range passes {
		n, err := walkCounting(ns, coll, program)
		if err != nil {
			return nil, err
		}
		var cursor ebpf.MapBatchCursor
		got, err := chosen.BatchLookup(&cursor, cookies, outcomes, nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil, err
		}
		m.count(outcomes[:got])
		m.remembered = n
		if m.Gone == 0 {
			break
		}
	}
	if made && m.remembered == 0 {
		return m, unpin(formerPath)
	}
	return m, nil
}

func (m *Moved) count(outcomes []outcome) {
	*m = Moved{Warnings: m.Warnings}
	for _, o := range outcomes {
		m.Matched++
		switch o.State {
		case wasPending:
			m.Gone++
		case wasMoved:
			m.Moved++
			m.Window += int(o.Window)
		case wasKept:
			m.Kept++
		case wasLeft:
			m.Left++
		case neverMoved:
			m.Matched--
		default:
			m.Failed++
			m.fail(o.reason(), 1)
		}
	}
}

func (o outcome) reason() string {
	switch errno := syscall.Errno(-o.Error); {
	case o.State == notHeld:
		return "no process holds it, or none has accepted it yet"
	case o.State == notReached:
		return fmt.Sprintf("no permission to access the process that holds it: %v", errno)
	case o.State == notSeen:
		return "no process that can be seen holds it"
	case o.State == cannotTell:
		return "it listens, and whether it has chosen the name for what it accepts cannot be told"
	case o.State == hadNoECN:
		return "the connection did not negotiate ECN, which the algorithm requires"
	case o.State == fellBack:
		return "the algorithm fell back to another one"
	case errno == unix.EPERM:
		return "the route locks the congestion control"
	case errno == unix.ENOENT:
		return "the previous algorithm is no longer registered"
	default:
		return errno.Error()
	}
}

// attachIter attaches an iterator. A *bpfload.RefusedError says that the kernel does not
// let it.
func attachIter(coll *ebpf.Collection, program string, over *ebpf.Map) (it *link.Iter, err error) {
	if err = fault.At("attach program " + program); err == nil {
		it, err = link.AttachIter(link.IterOptions{Program: coll.Programs[program], Map: over})
	}
	if err != nil {
		return nil, &bpfload.RefusedError{Program: program, Kind: "iterator", Err: bpfload.Plain(err)}
	}
	return it, nil
}

// walk runs an iterator from beginning to end.
func walk(ns *netns.NS, coll *ebpf.Collection, program string, over *ebpf.Map) error {
	it, err := attachIter(coll, program, over)
	if err != nil {
		return err
	}
	defer it.Close()
	return in(ns, func() error {
		r, err := it.Open() // belongs to the namespace that the thread is in
		if err != nil {
			return err
		}
		defer r.Close()
		for {
			_, err := io.Copy(io.Discard, r)
			if !errors.Is(err, unix.EAGAIN) { // a million sockets, and more to come
				return err
			}
		}
	})
}

// walkCounting runs an iterator over the sockets of a namespace, and says how many of
// them remember what they had.
func walkCounting(ns *netns.NS, coll *ebpf.Collection, program string) (n uint64, err error) {
	if err := coll.Variables["remembered"].Set(n); err != nil {
		return 0, err
	}
	if err := walk(ns, coll, program, nil); err != nil {
		return 0, err
	}
	return n, coll.Variables["remembered"].Get(&n)
}

func moveSpec() (*ebpf.CollectionSpec, error) {
	return ebpf.LoadCollectionSpecFromReader(bytes.NewReader(moveObject))
}

// loadMover loads one of the programs with the pinned map of what sockets had, and says
// whether it has made that.
func loadMover(program string, variables map[string]any, chosen int) (coll *ebpf.Collection, made bool, err error) {
	spec, err := moveSpec()
	if err != nil {
		return nil, false, err
	}
	maps.DeleteFunc(spec.Programs, func(name string, _ *ebpf.ProgramSpec) bool { return name != program })
	for name, v := range variables {
		if err := spec.Variables[name].Set(v); err != nil {
			return nil, false, err
		}
	}
	spec.Maps["chosen"].MaxEntries = max(1, uint32(chosen))
	former, made, err := openFormer(spec.Maps["former"])
	if err != nil {
		return nil, false, err
	}
	defer former.Close()
	coll, err = bpfload.Load(spec, map[string]*ebpf.Map{"former": former})
	if err != nil && made {
		err = errors.Join(err, unpin(formerPath))
	}
	return coll, made, err
}

// openFormer opens the pinned map of what sockets had, or makes and pins it.
func openFormer(spec *ebpf.MapSpec) (former *ebpf.Map, made bool, err error) {
	former, err = openMap(formerPath)
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return former, false, err
	}
	if err := fault.At("create BPF map " + spec.Name); err != nil {
		return nil, false, err
	}
	if former, err = ebpf.NewMap(spec); err != nil {
		return nil, false, bpfload.Plain(err)
	}
	if err := newPin(formerPath, former.Pin); err != nil {
		former.Close()
		return nil, false, err
	}
	return former, true, nil
}

// forget takes the pin away when no socket remembers anything. It is done after the
// sockets of one or more namespaces were moved.
func (m *Moved) forget() {
	if m.remembered > 0 || !isPinned(formerPath) {
		return
	}
	some, err := remembered()
	if err == nil && !some {
		err = unpin(formerPath)
	}
	if err != nil {
		m.Warnings = append(m.Warnings, fmt.Sprintf("%s, which says what moved sockets had before, stays: %v", formerPath, err))
	}
}

// remembered says whether any socket remembers what it had: of all that there are, or
// where the kernel refuses the program that walks through these, of those that can be
// restored. Where processes are hidden it may be so.
func remembered() (bool, error) {
	if n, err := countAll(); err == nil || !allProcesses() {
		return n > 0 || err != nil, nil
	}
	if some, err := anySeen(); err != nil || some {
		return some, err
	}
	former, err := openMap(formerPath)
	if err != nil {
		return false, err
	}
	defer former.Close()
	return anyHeld(former)
}

// anySeen says whether a socket of a visible namespace remembers what it had; false
// where the kernel takes no iterator over TCP sockets.
func anySeen() (bool, error) {
	const program = "restore" // which does nothing to sockets that are not chosen
	coll, _, err := loadMover(program, nil, 0)
	if _, refused := errors.AsType[*bpfload.RefusedError](err); refused {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer coll.Close()
	visible, err := netns.List("/")
	if err != nil {
		return false, err
	}
	self := ownInode()
	for _, v := range visible {
		n := namespace{v, v.Inode == self}
		var some uint64
		err := n.do(func() (err error) { some, err = walkCounting(nil, coll, program); return err })
		if _, refused := errors.AsType[*bpfload.RefusedError](err); refused {
			return false, nil
		}
		if err != nil || some > 0 {
			return true, err
		}
	}
	return false, nil
}

// countAll counts the sockets that remember what they had, in all namespaces.
func countAll() (n uint64, err error) {
	coll, _, err := loadMover("count", nil, 0)
	if err != nil {
		return 0, err
	}
	defer coll.Close()
	if err := walk(nil, coll, "count", coll.Maps["former"]); err != nil {
		return 0, err
	}
	return n, coll.Variables["remembered"].Get(&n)
}

// The programs' structure is packed as Go's is.
var _ [12]byte = [unsafe.Sizeof(outcome{})]byte{}
