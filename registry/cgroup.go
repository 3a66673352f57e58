// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bufio"
	"bytes"
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"ccload/internal/bpfload"
	"ccload/internal/fault"
	"ccload/structops"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

//go:embed cgroup.bpf.o
var groupObject []byte

// maxArms is how many congestion controls a control group's connections can be
// split over; cgroup.bpf.c has it, too.
const (
	maxArms   = 8
	MaxWeight = 1_000_000
)

// Arm is a congestion control and how many of a group's connections get it, in
// proportion to the other weights.
type Arm struct {
	Name   string `json:"name"`
	Weight uint32 `json:"weight"`
}

func (a Arm) String() string { return fmt.Sprintf("%s=%d", a.Name, a.Weight) }

// ParseSplit reads arms as users write them: "bpf_cubic=10,cubic=90".
func ParseSplit(text string) ([]Arm, error) {
	var arms []Arm
	fail := func(why string, args ...any) ([]Arm, error) {
		return nil, fmt.Errorf("split %q: "+why, append([]any{text}, args...)...)
	}
	for part := range strings.SplitSeq(text, ",") {
		name, weight, ok := strings.Cut(part, "=")
		if !ok || name == "" {
			return fail("%q is not NAME=WEIGHT", part)
		}
		w, err := strconv.ParseUint(weight, 10, 32)
		if err != nil || w == 0 || w > MaxWeight {
			return fail("the weight of %q is not a number from 1 to %d", name, MaxWeight)
		}
		if slices.ContainsFunc(arms, func(a Arm) bool { return a.Name == name }) {
			return fail("%q is there twice", name)
		}
		arms = append(arms, Arm{name, uint32(w)})
	}
	if len(arms) > maxArms {
		return fail("%d names: there is room for %d", len(arms), maxArms)
	}
	return arms, nil
}

// GroupChange says what UseGroup changed.
type GroupChange struct {
	Group  string `json:"cgroup"` // below the root of the cgroup2 hierarchy
	Before []Arm  `json:"before,omitempty"`
	After  []Arm  `json:"after"`
	Pin    string `json:"pin"`
}

// UseGroup gives the new connections of a control group and of the groups in it,
// those that they open and those that they accept, a congestion control each, by
// weight; the innermost group that has a selection decides. dir is a directory of
// cgroup2, or its path below the root of that hierarchy. A selection of the same
// group that is there already is replaced at once, and its counts end.
//
// The name is looked up for each connection: the code that is registered under it
// then is what it gets, unless the connection has one of that name already. While
// nothing is, connections keep what they would have without, and are counted as
// failed. The list of allowed names does not matter, and what a program chose for its
// socket before it connected is overruled.
//
// The pin keeps it; RestoreGroup and Restore end it. It needs CAP_NET_ADMIN, CAP_BPF
// and CAP_PERFMON.
func UseGroup(dir string, arms []Arm) (*GroupChange, error) {
	fail := func(err error) (*GroupChange, error) { return nil, fmt.Errorf("control group %q: %w", dir, err) }
	if len(arms) == 0 || len(arms) > maxArms {
		return fail(fmt.Errorf("%d congestion controls: there can be 1 to %d", len(arms), maxArms))
	}
	for _, a := range arms {
		if a.Weight == 0 || a.Weight > MaxWeight {
			return fail(fmt.Errorf("weight %d of %q: it is from 1 to %d", a.Weight, a.Name, MaxWeight))
		}
	}
	g, err := findGroup("/", dir)
	if err != nil {
		return fail(err)
	}
	if err := need("/", "CAP_NET_ADMIN", "CAP_BPF", "CAP_PERFMON"); err != nil {
		return fail(err)
	}
	unlock, err := lock()
	if err != nil {
		return fail(err)
	}
	defer unlock()
	c := &GroupChange{Group: g.name, After: slices.Clone(arms), Pin: g.pin()}
	if c.Before, err = g.use(arms); err != nil {
		return fail(err)
	}
	return c, nil
}

// use selects for a group, for who has the lock.
func (g *group) use(arms []Arm) (before []Arm, err error) {
	if now := liveGroups()[g.pin()]; now != nil {
		return now.arms(), replaceGroup(g.pin(), arms)
	}
	prog, err := loadGroup(arms)
	if err != nil {
		return nil, err
	}
	defer prog.Close()
	if err := fault.At("attach program to cgroup " + g.name); err != nil {
		return nil, err
	}
	l, err := link.AttachCgroup(link.CgroupOptions{Path: g.dir, Attach: ebpf.AttachCGroupSockOps, Program: prog})
	if err != nil {
		err = &bpfload.RefusedError{Program: "choose", Kind: "sockops", Err: bpfload.Plain(err)}
	} else {
		defer l.Close() // the pin holds it from then on
		err = newPin(g.pin(), l.Pin)
	}
	return nil, err
}

