// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

const kernelBTF = "/sys/kernel/btf/vmlinux"

// layout is how the running kernel lays out the value of a struct_ops map for a
// congestion control: struct bpf_struct_ops_tcp_congestion_ops, which holds the
// state of the map and struct tcp_congestion_ops.
type layout struct {
	typeID, size  uint32
	refcnt, state uint32 // offsets
	members       []kernelMember
	links         bool // struct_ops maps can be attached by links (Linux 6.4)
}

// kernelMember is a member of the kernel's struct tcp_congestion_ops.
type kernelMember struct {
	name     string
	off      uint32 // in the map's value
	size     uint32 // 0 where it does not matter: neither a function nor flags nor name
	function bool
}

func (l *layout) member(name string) *kernelMember {
	for i := range l.members {
		if l.members[i].name == name {
			return &l.members[i]
		}
	}
	return nil
}

// kernelLayout is read once; the kernel does not change while it runs.
var kernelLayout = sync.OnceValues(func() (*layout, error) { return readLayout(kernelBTF) })

func readLayout(path string) (*layout, error) {
	raw, done, err := mapFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w (built without CONFIG_DEBUG_INFO_BTF, or sysfs is not mounted)", ErrKernelBTF, err)
	}
	if err != nil {
		return nil, fmt.Errorf("the kernel's BTF: %w", err)
	}
	defer done()
	l, err := parseLayout(raw)
	if err != nil {
		return nil, fmt.Errorf("the kernel's BTF: %s: %w", path, err)
	}
	return l, nil
}

// mapFile maps a file that does not change, or reads it where the kernel does
// not let its BTF be mapped (before 6.16).
func mapFile(path string) (b []byte, done func(), err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err == nil && st.Size() > 0 {
		if b, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_PRIVATE); err == nil {
			return b, func() { unix.Munmap(b) }, nil
		}
	}
	b, err = os.ReadFile(path)
	return b, func() {}, err
}

// parseLayout finds the two structures in the kernel's BTF. The library can do
// that as well, but makes an index of all 100 000 types first, which takes longer
// than all else that listing what is registered takes.
func parseLayout(raw []byte) (*layout, error) {
	b, err := parseBTF(raw)
	if err != nil {
		return nil, err
	}
	const valueType = "bpf_struct_ops_tcp_congestion_ops"
	l := &layout{}
	for id := range b.types {
		if b.kind(id) != kindStruct {
			continue
		}
		switch string(b.name(id)) {
		case valueType:
			l.typeID, l.size = uint32(id), b.size(id)
		case "bpf_struct_ops_link":
			l.links = true
		}
	}
	if l.typeID == 0 {
		return nil, fmt.Errorf("struct %s: %w: congestion controls in BPF need Linux 5.6 with CONFIG_BPF_JIT", valueType, ErrKernel)
	}
	var found int
	for _, m := range b.members(int(l.typeID)) {
		switch m.name {
		case "common": // since Linux 6.9 the state is in a structure of its own
			for _, c := range b.members(m.typ) {
				found += l.place(c, m.off)
			}
		case "data":
			found++
			for _, c := range b.members(m.typ) {
				size, function := b.sizeof(c.typ)
				l.members = append(l.members, kernelMember{c.name, m.off + c.off, size, function})
			}
		default:
			found += l.place(m, 0)
		}
	}
	if found != 3 {
		return nil, fmt.Errorf("struct %s: its members are not as expected", valueType)
	}
	for _, m := range l.members {
		if m.off+m.size > l.size {
			return nil, fmt.Errorf("struct %s: member %q does not fit", valueType, m.name)
		}
	}
	if max(l.refcnt, l.state)+4 > l.size {
		return nil, fmt.Errorf("struct %s: its state does not fit", valueType)
	}
	return l, nil
}

func (l *layout) place(m btfMember, base uint32) int {
	switch m.name {
	case "refcnt":
		l.refcnt = base + m.off
	case "state":
		l.state = base + m.off
	default:
		return 0
	}
	return 1
}

// rawBTF is BTF as it is in memory (Documentation/bpf/btf.rst), with the place of
// each type.
type rawBTF struct {
	data    []byte
	strings []byte
	types   []uint32 // by id; 0 is void
}

const (
	kindInt = 1 + iota
	kindPtr
	kindArray
	kindStruct
	kindUnion
	kindEnum
	kindFwd
	kindTypedef
	kindVolatile
	kindConst
	kindRestrict
	kindFunc
	kindFuncProto
	kindVar
	kindDatasec
	kindFloat
	kindDeclTag
	kindTypeTag
	kindEnum64
)

