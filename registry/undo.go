// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unsafe"

	"ccload/internal/change"
	"ccload/internal/fault"
	"ccload/internal/netns"
	"ccload/internal/tcpca"
	"ccload/structops"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

const undoPath = useDir + "/undo"

// journal remembers what was there before a selection, so that it can be put back,
// also by another process: a pinned hash map, which goes with its last entry. An
// entry is written before what it undoes, for the process may be killed in
// between. Only who has the lock may use it.
type journal struct{ m *ebpf.Map }

// maxEntries is how many selections can be undone at a time.
const maxEntries = 65536

// key is what was selected. Targets are short: of a route 24 bytes, of an allowed
// name 15.
type key struct {
	Kind   uint32 // one of the below
	_      uint32
	NS     uint64 // cookie of the network namespace (SO_NETNS_COOKIE)
	Target [32]byte
}

const (
	keyDefault uint32 = 1 + iota
	keyRoute
	keyAllowed // in the list of allowed ones, for the sake of a default
)

// value is what was there before, and what we put there: the last, and what was
// there when that was to be put there, which it still is if we were killed.
type value struct {
	Inode  uint64 // of the network namespace
	Before text
	Ours   [2]text
}

// text is a name, with what else its kind has to remember.
type text [24]byte

func textOf(s string) (t text) { copy(t[:], s); return t }

func (t text) String() string { return string(bytes.TrimRight(t[:], "\x00")) }

// name is the congestion control in it.
func (t text) name() string {
	name, _, _ := strings.Cut(t.String(), " ")
	return name
}

// ours says whether what is there now is what the entry speaks of.
func (v *value) ours(now string) bool {
	return now == v.Before.String() || now == v.Ours[0].String() || now == v.Ours[1].String()
}

// openJournal opens the journal; nil if there is none and none is to be made.
func openJournal(make bool) (*journal, error) {
	m, err := openMap(undoPath)
	if errors.Is(err, fs.ErrNotExist) {
		if !make {
			return nil, nil
		}
		m, err = newJournal()
	}
	if err != nil {
		return nil, fmt.Errorf("undo journal: %w", err)
	}
	if m.Type() != ebpf.Hash || m.KeySize() != uint32(unsafe.Sizeof(key{})) || m.ValueSize() != uint32(unsafe.Sizeof(value{})) {
		m.Close()
		return nil, fmt.Errorf("undo journal %q: another version of ccload made it", undoPath)
	}
	return &journal{m}, nil
}

func newJournal() (*ebpf.Map, error) {
	if err := fault.At("create BPF map ccload_undo"); err != nil {
		return nil, err
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{
		Name: "ccload_undo", Type: ebpf.Hash, MaxEntries: maxEntries, Flags: unix.BPF_F_NO_PREALLOC,
		KeySize: uint32(unsafe.Sizeof(key{})), ValueSize: uint32(unsafe.Sizeof(value{})),
	})
	if err != nil {
		return nil, err
	}
	if err := newPin(undoPath, m.Pin); err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

// close settles what is allowed, and takes the journal away if it is empty.
func (j *journal) close() error {
	err := j.settle()
	entries, eerr := j.entries()
	j.m.Close()
	if eerr == nil && len(entries) == 0 {
		err = errors.Join(err, unpin(undoPath))
	}
	return err
}

func (j *journal) entries() (map[key]value, error) {
	entries := map[key]value{}
	var k key
	var v value
	i := j.m.Iterate()
	for i.Next(&k, &v) {
		entries[k] = v
	}
	return entries, i.Err()
}

// keyOf is the key of a target in the network namespace that the thread is in.
func keyOf(kind uint32, target []byte) (key, error) {
	k := key{Kind: kind}
	copy(k.Target[:], target)
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return k, fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(fd)
	if k.NS, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE); err != nil {
		err = fmt.Errorf("cookie of the network namespace: %w", err)
	}
	return k, err
}

// pending is an entry of a change that is not final yet.
type pending struct {
	j      *journal
	k      key
	before *value // the entry that was there; nil: none
	empty  bool   // once the change is final there is nothing to put back
}

// remember is to be called before a target is changed from what is there now. What
// somebody else put there since the entry was made counts.
func (j *journal) remember(k key, now, to string) (*pending, error) {
	return j.enter(k, now, to, now)
}

