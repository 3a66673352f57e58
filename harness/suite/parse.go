// SPDX-License-Identifier: Apache-2.0

package suite

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v4"

	"ccload/harness"
	"ccload/harness/trace"
)

// word is what may be the name of a directory.
var word = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)

// Parse reads an experiment file. Errors begin with its name, the line and the
// column.
func Parse(file string, b []byte) (*Suite, error) {
	var doc yaml.Node
	if err := yaml.Load(b, &doc); err != nil {
		var failed *yaml.LoadError
		if errors.As(err, &failed) && failed.Mark.Line > 0 {
			return nil, fmt.Errorf("%s:%d:%d: %s", file, failed.Mark.Line, max(1, failed.Mark.Column), failed.Message)
		}
		if len(strings.TrimSpace(string(b))) == 0 {
			return nil, fmt.Errorf("%s: it is empty", file)
		}
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	if len(doc.Content) == 0 {
		return nil, fmt.Errorf("%s: it is empty", file)
	}
	s := &Suite{}
	if err := s.parse(doc.Content[0]); err != nil {
		var at *placed
		if errors.As(err, &at) {
			return nil, fmt.Errorf("%s:%d:%d: %w", file, at.line, at.column, at.err)
		}
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return s, nil
}

// placed is an error with its place in the file.
type placed struct {
	line, column int
	err          error
}

func (p *placed) Error() string { return p.err.Error() }

func wrong(n *yaml.Node, format string, args ...any) error {
	return &placed{n.Line, n.Column, fmt.Errorf(format, args...)}
}

// fields says what to do with the value of each key of a mapping.
type fields map[string]func(*yaml.Node) error

func (f fields) parse(n *yaml.Node) error {
	n = resolved(n)
	if n.Kind != yaml.MappingNode {
		return wrong(n, "%s where keys with values should be", kind(n))
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		set, ok := f[key.Value]
		if !ok || key.Kind != yaml.ScalarNode {
			return wrong(key, "unknown key %q: there are %s", key.Value, strings.Join(slices.Sorted(maps.Keys(f)), ", "))
		}
		if seen[key.Value] {
			return wrong(key, "key %q: twice", key.Value)
		}
		seen[key.Value] = true
		if err := set(value); err != nil {
			return err
		}
	}
	return nil
}

// resolved follows an alias to what it stands for, which is never an alias.
func resolved(n *yaml.Node) *yaml.Node {
	if n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}

func kind(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	}
	if n.ShortTag() == "!!null" {
		return "nothing"
	}
	return fmt.Sprintf("%q", n.Value)
}

// text is a value that is written without structure.
func text(n *yaml.Node) (string, error) {
	n = resolved(n)
	if n.Kind != yaml.ScalarNode || n.ShortTag() == "!!null" {
		return "", wrong(n, "%s where a value should be", kind(n))
	}
	return n.Value, nil
}

// value makes a setter of what parses a text.
func value[T any](to *T, parse func(string) (T, error)) func(*yaml.Node) error {
	return func(n *yaml.Node) error {
		s, err := text(n)
		if err != nil {
			return err
		}
		v, err := parse(s)
		if err != nil {
			return wrong(resolved(n), "%w", err)
		}
		*to = v
		return nil
	}
}

func list(n *yaml.Node, each func(*yaml.Node) error) error {
	n = resolved(n)
	if n.Kind != yaml.SequenceNode {
		return wrong(n, "%s where a list should be", kind(n))
	}
	for _, e := range n.Content {
		if err := each(e); err != nil {
			return err
		}
	}
	return nil
}

func asIs(s string) (string, error) { return s, nil }

func name(s string) (string, error) {
	if !word.MatchString(s) {
		return "", fmt.Errorf("name %q: of letters, digits and . _ -", s)
	}
	return s, nil
}

func boolean(s string) (bool, error) {
	if s != "true" && s != "false" {
		return false, fmt.Errorf("%q: true or false", s)
	}
	return s == "true", nil
}

func whole(least, most int) func(string) (int, error) {
	return func(s string) (int, error) {
		v, err := strconv.Atoi(s)
		if err != nil || v < least || v > most {
			return 0, fmt.Errorf("%q: a whole number from %d to %d", s, least, most)
		}
		return v, nil
	}
}

// parsePackets reads a number of packets, 20p, as ecn's.
func parsePackets(s string) (int, error) {
	n, err := harness.ParseECN(s)
	if err != nil {
		return 0, fmt.Errorf("%q: in packets, at least 1: say 1p", s)
	}
	return n, nil
}

func seed(s string) (uint64, error) {
	v, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("seed %q: a whole number that is not negative", s)
	}
	return v, nil
}

