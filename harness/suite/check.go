// SPDX-License-Identifier: Apache-2.0

package suite

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v4"

	"ccload/harness"
	"ccload/harness/trace"
	"ccload/internal/yamlfile"
)

// check is a claim about what is measured.
type check struct {
	quantity quantity
	kind     checkKind
	theory   *model  // of theory
	value    float64 // of is, least and most
	within   band
	together bool // of all flows under test, not of each
	why      string
	at       *yaml.Node
}

type checkKind int

const (
	compare checkKind = iota // with the reference's
	theory
	is
	least
	most
)

// band is how far off a value may be: a share of what is wanted, or an absolute
// difference.
type band struct {
	value    float64
	relative bool
}

func (b band) allows(got, want float64) bool {
	off := math.Abs(got - want)
	if b.relative {
		// In the last digit a band of 0 is met by what is the same.
		return off <= b.value*math.Abs(want)*(1+1e-12)
	}
	return off <= b.value*(1+1e-12)
}

func parseCheck(n *yaml.Node) (check, error) {
	c := check{at: n}
	var within, quantity, value *yaml.Node // where they stand
	has := map[string]bool{}
	find := func(s string) (string, error) {
		q, ok := quantities[s]
		if !ok {
			return "", fmt.Errorf("unknown quantity %q: there are %s", s, strings.Join(Quantities(), ", "))
		}
		c.quantity = q
		return s, nil
	}
	keep := func(key string, kind checkKind, to **yaml.Node) func(*yaml.Node) error {
		return func(n *yaml.Node) error {
			has[key] = true
			c.kind, *to = kind, n
			return nil
		}
	}
	err := yamlfile.Fields{
		"compare": keep("compare", compare, &quantity),
		"measure": func(n *yaml.Node) error { has["measure"] = true; quantity = n; return nil },
		"theory":  keep("theory", theory, &value),
		"is":      keep("is", is, &value),
		"least":   keep("least", least, &value),
		"most":    keep("most", most, &value),
		"within":  func(n *yaml.Node) error { within = n; return nil },
		"flows": func(n *yaml.Node) error {
			return setNode(&c.together, n, func(s string) (bool, error) {
				if s != "together" {
					return false, fmt.Errorf("flows %q: together, or left out", s)
				}
				return true, nil
			})
		},
		"why": func(n *yaml.Node) (err error) { c.why, err = yamlfile.Text(n); return err },
	}.Parse(n)
	if err != nil {
		return c, err
	}
	claims := 0
	for _, key := range []string{"compare", "theory", "is", "least", "most"} {
		if has[key] {
			claims++
		}
	}
	if claims != 1 || has["compare"] == has["measure"] {
		return c, yamlfile.Wrong(n, "a check is compare: QUANTITY, or measure: QUANTITY with one of theory, is, least and most")
	}
	var s string
	if err := setNode(&s, quantity, find); err != nil {
		return c, err
	}
	if c.together && !slices.Contains([]string{"cwnd_mean", "throughput"}, s) {
		return c, yamlfile.Wrong(quantity, "flows together: of cwnd_mean and throughput")
	}
	switch c.kind {
	case compare:
	case theory:
		err = setNode(&s, value, func(s string) (string, error) {
			m, ok := models[s]
			if !ok {
				return "", fmt.Errorf("unknown theory %q: there are %s", s, strings.Join(Theories(), ", "))
			}
			c.theory = m
			return s, nil
		})
	default:
		err = setNode(&c.value, value, c.quantity.unit.parse)
	}
	if err != nil {
		return c, err
	}
	switch {
	case within != nil && (c.kind == least || c.kind == most):
		return c, yamlfile.Wrong(within, "a bound has no band")
	case within != nil:
		return c, setNode(&c.within, within, c.quantity.unit.parseBand)
	case c.kind == compare || c.kind == theory:
		return c, yamlfile.Wrong(n, "it has no band (within)")
	}
	return c, nil
}

// setNode parses the text of a node.
func setNode[T any](to *T, n *yaml.Node, parse func(string) (T, error)) error {
	return yamlfile.Value(to, parse)(n)
}

// unit is what a quantity is counted in.
type unit string

const (
	segments unit = "segments"
	packets  unit = "packets"
	bitRate  unit = "bit/s"
	second   unit = "s"
	count    unit = ""
	ratio    unit = "%"
)

func (u unit) parse(s string) (float64, error) {
	switch u {
	case bitRate:
		return harness.ParseRate(s)
	case second:
		return harness.ParseTime(s)
	}
	digits, percent := strings.CutSuffix(s, "%")
	v, err := strconv.ParseFloat(digits, 64)
	if err != nil || math.IsInf(v, 0) || !(v >= 0) || percent && u != ratio {
		return 0, fmt.Errorf("%q: not a number that is not negative", s)
	}
	if percent {
		v /= 100
	}
	return v, nil
}

// parseBand reads a band: with % it is a share of what is wanted.
func (u unit) parseBand(s string) (band, error) {
	if _, percent := strings.CutSuffix(s, "%"); percent {
		v, err := ratio.parse(s)
		return band{v, true}, err
	}
	v, err := u.parse(s)
	return band{v, false}, err
}

func (u unit) String() string { return string(u) }

func (u unit) format(v float64) string {
	switch u {
	case bitRate:
		return fmt.Sprintf("%.6g Mbit/s", v/1e6)
	case second:
		return fmt.Sprintf("%.4g s", v)
	case ratio:
		return fmt.Sprintf("%.4g", v)
	}
	return strings.TrimSuffix(fmt.Sprintf("%.5g %s", v, string(u)), " ")
}

