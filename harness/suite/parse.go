// SPDX-License-Identifier: Apache-2.0

package suite

import (
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
	"ccload/internal/yamlfile"
)

// oneRTT stands for a jitter of one RTT until the link is known.
const oneRTT = -1

// MaxRepeat is how often one run may be repeated.
const MaxRepeat = 1000

// word is what may be the name of a directory.
var word = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)

// Parse reads an experiment file. Errors begin with its name, the line and the
// column.
func Parse(file string, b []byte) (*Suite, error) {
	s := &Suite{}
	if err := yamlfile.Parse(file, b, s.parse); err != nil {
		return nil, err
	}
	return s, nil
}

func name(s string) (string, error) {
	if !word.MatchString(s) {
		return "", fmt.Errorf("name %q: of letters, digits and . _ -", s)
	}
	return s, nil
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

func (s *Suite) parse(n *yaml.Node) error {
	base := run{repeat: 1, experiment: trace.Experiment{Seed: 1, PerAck: true, Jitter: oneRTT}}
	var defaults, runs *yaml.Node
	keep := func(to **yaml.Node) func(*yaml.Node) error {
		return func(n *yaml.Node) error { *to = n; return nil }
	}
	keys := yamlfile.Fields{
		"name":        yamlfile.Value(&s.Name, name),
		"description": yamlfile.Value(&s.Description, yamlfile.AsIs),
		"defaults":    keep(&defaults),
		"runs":        keep(&runs),
	}
	maps.Copy(keys, base.whose())
	if err := keys.Parse(n); err != nil {
		return err
	}
	if s.Name == "" {
		return yamlfile.Wrong(n, "it has no name")
	}
	if runs == nil {
		return yamlfile.Wrong(n, "it has no runs")
	}
	baseLink := link{}
	if defaults != nil {
		if err := base.parse(defaults, &baseLink, nil); err != nil {
			return err
		}
	}
	names := map[string]bool{}
	err := yamlfile.List(runs, func(n *yaml.Node) error {
		n = yamlfile.Resolved(n)
		r, l := base, maps.Clone(baseLink)
		r.checks = slices.Clone(base.checks)
		if err := r.parse(n, &l, yamlfile.Fields{"name": yamlfile.Value(&r.name, name)}); err != nil {
			return err
		}
		if r.name == "" {
			return yamlfile.Wrong(n, "the run has no name")
		}
		if names[r.name] {
			return yamlfile.Wrong(n, "run %q: there is another of this name", r.name)
		}
		names[r.name] = true
		if err := l.apply(&r.experiment.Link); err != nil {
			return err
		}
		if r.experiment.Jitter == oneRTT {
			r.experiment.Jitter = r.experiment.Link.RTT
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
		return yamlfile.Wrong(runs, "there are no runs")
	}
	return nil
}

// whose are the keys that name congestion controls.
func (r *run) whose() yamlfile.Fields {
	var from *yaml.Node // what has set them on this level
	once := func(set func(*yaml.Node) error) func(*yaml.Node) error {
		return func(n *yaml.Node) error {
			if from != nil {
				return yamlfile.Wrong(n, "cc and pairs: one of them")
			}
			from, r.pairs = n, nil
			return set(n)
		}
	}
	return yamlfile.Fields{
		"cc":    once(r.pair),
		"pairs": once(func(n *yaml.Node) error { return yamlfile.List(n, r.pair) }),
	}
}

// pair adds one: a name, or a list of one or two.
func (r *run) pair(n *yaml.Node) error {
	var pair []string
	add := func(n *yaml.Node) error {
		var cc string
		if err := yamlfile.Value(&cc, harness.ParseCC)(n); err != nil {
			return err
		}
		if slices.Contains(pair, cc) {
			return yamlfile.Wrong(yamlfile.Resolved(n), "%q: twice", cc)
		}
		pair = append(pair, cc)
		return nil
	}
	err := error(nil)
	if yamlfile.Resolved(n).Kind == yaml.ScalarNode {
		err = add(n)
	} else {
		err = yamlfile.List(n, add)
	}
	if err == nil && (len(pair) < 1 || len(pair) > 2) {
		err = yamlfile.Wrong(yamlfile.Resolved(n), "%d congestion controls: one under test, and its reference", len(pair))
	}
	r.pairs = append(r.pairs, pair)
	return err
}

// parse reads what a run and the defaults have in common, and some keys more.
func (r *run) parse(n *yaml.Node, l *link, more yamlfile.Fields) error {
	e := &r.experiment
	keys := yamlfile.Fields{
		"link":     l.parse,
		"duration": yamlfile.Value(&e.Duration, harness.ParseTime),
		"seed":     yamlfile.Value(&e.Seed, seed),
		"jitter":   yamlfile.Value(&e.Jitter, harness.ParseTime),
		"silent":   yamlfile.Value(&e.Silent, yamlfile.Bool),
		"interval": yamlfile.Value(&e.Interval, harness.ParseTime),
		"per_ack":  yamlfile.Value(&e.PerAck, yamlfile.Bool),
		"repeat":   yamlfile.Value(&r.repeat, yamlfile.Whole(1, MaxRepeat)),
		"from":     yamlfile.Value(&r.from, harness.ParseTime),
		"until":    yamlfile.Value(&r.until, harness.ParseTime),
		"epochs": func(n *yaml.Node) error {
			var s string
			if err := yamlfile.Value(&s, yamlfile.AsIs)(n); err != nil {
				return err
			}
			if s != "whole" {
				return yamlfile.Wrong(yamlfile.Resolved(n), "epochs %q: whole, or left out", s)
			}
			r.epochs = true
			return nil
		},
		"flows": func(n *yaml.Node) error {
			e.Flows = nil
			if yamlfile.Resolved(n).Kind == yaml.ScalarNode {
				var count int
				err := yamlfile.Value(&count, yamlfile.Whole(1, harness.MaxFlows))(n)
				for range count {
					e.Flows = append(e.Flows, trace.Flow{CC: underTest})
				}
				return err
			}
			return yamlfile.List(n, func(n *yaml.Node) error {
				f := trace.Flow{CC: underTest}
				var bytes int
				err := yamlfile.Fields{
					"cc": yamlfile.Value(&f.CC, func(s string) (string, error) {
						if s == underTest {
							return s, nil
						}
						return harness.ParseCC(s)
					}),
					"start":    yamlfile.Value(&f.Start, harness.ParseTime),
					"duration": yamlfile.Value(&f.Duration, harness.ParseTime),
					"rate":     yamlfile.Value(&f.Rate, harness.ParseRate),
					"bytes":    yamlfile.Value(&bytes, yamlfile.Whole(1, math.MaxInt)),
				}.Parse(n)
				f.Bytes = int64(bytes)
				e.Flows = append(e.Flows, f)
				return err
			})
		},
		"checks": func(n *yaml.Node) error {
			return yamlfile.List(n, func(n *yaml.Node) error {
				c, err := parseCheck(n)
				r.checks = append(r.checks, c)
				return err
			})
		},
	}
	maps.Copy(keys, r.whose())
	maps.Copy(keys, more)
	return keys.Parse(n)
}

// link holds the values of a link's keys until all are known: a run's go before
// those of the defaults.
type link map[string]*yaml.Node

func (l *link) parse(n *yaml.Node) error {
	if *l == nil {
		*l = link{}
	}
	keys := yamlfile.Fields{}
	for _, key := range []string{"kind", "rate", "rtt", "buffer", "mtu", "loss", "ecn", "burst"} {
		keys[key] = func(n *yaml.Node) error {
			(*l)[key] = n
			return nil
		}
	}
	return keys.Parse(n)
}

func (l link) apply(to *trace.Link) error {
	to.MTU = 1500
	for _, k := range []struct {
		key string
		set func(*yaml.Node) error
	}{
		{"kind", yamlfile.Value(&to.Kind, yamlfile.AsIs)},
		{"mtu", yamlfile.Value(&to.MTU, harness.ParseMTU)},
		{"rate", yamlfile.Value(&to.Rate, harness.ParseRate)},
		{"rtt", yamlfile.Value(&to.RTT, harness.ParseTime)},
		{"buffer", yamlfile.Value(&to.Buffer, func(s string) (packets int, err error) {
			packets, to.BufferBDP, to.BufferBytes, err = harness.ParseBuffer(s)
			return packets, err
		})},
		{"loss", yamlfile.Value(&to.Loss, harness.ParseLoss)},
		{"ecn", yamlfile.Value(&to.ECN, harness.ParseECN)},
		{"burst", yamlfile.Value(&to.Burst, parsePackets)},
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
		return yamlfile.Wrong(n, "run %q: none of its flows is of the congestion control under test", r.name)
	}
	e, err := harness.Defaults(r.experiment)
	if err != nil {
		return yamlfile.Wrong(n, "run %q: %w", r.name, err)
	}
	if r.until == 0 {
		r.until = e.Duration
	}
	if !(r.from < r.until) || r.until > e.Duration {
		return yamlfile.Wrong(n, "run %q: measured from %g s until %g s: it lasts %g s", r.name, r.from, r.until, e.Duration)
	}
	for i := range r.checks {
		c := &r.checks[i]
		if c.kind != theory {
			continue
		}
		x, err := c.theory.of(e.Link, len(e.Flows))
		if err != nil {
			return yamlfile.Wrong(c.at, "run %q: theory %q: %w", r.name, c.theory.name, err)
		}
		if _, ok := x.values[c.quantity.name]; !ok {
			return yamlfile.Wrong(c.at, "run %q: theory %q says nothing of %s: it does of %s",
				r.name, c.theory.name, c.quantity.name, strings.Join(slices.Sorted(maps.Keys(x.values)), ", "))
		}
	}
	return nil
}