// replaceGroup puts another program in the place of the one behind a pin, at once.
func replaceGroup(pin string, arms []Arm) error {
	prog, err := loadGroup(arms)
	if err != nil {
		return err
	}
	defer prog.Close()
	l, err := openLink(pin)
	if err != nil {
		return err
	}
	defer l.Close()
	if err := fault.At("update program of cgroup"); err != nil {
		return err
	}
	return l.Update(prog)
}

// groupConfig and groupCount are the variables of cgroup.bpf.c.
type groupConfig struct {
	Arms, Mixed uint32
	Arm         [maxArms]struct {
		Below       uint64
		Name        [16]byte
		ECN, Weight uint32
	}
}

type groupCount struct{ Chosen, Failed [maxArms]uint64 }

// loadGroup makes sure of the names, and loads the program for them.
func loadGroup(arms []Arm) (*ebpf.Program, error) {
	for _, a := range arms {
		if _, err := autoload(a.Name); err != nil {
			return nil, fmt.Errorf("%q: %w", a.Name, err)
		}
	}
	config, err := configure(arms, needsECN)
	if err != nil {
		return nil, err
	}
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(groupObject))
	if err != nil {
		return nil, err
	}
	if err := spec.Variables["config"].Set(config); err != nil {
		return nil, err
	}
	coll, err := bpfload.Load(spec, nil)
	if err != nil {
		return nil, err
	}
	defer coll.Close()
	return coll.DetachProgram("choose"), nil
}

func configure(arms []Arm, needsECN func(name string) (bool, error)) (*groupConfig, error) {
	var total, sum uint64
	for _, a := range arms {
		total += uint64(a.Weight)
	}
	c := &groupConfig{Arms: uint32(len(arms))}
	for i, a := range arms {
		ecn, err := needsECN(a.Name)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", a.Name, err)
		}
		if ecn {
			c.Arm[i].ECN = 1
		}
		if c.Arm[i].ECN != c.Arm[0].ECN {
			c.Mixed = 1
		}
		sum += uint64(a.Weight)
		c.Arm[i].Below = sum << 32 / total
		c.Arm[i].Weight = a.Weight
		copy(c.Arm[i].Name[:15], a.Name)
	}
	return c, nil
}

// needsECN says whether a congestion control has TCP_CONG_NEEDS_ECN. The kernel
// tells of those in BPF only; of its own dctcp alone has it (Linux 6.18).
func needsECN(name string) (bool, error) {
	if _, err := autoload(name); err != nil {
		return false, err
	}
	e, err := find(name)
	if err != nil {
		return false, err
	}
	const flag = 2
	return name == "dctcp" || e.info != nil && e.info.Flags&flag != 0, nil
}

// liveGroup is what a group's program is doing.
type liveGroup struct {
	id     uint64 // 0: the group is gone
	config groupConfig
	count  groupCount
}

// readGroup reads a program through its link.
func readGroup(l link.Link) (*liveGroup, error) {
	info, err := l.Info()
	if err != nil {
		return nil, err
	}
	if info.Cgroup() == nil {
		return nil, errors.New("not the link of a control group")
	}
	g := &liveGroup{id: info.Cgroup().CgroupId}
	prog, err := ebpf.NewProgramFromID(info.Program)
	if err != nil {
		return nil, err
	}
	defer prog.Close()
	about, err := prog.Info()
	if err != nil {
		return nil, err
	}
	if about.Name != "choose" {
		return nil, fmt.Errorf("program %q is not ccload's", about.Name)
	}
	ids, _ := about.MapIDs()
	for _, id := range ids {
		if err := g.read(id); err != nil {
			return nil, err
		}
	}
	return g, nil
}

// read takes in one of the program's two maps: that of its constants is as long as
// the configuration.
func (g *liveGroup) read(id ebpf.MapID) error {
	m, err := ebpf.NewMapFromID(id)
	if err != nil {
		return err
	}
	defer m.Close()
	b, err := m.LookupBytes(uint32(0))
	if err != nil {
		return err
	}
	var into any = &g.count
	if len(b) == binary.Size(g.config) {
		into = &g.config
	}
	_, err = binary.Decode(b, binary.NativeEndian, into)
	return err
}

// arms are what the program was made for.
func (g *liveGroup) arms() (arms []Arm) {
	for _, a := range g.config.Arm[:min(g.config.Arms, maxArms)] {
		arms = append(arms, Arm{unix.ByteSliceToString(a.Name[:]), a.Weight})
	}
	return arms
}

// selections are what the program does, an arm each.
func (g *liveGroup) selections(name string) (found []Selection) {
	arms := g.arms()
	var total float64
	for _, a := range arms {
		total += float64(a.Weight)
	}
	for i, a := range arms {
		found = append(found, Selection{
			Kind: byGroup, By: byCcload, Name: a.Name, Target: name, Share: float64(a.Weight) / total,
			Chosen: &g.count.Chosen[i], Failed: &g.count.Failed[i],
		})
	}
	return found
}

// group is a control group.
type group struct {
	id   uint64
	dir  string
	name string // below the root of the hierarchy
}

const groupPin = "cgroup-"

func (g *group) pin() string { return filepath.Join(useDir, groupPin+strconv.FormatUint(g.id, 10)) }

