// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
)

func fixture(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name+".bpf.o"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func mustParse(t testing.TB, name string) *Spec {
	t.Helper()
	s, err := Parse(fixture(t, name))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// patch puts bytes in the place of others, which must be there; all of them.
func patch(t testing.TB, obj []byte, old, with string) []byte {
	t.Helper()
	if len(old) != len(with) || !bytes.Contains(obj, []byte(old)) {
		t.Fatalf("cannot patch %q to %q", old, with)
	}
	return bytes.ReplaceAll(obj, []byte(old), []byte(with))
}

func TestParse(t *testing.T) {
	s := mustParse(t, "basic")
	o := s.Ops[0]
	if len(s.Ops) != 1 || o.Map != "so_basic" || o.Name != "so_basic" || !o.Link || o.Optional || o.Flags != 1 {
		t.Errorf("ops: %+v", *o)
	}
	want := map[string]string{"ssthresh": "so_ssthresh", "cong_avoid": "so_cong_avoid", "undo_cwnd": "so_undo_cwnd"}
	if !maps.Equal(o.Programs, want) {
		t.Errorf("programs: %v, want %v", o.Programs, want)
	}
	if s.License != "Dual BSD/GPL" {
		t.Errorf("licence: %q", s.License)
	}
	// so_optional stands in a ?struct_ops section, and is no forgotten program.
	if len(s.Warnings) != 1 || !strings.Contains(s.Warnings[0], `"so_forgotten"`) {
		t.Errorf("warnings: %q", s.Warnings)
	}
}

func TestParseSeveral(t *testing.T) {
	s := mustParse(t, "several")
	type row struct {
		m, name        string
		link, optional bool
		ssthresh       string
	}
	var got []row
	for _, o := range s.Ops {
		got = append(got, row{o.Map, o.Name, o.Link, o.Optional, o.Programs["ssthresh"]})
	}
	want := []row{
		{"so_one", "so_one", true, false, "so_first"},
		{"so_two", "so_two", true, false, "so_second"},
		{"so_plain", "so_plain", false, false, "so_first"},
		{"so_next", "so_one", true, true, "so_second"},
		{"so_spare", "so_spare", false, true, "so_first"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
	if len(s.Warnings) > 0 {
		t.Errorf("warnings: %q", s.Warnings)
	}
	if o, err := s.Select("so_next"); err != nil || o != s.Ops[3] {
		t.Errorf("select: %v, %v", o, err)
	}
	if _, err := s.Select(""); err == nil || !strings.Contains(err.Error(), "so_one, so_two, so_plain") {
		t.Errorf("select of several: %v", err)
	}
	if _, err := s.Select("so_three"); !errors.Is(err, ErrNotFound) {
		t.Errorf("select of another: %v", err)
	}
	if o, err := mustParse(t, "flavour").Select(""); err != nil || o.Map != "so_flavour" {
		t.Errorf("select of the only one that is not optional: %v, %v", o, err)
	}
}

func TestParseErrors(t *testing.T) {
	basic := fixture(t, "basic")
	// Constants become zeros, 64 GB of them.
	zeros := bytes.Clone(basic)
	f, err := openObject(basic)
	if err != nil {
		t.Fatal(err)
	}
	i := slices.Index(f.Sections, f.Section(".rodata"))
	header := zeros[binary.NativeEndian.Uint64(zeros[0x28:])+uint64(i)*64:]
	binary.NativeEndian.PutUint32(header[4:], uint32(elf.SHT_NOBITS))
	binary.NativeEndian.PutUint64(header[32:], 64<<30)
	for _, c := range []struct {
		what string
		obj  []byte
		is   error
		text string
	}{
		{"zeros", zeros, ErrObject, `section ".rodata" claims 68719476736 bytes`},
		{"empty file", nil, ErrObject, ""},
		{"text", []byte("#include <stdio.h>\nint main(void) { return 0; }\n"), ErrObject, ""},
		{"truncated", basic[:len(basic)/2], ErrObject, ""},
		{"another machine", patch(t, basic, "\x01\x00\xf7\x00", "\x01\x00\x3e\x00"), ErrObject, "X86_64"},
		{"not relocatable", patch(t, basic, "\x01\x00\xf7\x00", "\x02\x00\xf7\x00"), ErrObject, "ET_EXEC"},
		{"no BTF", patch(t, patch(t, basic, ".BTF\x00", ".XXX\x00"), ".BTF.ext\x00", ".XXX.ext\x00"), ErrNoBTF, "-g"},
		{"no struct_ops", fixture(t, "none"), ErrNoOps, ""},
		{"another struct_ops", fixture(t, "other"), ErrNoOps, `"so_other" is a sched_ext_ops`},
		{"no licence", patch(t, basic, "\x00license\x00", "\x00lizenze\x00"), ErrLicense, "there is none"},
		{"licence", patch(t, basic, "Dual BSD/GPL", "Proprietary!"), ErrLicense, `"Proprietary!"`},
		{"licence almost", patch(t, basic, "Dual BSD/GPL", "GPL v3 only!"), ErrLicense, ""},
	} {
		t.Run(c.what, func(t *testing.T) {
			s, err := Parse(c.obj)
			if !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.text) {
				t.Fatalf("got %v, %v", s, err)
			}
		})
	}
}

// What is wrong with one congestion control of an object is said of that one.
func TestCheck(t *testing.T) {
	basic, flavour := fixture(t, "basic"), fixture(t, "flavour")
	// The name stands twice: as the variable's in the string tables, and in the data.
	name := func(to string) []byte {
		return patch(t, basic, "so_basic"+strings.Repeat("\x00", 8), to+strings.Repeat("\x00", 16-len(to)))
	}
	for _, c := range []struct {
		what string
		obj  []byte
		is   error
		text string
	}{
		{"no ssthresh", patch(t, basic, "\x00ssthresh\x00", "\x00pkts_ack\x00"), ErrRequired, `"ssthresh"`},
		{"no undo_cwnd", patch(t, basic, "\x00undo_cwnd\x00", "\x00not_cwnd_\x00"), ErrRequired, `"undo_cwnd"`},
		{"no cong_avoid", patch(t, basic, "\x00cong_avoid\x00", "\x00cong_apart\x00"), ErrRequired, `"cong_control"`},
		{"get_info", patch(t, flavour, "\x00new_func\x00", "\x00get_info\x00"), ErrMember, `"get_info"`},
		{"owner", fixture(t, "owner"), ErrMember, `"owner"`},
		{"name of 16 bytes", name("so_basic_16bytes"), ErrName, "16 bytes"},
		{"no name", name(""), ErrName, "0 bytes"},
		{"odd name", name("so-basic"), ErrName, `'-'`},
		{"program type", fixture(t, "program"), ErrProgram, `"so_xdp" is of type XDP`},
	} {
		t.Run(c.what, func(t *testing.T) {
			s, err := Parse(c.obj)
			if err != nil {
				t.Fatal(err)
			}
			bad := slices.IndexFunc(s.Ops, func(o *Ops) bool { return o.Check() != nil })
			if bad < 0 {
				t.Fatal("no error")
			}
			if err := s.Ops[bad].Check(); !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v", err)
			}
		})
	}

	s := mustParse(t, "mixed")
	want := map[string]struct {
		is   error
		text string
	}{
		"so_bits":      {ErrMember, `"so_bits": member may not be set: it is a bit field`},
		"so_good":      {},
		"so_lacks":     {ErrRequired, `"cong_avoid" or "cong_control"`},
		"so_owner":     {ErrMember, `"owner": member may not be set: only the kernel sets it`},
		"so_number":    {ErrProgram, "a number is in it"},
		"so_pointer":   {ErrProgram, `"so_variable" is not a function of the object`},
		"so_undefined": {ErrProgram, `"so_nowhere" is not a function of the object`},
		"so_field":     {ErrMember, `"so_extra": member may not be set: it is a __u64, and not known here`},
		"so_flags":     {ErrMember, `"flags": member may not be set: it is a pointer`},
		"so_renamed":   {ErrProgram, `"so_bare" is in section "cong_avoid": rename that to SEC("struct_ops/cong_avoid")`},
		"so_texted":    {ErrProgram, `"so_text" is in no section of its own: give it SEC("struct_ops/cong_avoid")`},
		"so_typed":     {ErrProgram, `"so_xdp" is of type XDP (section "xdp")`},
		"so_member":    {}, // that a kernel lacks a member is the kernel's to say
		"so_reference": {ErrProgram, `reference to "so_good"`},
		"so_section":   {ErrProgram, `reference to "so_good"`},
		"so_caller":    {ErrProgram, `"so_calls": `},
		"so_neighbour": {},
		"so_nameless":  {ErrName, "it has 0 bytes"},
		"so_odd":       {ErrName, `not '-'`},
		"so_long":      {ErrName, "it has 16 bytes"},
	}
	if len(s.Ops) != len(want) {
		t.Errorf("%d congestion controls, want %d", len(s.Ops), len(want))
	}
	for _, o := range s.Ops {
		w := want[o.Map]
		if err := o.Check(); w.is == nil && err != nil || w.is != nil && (!errors.Is(err, w.is) || !strings.Contains(err.Error(), w.text)) {
			t.Errorf("%s: %v, want %q", o.Map, err, w.text)
		}
	}
	// All that can be amended is the name.
	for _, m := range []string{"so_nameless", "so_odd", "so_long"} {
		o, err := s.Select(m)
		if err != nil {
			t.Fatal(err)
		}
		if o.Name = "so_named"; o.Check() != nil {
			t.Errorf("%s with another name: %v", m, o.Check())
		}
	}
	if _, err := s.Select(""); err == nil || !strings.HasSuffix(err.Error(), "name one of so_good, so_member, so_neighbour, so_nameless, so_odd, so_long (and not so_bits, so_lacks, so_owner, "+
		"so_number, so_pointer, so_undefined, so_field, so_flags, so_renamed, so_texted, so_typed, so_reference, so_section, so_caller, which cannot be used)") {
		t.Errorf("select of several: %v", err)
	}
}

// .BTF.ext is optional.
func TestParseNoExt(t *testing.T) {
	s, err := Parse(patch(t, fixture(t, "basic"), ".BTF.ext\x00", ".XXX.ext\x00"))
	if err != nil || s.Ops[0].Check() != nil {
		t.Errorf("%v, %v", s, err)
	}
}

// Wherever a file is cut, it is an error.
func TestParseTruncated(t *testing.T) {
	obj := fixture(t, "several")
	for n := 0; n < len(obj); n += 7 {
		if _, err := Parse(obj[:n]); err == nil {
			t.Errorf("no error for the first %d of %d bytes", n, len(obj))
		}
	}
}

func TestCheckName(t *testing.T) {
	for name, ok := range map[string]bool{
		"a": true, "bpf_cubic.2": true, ".a": true, "_": true, "exactly15bytes_": true,
		"": false, "exactly_16_bytes": false, "a b": false, "a/b": false, "ä": false, "a\x00": false, "a-b": false,
		".": false, "..": false, "...": false,
	} {
		if err := CheckName(name); (err == nil) != ok || err != nil && !errors.Is(err, ErrName) {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	objects, err := filepath.Glob("testdata/*.bpf.o")
	if err != nil || len(objects) == 0 {
		f.Fatal("no seeds", err)
	}
	for _, o := range objects {
		b, err := os.ReadFile(o)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, obj []byte) {
		s, err := Parse(obj)
		if err != nil {
			return
		}
		for _, o := range s.Ops {
			if err := o.Check(); err == nil {
				for m, p := range o.Programs { // what passed obeys the laws
					if s.coll.Programs[p] == nil || s.coll.Programs[p].Type != ebpf.StructOps {
						t.Errorf("map %q: member %q: program %q", o.Map, m, p)
					}
				}
			}
		}
		for _, p := range s.Params() {
			if b, ok := p.Value.([]byte); ok {
				err = s.Set(p.Name, b)
			} else {
				err = s.Set(p.Name, p.Value)
			}
			if err != nil {
				t.Error(err)
			}
		}
		if s.kconfig != nil {
			s.kconfigFrom("testdata")
		}
	})
}

// Of a Spec and its copy each can be changed without the other.
func TestCopy(t *testing.T) {
	s := mustParse(t, "basic")
	c := s.Copy()
	if len(c.Ops) != len(s.Ops) || !reflect.DeepEqual(c.Ops[0], s.Ops[0]) || !reflect.DeepEqual(c.Params(), s.Params()) {
		t.Fatalf("the copy is %+v of %+v", c.Ops, s.Ops)
	}
	want, ops := s.Params(), *s.Ops[0]
	programs := maps.Clone(ops.Programs)
	c.Ops[0].Name, c.Ops[0].Flags = "other", 7
	clear(c.Ops[0].Programs)
	c.Warnings = append(c.Warnings, "one more")
	for _, p := range want {
		if err := c.Set(p.Name, "1"); err != nil {
			t.Logf("%s: %v", p.Name, err)
		}
	}
	if reflect.DeepEqual(c.Params(), want) {
		t.Error("no parameter could be set")
	}
	if s.Ops[0].Name != ops.Name || s.Ops[0].Flags != ops.Flags || !maps.Equal(s.Ops[0].Programs, programs) || !reflect.DeepEqual(s.Params(), want) {
		t.Errorf("the original is %+v, %v", *s.Ops[0], s.Params())
	}
}
