// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
)

// Spec is an object file, parsed: what can be known without a kernel. It may be
// changed and loaded any number of times, but not from two goroutines at once.
type Spec struct {
	Ops      []*Ops // one for each tcp_congestion_ops variable, in the order of the file
	License  string
	Warnings []string // programs that nothing refers to, and the like

	// MapPins is where Load finds and puts maps that are pinned by name; nil: each
	// load makes its own, and pins none.
	MapPins MapPins

	coll    *ebpf.CollectionSpec // all but the ops
	kconfig *btf.Datasec         // extern __kconfig variables; nil if there are none
	weak    map[string]bool      // those of them that may be missing

	unreadable map[string]error // programs that are not in coll: why
	set        map[string]bool  // parameters that Set was called for
	raw        []byte           // the object
}

// Ops is one tcp_congestion_ops variable of an object.
type Ops struct {
	Map      string            // the variable's name, which becomes the map's
	Name     string            // the congestion control's name; may be changed before Load
	Link     bool              // from a .struct_ops.link section: registered through a BPF link where there are links
	Optional bool              // from a ?.struct_ops[.link] section: loaded only when asked for
	Flags    uint32            // TCP_CONG_*; may be changed before Load (bit 0 = NON_RESTRICTED)
	Programs map[string]string // member → program

	typ     *btf.Struct // as the object declares it
	err     error       // why it cannot be used, whatever its name
	fixed   []fixedField
	sock    *btf.Struct // struct sock, where fields behind it are fixed and not told
	private privateUse
}

// Copy is another Spec of the object: fields and parameters of the two can be changed
// without each other.
func (s *Spec) Copy() *Spec {
	c := *s
	c.Warnings, c.set = slices.Clone(s.Warnings), maps.Clone(s.set)
	c.Ops = nil
	for _, o := range s.Ops {
		ops := *o
		ops.Programs = maps.Clone(o.Programs)
		c.Ops = append(c.Ops, &ops)
	}
	if s.coll != nil {
		coll := *s.coll // which nothing but Set writes to
		coll.Variables = map[string]*ebpf.VariableSpec{}
		for name, v := range s.coll.Variables {
			one := *v
			coll.Variables[name] = &one
		}
		c.coll = &coll
	}
	return &c
}

const opsType = "tcp_congestion_ops"

const nameSize = 16 // of its member for the name (TCP_CA_NAME_MAX)

// Parse reads an ELF object, as clang -target bpf -g makes it, and checks what
// can be checked without a kernel: that it has BTF, a licence that is compatible
// with the GPL and at least one tcp_congestion_ops. The errors are those at the
// beginning of this package's list. What is wrong with one tcp_congestion_ops is
// no error here, for the object may have others: see Ops.Check.
//
// It does not need privileges and does not keep obj.
func Parse(obj []byte) (*Spec, error) {
	s, err := parse(obj)
	if err != nil {
		return nil, fmt.Errorf("object: %w", err)
	}
	return s, nil
}

func parse(obj []byte) (*Spec, error) {
	f, types, err := openTyped(obj)
	if err != nil {
		return nil, err
	}
	s := &Spec{weak: map[string]bool{}, unreadable: map[string]error{}, set: map[string]bool{}, raw: bytes.Clone(obj)}
	var others, unreadable []string
	for i, sec := range f.Sections {
		kind, optional := strings.CutPrefix(sec.Name, "?")
		if kind != ".struct_ops" && kind != ".struct_ops.link" {
			continue
		}
		vars, err := f.variables(i, types)
		if err != nil {
			unreadable = append(unreadable, fmt.Sprintf("section %q: %v", sec.Name, err))
		}
		for _, v := range vars {
			if v.typ == nil {
				others = append(others, fmt.Sprintf("%q is not a structure", v.name))
				continue
			}
			if name := flavourless(v.typ.Name); name != opsType {
				others = append(others, fmt.Sprintf("%q is a %s", v.name, name))
				continue
			}
			o := &Ops{Map: v.name, Link: kind == ".struct_ops.link", Optional: optional}
			o.read(v, f)
			s.Ops = append(s.Ops, o)
		}
	}
	if len(s.Ops) == 0 {
		if len(unreadable) > 0 {
			return nil, fmt.Errorf("%w: %s", ErrObject, strings.Join(unreadable, "; "))
		}
		if len(others) > 0 {
			return nil, fmt.Errorf("%w: %s", ErrNoOps, strings.Join(others, ", "))
		}
		return nil, ErrNoOps
	}
	for _, why := range unreadable {
		s.Warnings = append(s.Warnings, why+": left out")
	}
	for _, other := range others {
		s.Warnings = append(s.Warnings, "map "+other+": left out")
	}
	if err := s.readPrograms(f, types); err != nil {
		return nil, err
	}
	s.checkPrograms()
	s.readAccesses(f)
	return s, nil
}