// findGroup finds a control group by its directory, or by its path below the root
// of cgroup2, wherever that is mounted.
func findGroup(root, dir string) (*group, error) {
	mount, err := groupMount(root)
	if err != nil {
		return nil, err
	}
	candidates := []string{filepath.Join(mount, dir)}
	if filepath.IsAbs(dir) {
		candidates = []string{filepath.Clean(dir), candidates[0]}
	}
	for _, c := range candidates {
		var fs unix.Statfs_t
		st, err := os.Stat(c)
		if err != nil || !st.IsDir() || unix.Statfs(c, &fs) != nil || fs.Type != unix.CGROUP2_SUPER_MAGIC {
			continue
		}
		name := c
		if rel, err := filepath.Rel(mount, c); err == nil && filepath.IsLocal(rel) {
			name = filepath.Join("/", rel)
		}
		return &group{st.Sys().(*syscall.Stat_t).Ino, c, name}, nil // the kernel's id of a group is its inode
	}
	return nil, fmt.Errorf("%w: no directory of cgroup2, which is mounted on %s", fs.ErrNotExist, mount)
}

// groupMount is where cgroup2 is mounted.
func groupMount(root string) (string, error) {
	f, err := os.Open(filepath.Join(root, "proc/self/mountinfo"))
	if err != nil {
		return "", fmt.Errorf("cgroup2: %w", err)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if point, ok := structops.MountPoint(lines.Text(), "cgroup2"); ok {
			return point, nil
		}
	}
	return "", errors.New("cgroup2 is not mounted")
}

// groupName is what a group is called below the root of the hierarchy.
func groupName(mount string, id uint64) (string, error) {
	root, err := os.Open(mount)
	if err != nil {
		return "", err
	}
	defer root.Close()
	const kernfs = 0xfe // FILEID_KERNFS: the handle is the id
	fd, err := unix.OpenByHandleAt(int(root.Fd()), unix.NewFileHandle(kernfs, binary.NativeEndian.AppendUint64(nil, id)), unix.O_PATH|unix.O_CLOEXEC)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	path, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return "", err
	}
	rel, err := filepath.Rel(mount, path)
	return filepath.Join("/", rel), err
}

// groups gives what is pinned for control groups: the pins, and what is behind
// them; a group that is gone has id 0. What cannot be read is passed over.
func liveGroups() map[string]*liveGroup {
	found := map[string]*liveGroup{}
	names, _ := pinsIn(useDir)
	for _, name := range names {
		if !strings.HasPrefix(name, groupPin) {
			continue
		}
		pin := filepath.Join(useDir, name)
		if l, err := openLink(pin); err == nil {
			if g, err := readGroup(l); err == nil {
				found[pin] = g
			}
			l.Close()
		}
	}
	return found
}

// sweepGroups removes the pins of groups that are gone.
func sweepGroups() (problems []error) {
	for pin, g := range liveGroups() {
		if g.id == 0 {
			problems = append(problems, unpin(pin))
		}
	}
	tidyUp(useDir)
	return problems
}

// groups ends the selections of the groups that match.
func (r *Restoration) groups(match func(id uint64) bool) error {
	var errs []error
	for pin, g := range liveGroups() {
		if g.id == 0 || !match(g.id) {
			continue
		}
		one := Restored{Kind: byGroup, Target: g.path()}
		for i, a := range g.arms() {
			one.From += strings.Repeat(",", min(i, 1)) + a.String()
		}
		if err := endGroup(pin); err != nil {
			errs = append(errs, fmt.Errorf("restore %s: %w", one.Place(), err))
			continue
		}
		r.Restored = append(r.Restored, one)
	}
	return errors.Join(errs...)
}

// endGroup takes a group's program away. The kernel would do so some time after the pin
// is gone.
func endGroup(pin string) error {
	l, err := openLink(pin)
	if err != nil {
		return err
	}
	defer l.Close()
	if err := fault.At("detach program from cgroup"); err != nil {
		return err
	}
	if err := l.Detach(); err != nil {
		return err
	}
	return unpin(pin)
}

// path is the group's name, or if that cannot be told its id.
func (g *liveGroup) path() string {
	mount, err := groupMount("/")
	if err == nil {
		if name, err := groupName(mount, g.id); err == nil {
			return name
		}
	}
	return "id " + strconv.FormatUint(g.id, 10)
}

// groupSelections lists what control groups hand out.
func groupSelections() (found []Selection) {
	for _, g := range liveGroups() {
		if g.id != 0 {
			found = append(found, g.selections(g.path())...)
		}
	}
	return found
}

// GroupSelections is what a control group, named as for UseGroup, hands out; none
// if nothing is selected for it itself.
func GroupSelections(dir string) ([]Selection, error) {
	g, err := findGroup("/", dir)
	if err != nil {
		return nil, fmt.Errorf("control group %q: %w", dir, err)
	}
	if live := liveGroups()[g.pin()]; live != nil {
		return live.selections(g.name), nil
	}
	return []Selection{}, nil
}
