// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// Policy is a part of a live congestion control that a program of a user's may
// take the place of, while connections use it: a global function, or the rest of
// a callback behind a slot, or both.
//
// A function's name is the policy's. A slot is a map of type PROG_ARRAY with the
// name of the policy and "_slot": the callback calls what is in its element 0, and
// goes on if nothing is.
type Policy struct {
	Name      string   `json:"name"`
	Signature string   `json:"signature,omitempty"` // of the function, as in C
	Copies    []string `json:"copies,omitempty"`    // members: each one's program has a copy of the function
	Slot      string   `json:"slot,omitempty"`      // member whose program has the slot

	proto *btf.FuncProto
	slot  uint32 // map id
}

// How a program takes the place of a policy.
type How string

const (
	Freplace How = "freplace"  // in the place of the function (BPF_PROG_TYPE_EXT)
	TailCall How = "tail-call" // in the slot
)

const slotSuffix = "_slot"

var (
	ErrNoExtension = errors.New(`no extension in the object: neither SEC("freplace/FUNCTION") nor a program FUNCTION_slot in SEC("struct_ops/MEMBER")`)
	ErrPolicy      = errors.New("the extension does not fit")
)

// Policies are those of a live congestion control, or of one that is loaded
// (Object.Info), by name. It needs CAP_SYS_ADMIN.
func Policies(info *Info) ([]Policy, error) {
	found := map[string]*Policy{}
	at := func(name string) *Policy {
		if found[name] == nil {
			found[name] = &Policy{Name: name}
		}
		return found[name]
	}
	for _, m := range info.Members {
		functions, slots, err := lookInto(m.ID)
		if err != nil {
			return nil, fmt.Errorf("program %q: %w", m.Program, permission("", err, looking...))
		}
		for _, f := range functions {
			p := at(f.Name)
			p.proto = f.Type.(*btf.FuncProto)
			p.Signature = declaration(f.Name, p.proto)
			p.Copies = append(p.Copies, m.Member)
		}
		for name, id := range slots {
			p := at(name)
			p.Slot, p.slot = m.Member, id
		}
	}
	var all []Policy
	for _, name := range slices.Sorted(maps.Keys(found)) {
		slices.Sort(found[name].Copies)
		all = append(all, *found[name])
	}
	return all, nil
}

// lookInto finds the global functions of a program, and its slots: policy → map id.
func lookInto(program uint32) (functions []*btf.Func, slots map[string]uint32, err error) {
	fd, err := openID(unix.BPF_PROG_GET_FD_BY_ID, program)
	if err != nil {
		return nil, nil, err
	}
	defer unix.Close(fd)
	var ids [64]uint32                        // MAX_USED_MAPS
	var fns [256]struct{ offset, typ uint32 } // BPF_MAX_SUBPROGS
	info := progInfo{
		NumMaps: uint32(len(ids)), Maps: unsafe.Pointer(&ids),
		NumFuncInfo: uint32(len(fns)), FuncInfoSize: uint32(unsafe.Sizeof(fns[0])), FuncInfo: unsafe.Pointer(&fns),
	}
	if err := objInfo(fd, &info); err != nil {
		return nil, nil, err
	}
	slots = map[string]uint32{}
	for _, id := range ids[:min(int(info.NumMaps), len(ids))] {
		m, err := infoOfMap(id)
		if err != nil {
			return nil, nil, err
		}
		if policy, ok := strings.CutSuffix(cString(m.Name[:]), slotSuffix); ok && m.Type == uint32(ebpf.ProgramArray) {
			slots[policy] = id
		}
	}
	if info.NumFuncInfo < 2 || info.BTF == 0 {
		return nil, slots, nil
	}
	h, err := btf.NewHandleFromID(btf.ID(info.BTF))
	if err != nil {
		return nil, nil, err
	}
	defer h.Close()
	types, err := h.Spec(nil)
	if err != nil {
		return nil, nil, fmt.Errorf("BTF: %w", err)
	}
	// The first is the program itself.
	for _, fn := range fns[1:min(int(info.NumFuncInfo), len(fns))] {
		t, err := types.TypeByID(btf.TypeID(fn.typ))
		if err != nil {
			return nil, nil, fmt.Errorf("BTF: %w", err)
		}
		f, ok := t.(*btf.Func)
		if !ok || f.Linkage != btf.GlobalFunc {
			continue
		}
		if _, ok := f.Type.(*btf.FuncProto); ok {
			functions = append(functions, f)
		}
	}
	return functions, slots, nil
}

func infoOfMap(id uint32) (info mapInfo, err error) {
	fd, err := openID(unix.BPF_MAP_GET_FD_BY_ID, id)
	if err != nil {
		return info, err
	}
	defer unix.Close(fd)
	return info, objInfo(fd, &info)
}