// readPrograms reads all but the ops.
func (s *Spec) readPrograms(f *object, types *btf.Spec) (err error) {
	if s.License, err = f.license(); err != nil {
		return err
	}
	if s.coll, err = f.collection(nil); err != nil {
		if err := s.readFunctions(f, err); err != nil {
			return err
		}
	}
	return s.readKconfig(f, types)
}

// readFunctions reads what can be read of the programs, after it failed for all of
// them: an object may have programs that cannot be used beside those that can. Each
// function is tried with those that were read before it, for it may call them.
func (s *Spec) readFunctions(f *object, all error) error {
	bad, why := map[int]bool{}, map[int]error{}
	for i, sym := range f.symbols {
		if f.code(int(sym.Section)) && elf.ST_TYPE(sym.Info) == elf.STT_FUNC {
			bad[i] = true
		}
	}
	if len(bad) > maxTried {
		return all
	}
	for before := -1; before != len(bad); {
		before = len(bad)
		for _, i := range slices.Sorted(maps.Keys(bad)) {
			delete(bad, i)
			coll, err := f.collection(bad)
			if err != nil {
				bad[i], why[i] = true, err
				continue
			}
			s.coll = coll
		}
	}
	if s.coll == nil { // it is about something else
		return all
	}
	for i := range bad {
		s.unreadable[f.symbols[i].Name] = why[i]
	}
	return nil
}

// maxTried is how many functions are tried one by one.
const maxTried = 100

// code says whether a section has instructions.
func (f *object) code(section int) bool {
	return section < len(f.Sections) && f.Sections[section].Type == elf.SHT_PROGBITS && f.Sections[section].Flags&elf.SHF_EXECINSTR != 0
}

// checkPrograms looks at the programs from both sides: those that the ops name
// must be there, those that none names are left out.
func (s *Spec) checkPrograms() {
	used := map[string]bool{}
	for _, o := range s.Ops {
		for _, m := range slices.Sorted(maps.Keys(o.Programs)) {
			used[o.Programs[m]] = true
			if err := s.checkProgram(o.Programs[m], m); err != nil {
				o.refuse(m, err)
			}
		}
	}
	for _, p := range s.tailCalled() {
		used[p] = true
	}
	for _, p := range slices.Sorted(maps.Keys(s.coll.Programs)) {
		// A program in a ?struct_ops section says itself that it may be left out.
		if !used[p] && !strings.HasPrefix(s.coll.Programs[p].SectionName, "?") {
			s.Warnings = append(s.Warnings, fmt.Sprintf("program %q: no %s refers to it: left out", p, opsType))
		}
	}
}

// checkProgram says why a member cannot have a program.
func (s *Spec) checkProgram(name, member string) error {
	p, section := s.coll.Programs[name], "struct_ops/"+member
	switch {
	case s.unreadable[name] != nil:
		return fmt.Errorf("%w: %q: %w", ErrProgram, name, s.unreadable[name])
	case p == nil:
		return fmt.Errorf("%w: %q is in no section of its own: give it SEC(%q)", ErrProgram, name, section)
	case p.Type == ebpf.UnspecifiedProgram:
		return fmt.Errorf("%w: %q is in section %q: rename that to SEC(%q)", ErrProgram, name, p.SectionName, section)
	case p.Type != ebpf.StructOps:
		return fmt.Errorf("%w: %q is of type %v (section %q)", ErrProgram, name, p.Type, p.SectionName)
	}
	return nil
}

