// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"ccload/internal/fault"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// ExtensionObject is programs that are loaded for a policy of one congestion
// control, or that were found in their places. It is not safe for use by several
// goroutines.
type ExtensionObject struct {
	Policy  string
	How     How
	Program string // name

	proto    *btf.FuncProto
	programs map[string]*ebpf.Program // member → program
	to       map[string]uint32        // member → where it goes: the id of the program that has the function, or of the slot's map
}

// Load loads the extension for a policy of a congestion control. With an empty
// how it takes the function's place if the object has a program for that and the
// kernel allows it, else the slot; instead says why it was not the function.
//
// ErrPolicy says that the object and the congestion control do not fit. A program
// that the verifier refuses gives a *VerifierError, missing capabilities or a
// lockdown a *PermissionError.
func (e *Extension) Load(to *Info, policy string, how How) (o *ExtensionObject, instead string, err error) {
	var ways []How
	for _, f := range e.Forms {
		if f.Policy == policy && (how == "" || f.How == how) {
			ways = append(ways, f.How)
		}
	}
	if len(ways) == 0 {
		return nil, "", e.lacks(policy, how)
	}
	for _, way := range ways {
		if o, err = e.load(to, policy, way); err == nil {
			return o, instead, nil
		}
		if !Refused(err) && !errors.Is(err, errWay) {
			return nil, "", err
		}
		if Refused(err) {
			instead = oneLine(err)
		}
	}
	if instead != "" && !Refused(err) {
		err = fmt.Errorf("%w; and functions cannot be replaced here: %s", err, instead)
	}
	return nil, "", err
}

// lacks says what the object has in the place of a program for a policy.
func (e *Extension) lacks(policy string, how How) error {
	var have []string
	for _, f := range e.Forms {
		have = append(have, fmt.Sprintf("%s (%s)", f.Policy, f.How))
	}
	if how != "" {
		policy += fmt.Sprintf(" (%s)", how)
	}
	return fmt.Errorf("%w: the object has no program for %s, but for %s", ErrPolicy, policy, strings.Join(have, ", "))
}

// Refused says that the kernel lets nobody do it, in the way that was tried: neither is
// a capability missing, nor did its verifier find anything wrong.
func Refused(err error) bool {
	var forbidden *PermissionError
	if errors.As(err, &forbidden) {
		return len(forbidden.Missing) == 0
	}
	var verifier *VerifierError
	if errors.As(err, &verifier) && len(verifier.Log) > 0 {
		return false
	}
	const notSupported = unix.Errno(524) // ENOTSUPP, of the kernel's own
	return errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, notSupported) || errors.Is(err, unix.EINVAL)
}

// errWay says that a congestion control cannot be extended in this way.
var errWay = fmt.Errorf("%w", ErrPolicy)

func (e *Extension) load(to *Info, policy string, how How) (*ExtensionObject, error) {
	o, coll, err := e.prepare(to, policy, how)
	if err != nil {
		return nil, err
	}
	defer closeTargets(coll)
	var loaded *ebpf.Collection
	if err = fault.At("load program " + o.Program); err == nil {
		loaded, err = ebpf.NewCollectionWithOptions(coll, withoutLog())
	}
	if err != nil {
		err = e.spec.loadError(coll, nil, err)
		var ve *VerifierError
		if errors.As(err, &ve) {
			ve.Member = policy
		}
		return nil, err
	}
	defer loaded.Close()
	for member := range o.to {
		o.programs[member] = loaded.DetachProgram(key(o.Program, member))
	}
	return o, nil
}