func congestionControl(s string) (string, error) {
	if s == "" || strings.ContainsAny(s, "/$ ") || strings.HasPrefix(s, ".") {
		return "", fmt.Errorf("congestion control %q: not a name", s)
	}
	return s, nil
}

func (s *Suite) parse(n *yaml.Node) error {
	base := run{repeat: 1, experiment: trace.Experiment{Seed: 1, PerAck: true}}
	var defaults, runs *yaml.Node
	keep := func(to **yaml.Node) func(*yaml.Node) error {
		return func(n *yaml.Node) error { *to = n; return nil }
	}
	keys := fields{
		"name":        value(&s.Name, name),
		"description": value(&s.Description, asIs),
		"defaults":    keep(&defaults),
		"runs":        keep(&runs),
	}
	maps.Copy(keys, base.whose())
	if err := keys.parse(n); err != nil {
		return err
	}
	if s.Name == "" {
		return wrong(n, "it has no name")
	}
	if runs == nil {
		return wrong(n, "it has no runs")
	}
	baseLink := link{}
	if defaults != nil {
		if err := base.parse(defaults, &baseLink, nil); err != nil {
			return err
		}
	}
	names := map[string]bool{}
	err := list(runs, func(n *yaml.Node) error {
		n = resolved(n)
		r, l := base, maps.Clone(baseLink)
		r.checks = slices.Clone(base.checks)
		if err := r.parse(n, &l, fields{"name": value(&r.name, name)}); err != nil {
			return err
		}
		if r.name == "" {
			return wrong(n, "the run has no name")
		}
		if names[r.name] {
			return wrong(n, "run %q: there is another of this name", r.name)
		}
		names[r.name] = true
		if err := l.apply(&r.experiment.Link); err != nil {
			return err
		}
		if err := r.finish(n); err != nil {
			return err
		}
		s.runs = append(s.runs, r)
		return nil
	})
	if err != nil {
		return err
	}
	if len(s.runs) == 0 {
		return wrong(runs, "there are no runs")
	}
	return nil
}

// whose are the keys that name congestion controls.
func (r *run) whose() fields {
	var from *yaml.Node // what has set them on this level
	once := func(set func(*yaml.Node) error) func(*yaml.Node) error {
		return func(n *yaml.Node) error {
			if from != nil {
				return wrong(n, "cc and pairs: one of them")
			}
			from, r.pairs = n, nil
			return set(n)
		}
	}
	return fields{
		"cc":    once(r.pair),
		"pairs": once(func(n *yaml.Node) error { return list(n, r.pair) }),
	}
}

// pair adds one: a name, or a list of one or two.
func (r *run) pair(n *yaml.Node) error {
	var pair []string
	add := func(n *yaml.Node) error {
		var cc string
		if err := value(&cc, congestionControl)(n); err != nil {
			return err
		}
		if slices.Contains(pair, cc) {
			return wrong(resolved(n), "%q: twice", cc)
		}
		pair = append(pair, cc)
		return nil
	}
	err := error(nil)
	if resolved(n).Kind == yaml.ScalarNode {
		err = add(n)
	} else {
		err = list(n, add)
	}
	if err == nil && (len(pair) < 1 || len(pair) > 2) {
		err = wrong(resolved(n), "%d congestion controls: one under test, and its reference", len(pair))
	}
	r.pairs = append(r.pairs, pair)
	return err
}