// tailCalled are the programs that maps of the object refer to.
func (s *Spec) tailCalled() []string {
	var names []string
	for _, m := range s.coll.Maps {
		for _, kv := range m.Contents {
			if name, ok := kv.Value.(string); ok && m.Type == ebpf.ProgramArray && !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	return names
}

// Select gives the ops of a map. "" is the only one that is not optional; if
// there are several, the error lists them. Where all are optional and of one name,
// as those for kernels of different signatures are, "" is the first of them that the
// running kernel loads. Otherwise it is ErrNotFound.
func (s *Spec) Select(mapName string) (*Ops, error) {
	var names, unusable []string
	var found *Ops
	for _, o := range s.Ops {
		if o.Map == mapName && mapName != "" {
			return o, nil
		}
		if mapName == "" && o.Optional {
			continue
		}
		if found = o; o.law() != nil {
			unusable = append(unusable, o.Map)
		} else {
			names = append(names, o.Map)
		}
	}
	if mapName == "" && len(names)+len(unusable) == 1 {
		return found, nil
	}
	if mapName == "" && found == nil && s.Variants() {
		return s.loading(s.Ops)
	}
	list := strings.Join(names, ", ")
	switch {
	case mapName != "":
		return nil, fmt.Errorf("map %q: %w in the object, which has %s", mapName, ErrNotFound, strings.Join(append(names, unusable...), ", "))
	case found == nil:
		return nil, fmt.Errorf("map: %w: the object has only optional ones: one must be named", ErrNotFound)
	case len(names) == 0:
		return nil, fmt.Errorf("map: the object has several, and none can be used: %s", strings.Join(unusable, ", "))
	case len(unusable) > 0:
		list += " (and not " + strings.Join(unusable, ", ") + ", which cannot be used)"
	}
	return nil, fmt.Errorf("map: the object has several: name one of %s", list)
}

// Variants says whether all ops are optional and have one name: of these a kernel
// need load but one.
func (s *Spec) Variants() bool {
	return !slices.ContainsFunc(s.Ops, func(o *Ops) bool { return !o.Optional || o.Name != s.Ops[0].Name })
}

// SelectName gives the ops of a congestion control's name: if several have it, the
// one that is not optional, or else the first that the running kernel loads.
func (s *Spec) SelectName(name string) (*Ops, error) {
	var found []*Ops
	for _, o := range s.Ops {
		switch {
		case o.Name != name || o.law() != nil:
		case !o.Optional:
			return o, nil
		default:
			found = append(found, o)
		}
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("congestion control %q: %w in the object", name, ErrNotFound)
	}
	return s.loading(found)
}

// loading is the first of several that the running kernel loads.
func (s *Spec) loading(several []*Ops) (*Ops, error) {
	if len(several) == 1 {
		return several[0], nil
	}
	var errs error
	for _, o := range several {
		// Under some name, for its own may be a bad one, and as for a link, for a plain
		// one is registered as soon as it has its value.
		trial := *o
		trial.Name, trial.Link = "trial", true
		one := *s
		one.Ops, one.MapPins = []*Ops{&trial}, nil
		obj, err := one.Load(trial.Map)
		if err == nil {
			err = obj.stage()
			obj.Close()
		}
		if err == nil {
			return o, nil
		}
		if _, forbidden := errors.AsType[*PermissionError](err); forbidden {
			return nil, err
		}
		if errs == nil {
			errs = err
		} else {
			errs = fmt.Errorf("%w; %w", errs, err)
		}
	}
	return nil, fmt.Errorf("none of the variants loads: %w", errs)
}

// Check says what is wrong with a congestion control whatever the kernel: with its
// name, which may have been changed since Parse, the members that are required,
// those that BPF may not set, and the programs. Load checks, too.
func (o *Ops) Check() error {
	err := o.law()
	if err == nil {
		err = CheckName(o.Name)
	}
	if err != nil {
		return fmt.Errorf("map %q: %w", o.Map, err)
	}
	return nil
}

// law is Check but for the name.
func (o *Ops) law() error {
	if o.err != nil {
		return o.err
	}
	for _, m := range []string{"ssthresh", "undo_cwnd"} {
		if o.Programs[m] == "" {
			return fmt.Errorf("member %q: %w", m, ErrRequired)
		}
	}
	if o.Programs["cong_avoid"] == "" && o.Programs["cong_control"] == "" {
		return fmt.Errorf("member %q or %q: %w", "cong_avoid", "cong_control", ErrRequired)
	}
	if o.Programs["get_info"] != "" {
		return fmt.Errorf("member %q: %w: the kernel does not let BPF implement it", "get_info", ErrMember)
	}
	return nil
}

// refuse notes why a congestion control cannot be used; the first reason stays.
func (o *Ops) refuse(member string, err error) {
	if o.err == nil {
		o.err = fmt.Errorf("member %q: %w", member, err)
	}
}

// read takes the members out of the variable.
func (o *Ops) read(v variable, f *object) {
	o.Programs, o.typ = map[string]string{}, v.typ
	for _, m := range v.typ.Members {
		if err := o.readMember(m, v, f); err != nil {
			o.refuse(m.Name, err)
		}
	}
	for _, off := range slices.Sorted(maps.Keys(v.refs)) {
		o.refuse(fmt.Sprintf("at %d", off), fmt.Errorf("%w: %q is put into the middle of it", ErrMember, v.refs[off].Name))
	}
}

func (o *Ops) readMember(m btf.Member, v variable, f *object) error {
	off := int(m.Offset.Bytes())
	size, err := btf.Sizeof(m.Type)
	if err != nil || size < 0 || off+size > len(v.data) {
		return fmt.Errorf("%w: it does not fit", ErrMember)
	}
	data := v.data[off : off+size]
	rel, isSet := v.refs[off]
	delete(v.refs, off)
	zero := len(bytes.Trim(data, "\x00")) == 0 && !isSet
	switch ptr, isPtr := btf.As[*btf.Pointer](m.Type); {
	case m.BitfieldSize > 0 && zero:
	case m.BitfieldSize > 0:
		return fmt.Errorf("%w: it is a bit field", ErrMember)
	case m.Name == "name":
		if isSet || !zero && size != nameSize {
			return fmt.Errorf("%w: it is not a char[%d]", ErrMember, nameSize)
		}
		// All of the 16 bytes where there is no NUL, which is refused later.
		name, _, _ := bytes.Cut(data, []byte{0})
		o.Name = string(name)
	case zero:
	case isPtr && isFunction(ptr.Target):
		if !isSet || size != 8 {
			return fmt.Errorf("%w: a number is in it", ErrProgram)
		}
		if o.Programs[m.Name], err = f.function(rel, data); err != nil {
			return fmt.Errorf("%w: %w", ErrProgram, err)
		}
	case m.Name == "flags" && size == 4 && !isSet:
		o.Flags = binary.NativeEndian.Uint32(data)
	case slices.Contains([]string{"owner", "key", "list", "kern_cflags"}, m.Name):
		return fmt.Errorf("%w: only the kernel sets it", ErrMember)
	default:
		return fmt.Errorf("%w: it is a %s, and not known here", ErrMember, typeName(m.Type))
	}
	return nil
}

func isFunction(t btf.Type) bool {
	_, ok := btf.As[*btf.FuncProto](t)
	return ok
}

// flavourless takes the ___ suffix off that tells C types of one name apart.
func flavourless(name string) string {
	if i := strings.Index(name, "___"); i > 0 {
		return name[:i]
	}
	return name
}

// object is an ELF file in memory.
type object struct {
	*elf.File
	raw     []byte
	symbols []elf.Symbol
}

// openTyped opens an object that has BTF.
func openTyped(obj []byte) (*object, *btf.Spec, error) {
	f, err := openObject(obj)
	if err != nil {
		return nil, nil, err
	}
	types, err := btf.LoadSpecFromReader(bytes.NewReader(obj))
	if errors.Is(err, btf.ErrNotFound) {
		return nil, nil, ErrNoBTF
	}
	if err != nil {
		return nil, nil, fmt.Errorf("BTF: %w", err)
	}
	return f, types, nil
}

func openObject(obj []byte) (*object, error) {
	if !bytes.HasPrefix(obj, []byte(elf.ELFMAG)) {
		return nil, fmt.Errorf("%w: %s", ErrObject, foreign(obj))
	}
	f, err := elf.NewFile(bytes.NewReader(obj))
	// Old compilers left the machine out.
	if why := elsewhere(f, err); why != "" {
		return nil, fmt.Errorf("%w: %s", ErrObject, why)
	}
	if native := binary.NativeEndian.Uint16([]byte{1, 0}) == 1; native != (f.Data == elf.ELFDATA2LSB) {
		return nil, fmt.Errorf("%w: it is for machines of the other byte order", ErrObject)
	}
	symbols, err := f.Symbols()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrObject, err)
	}
	// The library makes room for what functions and empty sections claim to have.
	for _, sec := range f.Sections {
		if sec.Type == elf.SHT_NOBITS && sec.Size > maxEmpty {
			return nil, fmt.Errorf("%w: section %q claims %d bytes", ErrObject, sec.Name, sec.Size)
		}
	}
	for _, s := range symbols {
		if elf.ST_TYPE(s.Info) == elf.STT_FUNC && s.Size > uint64(len(obj)) {
			return nil, fmt.Errorf("%w: function %q claims %d bytes", ErrObject, s.Name, s.Size)
		}
	}
	return &object{f, obj, symbols}, nil
}

