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
	insns := p.Instructions
	offset := make([]int, len(insns)) // as the verifier counts
	index, function := map[int]int{}, map[string]int{}
	raw := 0
	for i := range insns {
		offset[i], index[raw] = raw, i
		if name := insns[i].Symbol(); name != "" {
			function[name] = i
		}
		raw += int(insns[i].Width())
	}
	before := make([]*machine, len(insns))
	var todo []int
	reach := func(i int, m *machine) {
		if i < 0 || i >= len(insns) {
			return
		}
		if before[i] == nil {
			before[i] = m.clone()
		} else if !before[i].join(m) {
			return
		}
		todo = append(todo, i)
	}
	start := &machine{stack: map[int16]held{}}
	start.regs[asm.R1] = held{kind: heldContext}
	reach(0, start)
	for len(todo) > 0 {
		i := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		ins, m := &insns[i], before[i].clone()
		s.step(ins, m, proto)
		switch class := ins.OpCode.Class(); {
		case !class.IsJump():
			reach(i+1, m)
		case ins.OpCode.JumpOp() == asm.Exit:
		case ins.OpCode.JumpOp() == asm.Call:
			if f, ok := function[ins.Reference()]; ok && ins.IsFunctionCall() {
				callee := &machine{stack: map[int16]held{}}
				copy(callee.regs[asm.R1:asm.R6], before[i].regs[asm.R1:asm.R6])
				reach(f, callee)
			}
			reach(i+1, m)
		default:
			to := offset[i] + 1 + int(ins.Offset)
			if ins.OpCode.JumpOp() == asm.Ja && class == asm.Jump32Class {
				to = offset[i] + 1 + int(ins.Constant)
			}
			if t, ok := index[to]; ok {
				reach(t, m)
			}
			if ins.OpCode.JumpOp() != asm.Ja {
				reach(i+1, m)
			}
		}
	}
	for i, m := range before {
		if m == nil {
			continue
		}
		ins := &insns[i]
		var base held
		switch ins.OpCode.Class() {
		case asm.LdXClass:
			base = m.regs[ins.Src]
		case asm.StClass, asm.StXClass:
			base = m.regs[ins.Dst]
		}
		if base.kind == heldPointer {
			found = append(found, access{
				of: base.of, arg: base.arg, private: base.private, off: base.off + int(ins.Offset), size: ins.OpCode.Size().Sizeof(),
				fixed: !base.private && btf.CORERelocationMetadata(ins) == nil, at: offset[i],
			})
		}
	}
	return found
}

// step is what an instruction does to what is known.
func (s *Spec) step(ins *asm.Instruction, m *machine, proto *btf.FuncProto) {
	dst, src := &m.regs[ins.Dst%11], m.regs[ins.Src%11]
	member, relocated := s.member(ins)
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
func distance(member btf.Member) held {
	d := held{kind: heldDistance, private: member.Name == privateMember}
	if _, ok := btf.As[*btf.Struct](member.Type); ok && !d.private {
		d.of = btf.UnderlyingType(member.Type).TypeName()
	}
	return d
}

// privateMember is the socket's room for the congestion control's own state.
const privateMember = "icsk_ca_priv"

// member is the member to whose offset an instruction is relocated.
func (s *Spec) member(ins *asm.Instruction) (last btf.Member, ok bool) {
	relo := btf.CORERelocationMetadata(ins)
	if relo == nil || !strings.Contains(relo.String(), "(byte_off,") {
		return last, false
	}
	_, path := s.relocationPath(ins)
	if len(path) == 0 {
		return last, false
	}
	return path[len(path)-1], true
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
