// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"strings"

	"ccload/internal/kernelbtf"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// Object is a loaded object: its programs are verified and its maps exist;
// nothing is registered yet. It is not safe for use by several goroutines.
type Object struct {
	coll    *ebpf.Collection
	maps    []*opsMap
	byName  []string // maps that are pinned by their names
	mapPins MapPins
	pinned  []string // of these, the ones that Load has pinned
	calls   []string // maps through which programs call others
}

// opsMap is the struct_ops map of one congestion control.
type opsMap struct {
	Ops        // a copy: the Spec may be changed meanwhile
	fd     int // -1 after it was handed to a Link
	id     uint32
	link   bool // it is registered through a link
	staged bool // its value is in the kernel
	value  []byte
}

// Load loads the programs of the named maps, or of every one that is not
// optional, and makes the maps. A name that was changed since Parse is checked
// again. Parameters are final from then on.
//
// A program that is refused gives a *VerifierError with the reason that Verify gives:
// by the verifier; or because the kernel lacks a function that it calls (ErrKernel),
// or has fields elsewhere than the object finds them (ErrLayout). Missing
// capabilities or a lockdown give a *PermissionError; ErrKernel also says that the
// kernel lacks a member, ErrKernelBTF that it has no BTF.
func (s *Spec) Load(mapNames ...string) (_ *Object, err error) {
	go kernelbtf.Types().Kernel() // the library will ask for it: tens of milliseconds
	l, err := kernelLayout()
	if err != nil {
		return nil, err
	}
	if len(mapNames) == 0 {
		for _, o := range s.Ops {
			if !o.Optional {
				mapNames = append(mapNames, o.Map)
			}
		}
	}
	obj := &Object{}
	r := s.reach(l)
	for _, name := range mapNames {
		o, err := s.Select(name)
		if err != nil {
			return nil, err
		}
		if err := o.Check(); err != nil {
			return nil, err
		}
		misfits, err := o.misfits()
		if err != nil {
			return nil, err
		}
		if len(misfits) > 0 {
			return nil, &VerifierError{misfits[0], ErrLayout}
		}
		m := &opsMap{Ops: *o, fd: -1, link: o.Link && l.links, value: make([]byte, l.size)}
		m.Programs = maps.Clone(o.Programs)
		if err := r.ops(m); err != nil {
			return nil, fmt.Errorf("map %q: %w", o.Map, err)
		}
		obj.maps = append(obj.maps, m)
	}
	if len(obj.maps) == 0 {
		return nil, fmt.Errorf("map: %w: the object has only optional ones: one must be named", ErrNotFound)
	}
	if obj.coll, err = r.load(obj.maps); err != nil {
		return nil, err
	}
	for _, m := range obj.maps {
		if err := m.create(obj.coll, l); err != nil {
			obj.Close()
			return nil, fmt.Errorf("map %q: %w", m.Map, permission("", err, loading...))
		}
	}
	if err := r.pin(obj, obj.coll); err != nil {
		obj.Close()
		return nil, err
	}
	for _, m := range obj.maps {
		m.keep(s, obj.coll)
	}
	return obj, nil
}

// key names a program in a collection. One that stands in two members is loaded
// once for each, because the verifier checks it against the member.
func key(program, member string) string { return program + ":" + member }

// program is a copy of a program, made for a member.
func (s *Spec) program(name, member string) *ebpf.ProgramSpec {
	p := s.coll.Programs[name].Copy()
	if p.Type == ebpf.StructOps {
		p.AttachTo = opsType + ":" + member
	}
	if s.kconfig != nil {
		s.bindKconfig(p.Instructions)
	}
	return p
}