// declaration is a function as C declares it.
func declaration(name string, f *btf.FuncProto) string {
	args := make([]string, len(f.Params))
	for i, p := range f.Params {
		t := cType(p.Type)
		if !strings.HasSuffix(t, "*") {
			t += " "
		}
		args[i] = strings.TrimSpace(t + p.Name)
	}
	if len(args) == 0 {
		args = []string{"void"}
	}
	return fmt.Sprintf("%s %s(%s)", cType(f.Return), name, strings.Join(args, ", "))
}

func cType(t btf.Type) string {
	inner, _ := qualified(t)
	if p, ok := inner.(*btf.Pointer); ok {
		return strings.TrimSuffix(cType(p.Target), " ") + " *"
	}
	if _, ok := inner.(*btf.Void); ok {
		return "void"
	}
	return typeName(t)
}

// sameProto is as strict about the types of a function as the kernel.
func sameProto(a, b *btf.FuncProto) bool {
	return len(a.Params) == len(b.Params) && sameType(a.Return, b.Return) &&
		slices.EqualFunc(a.Params, b.Params, func(p, q btf.FuncParam) bool { return sameType(p.Type, q.Type) })
}

func sameType(a, b btf.Type) bool {
	a, b = btf.UnderlyingType(a), btf.UnderlyingType(b)
	if pa, ok := a.(*btf.Pointer); ok {
		pb, ok := b.(*btf.Pointer)
		return ok && flavourless(btf.UnderlyingType(pa.Target).TypeName()) == flavourless(btf.UnderlyingType(pb.Target).TypeName())
	}
	sa, errA := btf.Sizeof(a)
	sb, errB := btf.Sizeof(b)
	return fmt.Sprintf("%T", a) == fmt.Sprintf("%T", b) && sa == sb && (errA == nil) == (errB == nil)
}

// Extension is an object file with programs for policies, parsed. It may be
// loaded any number of times, but not from two goroutines at once.
type Extension struct {
	Forms    []Form // in the order of policies; of one policy the function first
	License  string
	Warnings []string // programs that are for no policy

	spec *Spec // without ops
}

// Form is a program for a policy.
type Form struct {
	How     How    `json:"how"`
	Policy  string `json:"function"`
	Program string `json:"program"`
	Member  string `json:"member,omitempty"` // TailCall: of the callback that it does the rest of

	proto *btf.FuncProto // Freplace
}

// ParseExtension reads an ELF object with programs for policies: for a function
// any program in SEC("freplace/FUNCTION"), for a slot one with the name of the slot's
// map, FUNCTION_slot, in SEC("struct_ops/MEMBER"). What it checks are the laws of
// Parse about BTF and licence, and that there is at least one such program
// (ErrNoExtension).
func ParseExtension(obj []byte) (*Extension, error) {
	e, err := parseExtension(obj)
	if err != nil {
		return nil, fmt.Errorf("object: %w", err)
	}
	return e, nil
}

func parseExtension(obj []byte) (*Extension, error) {
	f, types, err := openTyped(obj)
	if err != nil {
		return nil, err
	}
	e := &Extension{spec: &Spec{weak: map[string]bool{}}}
	if err := e.spec.readPrograms(f, types); err != nil {
		return nil, err
	}
	e.License = e.spec.License
	for _, name := range slices.Sorted(maps.Keys(e.spec.coll.Programs)) {
		p := e.spec.coll.Programs[name]
		kind, target, _ := strings.Cut(p.SectionName, "/")
		form := Form{Program: name}
		policy, isSlot := strings.CutSuffix(name, slotSuffix)
		switch {
		case p.Type == ebpf.Extension && kind == "freplace" && target != "":
			if form.proto = proto(p); form.proto == nil {
				return nil, fmt.Errorf("program %q: %w", name, ErrNoBTF)
			}
			form.How, form.Policy = Freplace, target
		case p.Type == ebpf.StructOps && isSlot && policy != "" && target != "":
			form.How, form.Policy, form.Member = TailCall, policy, target
		default:
			e.Warnings = append(e.Warnings, fmt.Sprintf("program %q (section %q) is for no function: left out", name, p.SectionName))
			continue
		}
		if twice := e.form(form.Policy, form.How); twice != nil {
			return nil, fmt.Errorf("function %q: two programs for %s: %q and %q", form.Policy, form.How, twice.Program, name)
		}
		e.Forms = append(e.Forms, form)
	}
	if len(e.Forms) == 0 {
		return nil, ErrNoExtension
	}
	slices.SortFunc(e.Forms, func(a, b Form) int {
		return cmp.Or(cmp.Compare(a.Policy, b.Policy), cmp.Compare(a.How, b.How))
	})
	return e, nil
}