func (b band) format(u unit) string {
	if b.relative {
		return fmt.Sprintf("± %.4g %%", b.value*100)
	}
	return "± " + u.format(b.value)
}

// alone makes the checks that need no other result, and the curves of their theories.
func (r *run) alone(result *trace.Result) (checks []trace.Check, curves []trace.Curve) {
	views := r.look(result)
	drawn := map[string]bool{}
	for _, c := range r.checks {
		if c.kind == compare {
			continue
		}
		want := c.value
		name := c.quantity.name
		var x *expectation
		if c.theory != nil {
			x, _ = c.theory.of(result.Run.Experiment.Link, len(result.Run.Experiment.Flows))
			want = x.values[c.quantity.name]
			name += ", " + c.theory.name
			if !drawn[c.theory.name] {
				drawn[c.theory.name] = true
				for i, v := range views {
					curves = append(curves, x.curves(v, c.theory.name, i == 0)...)
				}
			}
		}
		checks = append(checks, c.judge(name, views, func(int) (float64, error) { return want, nil })...)
	}
	return checks, curves
}

// compare makes the checks against the result of the reference.
func (r *run) compare(mine, other *trace.Result, reference string) (checks []trace.Check) {
	views, others := r.look(mine), r.look(other)
	for _, c := range r.checks {
		if c.kind == compare {
			checks = append(checks, c.judge(c.quantity.name+" like "+reference, views, func(i int) (float64, error) {
				if c.together {
					return together(others, c.quantity)
				}
				if i >= len(others) {
					return 0, errors.New("no such flow")
				}
				return others[i].measure(c.quantity)
			})...)
		}
	}
	return checks
}

func (v *view) measure(q quantity) (float64, error) {
	if v.err != nil {
		return 0, v.err
	}
	if !(v.from < v.until) { // the flow was over before, or began after
		return 0, errNoSamples
	}
	return q.measure(v)
}

// together is what all flows have, as a mean over the time from the first one's
// start to the last one's end.
func together(views []*view, q quantity) (float64, error) {
	var sum float64
	from, until := math.Inf(1), 0.
	for _, v := range views {
		m, err := v.measure(q)
		if err != nil {
			return 0, err
		}
		sum += m * (v.until - v.from)
		from, until = min(from, v.from), max(until, v.until)
	}
	return sum / (until - from), nil
}

// judge holds what is measured of each flow, or of the link, against what is wanted.
func (c *check) judge(name string, views []*view, want func(i int) (float64, error)) (checks []trace.Check) {
	for i, v := range views {
		t := trace.Check{Name: name, Why: c.why}
		once := c.quantity.ofLink || c.together
		switch {
		case c.together:
			t.Name = "all flows: " + name
		case len(views) > 1 && !once:
			t.Name = fmt.Sprintf("flow %d: %s", v.flow.ID, name)
		}
		u := c.quantity.unit
		w, err := want(i)
		switch {
		case err != nil:
			t.Want = "not known: " + err.Error()
		case c.kind == least:
			t.Want = "≥ " + u.format(w)
		case c.kind == most:
			t.Want = "≤ " + u.format(w)
		default:
			t.Want = u.format(w) + " " + c.within.format(u)
		}
		got, gerr := v.measure(c.quantity)
		if c.together {
			got, gerr = together(views, c.quantity)
		}
		if gerr != nil {
			t.Got = gerr.Error()
		} else {
			t.Got = u.format(got)
			if c.within.relative && w != 0 {
				t.Got += fmt.Sprintf(" (%+.3g %%)", (got/w-1)*100)
			}
		}
		if err == nil && gerr == nil {
			switch c.kind {
			case least:
				t.OK = got >= w
			case most:
				t.OK = got <= w
			default:
				t.OK = c.within.allows(got, w)
			}
		}
		checks = append(checks, t)
		if once {
			break
		}
	}
	return checks
}

// curves are what a theory expects in the measuring window of a view: its epoch
// after each of the measured reductions, and its levels, once.
func (x *expectation) curves(v *view, theory string, first bool) (curves []trace.Curve) {
	if v.err != nil {
		return nil
	}
	if len(x.epoch) > 0 && len(v.cuts) > 0 {
		c := trace.Curve{Name: theory, Quantity: "cwnd"}
		for i, at := range v.cuts {
			until := v.until
			if i+1 < len(v.cuts) {
				until = v.cuts[i+1].begin
			}
			if piece := x.after(at.end, until); len(piece) > 1 {
				c.Pieces = append(c.Pieces, piece)
			}
		}
		curves = append(curves, c)
	}
	if first {
		for _, l := range x.levels {
			curves = append(curves, trace.Curve{Name: theory, Quantity: l.quantity, Pieces: [][][2]float64{{{v.from, l.value}, {v.until, l.value}}}})
		}
	}
	return curves
}

// after is the epoch that begins at a time, as far as it goes until another.
func (x *expectation) after(begin, until float64) (piece [][2]float64) {
	for i, p := range x.epoch {
		t, w := begin+p[0], p[1]
		if t > until {
			if i > 0 && begin < until {
				before := x.epoch[i-1]
				w = before[1] + (until-begin-before[0])/(p[0]-before[0])*(w-before[1])
				piece = append(piece, [2]float64{until, w})
			}
			break
		}
		piece = append(piece, [2]float64{t, w})
	}
	return piece
}
