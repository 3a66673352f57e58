// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"errors"
	"io/fs"
	"strings"
	"testing"

	"ccload/internal/kerneltest"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Of a file in which most cannot be used, one that can be is loaded, and each of the
// others is said to be what it is.
func TestMixed(t *testing.T) {
	kerneltest.Privileged(t)
	s := mustParse(t, "mixed")
	if l := mustAttach(t, mustLoad(t, s, "so_good"), ""); !registered(t, "so_good") || l.MapID() == 0 {
		t.Error("not registered")
	}
	if _, err := s.Load("so_lacks"); !errors.Is(err, ErrRequired) {
		t.Errorf("load of one that lacks a member: %v", err)
	}
	reports, err := s.Verify()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range reports {
		o, _ := s.Select(r.Map)
		switch {
		case r.Map == "so_good":
			if !r.Loads || len(r.Functions) != 3 {
				t.Errorf("%+v", *r)
			}
		case r.Map == "so_neighbour":
			if !r.Loads {
				t.Errorf("%+v", *r)
			}
		case r.Map == "so_member":
			if r.Loads || r.Why[0].Kind != MemberUnknown || r.Why[0].What != "so_unknown" {
				t.Errorf("%+v", *r)
			}
		case r.Loads || len(r.Why) != 1 || r.Why[0].Kind != BadObject || r.Why[0].Detail != o.Check().Error():
			t.Errorf("%+v", *r)
		}
	}
	if len(reports) != len(s.Ops) {
		t.Errorf("%d reports of %d", len(reports), len(s.Ops))
	}
}

// An object without .BTF.ext has programs without BTF.
func TestNoExt(t *testing.T) {
	kerneltest.Privileged(t)
	s, err := Parse(patch(t, fixture(t, "basic"), ".BTF.ext\x00", ".XXX.ext\x00"))
	if err != nil {
		t.Fatal(err)
	}
	s.Ops[0].Link = false // so that it can be copied
	l := mustAttach(t, mustLoad(t, s), "")
	i := mustInspect(t, l.MapID())
	if !i.Registered() || member(i, "cong_avoid").Program != "so_cong_avoid" {
		t.Errorf("%+v", *i)
	}
	again, err := i.Copy("so_again", func(*Link) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	if !registered(t, "so_again") {
		t.Error("the copy is not registered")
	}
	if err := again.Close(); err != nil {
		t.Error(err)
	}
	if r, err := s.Verify(); err != nil || !r[0].Loads {
		t.Errorf("%+v, %v", r[0], err)
	}
}

// Of variants for several kernels the one for this kernel is found.
func TestVariants(t *testing.T) {
	kerneltest.Privileged(t)
	s := mustParse(t, "variants")
	for _, o := range s.Ops {
		o.Name = "" // which is no obstacle: it is given another later
	}
	o, err := s.Select("")
	if err != nil {
		t.Fatal(err)
	}
	_, theirs := o.signatures("cong_control")
	if want := map[int]string{2: "so_old", 4: "so_new"}[len(theirs.Params)]; o.Map != want {
		t.Errorf("%s, want %s", o.Map, want)
	}
	if byName, err := s.SelectName(""); byName != o || err != nil {
		t.Errorf("by name: %v, %v", byName, err)
	}
	o.Name = "so_variants"
	if mustAttach(t, mustLoad(t, s, o.Map), ""); !registered(t, "so_variants") {
		t.Error("not registered")
	}
	// If none fits, each is told.
	o.Name = ""
	for _, o := range s.Ops {
		o.Programs["undo_cwnd"] = "so_nothing"
	}
	if _, err := s.Select(""); err == nil || !strings.Contains(err.Error(), `map "so_old": `) || !strings.Contains(err.Error(), `map "so_new": `) {
		t.Errorf("none fits: %v", err)
	}
}

// Only the maps are made that the programs use; what is wrong with one is said once.
func TestMaps(t *testing.T) {
	kerneltest.Privileged(t)
	s := mustParse(t, "maps")
	o := mustLoad(t, s, "so_sharer")
	if len(o.coll.Maps) != 2 || o.coll.Maps["so_shared"] == nil || o.coll.Maps["so_own"] == nil {
		t.Errorf("maps: %v", o.coll.Maps)
	}
	_, err := s.Load("so_teller")
	if e, ok := errors.AsType[*MapError](err); !ok || e.Map != "so_ring" || !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), `map "so_ring" (RingBuf of 3): invalid argument`) {
		t.Errorf("%v", err)
	}
	reports, err := s.Verify("so_teller")
	if err != nil || len(reports[0].Why) != 1 {
		t.Fatalf("%+v, %v", reports, err)
	}
	if why := reports[0].Why[0].String(); !strings.HasPrefix(why, "map refused: so_ring: (RingBuf of 3): invalid argument") {
		t.Errorf("%q", why)
	}
}

// pins keeps what is pinned in memory.
type pins map[string]*ebpf.Map

func (p pins) Open(name string) (*ebpf.Map, error) {
	if p[name] == nil {
		return nil, fs.ErrNotExist
	}
	return p[name].Clone()
}

func (p pins) Pin(name string, m *ebpf.Map) (err error) {
	p[name], err = m.Clone()
	return err
}

func (p pins) Unpin(name string) error {
	err := p[name].Close()
	delete(p, name)
	return err
}

// A map that is pinned by name is shared, if it is as declared.
func TestMapPins(t *testing.T) {
	kerneltest.Privileged(t)
	kept := pins{}
	t.Cleanup(func() {
		for _, m := range kept {
			m.Close()
		}
	})
	s := mustParse(t, "maps")
	s.MapPins = kept
	id := func(m *ebpf.Map) ebpf.MapID {
		info, err := m.Info()
		if err != nil {
			t.Fatal(err)
		}
		id, _ := info.ID()
		return id
	}
	first, second := mustLoad(t, s, "so_sharer"), mustLoad(t, s, "so_second")
	if len(kept) != 1 || id(first.coll.Maps["so_shared"]) != id(second.coll.Maps["so_shared"]) || id(first.coll.Maps["so_own"]) == id(second.coll.Maps["so_own"]) {
		t.Errorf("pinned: %v", kept)
	}
	s.coll.Maps["so_shared"].MaxEntries = 3
	if _, err := s.Load("so_sharer"); !errors.Is(err, ErrIncompatible) || !strings.Contains(err.Error(), `map "so_shared": the pinned map has a different definition: `) {
		t.Errorf("another size: %v", err)
	}
	s.MapPins = nil
	if third := mustLoad(t, s, "so_sharer"); id(third.coll.Maps["so_shared"]) == id(kept["so_shared"]) {
		t.Error("it is used without being asked for")
	}
}
