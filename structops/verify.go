// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"ccload/internal/kernelbtf"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// Report is what the running kernel makes of one congestion control of an
// object.
type Report struct {
	Map       string     `json:"map"`
	Name      string     `json:"name"`
	Loads     bool       `json:"loads"`
	Why       []Reason   `json:"why,omitempty"` // why it does not load: at most one for each program
	Functions []Function `json:"functions"`     // each program, followed by the functions that it calls
}

// Function is what the verifier made of a function. What is not known is nil.
// Each program has a copy of its own of the functions that it calls.
type Function struct {
	Name    string       `json:"name"`
	Kind    FunctionKind `json:"kind"`
	Program string       `json:"program"` // that it is a part of
	Section string       `json:"section"`
	Member  string       `json:"member"` // that the program serves
	Loads   bool         `json:"loads"`

	// Instructions is the length of the function as the kernel runs it, before
	// the JIT; Jited is the length of what the JIT made of it, in bytes.
	Instructions *int `json:"instructions,omitempty"`
	Jited        *int `json:"jited,omitempty"`

	// Processed counts the instructions that the verifier went through, each as
	// often as it did, until it accepted or refused; States those states that it
	// made, PeakStates those that it kept. A static function is gone through
	// where it is called, so its are among its callers'. Of a program that is
	// refused these are of all its functions together.
	//
	// A state that is made at the very beginning of a function counts with the
	// function that was verified before it.
	Processed  *int `json:"processed,omitempty"`
	States     *int `json:"states,omitempty"`
	PeakStates *int `json:"peak_states,omitempty"`

	// MaxStatesPerInsn is known of whole programs only.
	MaxStatesPerInsn *int `json:"max_states_per_insn,omitempty"`

	Stack *int `json:"stack,omitempty"` // bytes, without those of the functions that it calls
}

// FunctionKind is how a function is verified.
type FunctionKind string

const (
	EntryFunction  FunctionKind = "program"
	GlobalFunction FunctionKind = "global" // by itself, once
	StaticFunction FunctionKind = "static" // where it is called, each time
)

// Verify loads the named maps, or every one that is not optional, or the variants
// where all are optional and of one name, to see what the running kernel makes of
// them. Nothing is registered, and nothing stays loaded.
//
// What the kernel refuses, or every kernel would, is in the reports. The error says that a map is not in
// the object.
func (s *Spec) Verify(mapNames ...string) ([]*Report, error) {
	go kernelbtf.Types().Kernel() // as in Load
	var ops []*Ops
	for _, name := range mapNames {
		o, err := s.Select(name)
		if err != nil {
			return nil, err
		}
		ops = append(ops, o)
	}
	if len(mapNames) == 0 {
		for _, o := range s.Ops {
			if !o.Optional || s.Variants() {
				ops = append(ops, o)
			}
		}
	}
	if len(ops) == 0 {
		_, err := s.Select("")
		return nil, err
	}
	var reports []*Report
	for _, o := range ops {
		// A plain one is registered as soon as it has its value, one for a link is not.
		linked := *o
		linked.Link = true
		one := *s
		one.Ops, one.MapPins = []*Ops{&linked}, nil
		reports = append(reports, one.verify(&linked))
	}
	return reports, nil
}

func (s *Spec) verify(o *Ops) *Report {
	r := &Report{Map: o.Map, Name: o.Name, Functions: []Function{}}
	err := o.Check()
	var l *layout
	if err == nil {
		l, err = kernelLayout()
	}
	if err == nil {
		err = s.tryMaps(o, l)
	}
	if err == nil {
		err = s.examineAll(o, l, r)
	}
	if err == nil && len(r.Why) == 0 {
		var obj *Object
		if obj, err = s.Load(o.Map); err == nil {
			err = obj.stage()
			obj.Close()
		}
	}
	if err != nil {
		r.Why = []Reason{generalReason(err)}
	}
	r.Loads = len(r.Why) == 0
	return r
}

// flagsError are flags of ops of which a kernel does not know all.
type flagsError uint32

func (e flagsError) Error() string { return fmt.Sprintf("flags %#x", uint32(e)) }

// stage gives the maps their values where that does not register them.
func (o *Object) stage() error {
	// What 5.13 knows, and all kernels up to the first that have links.
	const oldest = 3
	for _, m := range o.maps {
		if !m.link {
			if m.Flags&^oldest != 0 {
				return flagsError(m.Flags)
			}
			continue
		}
		if err := m.put(); errors.Is(err, unix.EINVAL) && m.Flags&^oldest != 0 {
			return flagsError(m.Flags)
		} else if err != nil {
			return fmt.Errorf("map %q: %w", m.Map, permission("", err, loading...))
		}
	}
	return nil
}