// maxSection is more than any section of ops or licence has; what is larger is
// broken or hostile.
const maxSection = 1 << 20

// maxEmpty is more than any section of zeros has.
const maxEmpty = 1 << 28

func (f *object) data(sec *elf.Section) ([]byte, error) {
	if sec.Size > maxSection {
		return nil, fmt.Errorf("%w: it claims %d bytes", ErrObject, sec.Size)
	}
	if sec.Type == elf.SHT_NOBITS {
		return make([]byte, sec.Size), nil
	}
	return sec.Data()
}

// variable is a variable of a struct_ops section.
type variable struct {
	name string
	typ  *btf.Struct // nil: it is something else
	data []byte
	refs map[int]elf.Symbol // offset of a pointer → what it points to
}

// variables reads a struct_ops section, in the order of the file.
func (f *object) variables(section int, types *btf.Spec) ([]variable, error) {
	sec := f.Sections[section]
	data, err := f.data(sec)
	if err != nil {
		return nil, err
	}
	refs, err := f.relocations(section)
	if err != nil {
		return nil, err
	}
	var ds *btf.Datasec
	if err := types.TypeByName(sec.Name, &ds); err != nil {
		return nil, fmt.Errorf("BTF: %w", err)
	}
	var vars []variable
	for _, v := range ds.Vars {
		st, ok := btf.As[*btf.Struct](v.Type)
		if bv, isVar := v.Type.(*btf.Var); isVar {
			st, ok = btf.As[*btf.Struct](bv.Type)
		}
		if !ok {
			vars = append(vars, variable{name: v.Type.TypeName()})
			continue
		}
		if uint64(v.Offset)+uint64(st.Size) > uint64(len(data)) {
			return vars, fmt.Errorf("variable %q does not fit", v.Type.TypeName())
		}
		one := variable{v.Type.TypeName(), st, data[v.Offset:][:st.Size], map[int]elf.Symbol{}}
		for off, sym := range refs {
			if off >= uint64(v.Offset) && off < uint64(v.Offset)+uint64(st.Size) {
				one.refs[int(off-uint64(v.Offset))] = sym
			}
		}
		vars = append(vars, one)
	}
	return vars, nil
}

