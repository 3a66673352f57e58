// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
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

// policyOf finds a policy; without it the error is ErrNotFound.
func policyOf(info *Info, name string) (Policy, error) {
	all, err := Policies(info)
	if err != nil {
		return Policy{}, err
	}
	for _, p := range all {
		if p.Name == name {
			return p, nil
		}
	}
	return Policy{}, fmt.Errorf("function %q: %w", name, ErrNotFound)
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
