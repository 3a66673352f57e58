// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"

	"ccload/internal/fault"

	"github.com/cilium/ebpf"
)

// reached is what of an object some of its congestion controls need: their programs,
// the maps that these use, the programs that are called through maps, and so on. The
// rest of the object may be for others, or for other kernels.
type reached struct {
	*ebpf.CollectionSpec
	spec   *Spec
	layout *layout
	alone  bool // programs that are called through maps are left out

	reused map[string]*ebpf.Map // pinned by name, and there already
}

func (s *Spec) reach(l *layout) *reached {
	return &reached{
		CollectionSpec: &ebpf.CollectionSpec{
			Maps: map[string]*ebpf.MapSpec{}, Programs: map[string]*ebpf.ProgramSpec{}, Variables: map[string]*ebpf.VariableSpec{},
			Types: s.coll.Types, ByteOrder: s.coll.ByteOrder,
		},
		spec: s, layout: l, reused: map[string]*ebpf.Map{},
	}
}

// ops adds the programs of a congestion control.
func (r *reached) ops(m *opsMap) error {
	for _, member := range slices.Sorted(maps.Keys(m.Programs)) {
		name := m.Programs[member]
		if km := r.layout.member(member); km == nil || !km.function {
			return fmt.Errorf("member %q: %w: its struct %s has no such function", member, ErrKernel, opsType)
		}
		if r.spec.coll.Programs[name] == nil {
			return fmt.Errorf("member %q: program %q: %w", member, name, ErrNotFound)
		}
		if err := r.program(key(name, member), r.spec.program(name, member)); err != nil {
			return err
		}
	}
	return nil
}

func (r *reached) program(key string, p *ebpf.ProgramSpec) error {
	r.Programs[key] = p
	for i := range p.Instructions {
		if ins := &p.Instructions[i]; ins.IsLoadFromMap() {
			if err := r.object(ins.Reference()); err != nil {
				return err
			}
		}
	}
	return nil
}

// object adds a map of the object.
func (r *reached) object(name string) (err error) {
	m := r.spec.coll.Maps[name]
	if r.Maps[name] != nil {
		return nil
	}
	if name == kconfigMap && r.spec.kconfig != nil {
		m, err = r.spec.kconfigFrom("/")
	}
	if m == nil || err != nil { // what has no map the library says
		return err
	}
	m = m.Copy()
	r.Maps[name] = m
	for variable, v := range r.spec.coll.Variables {
		if v.SectionName == name {
			r.Variables[variable] = v
		}
	}
	if r.alone && m.Type == ebpf.ProgramArray {
		m.Contents = nil
	}
	for _, kv := range m.Contents {
		to, ok := kv.Value.(string)
		switch {
		case !ok:
		case m.Type == ebpf.ProgramArray:
			if r.Programs[to] != nil {
				continue
			}
			p, err := r.spec.tailProgram(to, r.layout)
			if err == nil {
				err = r.program(to, p)
			}
			if err != nil {
				return err
			}
		default: // a map in a map
			if err := r.object(to); err != nil {
				return err
			}
		}
	}
	return nil
}

// tailProgram is a program that others call through a map. The kernel lets only
// programs for the same member do that, and the section has to name it.
func (s *Spec) tailProgram(name string, l *layout) (*ebpf.ProgramSpec, error) {
	p := s.coll.Programs[name]
	if p == nil {
		return nil, fmt.Errorf("program %q: %w", name, ErrNotFound)
	}
	_, member, _ := strings.Cut(p.SectionName, "/")
	if km := l.member(member); p.Type == ebpf.StructOps && (km == nil || !km.function) {
		return nil, fmt.Errorf("program %q: a map refers to it, and its section %q does not name the member that it is for, as %q does: %w",
			name, p.SectionName, "struct_ops/cong_avoid", ErrProgram)
	}
	return s.program(name, member), nil
}

// load loads all of it, for some congestion controls.
func (r *reached) load(of []*opsMap) (*ebpf.Collection, error) {
	defer func() {
		for _, m := range r.reused {
			m.Close()
		}
	}()
	if err := r.reuse(); err != nil {
		return nil, err
	}
	how := withoutLog()
	how.MapReplacements = r.reused
	if err := fault.At("load object"); err != nil {
		return nil, err
	}
	coll, err := ebpf.NewCollectionWithOptions(r.CollectionSpec, how)
	if err != nil {
		var ops []*Ops
		for _, m := range of {
			ops = append(ops, &m.Ops)
		}
		return nil, r.spec.loadError(r.CollectionSpec, ops, err)
	}
	return coll, nil
}

// alone is one program with the maps that it uses, none of which is pinned.
func (s *Spec) alone(p *ebpf.ProgramSpec) (*ebpf.CollectionSpec, error) {
	l, err := kernelLayout()
	if err != nil {
		return nil, err
	}
	r := s.reach(l)
	r.alone = true
	if err := r.program(p.Name, p); err != nil {
		return nil, err
	}
	for _, m := range r.Maps {
		m.Pinning = ebpf.PinNone
	}
	return r.CollectionSpec, nil
}