// prepare finds what is to be loaded: a program for each place. The caller closes
// the programs' targets.
func (e *Extension) prepare(to *Info, policy string, how How) (*ExtensionObject, *ebpf.CollectionSpec, error) {
	p, err := policyOf(to, policy)
	if err != nil {
		return nil, nil, err
	}
	form := e.form(policy, how)
	if form == nil {
		return nil, nil, e.lacks(policy, how)
	}
	o := &ExtensionObject{Policy: policy, How: how, Program: form.Program, proto: form.proto, programs: map[string]*ebpf.Program{}}
	if err := o.aim(p, to, form.Member); err != nil {
		return nil, nil, err
	}
	l, err := kernelLayout()
	if err != nil {
		return nil, nil, err
	}
	r := e.spec.reach(l)
	for member, id := range o.to {
		p := e.spec.program(form.Program, member)
		if how == Freplace {
			p.AttachTo = policy
			if p.AttachTarget, err = ebpf.NewProgramFromID(ebpf.ProgramID(id)); err != nil {
				closeTargets(r.CollectionSpec)
				return nil, nil, permission("", err, looking...)
			}
		}
		if err := r.program(key(form.Program, member), p); err != nil {
			closeTargets(r.CollectionSpec)
			return nil, nil, err
		}
	}
	return o, r.CollectionSpec, r.reuse()
}

func closeTargets(coll *ebpf.CollectionSpec) {
	for _, p := range coll.Programs {
		if p.AttachTarget != nil {
			p.AttachTarget.Close()
		}
	}
}

// aim works out where the programs go; an error if they do not fit there.
func (o *ExtensionObject) aim(p Policy, to *Info, member string) error {
	o.to = map[string]uint32{}
	switch {
	case o.How == Freplace && len(p.Copies) == 0:
		return fmt.Errorf("%w: %q has no function %q, only a slot", errWay, to.Name, p.Name)
	case o.How == Freplace && !sameProto(o.proto, p.proto):
		return fmt.Errorf("%w: %q has %s, the object %s", ErrPolicy, to.Name, p.Signature, declaration(o.Program, o.proto))
	case o.How == Freplace:
		for _, m := range to.Members {
			if slices.Contains(p.Copies, m.Member) {
				o.to[m.Member] = m.ID
			}
		}
	case p.Slot == "":
		return fmt.Errorf("%w: %q has no slot for %q, only a function", errWay, to.Name, p.Name)
	case p.Slot != member:
		return fmt.Errorf("%w: %q has the slot for %q in %s, the object's program is for %s", ErrPolicy, to.Name, p.Name, p.Slot, member)
	default:
		o.to[member] = p.slot
	}
	return nil
}

// Members are those into whose programs it goes.
func (o *ExtensionObject) Members() []string { return slices.Sorted(maps.Keys(o.to)) }

// Attach puts the programs in their places, of which path names the pin for each
// member. At once, and for open connections too, they are what is called. What
// holds them are the pins; if it fails it leaves none.
func (o *ExtensionObject) Attach(path func(member string) string) (err error) {
	var pinned []string
	defer func() {
		if err != nil {
			for _, p := range pinned {
				err = errors.Join(err, Detach(p))
			}
		}
	}()
	for _, member := range o.Members() {
		p := path(member)
		attach := o.function
		if o.How == TailCall {
			attach = o.fill
		}
		if err := attach(member, p); err != nil {
			return fmt.Errorf("function %q: %s: %w", o.Policy, member, permission("", err, loading...))
		}
		pinned = append(pinned, p)
	}
	return nil
}

// pinPrivate pins a descriptor for its owner alone.
func pinPrivate(fd int, path string) error {
	if err := pin(fd, path); err != nil {
		return fmt.Errorf("pin %q: %w", path, err)
	}
	err := os.Chmod(path, 0o600)
	if err != nil {
		os.Remove(path)
	}
	return err
}

// function puts a program in the place of one copy of the function.
func (o *ExtensionObject) function(member, path string) error {
	target, err := openID(unix.BPF_PROG_GET_FD_BY_ID, o.to[member])
	if err != nil {
		return err
	}
	defer unix.Close(target)
	id, err := functionID(target, o.Policy)
	if err != nil {
		return err
	}
	link, err := createFreplace(o.programs[member].FD(), target, id)
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("somebody else has replaced it: %w", err)
	}
	if err != nil {
		return err
	}
	defer unix.Close(link)
	return pinPrivate(link, path)
}

