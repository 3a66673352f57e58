// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"ccload/internal/kernelbtf"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
)

// Reason says why something does not load.
type Reason struct {
	Kind     ReasonKind `json:"kind"`
	What     string     `json:"what,omitempty"` // the function, STRUCT.FIELD, member or argument
	Program  string     `json:"program,omitempty"`
	Member   string     `json:"member,omitempty"`
	Function string     `json:"function,omitempty"` // of the program, in which it was refused
	Detail   string     `json:"detail,omitempty"`   // in one line, the kernel's own last words where there are any
	Means    string     `json:"means,omitempty"`    // what they mean, and what to do about it; "" if that is not known here
	Source   string     `json:"source,omitempty"`   // line of C, where the log tells it
	Log      []string   `json:"log,omitempty"`      // the verifier's; only its end where that is after more than 100,000 instructions
}

// ReasonKind is a sort of reason.
type ReasonKind string

const (
	FunctionMissing   ReasonKind = "kernel function missing"
	FunctionForbidden ReasonKind = "kernel function not allowed"
	HelperMissing     ReasonKind = "helper not available"
	FieldMissing      ReasonKind = "kernel field missing"
	FieldNotWritable  ReasonKind = "field not writable"
	MemberUnknown     ReasonKind = "member unknown"
	SignatureChanged  ReasonKind = "signature changed"
	PrivateState      ReasonKind = "private state too large"
	LayoutDiffers     ReasonKind = "kernel layout differs"
	FlagsUnknown      ReasonKind = "flags unknown"
	NoBTF             ReasonKind = "no BTF"
	Licence           ReasonKind = "licence"
	LockedDown        ReasonKind = "locked down"
	NotPermitted      ReasonKind = "not permitted"
	BadObject         ReasonKind = "object"
	MapRefused        ReasonKind = "map refused"
	VerifierRefusal   ReasonKind = "verifier's refusal"
	Other             ReasonKind = "other"
)

// String is one line, with the line of C.
func (r Reason) String() string {
	if r.Source == "" {
		return r.Brief()
	}
	return r.Brief() + " at " + r.Source
}

// Brief is one line, and shorter.
func (r Reason) Brief() string {
	s := string(r.Kind)
	if r.What != "" {
		s += ": " + r.What
	}
	if r.Detail != "" {
		s += ": " + r.Detail
	}
	if r.Program == "" || r.Kind == MemberUnknown {
		return s
	}
	s += " (" + r.Program + " for " + r.Member
	if r.Function != "" && r.Function != r.Program {
		s += ", in " + r.Function
	}
	return s + ")"
}

// outside says that it is about a store into the socket where none may be.
func (r Reason) outside() bool {
	return r.Kind == FieldNotWritable || strings.HasPrefix(r.Detail, "write access at off ")
}

// Refusal is the reason in an error of Parse that is about the laws that every
// kernel has; false for other errors, as of a file that is no object.
func Refusal(err error) (Reason, bool) {
	for law, kind := range map[error]ReasonKind{
		ErrLicense: Licence, ErrNoBTF: NoBTF, ErrName: BadObject, ErrRequired: BadObject, ErrMember: BadObject, ErrProgram: BadObject,
	} {
		if errors.Is(err, law) {
			return Reason{Kind: kind, Detail: strings.TrimPrefix(err.Error(), "object: ")}, true
		}
	}
	return Reason{}, false
}

// generalReason is the reason in an error that is not about one program.
func generalReason(err error) Reason {
	r := Reason{Kind: Other, Detail: oneLine(err)}
	var pe *PermissionError
	var flags flagsError
	if errors.As(err, &pe) {
		if r.Kind = NotPermitted; len(pe.Missing) == 0 && pe.Lockdown != "" {
			r.Kind = LockedDown
		}
		r.Detail = pe.Error()
	} else if errors.Is(err, ErrKernelBTF) {
		r.Kind = NoBTF
	} else if errors.As(err, &flags) {
		r.Kind, r.What, r.Detail = FlagsUnknown, fmt.Sprintf("%#x", uint32(flags)), ""
	} else if e, ok := errors.AsType[*MapError](err); ok {
		r.Kind, r.What, r.Detail = MapRefused, e.Map, strings.TrimPrefix(oneLine(e), fmt.Sprintf("map %q ", e.Map))
	} else if law, ok := Refusal(err); ok {
		r = law
	}
	return r
}

func oneLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}

// What the library puts in the place of what a kernel does not have: the number of
// a helper that does not exist.
const (
	poisonedField    = btf.COREBadRelocationSentinel
	poisonedFunction = 0xdedc0de
)

const bareFunction = "it is a plain C function; the callback's arguments come as an array of 64-bit words: wrap it in BPF_PROG or STRUCT_OPS"

// bare says that a program is declared with the callback's own arguments.
func bare(p *ebpf.ProgramSpec) bool {
	f := proto(p)
	return f != nil && len(f.Params) > 0 && slices.Contains(socketViews, pointsTo(f.Params[0].Type))
}

const missingModule = "nor does a module have it that is loaded"

// libraryKfunc is how the library names the kernel function that it cannot bind.
var libraryKfunc = regexp.MustCompile(`kfunc "([^"]+)": (.*)`)

// programReason is the reason for which a program, made for a member, does not
// load.
func (s *Spec) programReason(err error, p *ebpf.ProgramSpec, o *Ops, member string) Reason {
	var ve *ebpf.VerifierError
	if !errors.As(err, &ve) {
		r := generalReason(err)
		if m := libraryKfunc.FindStringSubmatch(r.Detail); m != nil {
			r.Kind, r.What, r.Detail = SignatureChanged, m[1], m[2]
			if errors.Is(err, ebpf.ErrNotSupported) {
				r.Kind, r.Detail, r.Means = FunctionMissing, "", missingModule
			} else if ours, theirs := s.kernelFunction(r.What); ours != nil && theirs != nil {
				r.Detail = fmt.Sprintf("the kernel has %s, the object %s", signature(theirs), signature(ours))
			}
		}
		return r
	}
	log := parseRefusal(ve.Log)
	r := Reason{Kind: VerifierRefusal, Detail: log.reason, Means: explain(log.reason), Source: log.source, Log: ve.Log}
	if log.before != "" {
		r.Detail += " (" + log.before + ")"
	}
	if r.Detail == "" {
		r.Detail = ve.Cause.Error()
	}
	if r.Means != "" && bare(p) {
		r.Means = bareFunction
	}
	if m := atInstruction.FindStringSubmatch(log.reason); m != nil && log.at < 0 {
		log.at, _ = strconv.Atoi(m[1]) // it was not gone through yet
	}
	if r.Source == "" && log.at >= 0 {
		r.Source = sourceAt(p, log.at)
	}
	at, function := instructionAt(p, log.at)
	r.Function = function
	switch {
	case log.unknown == poisonedFunction && at != nil:
		r.Kind, r.What, r.Detail, r.Means = FunctionMissing, at.Reference(), "", missingModule
	case log.unknown == poisonedField || strings.Contains(err.Error(), "bad CO-RE relocation"):
		r.Kind, r.What, r.Detail, r.Source = FieldMissing, s.relocated(at), "", ""
		r.Means = "bpf_core_field_exists() tells whether a kernel has it"
	case log.unknown >= 0:
		r.Kind, r.What = HelperMissing, fmt.Sprintf("number %d", log.unknown)
	case log.helper != "":
		r.Kind, r.What = HelperMissing, log.helper
	case log.function != "":
		r.Kind, r.What = FunctionForbidden, log.function
	case log.structure != "":
		r.Kind, r.What = FieldNotWritable, log.structure
		if kernel, err := kernelbtf.Types().Kernel(); err == nil {
			r.What = fieldAt(kernel, log.structure, log.offset)
		}
	case log.reason == "only read is supported":
		r.Kind = FieldNotWritable
	case log.argument > 0 || log.scalar:
		if n, detail := s.signatureChanged(p, o, member, log.argument); n > 0 {
			r.Kind, r.Detail, r.Means = SignatureChanged, detail, "the verifier: "+log.reason
			if !strings.HasPrefix(detail, member+" ") {
				r.What = fmt.Sprintf("%s, argument %d", member, n)
			}
		}
	}
	return r
}