// parse reads what a run and the defaults have in common, and some keys more.
func (r *run) parse(n *yaml.Node, l *link, more fields) error {
	e := &r.experiment
	keys := fields{
		"link":     l.parse,
		"duration": value(&e.Duration, harness.ParseTime),
		"seed":     value(&e.Seed, seed),
		"interval": value(&e.Interval, harness.ParseTime),
		"per_ack":  value(&e.PerAck, boolean),
		"repeat":   value(&r.repeat, whole(1, 1000)),
		"from":     value(&r.from, harness.ParseTime),
		"until":    value(&r.until, harness.ParseTime),
		"epochs": func(n *yaml.Node) error {
			var s string
			if err := value(&s, asIs)(n); err != nil {
				return err
			}
			if s != "whole" {
				return wrong(resolved(n), "epochs %q: whole, or left out", s)
			}
			r.epochs = true
			return nil
		},
		"flows": func(n *yaml.Node) error {
			e.Flows = nil
			if resolved(n).Kind == yaml.ScalarNode {
				var count int
				err := value(&count, whole(1, 1000))(n)
				for range count {
					e.Flows = append(e.Flows, trace.Flow{CC: underTest})
				}
				return err
			}
			return list(n, func(n *yaml.Node) error {
				f := trace.Flow{CC: underTest}
				var bytes int
				err := fields{
					"cc": value(&f.CC, func(s string) (string, error) {
						if s == underTest {
							return s, nil
						}
						return congestionControl(s)
					}),
					"start":    value(&f.Start, harness.ParseTime),
					"duration": value(&f.Duration, harness.ParseTime),
					"rate":     value(&f.Rate, harness.ParseRate),
					"bytes":    value(&bytes, whole(1, math.MaxInt)),
				}.parse(n)
				f.Bytes = int64(bytes)
				e.Flows = append(e.Flows, f)
				return err
			})
		},
		"checks": func(n *yaml.Node) error {
			return list(n, func(n *yaml.Node) error {
				c, err := parseCheck(n)
				r.checks = append(r.checks, c)
				return err
			})
		},
	}
	maps.Copy(keys, r.whose())
	maps.Copy(keys, more)
	return keys.parse(n)
}

// link holds the values of a link's keys until all are known: what a buffer is
// depends on the MTU, and a run's keys go before those of the defaults.
type link map[string]*yaml.Node

func (l *link) parse(n *yaml.Node) error {
	if *l == nil {
		*l = link{}
	}
	keys := fields{}
	for _, key := range []string{"kind", "rate", "rtt", "buffer", "mtu", "loss", "ecn", "burst"} {
		keys[key] = func(n *yaml.Node) error {
			(*l)[key] = n
			return nil
		}
	}
	return keys.parse(n)
}

func (l link) apply(to *trace.Link) error {
	to.MTU = 1500
	for _, k := range []struct {
		key string
		set func(*yaml.Node) error
	}{
		{"kind", value(&to.Kind, asIs)},
		{"mtu", value(&to.MTU, whole(1, 1<<16))}, // before the buffer
		{"rate", value(&to.Rate, harness.ParseRate)},
		{"rtt", value(&to.RTT, harness.ParseTime)},
		{"buffer", value(&to.Buffer, func(s string) (packets int, err error) {
			packets, to.BufferBDP, err = harness.ParseBuffer(s, to.MTU)
			return packets, err
		})},
		{"loss", value(&to.Loss, harness.ParseLoss)},
		{"ecn", value(&to.ECN, harness.ParseECN)},
		{"burst", value(&to.Burst, parsePackets)},
	} {
		if n := l[k.key]; n != nil {
			if err := k.set(n); err != nil {
				return err
			}
		}
	}
	return nil
}

// finish says whether a run makes sense as a whole.
func (r *run) finish(n *yaml.Node) error {
	if len(r.experiment.Flows) == 0 {
		r.experiment.Flows = []trace.Flow{{CC: underTest}}
	}
	if !slices.ContainsFunc(r.experiment.Flows, func(f trace.Flow) bool { return f.CC == underTest }) {
		return wrong(n, "run %q: none of its flows is of the congestion control under test", r.name)
	}
	e, err := harness.Defaults(r.experiment)
	if err != nil {
		return wrong(n, "run %q: %w", r.name, err)
	}
	if r.until == 0 {
		r.until = e.Duration
	}
	if !(r.from < r.until) || r.until > e.Duration {
		return wrong(n, "run %q: measured from %g s until %g s: it lasts %g s", r.name, r.from, r.until, e.Duration)
	}
	for i := range r.checks {
		c := &r.checks[i]
		if c.kind != theory {
			continue
		}
		x, err := c.theory.of(e.Link, len(e.Flows))
		if err != nil {
			return wrong(c.at, "run %q: theory %q: %w", r.name, c.theory.name, err)
		}
		if _, ok := x.values[c.quantity.name]; !ok {
			return wrong(c.at, "run %q: theory %q says nothing of %s: it does of %s",
				r.name, c.theory.name, c.quantity.name, strings.Join(slices.Sorted(maps.Keys(x.values)), ", "))
		}
	}
	return nil
}