// functionID is the id that a function has in its program's BTF.
func functionID(program int, name string) (uint32, error) {
	var info progInfo
	if err := objInfo(program, &info); err != nil {
		return 0, err
	}
	b, err := loadBTF(info.BTF)
	if err != nil {
		return 0, err
	}
	for id := range b.types {
		if b.kind(id) == kindFunc && string(b.name(id)) == name {
			return uint32(id), nil
		}
	}
	return 0, fmt.Errorf("function %q: %w", name, ErrNotFound)
}

// fill puts a program into the slot. The kernel empties it when no process and no
// pin holds its map, so it is pinned first.
func (o *ExtensionObject) fill(member, path string) error {
	fd, err := openID(unix.BPF_MAP_GET_FD_BY_ID, o.to[member])
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	id := make([]byte, 4)
	if err := element(unix.BPF_MAP_LOOKUP_ELEM, fd, id); err == nil {
		return fmt.Errorf("program %d, of somebody else, is in the slot: %w", binary.NativeEndian.Uint32(id), unix.EBUSY)
	} else if !errors.Is(err, unix.ENOENT) {
		return err
	}
	if err := pinPrivate(fd, path); err != nil {
		return err
	}
	if err := keepFilled(fd, uint32(o.programs[member].FD())); err != nil {
		os.Remove(path)
		return err
	}
	return nil
}

// settle is how long a slot has to keep its program until it counts as filled.
const settle = 50 * time.Millisecond