// instructionAt is the instruction with a number, as the verifier counts, and the
// function that it is in; nil if there is none.
func instructionAt(p *ebpf.ProgramSpec, n int) (_ *asm.Instruction, function string) {
	for iter := p.Instructions.Iterate(); iter.Next(); {
		if f := btf.FuncMetadata(iter.Ins); f != nil {
			function = f.Name
		}
		if int(iter.Offset) == n {
			return iter.Ins, function
		}
	}
	return nil, ""
}

// atInstruction is how the verifier names an instruction in a sentence.
var atInstruction = regexp.MustCompile(`\binsn (\d+)`)

// sourceAt is the line of C that an instruction was made of, as newer kernels' logs
// have it; "" if the object does not tell.
func sourceAt(p *ebpf.ProgramSpec, n int) (source string) {
	for iter := p.Instructions.Iterate(); iter.Next() && int(iter.Offset) <= n; {
		if iter.Ins.Symbol() != "" {
			source = ""
		}
		if l, ok := iter.Ins.Source().(*btf.Line); ok {
			source = fmt.Sprintf("%s:%d: %s", filepath.Base(l.FileName()), l.LineNumber(), strings.TrimSpace(l.Line()))
		}
	}
	return source
}

// relocation is how the library prints one: it does not give its parts.
var relocation = regexp.MustCompile(`\[([0-9:]+)\], local_id=(\d+)`)

// relocated is the STRUCT.FIELD that an instruction is relocated to; "" if there
// is none.
func (s *Spec) relocated(ins *asm.Instruction) string {
	owner, path := s.relocationPath(ins)
	if owner == nil {
		return ""
	}
	name := flavourless(owner.TypeName())
	for _, m := range path {
		if m.Name != "" {
			name += "." + m.Name
		}
	}
	return name
}

func membersOf(t btf.Type) []btf.Member {
	switch t := btf.UnderlyingType(t).(type) {
	case *btf.Struct:
		return t.Members
	case *btf.Union:
		return t.Members
	}
	return nil
}

// fieldAt is the field at an offset (bytes) of a structure, as STRUCT.FIELD with
// the innermost structure that has a name; the structure's name where there is no
// such field.
func fieldAt(types *btf.Spec, structure string, off int) string {
	var st *btf.Struct
	if err := types.TypeByName(structure, &st); err != nil || off < 0 {
		return structure
	}
	owner, path := structure, ""
	var t btf.Type = st
next:
	for depth := 0; depth < 32; depth++ { // as deep as BTF may be
		for _, m := range membersOf(t) {
			size, err := btf.Sizeof(m.Type)
			begin := int(m.Offset.Bytes())
			if err != nil || off < begin || off >= begin+size {
				continue
			}
			if path += m.Name; len(membersOf(m.Type)) == 0 {
				return owner + "." + path
			}
			if name := btf.UnderlyingType(m.Type).TypeName(); name != "" {
				owner, path = name, ""
			} else if m.Name != "" {
				path += "."
			}
			t, off = m.Type, off-begin
			continue next
		}
		break
	}
	return owner
}

// signatures are those of a member's function in the object and in the kernel; nil
// where they are not known.
func (o *Ops) signatures(member string) (ours, theirs *btf.FuncProto) {
	kernel, err := kernelbtf.Types().Kernel()
	if err != nil {
		return o.callback(member), nil
	}
	var st *btf.Struct
	if err := kernel.TypeByName(opsType, &st); err != nil {
		return o.callback(member), nil
	}
	return o.callback(member), callback(st, member)
}

