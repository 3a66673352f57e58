// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"debug/dwarf"
	"debug/elf"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"ccload/internal/kernelbtf"

	"github.com/cilium/ebpf/btf"
)

// ErrLayout says that an object finds fields where another kernel has them.
var ErrLayout = errors.New("made for another kernel's layout")

// fixedField is a field of the kernel's that a program finds where it was in the
// kernel that the object was compiled for, for its type has no
// preserve_access_index.
type fixedField struct {
	of              string   // structure
	path            []string // names of members; nil if the object does not tell
	begin           int      // of the field; of what is accessed where that is not known
	program, member string
}

func (f fixedField) String() string {
	if f.path == nil {
		return fmt.Sprintf("byte %d", f.begin)
	}
	return fmt.Sprintf("%s at byte %d", strings.Join(f.path, "."), f.begin)
}

// privateUse is how much is used of the private state, and where the last byte is.
type privateUse struct {
	size            int
	program, member string
}

// socketViews are the structures that begin with the one before: a socket is all of
// them.
var socketViews = []string{"sock", "inet_sock", "inet_connection_sock", "tcp_sock"}

// kernelArguments are the structures that callbacks are given.
var kernelArguments = append([]string{"rate_sample", "ack_sample"}, socketViews...)

// readAccesses finds out what the ops' programs access of the kernel's structures,
// and warns of what is fixed to one kernel's layout.
func (s *Spec) readAccesses(f *object) {
	var known *shapes
	var warned []string
	for _, o := range s.Ops {
		for _, member := range slices.Sorted(maps.Keys(o.Programs)) {
			p := s.coll.Programs[o.Programs[member]]
			if p == nil {
				continue
			}
			for _, a := range s.accesses(p, o.callback(member)) {
				if a.private && a.off+a.size > o.private.size {
					o.private = privateUse{a.off + a.size, p.Name, member}
				}
				// The very beginning is the same everywhere.
				if !a.fixed || a.off <= 0 || a.arg > 0 && !slices.Contains(kernelArguments, flavourless(a.of)) {
					continue
				}
				if known == nil {
					known = s.shapes(f)
				}
				field := fixedField{program: p.Name, member: member}
				field.of, field.path, field.begin = known.find(a.of, a.off)
				if field.path == nil && slices.Contains(socketViews, flavourless(a.of)) && !known.socket {
					o.sock = known.whole("sock")
				}
				if !slices.ContainsFunc(o.fixed, func(g fixedField) bool { return g.of == field.of && g.begin == field.begin }) {
					o.fixed = append(o.fixed, field)
				}
			}
		}
		for _, of := range o.fixedStructures() {
			if slices.Contains(warned, of) {
				continue
			}
			warned = append(warned, of)
			first := o.fixed[slices.IndexFunc(o.fixed, func(f fixedField) bool { return f.of == of })]
			s.Warnings = append(s.Warnings, fmt.Sprintf(
				"struct %s is fixed to one kernel's layout (%s, in %s): give it __attribute__((preserve_access_index)), and each kernel's own is used",
				of, first, first.program))
		}
	}
}

func (o *Ops) fixedStructures() (names []string) {
	for _, f := range o.fixed {
		if !slices.Contains(names, f.of) {
			names = append(names, f.of)
		}
	}
	return names
}

// misfits are the reasons for which a congestion control must not run on this
// kernel although the verifier may accept it: it would use the wrong fields, or
// read what is behind its private state.
func (o *Ops) misfits() (all []Reason, err error) {
	if len(o.fixed) == 0 && o.sock == nil && o.private.size <= smallestPrivate {
		return nil, nil
	}
	kernel, err := kernelbtf.Types().Kernel()
	if err != nil {
		return nil, err
	}
	if have := privateSize(kernel); o.private.size > have && have > 0 {
		all = append(all, Reason{
			Kind: PrivateState, What: fmt.Sprintf("%d bytes are needed, the kernel has %d", o.private.size, have),
			Program: o.private.program, Member: o.private.member,
			Means: "keep less in icsk_ca_priv, or the rest in a map (BPF_MAP_TYPE_SK_STORAGE, of each socket)",
		})
	}
	for _, of := range o.fixedStructures() {
		for _, f := range o.fixed {
			if f.of != of || f.path == nil {
				continue
			}
			at, ok := kernelPlace(kernel, of, f.path)
			if !ok || at == f.begin {
				continue
			}
			all = append(all, Reason{
				Kind: LayoutDiffers, What: of + "." + strings.Join(f.path, "."), Program: f.program, Member: f.member,
				Detail: fmt.Sprintf("byte %d in the object, %d in this kernel", f.begin, at),
				Means:  fmt.Sprintf("it would use the wrong fields: give struct %s __attribute__((preserve_access_index)) and compile it again", of),
			})
			break
		}
	}
	if len(all) == 0 && o.sock != nil {
		all = differences(kernel, o.sock)
	}
	return all, nil
}

