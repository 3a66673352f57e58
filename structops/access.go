// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"maps"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
)

// access is a load or a store of a program through a pointer that the kernel gave
// it: to one of the callback's arguments, or to what was reached from there.
type access struct {
	of        string // structure, by its name in the object; "" if that does not tell
	arg       int    // of the callback that it came in, from 1; 0: reached otherwise
	private   bool   // it is the socket's room for the congestion control's own state
	off, size int
	fixed     bool // the compiler worked out the place; otherwise CO-RE finds it
	at        int  // instruction, as the verifier counts
}

// held is what is known of a register.
type held struct {
	kind    heldKind
	of      string
	arg     int
	private bool
	off     int
}

type heldKind uint8

const (
	heldUnknown heldKind = iota
	heldContext          // the callback's arguments, 64 bits each
	heldPointer
	heldDistance // a constant that CO-RE fills in: how far it is to a member
)

// machine is what is known before an instruction. What differs between two ways to
// it is not known.
type machine struct {
	regs  [11]held
	stack map[int16]held // of 64 bits, by offset
}

func (m *machine) clone() *machine { return &machine{m.regs, maps.Clone(m.stack)} }

// join keeps what is the same in both; it says whether something was lost.
func (m *machine) join(o *machine) (lost bool) {
	for i := range m.regs {
		if m.regs[i] != o.regs[i] && m.regs[i].kind != heldUnknown {
			m.regs[i], lost = held{}, true
		}
	}
	for off, v := range m.stack {
		if o.stack[off] != v {
			delete(m.stack, off)
			lost = true
		}
	}
	return lost
}

// accesses follows the callback's arguments through a program and finds what is
// read and written through them. proto is the type of the callback. Where pointers
// are computed with in other ways than by constants, they are lost: what is found
// is there, and not everything is found.
func (s *Spec) accesses(p *ebpf.ProgramSpec, proto *btf.FuncProto) (found []access) {
	w := s.newTour(p)
	start := &machine{}
	start.regs[asm.R1] = held{kind: heldContext}
	w.reach(0, start)
	for len(w.todo) > 0 {
		i := w.todo[len(w.todo)-1]
		w.todo = w.todo[:len(w.todo)-1]
		w.block(i, proto, nil)
	}
	for i, m := range w.before {
		if m != nil {
			w.block(i, proto, &found)
		}
	}
	return found
}

// tour is a way through a program.
type tour struct {
	insns   asm.Instructions
	offset  []int               // of an instruction, as the verifier counts
	index   []int               // the other way round; -1 within one
	begins  map[string]int      // functions
	entered []bool              // jumps or calls lead here, too
	members map[int]*btf.Member // to whose offsets instructions are relocated
	before  []*machine          // where a block begins that something leads to
	todo    []int               // blocks
}

func (s *Spec) newTour(p *ebpf.ProgramSpec) *tour {
	n := len(p.Instructions)
	w := &tour{
		insns: p.Instructions, offset: make([]int, n), index: make([]int, 0, n), begins: map[string]int{},
		entered: make([]bool, n), members: map[int]*btf.Member{}, before: make([]*machine, n),
	}
	for i := range w.insns {
		ins := &w.insns[i]
		w.offset[i], w.index = len(w.index), append(w.index, i)
		if ins.Width() == 2 {
			w.index = append(w.index, -1)
		}
		if name := ins.Symbol(); name != "" {
			w.begins[name], w.entered[i] = i, true
		}
		if m := s.member(ins); m != nil {
			w.members[i] = m
		}
	}
	for i := range w.insns {
		if to := w.target(i); to >= 0 {
			w.entered[to] = true
		}
	}
	return w
}

// target is where a jump leads, or -1.
func (w *tour) target(i int) int {
	ins := &w.insns[i]
	class, op := ins.OpCode.Class(), ins.OpCode.JumpOp()
	if !class.IsJump() || op == asm.Exit || op == asm.Call {
		return -1
	}
	by := int(ins.Offset)
	if op == asm.Ja && class == asm.Jump32Class {
		by = int(ins.Constant)
	}
	if at := w.offset[i] + 1 + by; at >= 0 && at < len(w.index) {
		return w.index[at]
	}
	return -1
}

// reach notes what is known where a block begins, and that it is to be walked
// through if that is new.
func (w *tour) reach(i int, m *machine) {
	if i >= len(w.insns) {
		return
	}
	if w.before[i] == nil {
		w.before[i] = m.clone()
	} else if !w.before[i].join(m) {
		return
	}
	w.todo = append(w.todo, i)
}

// block walks to the block's end; or if found is given, only notes what is accessed.
func (w *tour) block(i int, proto *btf.FuncProto, found *[]access) {
	m := w.before[i].clone()
	for {
		ins := &w.insns[i]
		class, op := ins.OpCode.Class(), ins.OpCode.JumpOp()
		if found != nil {
			w.note(i, m, found)
		} else if f, ok := w.begins[ins.Reference()]; ok && ins.IsFunctionCall() {
			callee := &machine{}
			copy(callee.regs[asm.R1:asm.R6], m.regs[asm.R1:asm.R6])
			w.reach(f, callee)
		}
		step(ins, w.members[i], m, proto)
		if to := w.target(i); to >= 0 && found == nil {
			w.reach(to, m)
		}
		if i++; class.IsJump() && (op == asm.Exit || op == asm.Ja) || i >= len(w.insns) {
			return
		}
		if w.entered[i] {
			if found == nil {
				w.reach(i, m)
			}
			return
		}
	}
}

