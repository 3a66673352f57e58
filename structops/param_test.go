// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"errors"
	"reflect"
	"strings"
	"testing"
)

func params(s *Spec) map[string]any {
	m := map[string]any{}
	for _, p := range s.Params() {
		m[p.Name] = p.Value
	}
	return m
}

func TestParams(t *testing.T) {
	want := []Param{
		{Name: "not_constant", Type: "__u32", Value: uint64(9), Running: true},
		{Name: "p_bool", Type: "bool", Value: true}, {Name: "p_double", Type: "double", Value: 0.1}, {Name: "p_enum", Type: "enum so_mode", Value: uint64(70000)},
		{Name: "p_float", Type: "float", Value: 1.5}, {Name: "p_pair", Type: "struct so_pair", Value: []byte{1, 0, 0, 0, 2, 0, 0, 0}},
		{Name: "p_s16", Type: "short", Value: int64(-300)}, {Name: "p_s32", Type: "__s32", Value: int64(-70000)}, {Name: "p_s64", Type: "__s64", Value: int64(-1 << 62)},
		{Name: "p_u32", Type: "__u32", Value: uint64(70000)}, {Name: "p_u64", Type: "__u64", Value: uint64(1 << 63)}, {Name: "p_u8", Type: "__u8", Value: uint64(200)},
	}
	if got := mustParse(t, "basic").Params(); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
}

func TestSet(t *testing.T) {
	for _, c := range []struct {
		name        string
		value, want any // a nil want: an error
	}{
		{"p_u8", 255, uint64(255)}, {"p_u8", uint16(0), uint64(0)}, {"p_u8", "17", uint64(17)}, {"p_u8", true, uint64(1)},
		{"p_u8", 256, nil}, {"p_u8", -1, nil}, {"p_u8", "256", nil}, {"p_u8", "0x10", nil}, {"p_u8", "", nil}, {"p_u8", 1.0, nil}, {"p_u8", nil, nil},
		{"p_s16", -32768, int64(-32768)}, {"p_s16", 32767, int64(32767)}, {"p_s16", "-5", int64(-5)},
		{"p_s16", -32769, nil}, {"p_s16", 32768, nil}, {"p_s16", uint64(1 << 63), nil},
		{"p_u32", uint32(1<<32 - 1), uint64(1<<32 - 1)}, {"p_u32", int64(1 << 32), nil},
		{"p_u64", uint64(1<<64 - 1), uint64(1<<64 - 1)}, {"p_u64", "18446744073709551615", uint64(1<<64 - 1)},
		{"p_u64", "18446744073709551616", nil}, {"p_u64", int8(-1), nil},
		{"p_s64", int64(-1 << 63), int64(-1 << 63)}, {"p_s64", uint64(1 << 63), nil},
		{"p_bool", false, false}, {"p_bool", 1, true}, {"p_bool", "false", false}, {"p_bool", 2, nil}, {"p_bool", "2", nil},
		{"p_enum", 0, uint64(0)}, {"p_enum", -1, nil},
		{"p_float", 2.5, 2.5}, {"p_float", "-2.5", -2.5}, {"p_double", 3, 3.0}, {"p_double", "x", nil}, {"p_double", true, nil},
		{"p_pair", []byte("12345678"), []byte("12345678")}, {"p_pair", []byte("1"), nil}, {"p_pair", 1, nil},
	} {
		s := mustParse(t, "basic")
		before := params(s)[c.name]
		err := s.Set(c.name, c.value)
		got := params(s)[c.name]
		switch {
		case c.want == nil && err == nil:
			t.Errorf("%s = %v: no error", c.name, c.value)
		case c.want == nil && !reflect.DeepEqual(got, before):
			t.Errorf("%s = %v: an error, and yet it is %v", c.name, c.value, got)
		case c.want != nil && (err != nil || !reflect.DeepEqual(got, c.want)):
			t.Errorf("%s = %v: got %v, %v", c.name, c.value, got, err)
		}
	}
}

func TestSetUnknown(t *testing.T) {
	s := mustParse(t, "basic")
	for _, name := range []string{"p_u16", "", "not_volatile", "LICENSE"} {
		if err := s.Set(name, 1); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "p_u8") {
			t.Errorf("%q: %v", name, err)
		}
	}
}