// callback is the type of a member's function as the object declares it.
func (o *Ops) callback(member string) *btf.FuncProto {
	if o.typ == nil {
		return nil
	}
	return callback(o.typ, member)
}

func callback(ops *btf.Struct, member string) *btf.FuncProto {
	for _, m := range ops.Members {
		if p, ok := btf.As[*btf.Pointer](m.Type); ok && m.Name == member {
			f, _ := btf.As[*btf.FuncProto](p.Target)
			return f
		}
	}
	return nil
}

// kernelFunction are the types of a kernel's function in the object and in the kernel;
// nil where they are not known.
func (s *Spec) kernelFunction(name string) (ours, theirs *btf.FuncProto) {
	kernel, err := kernelbtf.Types().Kernel()
	if err != nil {
		return nil, nil
	}
	var f *btf.Func
	if s.coll.Types.TypeByName(name, &f) == nil {
		ours, _ = f.Type.(*btf.FuncProto)
	}
	if kernel.TypeByName(name, &f) == nil {
		theirs, _ = f.Type.(*btf.FuncProto)
	}
	return ours, theirs
}

// signatureChanged is the argument, from 1, that a program takes for something else
// than the kernel gives it, with how the two differ; 0 if there is none. missing is
// one that the verifier says is not there.
func (s *Spec) signatureChanged(p *ebpf.ProgramSpec, o *Ops, member string, missing int) (n int, detail string) {
	ours, theirs := o.signatures(member)
	if theirs == nil {
		return missing, ""
	}
	if n = missing; n == 0 {
		// A pointer in the program may be a number in the kernel, or another pointer
		// further on.
		for _, a := range s.accesses(p, ours) {
			if a.arg > 0 && (a.arg > len(theirs.Params) || pointsTo(theirs.Params[a.arg-1].Type) == "") {
				n = a.arg
				break
			}
		}
		if n == 0 {
			n = changed(ours, theirs)
		}
	}
	const before, since = "(sk, rs)", "(sk, ack, flag, rs)"
	switch given := len(theirs.Params); {
	case n == 0:
		return 0, ""
	case member == "cong_control" && given == 4 && n == 2:
		return n, fmt.Sprintf("cong_control has %s from 6.10 on; this program has %s", since, before)
	case member == "cong_control" && given == 2 && (n == 3 || n == 4):
		return n, fmt.Sprintf("cong_control has %s before 6.10; this program has %s", before, since)
	case missing > 0 || ours == nil:
		return n, "the kernel has " + signature(theirs)
	}
	return n, fmt.Sprintf("the kernel has %s, the object %s", signature(theirs), signature(ours))
}

// changed is the number of the first argument that is a pointer to a structure
// here and something else there, from 1; 0 if there is none.
func changed(ours, theirs *btf.FuncProto) int {
	if ours == nil || theirs == nil {
		return 0
	}
	for i, p := range ours.Params {
		want := pointsTo(p.Type)
		if want != "" && (i >= len(theirs.Params) || pointsTo(theirs.Params[i].Type) != want) {
			return i + 1
		}
	}
	return 0
}

// pointsTo is the name of the structure that a type points to, without flavour.
func pointsTo(t btf.Type) string { return flavourless(target(t)) }

// target is the name with its flavour.
func target(t btf.Type) string {
	if p, ok := btf.As[*btf.Pointer](t); ok {
		return btf.UnderlyingType(p.Target).TypeName()
	}
	return ""
}

// signature prints the arguments of a function.
func signature(f *btf.FuncProto) string {
	var args []string
	for _, p := range f.Params {
		if to := pointsTo(p.Type); to != "" {
			args = append(args, to+" *")
		} else {
			args = append(args, p.Type.TypeName())
		}
	}
	return "(" + strings.Join(args, ", ") + ")"
}