func (m *opsMap) create(coll *ebpf.Collection, l *layout) error {
	var p *ebpf.Program
	for member, program := range m.Programs {
		p = coll.Programs[key(program, member)]
		binary.NativeEndian.PutUint64(m.value[l.member(member).off:], uint64(p.FD()))
	}
	name, flags := l.member("name"), l.member("flags")
	if name == nil || flags == nil || name.size < uint32(len(m.Name))+1 || flags.size != 4 {
		return fmt.Errorf("struct %s: its name or flags are not as expected: %w", opsType, ErrKernel)
	}
	copy(m.value[name.off:], m.Name)
	binary.NativeEndian.PutUint32(m.value[flags.off:], m.Flags)

	var mapFlags uint32
	if m.link {
		mapFlags = unix.BPF_F_LINK
	}
	types, err := p.Handle()
	if errors.Is(err, ebpf.ErrNotSupported) { // it has none: the object has no .BTF.ext
		types, err = anyBTF()
	}
	if err != nil {
		return fmt.Errorf("BTF: %w", err)
	}
	defer types.Close()
	fd, err := createMap(m.Map, types.FD(), l.typeID, l.size, mapFlags)
	if err != nil {
		return fmt.Errorf("create: %w", err)
	}
	m.fd = fd
	var info mapInfo
	if err := objInfo(fd, &info); err != nil {
		return fmt.Errorf("info: %w", err)
	}
	m.id = info.ID
	return nil
}

// anyBTF is BTF that says nothing.
func anyBTF() (*btf.Handle, error) {
	b, err := btf.NewBuilder([]btf.Type{&btf.Int{Name: "int", Size: 4, Encoding: btf.Signed}}, nil)
	if err != nil {
		return nil, err
	}
	return btf.NewHandle(b)
}

// put gives the map its value. Without a link that registers it.
func (m *opsMap) put() error {
	if m.staged {
		return nil
	}
	err := element(unix.BPF_MAP_UPDATE_ELEM, m.fd, m.value)
	m.staged = err == nil
	return err
}

// Close frees what was loaded and not attached. It may be called again.
func (o *Object) Close() error {
	if o.coll != nil {
		o.coll.Close()
		o.coll = nil
	}
	for _, m := range o.maps {
		if m.fd >= 0 {
			unix.Close(m.fd)
			m.fd = -1
		}
	}
	return nil
}

func (o *Object) find(mapName string) (*opsMap, error) {
	var names []string
	for _, m := range o.maps {
		if m.Map == mapName || mapName == "" && len(o.maps) == 1 {
			if m.fd < 0 {
				return nil, fmt.Errorf("map %q: it is attached already, or closed", m.Map)
			}
			return m, nil
		}
		names = append(names, m.Map)
	}
	if list := strings.Join(names, ", "); mapName != "" {
		return nil, fmt.Errorf("map %q: %w: loaded are %s", mapName, ErrNotFound, list)
	} else {
		return nil, fmt.Errorf("map: several are loaded: name one of %s", list)
	}
}

// withoutLog is how programs are loaded that should be accepted: a log is asked for
// when one was refused, and then of that program alone.
func withoutLog() ebpf.CollectionOptions {
	return ebpf.CollectionOptions{Cache: kernelbtf.Types(), Programs: ebpf.ProgramOptions{LogDisabled: true}}
}

// loadError says what the library's error means to a user: of a program that was
// refused what Verify says of it.
func (s *Spec) loadError(coll *ebpf.CollectionSpec, ops []*Ops, err error) error {
	var refused *ebpf.ProgramSpec
	for k, p := range coll.Programs {
		if strings.Contains(err.Error(), "program "+k+": ") {
			refused = p
		}
	}
	if refused == nil {
		return mapError(coll, permission("", err, loading...))
	}
	_, why := s.examine(refused)
	var forbidden *PermissionError
	if errors.As(why, &forbidden) {
		return why
	}
	if why == nil { // it is accepted by itself
		return err
	}
	_, member, _ := strings.Cut(refused.AttachTo, ":")
	of := &Ops{}
	for _, o := range ops {
		if o.Programs[member] == refused.Name {
			of = o
		}
	}
	e := &VerifierError{s.programReason(why, refused, of, member), why}
	if e.Program, e.Member = refused.Name, member; e.Kind == FunctionMissing {
		e.Err = fmt.Errorf("%w: %w", ErrKernel, why)
	}
	return e
}