// relocations of a section: offset → symbol.
func (f *object) relocations(section int) (map[uint64]elf.Symbol, error) {
	refs := map[uint64]elf.Symbol{}
	for _, sec := range f.Sections {
		if sec.Type != elf.SHT_REL || int(sec.Info) != section {
			continue
		}
		b, err := f.data(sec)
		if err != nil {
			return nil, err
		}
		for ; len(b) >= 16; b = b[16:] {
			off, sym := binary.NativeEndian.Uint64(b), binary.NativeEndian.Uint64(b[8:])>>32
			// Symbol 0 is none, and not in the list. Who has it in a member is told.
			refs[off] = elf.Symbol{Name: fmt.Sprintf("symbol %d", sym)}
			if sym >= 1 && sym <= uint64(len(f.symbols)) {
				refs[off] = f.symbols[sym-1]
			}
		}
	}
	return refs, nil
}

// function is the name of the function that a pointer is relocated to: a static
// one by its section, with the offset in the pointer itself.
func (f *object) function(sym elf.Symbol, pointer []byte) (string, error) {
	if elf.ST_TYPE(sym.Info) == elf.STT_FUNC {
		return sym.Name, nil
	}
	if elf.ST_TYPE(sym.Info) == elf.STT_SECTION {
		at := binary.NativeEndian.Uint64(pointer)
		for _, s := range f.symbols {
			if elf.ST_TYPE(s.Info) == elf.STT_FUNC && s.Section == sym.Section && s.Value == at {
				return s.Name, nil
			}
		}
	}
	return "", fmt.Errorf("%q is not a function of the object", sym.Name)
}

