// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
)

// Param is a parameter: a global variable of the object (or of a live one) that is
// volatile, or a number in .data. A const one can be set until it is loaded, another
// also while it runs. What is static in C is none, nor what the compiler has made.
type Param struct {
	Name    string
	Type    string // C type, e.g. "__u32"
	Value   any    // int64, uint64, bool, float64; []byte for other types
	Running bool   // it may be set while it runs
}

// Params are the parameters with their present values, by name.
func (s *Spec) Params() []Param {
	var ps []Param
	for _, v := range s.coll.Variables {
		if isParam(v) {
			ps = append(ps, Param{Name: v.Name, Type: typeName(v.Type.Type), Value: decode(v.Type.Type, v.Value), Running: runs(v.Type.Type, v.Constant())})
		}
	}
	sortParams(ps)
	return ps
}

func sortParams(ps []Param) {
	slices.SortFunc(ps, func(a, b Param) int { return strings.Compare(a.Name, b.Name) })
}

func isParam(v *ebpf.VariableSpec) bool {
	return v.Type != nil && isTunable(v.SectionName, v.Type, len(v.Value))
}

// Set gives a parameter a value: any integer type, bool, a float for a float,
// bytes of the variable's size, or the text of one of these. The error says when
// there is no such parameter (ErrNotFound), or the value does not fit its C type.
// Objects that are loaded already keep their values.
func (s *Spec) Set(name string, value any) error {
	v := s.coll.Variables[name]
	if v == nil || !isParam(v) {
		var names []string
		for _, p := range s.Params() {
			names = append(names, p.Name)
		}
		have := "the object has none"
		if len(names) > 0 {
			have = "the object has " + strings.Join(names, ", ")
		}
		return fmt.Errorf("parameter %q: %w: %s", name, ErrNotFound, have)
	}
	b, err := encode(v.Type.Type, len(v.Value), value)
	if err != nil {
		return fmt.Errorf("parameter %q: %v: %w", name, value, err)
	}
	v.Value = b
	s.set[name] = true
	return nil
}

// IsSet says whether a parameter was given a value by Set.
func (s *Spec) IsSet(name string) bool { return s.set[name] }

// qualified goes through qualifiers only.
func qualified(t btf.Type) (inner btf.Type, volatile bool) {
	for range 32 {
		switch q := t.(type) {
		case *btf.Const:
			t = q.Type
		case *btf.Volatile:
			t, volatile = q.Type, true
		default:
			return t, volatile
		}
	}
	return t, volatile
}

// isTunable tells parameters from other variables of a section. Constants that are not
// volatile the compiler has folded into the code; numbers in .bss are what programs
// count. What has not the size of its type is broken.
func isTunable(section string, v *btf.Var, size int) bool {
	_, volatile := qualified(v.Type)
	_, number := scalar(v.Type)
	n, err := btf.Sizeof(v.Type)
	return (volatile || number && strings.HasPrefix(section, ".data")) && v.Linkage != btf.StaticVar && err == nil && n == size && size > 0
}

// runs says whether a parameter may be set while it runs.
func runs(t btf.Type, constant bool) bool {
	_, number := scalar(t)
	return number && !constant
}

func typeName(t btf.Type) string {
	inner, _ := qualified(t)
	switch c := inner.(type) {
	case *btf.Struct:
		return "struct " + c.Name
	case *btf.Union:
		return "union " + c.Name
	case *btf.Enum:
		return "enum " + c.Name
	case *btf.Array:
		return fmt.Sprintf("%s[%d]", typeName(c.Type), c.Nelems)
	case *btf.Pointer:
		return "pointer"
	}
	return inner.TypeName()
}