var errBTF = errors.New("not valid BTF")

func parseBTF(raw []byte) (*rawBTF, error) {
	ne := binary.NativeEndian
	if len(raw) < 24 || ne.Uint16(raw) != 0xeb9f {
		return nil, errBTF
	}
	header := ne.Uint32(raw[4:])
	if uint64(header) > uint64(len(raw)) {
		return nil, errBTF
	}
	part := func(at int) []byte {
		off, n := uint64(ne.Uint32(raw[at:])), uint64(ne.Uint32(raw[at+4:]))
		if body := raw[header:]; off+n <= uint64(len(body)) {
			return body[off : off+n]
		}
		return nil
	}
	b := &rawBTF{data: part(8), strings: part(16)}
	b.types = append(make([]uint32, 0, len(b.data)/28), 0)
	for off := 0; off < len(b.data); {
		if off+12 > len(b.data) {
			return nil, errBTF
		}
		b.types = append(b.types, uint32(off))
		info := ne.Uint32(b.data[off+4:])
		n := int(info & 0xffff)
		off += 12
		switch info >> 24 & 0x1f {
		case kindInt, kindVar, kindDeclTag:
			off += 4
		case kindArray:
			off += 12
		case kindStruct, kindUnion, kindDatasec, kindEnum64:
			off += 12 * n
		case kindEnum, kindFuncProto:
			off += 8 * n
		case kindPtr, kindFwd, kindTypedef, kindVolatile, kindConst, kindRestrict, kindFunc, kindFloat, kindTypeTag:
		default:
			return nil, fmt.Errorf("%w: unknown kind %d", errBTF, info>>24&0x1f)
		}
		if off > len(b.data) {
			return nil, errBTF
		}
	}
	return b, nil
}

// word is the n-th word of a type; 0 for types that are not there.
func (b *rawBTF) word(id, n int) uint32 {
	if id <= 0 || id >= len(b.types) {
		return 0
	}
	if off := int(b.types[id]) + 4*n; off+4 <= len(b.data) {
		return binary.NativeEndian.Uint32(b.data[off:])
	}
	return 0
}

func (b *rawBTF) kind(id int) uint32    { return b.word(id, 1) >> 24 & 0x1f }
func (b *rawBTF) size(id int) uint32    { return b.word(id, 2) }
func (b *rawBTF) name(id int) []byte    { return b.text(b.word(id, 0)) }
func (b *rawBTF) target(id int) int     { return int(b.word(id, 2)) }
func (b *rawBTF) length(id int) int     { return int(b.word(id, 1) & 0xffff) }
func (b *rawBTF) bitfields(id int) bool { return b.word(id, 1)>>31 == 1 }

func (b *rawBTF) text(off uint32) []byte {
	if uint64(off) >= uint64(len(b.strings)) {
		return nil
	}
	s := b.strings[off:]
	for i, c := range s {
		if c == 0 {
			return s[:i]
		}
	}
	return nil
}

type btfMember struct {
	name string
	typ  int
	off  uint32 // bytes
}

func (b *rawBTF) members(id int) []btfMember {
	if id = b.resolve(id); b.kind(id) != kindStruct {
		return nil
	}
	var ms []btfMember
	for i := range b.length(id) {
		off := b.word(id, 3+3*i+2)
		if b.bitfields(id) {
			off &= 0xffffff
		}
		ms = append(ms, btfMember{string(b.text(b.word(id, 3+3*i))), int(b.word(id, 3+3*i+1)), off / 8})
	}
	return ms
}

// resolve goes through names and qualifiers to the type behind them.
func (b *rawBTF) resolve(id int) int {
	for range 32 {
		switch b.kind(id) {
		case kindTypedef, kindVolatile, kindConst, kindRestrict, kindTypeTag:
			id = b.target(id)
		default:
			return id
		}
	}
	return 0
}

// sizeof is the size of the types that the members of interest have, and
// whether it is a pointer to a function.
func (b *rawBTF) sizeof(id int) (size uint32, function bool) {
	id = b.resolve(id)
	switch b.kind(id) {
	case kindInt, kindEnum:
		return b.size(id), false
	case kindPtr:
		return 8, b.kind(b.resolve(b.target(id))) == kindFuncProto
	case kindArray: // word 3: element type; 5: number
		size, _ := b.sizeof(int(b.word(id, 3)))
		return size * b.word(id, 5), false
	}
	return 0, false
}