// tryMaps makes the maps of a congestion control, for what is wrong with one is not to
// be said of each program that uses it.
func (s *Spec) tryMaps(o *Ops, l *layout) error {
	r := s.reach(l)
	for _, member := range slices.Sorted(maps.Keys(o.Programs)) {
		if s.coll.Programs[o.Programs[member]] == nil {
			continue // Load says it
		}
		if err := r.program(key(o.Programs[member], member), s.program(o.Programs[member], member)); err != nil {
			return err
		}
	}
	r.Programs = nil
	for _, m := range r.Maps {
		if m.Type == ebpf.ProgramArray {
			m.Contents = nil
		}
	}
	coll, err := r.load(nil)
	if err == nil {
		coll.Close()
	}
	return err
}

// MapPins is where maps are that an object declares as pinned by name
// (LIBBPF_PIN_BY_NAME): one that is there is used, otherwise a new one is put there.
type MapPins interface {
	Open(name string) (*ebpf.Map, error) // fs.ErrNotExist: there is none
	Pin(name string, m *ebpf.Map) error
	Unpin(name string) error // what Pin has put there
}

// ErrIncompatible says that a map that is pinned is not as the object declares it.
var ErrIncompatible = ebpf.ErrMapIncompatible

// byName says whether a map is to be pinned by its name.
func (s *Spec) byName(name string) bool {
	return s.coll.Maps[name] != nil && s.coll.Maps[name].Pinning == ebpf.PinByName
}

// PinsMaps are the names of the maps of the object that are to be pinned by them.
func (s *Spec) PinsMaps() []string {
	return slices.DeleteFunc(slices.Sorted(maps.Keys(s.coll.Maps)), func(name string) bool { return !s.byName(name) })
}

// reuse opens the pinned maps.
func (r *reached) reuse() error {
	for name, m := range r.Maps {
		if !r.spec.byName(name) {
			continue
		}
		m.Pinning = ebpf.PinNone // the library's way has no say in whose the pins are
		if r.spec.MapPins == nil {
			continue
		}
		there, err := r.spec.MapPins.Open(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("map %q: %w", name, permission("", err, loading...))
		}
		r.reused[name] = there
		if err := m.Compatible(there); err != nil {
			return fmt.Errorf("map %q: the pinned map has a different definition: %w", name, err)
		}
	}
	return nil
}

// PinnedMaps are the names of the maps that are pinned by them.
func (o *Object) PinnedMaps() []string { return o.byName }

// Calls are the maps through which its programs call others, by name. The kernel empties
// one that no process has open and no pin holds, and calls through it then do nothing:
// who attaches what is to outlive the process has to pin them.
func (o *Object) Calls() map[string]*ebpf.Map {
	calls := map[string]*ebpf.Map{}
	for _, name := range o.calls {
		calls[name] = o.coll.Maps[name]
	}
	return calls
}

// UnpinMaps takes back the pins of maps that Load has made, for when what was loaded is not
// attached after all.
func (o *Object) UnpinMaps() error {
	var errs []error
	for _, name := range o.pinned {
		if err := o.mapPins.Unpin(name); err != nil {
			errs = append(errs, fmt.Errorf("map %q: %w", name, err))
		}
	}
	o.pinned = nil
	return errors.Join(errs...)
}

// pin pins those that were not there.
func (r *reached) pin(o *Object, coll *ebpf.Collection) error {
	for name, m := range r.Maps {
		if m.Type == ebpf.ProgramArray && len(m.Contents) > 0 {
			o.calls = append(o.calls, name)
		}
	}
	if o.mapPins = r.spec.MapPins; o.mapPins == nil {
		return nil
	}
	for _, name := range slices.Sorted(maps.Keys(r.Maps)) {
		if !r.spec.byName(name) {
			continue
		}
		if o.byName = append(o.byName, name); r.reused[name] != nil {
			continue
		}
		if err := r.spec.MapPins.Pin(name, coll.Maps[name]); err != nil {
			return errors.Join(fmt.Errorf("map %q: %w", name, permission("", err, loading...)), o.UnpinMaps())
		}
		o.pinned = append(o.pinned, name)
	}
	return nil
}

// MapError says that the kernel did not make a map of an object. The errno shows
// through.
type MapError struct {
	Map  string
	Spec *ebpf.MapSpec
	Err  error

	why string
}

// mapError finds the map in an error of the library.
func mapError(coll *ebpf.CollectionSpec, err error) error {
	for name, m := range coll.Maps {
		if why, ok := strings.CutPrefix(err.Error(), "map "+name+": "); ok {
			return &MapError{Map: name, Spec: m, Err: err, why: strings.TrimPrefix(why, "map create: ")}
		}
	}
	return err
}

func (e *MapError) Error() string {
	what := fmt.Sprintf("%v of %d", e.Spec.Type, e.Spec.MaxEntries)
	if e.Spec.KeySize > 0 {
		what += fmt.Sprintf(", key %d bytes, value %d bytes", e.Spec.KeySize, e.Spec.ValueSize)
	}
	return fmt.Sprintf("map %q (%s): %v", e.Map, what, e.why)
}

func (e *MapError) Unwrap() error { return e.Err }