// proto is the type of a program; nil if its BTF does not tell.
func proto(p *ebpf.ProgramSpec) *btf.FuncProto {
	if len(p.Instructions) == 0 {
		return nil
	}
	fn := btf.FuncMetadata(&p.Instructions[0])
	if fn == nil {
		return nil
	}
	t, _ := fn.Type.(*btf.FuncProto)
	return t
}

func (e *Extension) form(policy string, how How) *Form {
	for i := range e.Forms {
		if e.Forms[i].Policy == policy && e.Forms[i].How == how {
			return &e.Forms[i]
		}
	}
	return nil
}

// Replacement is programs that are loaded for a policy of one congestion control,
// or that were found in their places. It is not safe for use by several
// goroutines.
type Replacement struct {
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
func (e *Extension) Load(to *Info, policy string, how How) (r *Replacement, instead string, err error) {
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
		if r, err = e.load(to, policy, way); err == nil {
			return r, instead, nil
		}
		if !locked(err) && !errors.Is(err, errWay) {
			return nil, "", err
		}
		if locked(err) {
			instead = oneLine(err)
		}
	}
	if instead != "" && !locked(err) {
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

// locked says that the kernel lets nobody do it.
func locked(err error) bool {
	var forbidden *PermissionError
	if errors.As(err, &forbidden) {
		return len(forbidden.Missing) == 0
	}
	return errors.Is(err, ebpf.ErrNotSupported)
}

// errWay says that a congestion control cannot be extended in this way.
var errWay = fmt.Errorf("%w", ErrPolicy)

func (e *Extension) load(to *Info, policy string, how How) (*Replacement, error) {
	r, coll, err := e.prepare(to, policy, how)
	if err != nil {
		return nil, err
	}
	defer closeTargets(coll)
	loaded, err := ebpf.NewCollectionWithOptions(coll, ebpf.CollectionOptions{Cache: kernelTypes()})
	if err != nil {
		err = loadError(coll, err)
		var ve *VerifierError
		if errors.As(err, &ve) {
			ve.Member, ve.Policy = "", policy
		}
		return nil, err
	}
	defer loaded.Close()
	for member := range r.to {
		r.programs[member] = loaded.DetachProgram(key(r.Program, member))
	}
	return r, nil
}

// prepare finds what is to be loaded: a program for each place. The caller closes
// the programs' targets.
func (e *Extension) prepare(to *Info, policy string, how How) (*Replacement, *ebpf.CollectionSpec, error) {
	all, err := Policies(to)
	if err != nil {
		return nil, nil, err
	}
	i := slices.IndexFunc(all, func(p Policy) bool { return p.Name == policy })
	if i < 0 {
		return nil, nil, fmt.Errorf("function %q: %w", policy, ErrNotFound)
	}
	form := e.form(policy, how)
	if form == nil {
		return nil, nil, e.lacks(policy, how)
	}
	r := &Replacement{Policy: policy, How: how, Program: form.Program, proto: form.proto, programs: map[string]*ebpf.Program{}}
	if err := r.aim(all[i], to, form.Member); err != nil {
		return nil, nil, err
	}
	coll, err := e.spec.collection()
	if err != nil {
		return nil, nil, err
	}
	for member, id := range r.to {
		p := e.spec.program(form.Program, member)
		if how == Freplace {
			p.AttachTo = policy
			if p.AttachTarget, err = ebpf.NewProgramFromID(ebpf.ProgramID(id)); err != nil {
				closeTargets(coll)
				return nil, nil, permission("", err, looking...)
			}
		}
		coll.Programs[key(form.Program, member)] = p
	}
	return r, coll, nil
}

func closeTargets(coll *ebpf.CollectionSpec) {
	for _, p := range coll.Programs {
		if p.AttachTarget != nil {
			p.AttachTarget.Close()
		}
	}
}

// aim works out where the programs go; an error if they do not fit there.
func (r *Replacement) aim(p Policy, to *Info, member string) error {
	r.to = map[string]uint32{}
	switch {
	case r.How == Freplace && len(p.Copies) == 0:
		return fmt.Errorf("%w: %q has no function %q, only a slot", errWay, to.Name, p.Name)
	case r.How == Freplace && !sameProto(r.proto, p.proto):
		return fmt.Errorf("%w: %q has %s, the object %s", ErrPolicy, to.Name, p.Signature, declaration(r.Program, r.proto))
	case r.How == Freplace:
		for _, m := range to.Members {
			if slices.Contains(p.Copies, m.Member) {
				r.to[m.Member] = m.ID
			}
		}
	case p.Slot == "":
		return fmt.Errorf("%w: %q has no slot for %q, only a function", errWay, to.Name, p.Name)
	case p.Slot != member:
		return fmt.Errorf("%w: %q has the slot for %q in %s, the object's program is for %s", ErrPolicy, to.Name, p.Name, p.Slot, member)
	default:
		r.to[member] = p.slot
	}
	return nil
}

// Members are those whose programs the replacement goes into.
func (r *Replacement) Members() []string { return slices.Sorted(maps.Keys(r.to)) }

// Attach puts the programs in their places, of which path names the pin for each
// member. At once, and for open connections too, they are what is called. What
// holds them are the pins; if it fails it leaves none.
func (r *Replacement) Attach(path func(member string) string) (err error) {
	var pinned []string
	defer func() {
		if err != nil {
			for _, p := range pinned {
				err = errors.Join(err, Detach(p))
			}
		}
	}()
	for _, member := range r.Members() {
		p := path(member)
		attach := r.function
		if r.How == TailCall {
			attach = r.fill
		}
		if err := attach(member, p); err != nil {
			return fmt.Errorf("function %q: %s: %w", r.Policy, member, permission("", err, loading...))
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
	return os.Chmod(path, 0o600)
}

// function puts a program in the place of one copy of the function.
func (r *Replacement) function(member, path string) error {
	target, err := openID(unix.BPF_PROG_GET_FD_BY_ID, r.to[member])
	if err != nil {
		return err
	}
	defer unix.Close(target)
	id, err := functionID(target, r.Policy)
	if err != nil {
		return err
	}
	link, err := createReplacement(r.programs[member].FD(), target, id)
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
func (r *Replacement) fill(member, path string) error {
	fd, err := openID(unix.BPF_MAP_GET_FD_BY_ID, r.to[member])
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
	if err := keepFilled(fd, uint32(r.programs[member].FD())); err != nil {
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
func (r *Replacement) Close() error {
	for member, p := range r.programs {
		p.Close()
		delete(r.programs, member)
	}
	return nil
}

// Place is what a pin of Attach holds.
type Place struct {
	How       How
	Program   string // "": the slot is empty
	ProgramID uint32
	In        uint32 // id of the program that had the function, or of the slot's map
	Policy    string // TailCall, from the name of the map
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
		var info tracingInfo
		if err := objInfo(fd, &info); err != nil {
			return nil, -1, err
		}
		if info.Type != tracingLink {
			return nil, -1, ErrNotFound
		}
		p.How, p.ProgramID, p.In = Freplace, info.Prog, info.Target
	} else {
		var info mapInfo
		if err := objInfo(fd, &info); err != nil {
			return nil, -1, err
		}
		policy, ok := strings.CutSuffix(cString(info.Name[:]), slotSuffix)
		if kind != "bpf-map" || info.Type != uint32(ebpf.ProgramArray) || !ok {
			return nil, -1, ErrNotFound
		}
		id := make([]byte, 4)
		if err := element(unix.BPF_MAP_LOOKUP_ELEM, fd, id); err != nil && !errors.Is(err, unix.ENOENT) {
			return nil, -1, err
		}
		p.How, p.ProgramID, p.In, p.Policy = TailCall, binary.NativeEndian.Uint32(id), info.ID, policy
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
func Reload(places map[string]string, policy string, to *Info) (_ *Replacement, err error) {
	all, err := Policies(to)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(all, func(p Policy) bool { return p.Name == policy })
	if i < 0 {
		return nil, fmt.Errorf("function %q: %w: the new code has none of that name", policy, ErrPolicy)
	}
	r := &Replacement{Policy: policy, programs: map[string]*ebpf.Program{}}
	defer func() {
		if err != nil {
			r.Close()
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
		member, r.programs[m], r.How, r.Program = m, prog, p.How, p.Program
		if p.How == Freplace && r.proto == nil {
			if r.proto, err = protoOf(prog); err != nil {
				return nil, fmt.Errorf("function %q: %w", policy, err)
			}
		}
	}
	if err := r.aim(all[i], to, member); err != nil {
		return nil, fmt.Errorf("function %q: %w", policy, err)
	}
	for m := range r.to {
		// The kernel ties an extension to the member that it was loaded for.
		if r.programs[m] == nil {
			return nil, fmt.Errorf("function %q: %w: the new code has a copy of it for %s, too", policy, ErrPolicy, m)
		}
	}
	return r, nil
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
		if err = element(unix.BPF_MAP_DELETE_ELEM, fd, nil); errors.Is(err, unix.ENOENT) {
			err = nil
		}
	} else {
		id, err = linkID(fd)
	}
	if err == nil {
		err = os.Remove(path)
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