// displace is remember for what is changed only because a name goes away, which ends
// an entry of this change with it.
func (j *journal) displace(k key, from, to string) (*pending, error) {
	return j.enter(k, from, to, leaving)
}

// leaving stands in an entry, as what we put there before the last, for a name that is
// being unregistered, and that ccload has not put there.
const leaving = "*"

func (j *journal) enter(k key, now, to, last string) (*pending, error) {
	p := &pending{j: j, k: k}
	v := value{Inode: ownInode(), Before: textOf(now), Ours: [2]text{textOf(last), textOf(to)}}
	var before value
	switch err := j.m.Lookup(k, &before); {
	case err == nil:
		p.before = &before
		if before.ours(now) {
			v.Before, v.Ours[0] = before.Before, textOf(now)
		}
	case !errors.Is(err, ebpf.ErrKeyNotExist):
		return nil, fmt.Errorf("undo journal: %w", err)
	}
	p.empty = v.Before == v.Ours[1] || v.Ours[0] == textOf(leaving)
	return p, j.put(k, v)
}

// taken takes the entry back, after the change was not made or was itself taken back.
func (p *pending) taken() error {
	if p.before != nil {
		return p.j.put(p.k, *p.before)
	}
	return p.j.delete(p.k)
}

// final is for when nothing can take the change back any more but the entry.
func (p *pending) final() error {
	if p.empty {
		return p.j.delete(p.k)
	}
	return nil
}

// settled is taken or final, by the error of the change.
func (p *pending) settled(err error) error {
	if err != nil {
		return errors.Join(err, p.taken())
	}
	return p.final()
}

func (j *journal) put(k key, v value) error {
	err := fault.At("write to the undo journal")
	if err == nil {
		err = j.m.Put(k, v)
	}
	if err != nil {
		return fmt.Errorf("undo journal: %w", err)
	}
	return nil
}

// delete also takes away what is not there.
func (j *journal) delete(k key) error {
	err := fault.At("delete from the undo journal")
	if err == nil {
		err = j.m.Delete(k)
	}
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("undo journal: %w", err)
	}
	return nil
}

// allow makes a name an allowed one until nothing that the journal knows needs it.
// In the initial namespace the kernel itself does so with its default.
func (j *journal) allow(name string) error {
	if _, allowed, err := tcpca.Ask(name); err != nil || allowed {
		return err
	}
	k := key{Kind: keyAllowed}
	copy(k.Target[:], name)
	if err := j.put(k, value{}); err != nil {
		return err
	}
	if initial("/") {
		return nil
	}
	return changeAllowed(adding(name))
}