// examineAll looks at each program by itself, so that one that is refused does
// not hide the others. The error is that the process may load none.
func (s *Spec) examineAll(o *Ops, l *layout, r *Report) error {
	add := func(p *ebpf.ProgramSpec, name, member string) error {
		fs, err := s.examine(p)
		var forbidden *PermissionError
		if errors.As(err, &forbidden) {
			return err
		}
		for i := range fs {
			fs[i].Program, fs[i].Section, fs[i].Member, fs[i].Loads = name, p.SectionName, member, err == nil
		}
		r.Functions = append(r.Functions, fs...)
		if err != nil {
			why := s.programReason(err, p, o, member)
			why.Program, why.Member = name, member
			if i := slices.IndexFunc(r.Why, func(w Reason) bool { return w.Kind == PrivateState && w.Log == nil && why.outside() }); i >= 0 {
				// That is why: said once.
				why.Kind, why.What, why.Means = r.Why[i].Kind, r.Why[i].What, r.Why[i].Means
				r.Why[i] = why
				return nil
			}
			r.Why = append(r.Why, why)
		}
		return nil
	}
	var err error
	if r.Why, err = o.misfits(); err != nil {
		return err
	}
	for _, member := range slices.Sorted(maps.Keys(o.Programs)) {
		name := o.Programs[member]
		if km := l.member(member); km == nil || !km.function {
			r.Why = append(r.Why, Reason{Kind: MemberUnknown, What: member, Program: name, Member: member})
			continue
		}
		if s.coll.Programs[name] == nil {
			continue // Load will say it, as of those below
		}
		if err := add(s.program(name, member), name, member); err != nil {
			return err
		}
	}
	reached := s.reach(l)
	for member, name := range o.Programs {
		if s.coll.Programs[name] != nil {
			reached.program(key(name, member), s.program(name, member)) // that it fails Load will say
		}
	}
	for _, name := range s.tailCalled() {
		p := reached.Programs[name]
		if p == nil {
			continue
		}
		_, member, _ := strings.Cut(p.AttachTo, ":")
		if err := add(p, name, member); err != nil {
			return err
		}
	}
	return nil
}

// maxLogged is for how many processed instructions a log is asked for. That of a
// program that is refused after a million takes hundreds of megabytes.
const maxLogged = 100_000

// examine loads a program and describes it.
func (s *Spec) examine(p *ebpf.ProgramSpec) ([]Function, error) {
	entry := Function{Name: p.Name, Kind: EntryFunction}
	load := s.loadAlone
	prog, err := load(p, ebpf.ProgramOptions{LogLevel: ebpf.LogLevelStats})
	var ve *ebpf.VerifierError
	if errors.Is(err, unix.EFAULT) && !errors.As(err, &ve) {
		// The library drops the log then, whatever is in it.
		if _, raw := s.loadRaw(p, ebpf.ProgramOptions{LogLevel: ebpf.LogLevelStats, LogSizeStart: 1 << 20}); errors.As(raw, &ve) {
			load, err = s.loadRaw, raw
		}
	}
	if errors.As(err, &ve) {
		st, ok := parseStats(ve.Log)
		if ok {
			entry.Processed, entry.States, entry.PeakStates, entry.MaxStatesPerInsn = &st.processed, &st.states, &st.peak, &st.maxPerInsn
		}
		if !ok || st.processed <= maxLogged {
			prog, err = load(p, ebpf.ProgramOptions{LogLevel: ebpf.LogLevelBranch, LogSizeStart: 8 << 20})
		}
	}
	if err != nil {
		return []Function{entry}, err
	}
	defer prog.Close()
	fs := functions(prog, entry)
	if st, ok := parseStats(strings.Split(prog.VerifierLog, "\n")); ok {
		fs[0].MaxStatesPerInsn = &st.maxPerInsn
		for i, depth := range st.stack[:min(len(st.stack), len(fs))] {
			fs[i].Stack = &depth
		}
		s.share(p, fs, st)
	}
	return fs, nil
}