// keepFilled puts a program into a slot that is held. The kernel empties a slot in
// the background, and may just be about to: because somebody had looked at it
// before it was held, this process among them. Then it has to be filled again.
func keepFilled(fd int, program uint32) error {
	id := make([]byte, 4)
	begin := time.Now()
	for since := begin; time.Since(since) < settle; time.Sleep(settle / 10) {
		err := element(unix.BPF_MAP_LOOKUP_ELEM, fd, id)
		if err == nil {
			continue
		}
		if errors.Is(err, unix.ENOENT) && time.Since(begin) < lingers {
			since = time.Now()
			err = element(unix.BPF_MAP_UPDATE_ELEM, fd, binary.NativeEndian.AppendUint32(nil, program))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Close frees what is not attached. It may be called again.
func (o *ExtensionObject) Close() error {
	for member, p := range o.programs {
		p.Close()
		delete(o.programs, member)
	}
	return nil
}

// Place is what a pin of Attach holds.
type Place struct {
	How       How
	Program   string // "": the slot is empty
	ProgramID uint32
}

// OpenPlace looks at a pin. What holds neither an extension nor a slot is
// ErrNotFound.
func OpenPlace(path string) (*Place, error) {
	p, fd, err := openPlace(path)
	if err != nil {
		return nil, fmt.Errorf("pin %q: %w", path, permission("", err, looking...))
	}
	unix.Close(fd)
	return p, nil
}

// openPlace leaves the pin's descriptor open.
func openPlace(path string) (_ *Place, fd int, err error) {
	if fd, err = openPin(path); err != nil {
		return nil, -1, err
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	kind, err := fdKind(fd)
	if err != nil {
		return nil, -1, err
	}
	p := &Place{}
	if strings.HasSuffix(kind, "link") {
		var info linkInfo
		if err := objInfo(fd, &info); err != nil {
			return nil, -1, err
		}
		if info.Type != tracingLink {
			return nil, -1, ErrNotFound
		}
		p.How, p.ProgramID = Freplace, info.Prog
	} else {
		var info mapInfo
		if err := objInfo(fd, &info); err != nil {
			return nil, -1, err
		}
		if kind != "bpf-map" || info.Type != uint32(ebpf.ProgramArray) || !strings.HasSuffix(cString(info.Name[:]), slotSuffix) {
			return nil, -1, ErrNotFound
		}
		id := make([]byte, 4)
		if err := element(unix.BPF_MAP_LOOKUP_ELEM, fd, id); err != nil && !errors.Is(err, unix.ENOENT) {
			return nil, -1, err
		}
		p.How, p.ProgramID = TailCall, binary.NativeEndian.Uint32(id)
	}
	if p.ProgramID == 0 {
		return p, fd, nil
	}
	prog, err := openID(unix.BPF_PROG_GET_FD_BY_ID, p.ProgramID)
	if err != nil {
		return nil, -1, err
	}
	defer unix.Close(prog)
	m := Member{ID: p.ProgramID}
	if err := new(Info).readProgram(&m, map[uint32]bool{}); err != nil {
		return nil, -1, err
	}
	p.Program = m.Program
	return p, fd, nil
}

// Reload finds the programs that are attached to one congestion control, for
// another one in its place: that of an Object that is loaded, say. places are the
// pins, by member.
//
// ErrPolicy and ErrNotFound say that they do not fit there.
func Reload(places map[string]string, policy string, to *Info) (_ *ExtensionObject, err error) {
	there, err := policyOf(to, policy)
	if errors.Is(err, ErrNotFound) {
		return nil, fmt.Errorf("function %q: %w: the new code has none of that name", policy, ErrPolicy)
	}
	if err != nil {
		return nil, err
	}
	o := &ExtensionObject{Policy: policy, programs: map[string]*ebpf.Program{}}
	defer func() {
		if err != nil {
			o.Close()
		}
	}()
	var member string
	for m, path := range places {
		p, err := OpenPlace(path)
		if err != nil {
			return nil, err
		}
		prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(p.ProgramID))
		if err != nil {
			return nil, fmt.Errorf("function %q: %w", policy, permission("", err, looking...))
		}
		member, o.programs[m], o.How, o.Program = m, prog, p.How, p.Program
		if p.How == Freplace && o.proto == nil {
			if o.proto, err = protoOf(prog); err != nil {
				return nil, fmt.Errorf("function %q: %w", policy, err)
			}
		}
	}
	if err := o.aim(there, to, member); err != nil {
		return nil, fmt.Errorf("function %q: %w", policy, err)
	}
	for m := range o.to {
		// The kernel ties an extension to the member that it was loaded for.
		if o.programs[m] == nil {
			return nil, fmt.Errorf("function %q: %w: the new code has a copy of it for %s, too", policy, ErrPolicy, m)
		}
	}
	return o, nil
}

// protoOf is the type of a program's first function.
func protoOf(p *ebpf.Program) (*btf.FuncProto, error) {
	info, err := p.Info()
	if err != nil {
		return nil, permission("", err, looking...)
	}
	functions, err := info.FuncInfos()
	if err != nil {
		return nil, permission("", err, looking...)
	}
	if len(functions) > 0 {
		if proto, ok := functions[0].Func.Type.(*btf.FuncProto); ok {
			return proto, nil
		}
	}
	return nil, errBTF
}

// Detach takes a program out of its place and removes the pin. When it returns,
// the policy is the original again.
func Detach(path string) error {
	p, fd, err := openPlace(path)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("pin %q: %w", path, permission("", err, looking...))
	}
	var id uint32
	if p.How == TailCall {
		err = empty(fd, p.ProgramID, func() error { return removePin(path) })
	} else if id, err = linkID(fd); err == nil {
		err = removePin(path)
	}
	unix.Close(fd)
	if err == nil && id != 0 {
		err = waitLink(id)
	}
	if err != nil {
		return fmt.Errorf("pin %q: %w", path, err)
	}
	return nil
}

// empty takes a program out of a slot, and puts it back if what is to follow fails.
func empty(slot int, program uint32, then func() error) error {
	if program == 0 {
		return then()
	}
	fd, err := openID(unix.BPF_PROG_GET_FD_BY_ID, program)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := element(unix.BPF_MAP_DELETE_ELEM, slot, nil); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	if err := then(); err != nil {
		return errors.Join(err, element(unix.BPF_MAP_UPDATE_ELEM, slot, binary.NativeEndian.AppendUint32(nil, uint32(fd))))
	}
	return nil
}

// waitLink waits until the kernel has let go of a link that nothing holds.
func waitLink(id uint32) error {
	for deadline := time.Now().Add(lingers); ; time.Sleep(time.Millisecond) {
		fd, err := openID(unix.BPF_LINK_GET_FD_BY_ID, id)
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		if err != nil {
			return err
		}
		unix.Close(fd)
		if time.Now().After(deadline) {
			return fmt.Errorf("link %d is held by something else: the program stays in its place", id)
		}
	}
}