// settle takes the names from the list of allowed ones that were added for a
// default which is no more, and the entries away that end with a name which is. What
// cannot be done now stays for the next time.
func (j *journal) settle() error {
	var errs []error
	entries, _ := j.entries()
	needed := map[text]bool{}
	for k, v := range entries {
		if k.Kind == keyDefault {
			needed[v.Ours[0]], needed[v.Ours[1]] = true, true
		}
		if v.Ours[0] != textOf(leaving) {
			continue
		}
		needed[v.Before] = true
		if there, _, err := tcpca.Ask(v.Before.name()); err == nil && !there {
			errs = append(errs, j.delete(k))
		}
	}
	for k := range entries {
		name := text(k.Target[:unsafe.Sizeof(text{})])
		if k.Kind != keyAllowed || needed[name] {
			continue
		}
		err := changeAllowed(removing(name.String()))
		if err == nil {
			err = j.delete(k)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// sweepUses drops the entries of network namespaces that are gone, or whose default is
// what it was, and the pins of control groups that are gone.
func sweepUses() (problems []error) {
	problems = sweepGroups()
	j, err := openJournal(false)
	if err != nil || j == nil {
		return append(problems, err)
	}
	defer func() { problems = append(problems, j.close()) }()
	entries, err := j.entries()
	if err != nil {
		return append(problems, fmt.Errorf("undo journal: %w", err))
	}
	at, err := reach(entries)
	if err != nil {
		return append(problems, err)
	}
	all := allProcesses()
	for k, v := range entries {
		n, ok := at[k.NS]
		over := !ok && all
		if ok && k.Kind == keyDefault {
			n.do(func() error {
				now, err := readDefault("/")
				over = err == nil && now == v.Before.String()
				return err
			})
		}
		if over && k.Kind != keyAllowed {
			problems = append(problems, j.delete(k))
		}
	}
	return problems
}

// reach finds the network namespaces of the entries, by their cookies: those that
// have a process or a name, and those that a descriptor or a mount leads to.
func reach(entries map[key]value) (map[uint64]namespace, error) {
	wanted := map[uint64]bool{}
	for k, v := range entries {
		if k.Kind != keyAllowed {
			wanted[v.Inode] = true
		}
	}
	at := map[uint64]namespace{}
	if len(wanted) == 0 {
		return at, nil
	}
	visible, err := netns.List("/")
	if err != nil {
		return nil, err
	}
	self := ownInode()
	see := func(v netns.Visible) {
		n := namespace{v, v.Inode == self}
		n.do(func() error {
			k, err := keyOf(0, nil)
			if err == nil {
				at[k.NS] = n
			}
			return err
		})
		delete(wanted, v.Inode)
	}
	for _, v := range visible {
		if wanted[v.Inode] {
			see(v)
		}
	}
	if len(wanted) == 0 {
		return at, nil
	}
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, fd := range fds {
		var inode uint64
		if to, err := os.Readlink(fd); err == nil && sscan(to, "net:[%d]", &inode) && wanted[inode] {
			see(netns.Visible{Inode: inode, Path: fd})
		}
	}
	mounts, _ := filepath.Glob("/proc/[0-9]*/mountinfo")
	for _, m := range mounts {
		b, _ := os.ReadFile(m)
		for line := range strings.Lines(string(b)) {
			point, ok := structops.MountPoint(line, "nsfs")
			var inode uint64
			if ok && sscan(strings.Fields(line)[3], "net:[%d]", &inode) && wanted[inode] {
				see(netns.Visible{Inode: inode, Path: filepath.Join(filepath.Dir(m), "root", point)})
			}
		}
	}
	return at, nil
}

func sscan(s, format string, into ...any) bool {
	n, err := fmt.Sscanf(s, format, into...)
	return err == nil && n == len(into)
}

// allProcesses says whether all processes of the machine can be seen, so that a
// network namespace that nothing leads to is gone, and is not only another
// container's.
func allProcesses() bool {
	const initial = 0xeffffffc // PROC_PID_INIT_INO
	var st unix.Stat_t
	return unix.Stat("/proc/self/ns/pid", &st) == nil && st.Ino == initial
}

// Restoration says what was put back.
type Restoration struct {
	Restored []Restored `json:"restored"`
	Sockets  *Moved     `json:"sockets,omitempty"` // that were moved while open; absent if there were none, or they were not asked for
	Warnings []string   `json:"warnings,omitempty"`
}

// Restored is one selection that was taken back.
type Restored struct {
	Kind      string `json:"kind"`                // as in Selection
	Namespace string `json:"namespace,omitempty"` // name, "pid N", or "this one"
	Target    string `json:"target,omitempty"`
	From      string `json:"from,omitempty"` // what was selected
	To        string `json:"to,omitempty"`   // what was before, and is again; absent: nothing
}

// Restore puts back what was there before the selections that this package has
// made in all network namespaces that the caller can see, whichever process made
// them; and before sockets that were open were moved. What somebody else has changed
// since is left as it is, and said in the warnings; so is, where there is nothing to put
// back, what others have selected. What fails stays to be restored.
func Restore() (*Restoration, error) {
	defer change.Together()()
	r, err := restore(func(key) bool { return true }, func(uint64) bool { return true })
	if r == nil {
		return nil, err
	}
	err = errors.Join(err, locked(r.allSockets))
	if len(r.Restored)+len(r.Warnings) == 0 && r.Sockets == nil && err == nil {
		seen, _ := survey("")
		r.Warnings = seen.foreign()
	}
	return r, err
}

// RestoreDefault is Restore for the default of a network namespace; nil means the
// one that the caller is in.
func RestoreDefault(ns *netns.NS) (*Restoration, error) {
	return restoreOne(ns, func(k key) bool { return k.Kind == keyDefault })
}

// RestoreRoute is Restore for the routes of a prefix in a network namespace.
func RestoreRoute(ns *netns.NS, prefix netip.Prefix) (*Restoration, error) {
	return restoreOne(ns, func(k key) bool { return k.Kind == keyRoute && targetOf(k).prefix == prefix })
}

// RestoreGroup is Restore for a control group, which is named as for UseGroup.
func RestoreGroup(dir string) (*Restoration, error) {
	g, err := findGroup("/", dir)
	if err != nil {
		return nil, fmt.Errorf("restore: %w", err)
	}
	return restore(func(key) bool { return false }, func(id uint64) bool { return id == g.id })
}

func restoreOne(ns *netns.NS, match func(key) bool) (*Restoration, error) {
	var here key
	if err := in(ns, func() (err error) { here, err = keyOf(0, nil); return err }); err != nil {
		return nil, fmt.Errorf("restore: %w", err)
	}
	return restore(func(k key) bool { return k.NS == here.NS && match(k) }, func(uint64) bool { return false })
}

// restore takes back what matches.
func restore(match func(key) bool, group func(uint64) bool) (*Restoration, error) {
	fail := func(err error) (*Restoration, error) { return nil, fmt.Errorf("restore: %w", err) }
	if err := need("/", "CAP_NET_ADMIN", "CAP_BPF"); err != nil {
		return fail(err)
	}
	unlock, err := lock()
	if err != nil {
		return fail(err)
	}
	defer unlock()
	r := &Restoration{Restored: []Restored{}}
	errs := []error{r.groups(group)}
	failed := func(err error) (*Restoration, error) { // what is put back is
		return r, errors.Join(append(errs, fmt.Errorf("restore: %w", err))...)
	}
	j, err := openJournal(false)
	if err != nil {
		return failed(err)
	}
	if j == nil {
		return r, errors.Join(errs...)
	}
	defer func() {
		if err := j.close(); err != nil {
			r.Warnings = append(r.Warnings, err.Error())
		}
	}()
	entries, err := j.entries()
	if err != nil {
		return failed(fmt.Errorf("undo journal: %w", err))
	}
	at, err := reach(entries)
	if err != nil {
		return failed(err)
	}
	for _, k := range slices.SortedFunc(maps.Keys(entries), func(a, b key) int { return bytes.Compare(a.bytes(), b.bytes()) }) {
		if k.Kind == keyAllowed || !match(k) {
			continue
		}
		v := entries[k]
		n, ok := at[k.NS]
		if !ok {
			r.Warnings = append(r.Warnings, fmt.Sprintf("network namespace net:[%d] cannot be seen from here: nothing is put back there", v.Inode))
			continue
		}
		one := Restored{Kind: byDefault, Namespace: n.label()}
		var warning string
		err := n.do(func() (err error) {
			if k.Kind == keyRoute {
				return one.route(targetOf(k), &v, &warning)
			}
			return one.namespaceDefault(j, &v, &warning)
		})
		if err != nil {
			errs = append(errs, fmt.Errorf("restore %s: %w", one.Place(), err))
			continue
		}
		if err := j.delete(k); err != nil {
			errs = append(errs, fmt.Errorf("restore %s: %w", one.Place(), err))
		}
		if warning != "" {
			r.Warnings = append(r.Warnings, one.Place()+": "+warning)
		} else if one.From != one.To {
			r.Restored = append(r.Restored, one)
		}
	}
	return r, errors.Join(errs...)
}

// bytes orders keys.
func (k key) bytes() []byte {
	return fmt.Appendf(nil, "%d %d %s", k.Kind, k.NS, k.Target)
}

// Place says what was selected, as users read it.
func (o *Restored) Place() string {
	return (&Selection{Kind: o.Kind, Target: o.Target, Namespace: o.Namespace}).Place()
}

// left is the warning about what somebody else has put there.
func left(now string) string {
	if now == "" {
		now = "none"
	}
	return fmt.Sprintf("it is %s now, which ccload did not select: left as it is", now)
}

// namespaceDefault puts back the default of the network namespace that the thread is in.
func (o *Restored) namespaceDefault(j *journal, v *value, warning *string) error {
	now, err := readDefault("/")
	if err != nil {
		return err
	}
	o.From, o.To = now, v.Before.String()
	if now == o.To {
		return nil
	}
	if !v.ours(now) {
		*warning = left(now)
		return nil
	}
	if err := Require(o.To); err != nil {
		return err
	}
	// It may not have been an allowed one: a new network namespace has what the
	// initial one has then.
	if err := j.allow(o.To); err != nil {
		return err
	}
	return setDefault("/", o.To)
}