func (f *object) license() (string, error) {
	sec := f.Section("license")
	if sec == nil {
		return "", fmt.Errorf(`%w: there is none; have char LICENSE[] SEC("license") = "GPL"`, ErrLicense)
	}
	b, err := f.data(sec)
	if err != nil {
		return "", err
	}
	b, _, _ = bytes.Cut(b, []byte{0})
	switch l := string(b); l {
	// The kernel's list, to the letter: include/linux/license.h.
	case "GPL", "GPL v2", "GPL and additional rights", "Dual BSD/GPL", "Dual MIT/GPL", "Dual MPL/GPL":
		return l, nil
	default:
		return "", fmt.Errorf("licence %q: %w, as the kernel has it", l, ErrLicense)
	}
}

// collection is what the library reads of the object, but for some functions.
func (f *object) collection(without map[int]bool) (*ebpf.CollectionSpec, error) {
	return ebpf.LoadCollectionSpecFromReader(bytes.NewReader(f.hidden(without)))
}

// hidden is a copy of the object with two things out of the library's sight. It
// refuses or misreads most struct_ops sections, so they become notes; and it
// fills .kconfig variables from a file that many machines have not, so their
// section is renamed in the BTF, and the references to them stay plain. Some
// functions (symbols) may be hidden, too.
func (f *object) hidden(functions map[int]bool) []byte {
	b := bytes.Clone(f.raw)
	header, entry := binary.NativeEndian.Uint64(b[0x28:]), uint64(binary.NativeEndian.Uint16(b[0x3a:]))
	shown := map[int]bool{} // sections of functions that are not hidden
	for i, sym := range f.symbols {
		shown[int(sym.Section)] = shown[int(sym.Section)] || !functions[i] && elf.ST_TYPE(sym.Info) == elf.STT_FUNC
	}
	for i, sec := range f.Sections {
		if strings.HasPrefix(strings.TrimPrefix(sec.Name, "?"), ".struct_ops") || len(functions) > 0 && f.code(i) && !shown[i] {
			at := header + uint64(i)*entry + 4
			binary.NativeEndian.PutUint32(b[at:], uint32(elf.SHT_NOTE))
		}
		if end := sec.Offset + sec.FileSize; sec.Offset <= end && end <= uint64(len(b)) {
			f.hide(functions, sec, b[sec.Offset:end])
		}
		if end := sec.Offset + sec.FileSize; sec.Name == ".BTF" && sec.Offset <= end && end <= uint64(len(b)) {
			if i := bytes.Index(b[sec.Offset:end], []byte("\x00.kconfig\x00")); i >= 0 {
				copy(b[sec.Offset+uint64(i):], "\x00.hidden.\x00")
			}
		}
	}
	return b
}

// hide hides functions in a copy of a section: in the symbols, of which each becomes one
// of data, and in the relocations, of which those of its instructions are made ones of
// nothing.
func (f *object) hide(functions map[int]bool, sec *elf.Section, b []byte) {
	ne := binary.NativeEndian
	switch sec.Type {
	case elf.SHT_SYMTAB:
		for i := range functions {
			if at := elf.Sym64Size*(i+1) + 4; at < len(b) { // the first symbol is none
				b[at] = b[at]&^0xf | byte(elf.STT_OBJECT)
			}
		}
	case elf.SHT_REL:
		for ; len(b) >= 16; b = b[16:] {
			for i := range functions {
				sym := f.symbols[i]
				if at := ne.Uint64(b); int(sym.Section) == int(sec.Info) && at >= sym.Value && at-sym.Value < sym.Size {
					ne.PutUint64(b, 1<<63)
					ne.PutUint64(b[8:], uint64(i+1)<<32)
					break
				}
			}
		}
	}
}