// scalar says how a type is read: as a bool, a float, or a signed or unsigned
// integer; not ok if it is none of these.
func scalar(t btf.Type) (kind reflect.Kind, ok bool) {
	inner, _ := qualified(t)
	switch c := btf.UnderlyingType(inner).(type) {
	case *btf.Int:
		switch {
		case c.Encoding == btf.Bool:
			return reflect.Bool, true
		case c.Encoding == btf.Signed:
			return reflect.Int64, c.Size <= 8
		}
		return reflect.Uint64, c.Size <= 8
	case *btf.Enum:
		if c.Signed {
			return reflect.Int64, true
		}
		return reflect.Uint64, true
	case *btf.Float:
		return reflect.Float64, c.Size == 4 || c.Size == 8
	}
	return 0, false
}

func decode(t btf.Type, b []byte) any {
	kind, ok := scalar(t)
	var n uint64
	switch {
	case !ok:
		return bytes.Clone(b)
	case len(b) == 1:
		n = uint64(b[0])
	case len(b) == 2:
		n = uint64(binary.NativeEndian.Uint16(b))
	case len(b) == 4:
		n = uint64(binary.NativeEndian.Uint32(b))
	case len(b) == 8:
		n = binary.NativeEndian.Uint64(b)
	default:
		return bytes.Clone(b)
	}
	switch kind {
	case reflect.Bool:
		return n != 0
	case reflect.Int64:
		unused := 64 - 8*len(b)
		return int64(n<<unused) >> unused
	case reflect.Float64:
		if len(b) == 4 {
			return float64(math.Float32frombits(uint32(n)))
		}
		return math.Float64frombits(n)
	}
	return n
}

func encode(t btf.Type, size int, value any) ([]byte, error) {
	b := make([]byte, size)
	kind, ok := scalar(t)
	if !ok {
		raw, isBytes := value.([]byte)
		if !isBytes || len(raw) != size {
			return nil, fmt.Errorf("a %s takes %d bytes", typeName(t), size)
		}
		return append(b[:0], raw...), nil
	}
	if text, isText := value.(string); isText {
		parsed, err := parseScalar(kind, text)
		if err != nil {
			return nil, fmt.Errorf("not a %s", typeName(t))
		}
		value = parsed
	}
	v := reflect.ValueOf(value)
	if kind == reflect.Float64 {
		var f float64
		switch {
		case v.CanFloat():
			f = v.Float()
		case v.CanInt():
			f = float64(v.Int())
		case v.CanUint():
			f = float64(v.Uint())
		default:
			return nil, fmt.Errorf("a %T is not a number", value)
		}
		if size == 4 {
			binary.NativeEndian.PutUint32(b, math.Float32bits(float32(f)))
		} else {
			binary.NativeEndian.PutUint64(b, math.Float64bits(f))
		}
		return b, nil
	}
	var n uint64
	var negative bool
	switch {
	case v.Kind() == reflect.Bool && v.Bool():
		n = 1
	case v.Kind() == reflect.Bool:
	case v.CanInt():
		n, negative = uint64(v.Int()), v.Int() < 0
	case v.CanUint():
		n = v.Uint()
	default:
		return nil, fmt.Errorf("a %T is not a %s", value, typeName(t))
	}
	lo, hi := int64(0), uint64(1)<<(8*size-1)<<1-1
	switch kind {
	case reflect.Bool:
		hi = 1
	case reflect.Int64:
		hi /= 2
		lo = -int64(hi) - 1
	}
	if negative && int64(n) < lo || !negative && n > hi {
		return nil, fmt.Errorf("a %s goes from %d to %d", typeName(t), lo, hi)
	}
	return b, putInteger(b, negative, n)
}

func parseScalar(kind reflect.Kind, text string) (any, error) {
	if kind == reflect.Float64 {
		return strconv.ParseFloat(text, 64)
	}
	if kind == reflect.Bool {
		return strconv.ParseBool(text)
	}
	if n, err := strconv.ParseInt(text, 10, 64); err == nil {
		return n, nil
	}
	return strconv.ParseUint(text, 10, 64)
}
