// SPDX-License-Identifier: Apache-2.0

// Package cc is the catalogue of the congestion controls that come with
// ccload: for each its name, what it was written from, its tunables and the
// type of the state that it keeps in each socket. It does not touch the kernel;
// package registry puts an algorithm there.
package cc

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"ccload/bpf"
)

// Algorithm describes one congestion control.
type Algorithm struct {
	Name      string     // the name in the kernel, and of the map in the object
	Reference string     // the RFC or paper that it was written from
	Doc       string     // one line
	Tunables  []Tunable  // in the order of the C file
	NewState  func() any // a pointer to the zero private state, laid out as icsk_ca_priv; nil: it keeps none

	stem string
}

// Kind is how a tunable is written and stored.
type Kind int

const (
	Integer  Kind = iota // a whole number
	Bool                 // on or off, 1 or 0, true or false
	Fraction             // a real number or a/b, stored in 1/1024
)

// scale is the number of parts of one that a Fraction is stored in.
const scale = 1024

// Tunable is a parameter of an algorithm: a volatile __u32 of the C file, whose
// name it bears. One that is const there is set before the algorithm is loaded.
type Tunable struct {
	Name     string
	Kind     Kind
	Unit     string // "segments", "us", …; empty for pure numbers
	Default  uint32 // as stored
	Min, Max uint32 // as stored, inclusive
	Running  bool   // it may be set while the algorithm runs, too
	Doc      string
}

// Parse reads a value as a user writes it and checks its bounds. It returns the
// value as it is stored.
func (t *Tunable) Parse(s string) (uint32, error) {
	v, err := t.parse(s)
	if err != nil {
		return 0, fmt.Errorf("tunable %q: %q is not %s", t.Name, s, [...]string{"a whole number", "on or off", "a number"}[t.Kind])
	}
	if !(v >= float64(t.Min) && v <= float64(t.Max)) {
		return 0, fmt.Errorf("tunable %q: %s is out of bounds: %s to %s", t.Name, s, t.Format(t.Min), t.Format(t.Max))
	}
	return uint32(v), nil
}

func (t *Tunable) parse(s string) (float64, error) {
	switch t.Kind {
	case Bool:
		switch strings.ToLower(s) {
		case "on", "true", "yes", "1":
			return 1, nil
		case "off", "false", "no", "0":
			return 0, nil
		}
		return 0, strconv.ErrSyntax
	case Fraction:
		num, den, ratio := strings.Cut(s, "/")
		v, err := strconv.ParseFloat(num, 64)
		if err == nil && ratio {
			var d float64
			d, err = strconv.ParseFloat(den, 64)
			v /= d
		}
		return math.Round(v * scale), err
	default:
		v, err := strconv.ParseInt(s, 0, 64)
		return float64(v), err
	}
}

// Format writes a stored value as Parse reads it.
func (t *Tunable) Format(v uint32) string {
	switch {
	case t.Kind == Bool && v == 0:
		return "off"
	case t.Kind == Bool:
		return "on"
	case t.Kind == Fraction:
		return strconv.FormatFloat(float64(v)/scale, 'g', 4, 64)
	}
	return strconv.FormatUint(uint64(v), 10)
}

// All lists the catalogue by name. The caller must not change it.
func All() []*Algorithm { return catalogue }

var catalogue = []*Algorithm{cubic, dctcp, reno}

// Lookup finds an algorithm by name; nil if the catalogue has none of that name.
func Lookup(name string) *Algorithm {
	i := slices.IndexFunc(catalogue, func(a *Algorithm) bool { return a.Name == name })
	if i < 0 {
		return nil
	}
	return catalogue[i]
}

// Object is the compiled BPF object. The caller must not change it.
func (a *Algorithm) Object() []byte { return bpf.Object(a.stem) }

// Tunable finds a tunable by name; nil if there is none.
func (a *Algorithm) Tunable(name string) *Tunable {
	i := slices.IndexFunc(a.Tunables, func(t Tunable) bool { return t.Name == name })
	if i < 0 {
		return nil
	}
	return &a.Tunables[i]
}

// Configure checks the settings of tunables, written as users write them, and
// returns the variables of the object with the values to store in them. Unknown
// names, values that do not parse and values out of bounds are errors.
func (a *Algorithm) Configure(set map[string]string) (map[string]uint32, error) {
	vars := make(map[string]uint32, len(set))
	for name, text := range set {
		t := a.Tunable(name)
		if t == nil {
			return nil, &UnknownTunableError{a, name}
		}
		v, err := t.Parse(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", a.Name, err)
		}
		vars[name] = v
	}
	return vars, nil
}

// UnknownTunableError says that an algorithm has no tunable of that name.
type UnknownTunableError struct {
	Algorithm *Algorithm
	Name      string
}

func (e *UnknownTunableError) Error() string {
	names := make([]string, len(e.Algorithm.Tunables))
	for i, t := range e.Algorithm.Tunables {
		names[i] = t.Name
	}
	if len(names) == 0 {
		return fmt.Sprintf("%s: unknown tunable %q: it has none", e.Algorithm.Name, e.Name)
	}
	return fmt.Sprintf("%s: unknown tunable %q: it has %s", e.Algorithm.Name, e.Name, strings.Join(names, ", "))
}