// loadAlone loads one program, with the maps that it uses.
func (s *Spec) loadAlone(p *ebpf.ProgramSpec, opt ebpf.ProgramOptions) (*ebpf.Program, error) {
	coll, err := s.alone(p)
	if err != nil {
		return nil, err
	}
	loaded, err := ebpf.NewCollectionWithOptions(coll, ebpf.CollectionOptions{Cache: kernelbtf.Types(), Programs: opt})
	var ve *ebpf.VerifierError
	if errors.As(err, &ve) {
		if why, _, _ := decisive(ve.Log); why != "" {
			return nil, err // whatever the errno: the verifier says why
		}
	}
	if err != nil {
		return nil, permission("", err, loading...)
	}
	defer loaded.Close()
	return loaded.DetachProgram(p.Name), nil
}

// functions are those that the kernel has of a program, in its order, the entry
// first.
func functions(prog *ebpf.Program, entry Function) []Function {
	info, err := prog.Info()
	if err != nil {
		return []Function{entry}
	}
	size, err := info.TranslatedSize()
	if err != nil {
		return []Function{entry}
	}
	infos, err := info.FuncInfos()
	if err != nil || len(infos) == 0 {
		infos = []btf.FuncOffset{{Func: &btf.Func{Name: entry.Name}}}
	}
	jited, _ := info.JitedFuncLens()
	end := asm.RawInstructionOffset(size / asm.InstructionSize)
	fs := make([]Function, len(infos))
	for i := len(infos) - 1; i >= 0; i-- {
		fs[i] = Function{Name: infos[i].Func.Name, Kind: StaticFunction}
		if infos[i].Func.Linkage == btf.GlobalFunc {
			fs[i].Kind = GlobalFunction
		}
		n := int(end - infos[i].Offset)
		fs[i].Instructions, end = &n, infos[i].Offset
		if len(jited) == len(infos) {
			b := int(jited[i])
			fs[i].Jited = &b
		}
	}
	fs[0].Name, fs[0].Kind = entry.Name, entry.Kind
	return fs
}

// share shares the costs of a program out among its functions.
//
// The verifier goes through the entry and each global function one after the
// other, and tells only the sums. So for each of them the program is loaded again
// with an instruction at the function's beginning that is refused at once: what it
// has cost until then is the cost of the functions before, for of a global
// function its callers see no more than its type. (The log of every instruction
// would tell as well, but not the states, and it may be very large.)
func (s *Spec) share(p *ebpf.ProgramSpec, fs []Function, total stats) {
	type begin struct {
		f *Function
		stats
	}
	begins := []begin{{&fs[0], stats{}}}
	for i := range fs {
		if fs[i].Kind == GlobalFunction {
			begins = append(begins, begin{f: &fs[i]})
		}
	}
	if len(begins) > 1 {
		for i := range begins {
			b := &begins[i]
			poisoned := poison(p, b.f.Name)
			if poisoned == nil {
				return
			}
			prog, err := s.loadAlone(poisoned, ebpf.ProgramOptions{LogLevel: ebpf.LogLevelStats})
			if err == nil {
				prog.Close()
				return // it is not verified at all, nobody calls it
			}
			var ve *ebpf.VerifierError
			if !errors.As(err, &ve) || !slices.Contains(ve.Log, poisonRefused) {
				return
			}
			st, ok := parseStats(ve.Log)
			if !ok {
				return
			}
			st.processed-- // the poison itself
			b.stats = st
		}
		slices.SortFunc(begins, func(a, b begin) int { return a.processed - b.processed })
	}
	for i, b := range begins {
		next := total
		if i+1 < len(begins) {
			next = begins[i+1].stats
		}
		processed, states, peak := next.processed-b.processed, next.states-b.states, next.peak-b.peak
		b.f.Processed, b.f.States, b.f.PeakStates = &processed, &states, &peak
	}
}

// poisonRefused is what the verifier says to a read of register 9, which nothing
// is in when a function begins.
const poisonRefused = "R9 !read_ok"

// poison is a copy of a program with a function that is refused at its first
// instruction; nil if there is no such function.
func poison(p *ebpf.ProgramSpec, function string) *ebpf.ProgramSpec {
	p = p.Copy()
	for i := range p.Instructions {
		first := &p.Instructions[i]
		fn := btf.FuncMetadata(first)
		if first.Symbol() != function || fn == nil {
			continue
		}
		bad := btf.WithFuncMetadata(asm.Mov.Reg(asm.R0, asm.R9).WithSymbol(function).WithSource(first.Source()), fn)
		*first = btf.WithFuncMetadata(first.WithSymbol(""), nil)
		p.Instructions = slices.Insert(p.Instructions, i, bad)
		return p
	}
	return nil
}