// differences are where the kernel has a structure otherwise than the object: the first
// of its members, or its end.
func differences(kernel *btf.Spec, ours *btf.Struct) []Reason {
	r := Reason{
		Kind: LayoutDiffers, What: ours.Name,
		Means: "what is behind it is elsewhere, too, and it would use the wrong fields: compile it with preserve_access_index",
	}
	for _, m := range ours.Members {
		if size, err := btf.Sizeof(m.Type); size == 0 || err != nil { // only marks a place
			continue
		}
		if at, ok := kernelPlace(kernel, ours.Name, []string{m.Name}); ok && m.Name != "" && m.BitfieldSize == 0 && at != int(m.Offset.Bytes()) {
			r.What += "." + m.Name
			r.Detail = fmt.Sprintf("byte %d in the object, %d in this kernel", m.Offset.Bytes(), at)
			return []Reason{r}
		}
	}
	var theirs *btf.Struct
	if kernel.TypeByName(ours.Name, &theirs) == nil && theirs.Size != ours.Size {
		r.Detail = fmt.Sprintf("%d bytes in the object, %d in this kernel", ours.Size, theirs.Size)
		return []Reason{r}
	}
	return nil
}

// smallestPrivate is how much every kernel with struct_ops has of private state.
const smallestPrivate = 104

// privateSize is how much the kernel has of it; 0 if that is not known.
func privateSize(kernel *btf.Spec) int {
	var st *btf.Struct
	if kernel.TypeByName("inet_connection_sock", &st) != nil {
		return 0
	}
	for _, m := range st.Members {
		if m.Name == privateMember {
			size, _ := btf.Sizeof(m.Type)
			return size
		}
	}
	return 0
}

// shapes are the kernel's structures as the object declares them.
type shapes struct {
	types     *btf.Spec
	relocated map[string]bool // those whose fields CO-RE finds
	socket    bool            // a structure of sockets is among them
	debug     *dwarf.Data     // has those that are not in BTF, because only code names them; nil: stripped
}

func (s *Spec) shapes(f *object) *shapes {
	k := &shapes{types: s.coll.Types, relocated: map[string]bool{}, debug: f.debugInfo()}
	for _, p := range s.coll.Programs {
		for i := range p.Instructions {
			if owner, _ := s.relocationPath(&p.Instructions[i]); owner != nil {
				k.relocated[owner.TypeName()] = true
				k.socket = k.socket || slices.Contains(socketViews, flavourless(owner.TypeName()))
			}
		}
	}
	return k
}

// whole is a structure that is declared as a kernel has it, to all appearances: with
// very many members; nil if it is not.
func (k *shapes) whole(name string) *btf.Struct {
	if st := k.structure(name); st != nil && len(st.Members) > 40 {
		return st
	}
	return nil
}

// find is the field at an offset of a structure; of a socket's, in the smallest of
// its structures that is large enough. Of a structure that CO-RE is used for only a
// part is declared, in no order.
func (k *shapes) find(of string, off int) (owner string, path []string, begin int) {
	names := []string{of}
	if i := slices.Index(socketViews, flavourless(of)); i >= 0 {
		names = append(names, socketViews[i+1:]...)
	}
	for i, name := range names {
		if i > 0 && k.socket {
			break
		}
		st := k.structure(name)
		if st == nil || off >= int(st.Size) || k.relocated[name] {
			continue
		}
		if path, begin := fieldPath(st, off); path != nil {
			return flavourless(name), path, begin
		}
	}
	return flavourless(names[len(names)-1]), nil, off
}

func (k *shapes) structure(name string) *btf.Struct {
	if types, err := k.types.AnyTypesByName(name); err == nil {
		for _, t := range types {
			if st, ok := t.(*btf.Struct); ok {
				return st
			}
		}
	}
	if k.debug == nil {
		return nil
	}
	for r := k.debug.Reader(); ; {
		e, err := r.Next()
		if err != nil || e == nil {
			return nil
		}
		switch e.Tag {
		case dwarf.TagCompileUnit:
			continue
		case dwarf.TagStructType:
			if called, _ := e.Val(dwarf.AttrName).(string); called == name && e.Val(dwarf.AttrDeclaration) == nil {
				t, err := k.debug.Type(e.Offset)
				if err != nil {
					return nil
				}
				st, _ := debugTypes{}.convert(t).(*btf.Struct)
				return st
			}
		}
		r.SkipChildren()
	}
}