// note appends an access through a pointer that is known.
func (w *tour) note(i int, m *machine, found *[]access) {
	ins := &w.insns[i]
	var base held
	switch ins.OpCode.Class() {
	case asm.LdXClass:
		base = m.regs[ins.Src%11]
	case asm.StClass, asm.StXClass:
		base = m.regs[ins.Dst%11]
	}
	if base.kind == heldPointer {
		*found = append(*found, access{
			of: base.of, arg: base.arg, private: base.private, off: base.off + int(ins.Offset), size: ins.OpCode.Size().Sizeof(),
			fixed: !base.private && btf.CORERelocationMetadata(ins) == nil, at: w.offset[i],
		})
	}
}

// step is what an instruction, which may be relocated to a member's offset, does to
// what is known.
func step(ins *asm.Instruction, member *btf.Member, m *machine, proto *btf.FuncProto) {
	dst, src := &m.regs[ins.Dst%11], m.regs[ins.Src%11]
	relocated := member != nil
	switch class := ins.OpCode.Class(); class {
	case asm.LdClass:
		*dst = held{}
		if relocated {
			*dst = distance(member)
		}
	case asm.LdXClass:
		whole := ins.OpCode.Size() == asm.DWord && ins.OpCode.Mode() == asm.MemMode
		switch {
		case ins.Src == asm.RFP && whole:
			*dst = m.stack[ins.Offset]
		case src.kind == heldContext && whole && ins.Offset >= 0 && ins.Offset%8 == 0:
			n := int(ins.Offset / 8)
			*dst = held{kind: heldPointer, arg: n + 1}
			if proto != nil && n < len(proto.Params) {
				dst.of = target(proto.Params[n].Type)
			}
		case relocated && whole && target(member.Type) != "":
			*dst = held{kind: heldPointer, of: target(member.Type)}
		default:
			*dst = held{}
		}
	case asm.StClass, asm.StXClass:
		if ins.Dst == asm.RFP {
			delete(m.stack, ins.Offset&^7)
			if ins.OpCode.Size() == asm.DWord && class == asm.StXClass && ins.OpCode.Mode() == asm.MemMode {
				if m.stack == nil {
					m.stack = map[int16]held{}
				}
				m.stack[ins.Offset] = src
			}
		}
		if ins.OpCode.Mode() == asm.AtomicMode { // it may fetch what was there
			m.regs[ins.Src%11], m.regs[asm.R0] = held{}, held{}
		}
	case asm.ALU64Class:
		register := ins.OpCode.Source() == asm.RegSource
		switch op := ins.OpCode.ALUOp(); {
		case op == asm.Mov && register:
			*dst = src
		case op == asm.Mov && relocated:
			*dst = distance(member)
		case op == asm.Add && register && dst.kind == heldPointer && src.kind == heldDistance:
			*dst = held{kind: src.kind - heldDistance + heldPointer, of: src.of, private: src.private}
		case op == asm.Add && register && dst.kind == heldDistance && src.kind == heldPointer:
			dst.kind = heldPointer
		case op == asm.Add && relocated && dst.kind == heldPointer:
			*dst = distance(member)
			dst.kind = heldPointer
		case op == asm.Add && !register && dst.kind == heldPointer:
			dst.off += int(ins.Constant)
		default:
			*dst = held{}
		}
		if dst.kind == heldPointer && dst.of == "" && !dst.private && dst.arg == 0 {
			*dst = held{}
		}
	case asm.ALUClass:
		*dst = held{}
	case asm.JumpClass:
		if ins.OpCode.JumpOp() == asm.Call {
			for r := asm.R0; r <= asm.R5; r++ {
				m.regs[r] = held{}
			}
		}
	}
}

// distance is what a register holds that CO-RE fills with a member's offset.
func distance(member *btf.Member) held {
	d := held{kind: heldDistance, private: member.Name == privateMember}
	if _, ok := btf.As[*btf.Struct](member.Type); ok && !d.private {
		d.of = btf.UnderlyingType(member.Type).TypeName()
	}
	return d
}

// privateMember is the socket's room for the congestion control's own state.
const privateMember = "icsk_ca_priv"

// member is the member to whose offset an instruction is relocated; nil if it is not.
func (s *Spec) member(ins *asm.Instruction) *btf.Member {
	relo := btf.CORERelocationMetadata(ins)
	if relo == nil || !strings.Contains(relo.String(), "(byte_off,") {
		return nil
	}
	if _, path := s.relocationPath(ins); len(path) > 0 {
		return &path[len(path)-1]
	}
	return nil
}

// relocationPath are the type that an instruction is relocated to, and the members
// from there on; nil if it is not relocated.
func (s *Spec) relocationPath(ins *asm.Instruction) (owner btf.Type, path []btf.Member) {
	if ins == nil || s.coll.Types == nil {
		return nil, nil
	}
	relo := btf.CORERelocationMetadata(ins)
	if relo == nil {
		return nil, nil
	}
	m := relocation.FindStringSubmatch(relo.String())
	if m == nil {
		return nil, nil
	}
	id, err := strconv.ParseUint(m[2], 10, 32)
	if err != nil {
		return nil, nil
	}
	if owner, err = s.coll.Types.TypeByID(btf.TypeID(id)); err != nil {
		return nil, nil
	}
	t := owner
	for _, index := range strings.Split(m[1], ":")[1:] { // the first is which of an array of the structure
		if a, isArray := btf.As[*btf.Array](t); isArray {
			t = a.Type
			continue
		}
		members := membersOf(t)
		n, err := strconv.Atoi(index)
		if err != nil || n >= len(members) {
			break
		}
		path, t = append(path, members[n]), members[n].Type
	}
	return owner, path
}