// debugTypes are types of DWARF in BTF, of which only the places of members count.
// What is within itself has no size.
type debugTypes map[dwarf.Type]btf.Type

func (d debugTypes) convert(t dwarf.Type) btf.Type {
	if done, ok := d[t]; ok {
		return done
	}
	d[t] = &btf.Int{}
	size := uint32(max(0, min(t.Common().ByteSize, 1<<30)))
	switch t := t.(type) {
	case *dwarf.TypedefType:
		d[t] = d.convert(t.Type)
	case *dwarf.QualType:
		d[t] = d.convert(t.Type)
	case *dwarf.ArrayType:
		one, err := btf.Sizeof(d.convert(t.Type))
		if size := int64(one) * t.Count; err == nil && size >= 0 && size < 1<<30 {
			d[t] = &btf.Int{Size: uint32(size)}
		}
	case *dwarf.StructType:
		var members []btf.Member
		for _, f := range t.Field {
			if f.BitSize == 0 {
				members = append(members, btf.Member{Name: f.Name, Type: d.convert(f.Type), Offset: btf.Bits(f.ByteOffset * 8)})
			}
		}
		d[t] = &btf.Struct{Name: t.StructName, Size: size, Members: members}
		if t.Kind == "union" {
			d[t] = &btf.Union{Name: t.StructName, Size: size, Members: members}
		}
	default:
		d[t] = &btf.Int{Size: size}
	}
	return d[t]
}

// debugInfo is the object's DWARF; nil if it has none. That it is relocatable does
// not matter: what is to be added is in place, and its sections begin at 0.
func (f *object) debugInfo() *dwarf.Data {
	read := func(name string) []byte {
		sec := f.Section(".debug_" + name)
		if sec == nil || sec.Flags&elf.SHF_COMPRESSED != 0 || sec.Size > uint64(len(f.raw)) {
			return nil
		}
		b, _ := sec.Data()
		return b
	}
	d, err := dwarf.New(read("abbrev"), nil, nil, read("info"), read("line"), nil, read("ranges"), read("str"))
	if err != nil {
		return nil
	}
	for _, name := range []string{"str_offsets", "addr", "line_str", "rnglists", "loclists"} {
		if b := read(name); b != nil && d.AddSection(".debug_"+name, b) != nil {
			return nil
		}
	}
	return d
}

// fieldPath is the field that an offset is in; nil if that is not one of a plain
// type.
func fieldPath(t btf.Type, off int) (path []string, begin int) {
	for depth := 0; depth < 32; depth++ { // as deep as BTF may be
		i := slices.IndexFunc(membersOf(t), func(m btf.Member) bool {
			size, err := btf.Sizeof(m.Type)
			at := int(m.Offset.Bytes())
			return err == nil && m.BitfieldSize == 0 && off >= at && off < at+size
		})
		if i < 0 {
			return nil, 0
		}
		m := membersOf(t)[i]
		if m.Name != "" {
			path = append(path, m.Name)
		}
		begin, off = begin+int(m.Offset.Bytes()), off-int(m.Offset.Bytes())
		if t = m.Type; len(membersOf(t)) == 0 {
			return path, begin
		}
	}
	return nil, 0
}

// kernelPlace is where the kernel has a field; false if it has none of that name.
func kernelPlace(kernel *btf.Spec, structure string, path []string) (off int, ok bool) {
	var st *btf.Struct
	if kernel.TypeByName(structure, &st) != nil {
		return 0, false
	}
	var t btf.Type = st
	for _, name := range path {
		m, at := named(t, name, 0)
		if m == nil {
			return 0, false
		}
		off, t = off+at, m.Type
	}
	return off, true
}

// named is the member of a name, also of an unnamed member's, and its offset.
func named(t btf.Type, name string, depth int) (*btf.Member, int) {
	members := membersOf(t)
	for i := range members {
		m := &members[i]
		if m.Name == name {
			return m, int(m.Offset.Bytes())
		}
		if m.Name == "" && depth < 32 {
			if inner, at := named(m.Type, name, depth+1); inner != nil {
				return inner, int(m.Offset.Bytes()) + at
			}
		}
	}
	return nil, 0
}
