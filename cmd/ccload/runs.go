// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"ccload/harness/trace"
)

// rowsMost is how many flows, or runs, have a row each in a table. More are told as
// quantiles.
const rowsMost = 20

// measuredRuns is what run did: one document, however many runs there are.
type measuredRuns struct {
	Dir  string       `json:"dir"` // that of all results
	Runs []*trace.Run `json:"runs"`
}

// someRuns says whether what there is of runs that failed is to be printed: for
// programs also that there is nothing.
func (a *app) someRuns(runs []*trace.Run, err error) bool {
	_, misuse := errors.AsType[usageError](err)
	return len(runs) > 0 || a.json && !misuse
}

// printRuns prints the results: as text in tables, with a row for each flow where
// that is wanted or where they are few.
func (a *app) printRuns(dir string, runs []*trace.Run, all bool) error {
	a.warnRuns(runs)
	return a.print(measuredRuns{dir, append([]*trace.Run{}, runs...)}, func() {
		flows := 0
		for _, r := range runs {
			flows += len(r.Flows)
		}
		if flows == 0 {
			return // no run came so far that there is anything to tell
		}
		if flows > rowsMost && !all {
			a.printFlowQuantiles(runs)
		} else {
			a.printFlows(runs)
		}
		a.printf("\n")
		if len(runs) > rowsMost && !all {
			a.printLinkQuantiles(runs)
		} else {
			a.printLinks(runs)
		}
		if max(flows, len(runs)) > rowsMost && !all {
			what := counted(flows, "flow")
			if len(runs) > rowsMost {
				what += " and " + counted(len(runs), "run")
			}
			a.say("quantiles of %s; --all prints a row for each", what)
		}
	})
}

func counted(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// column is a quantity of a T: a flow or a run.
type column[T any] struct {
	head, of string // as the head of a column; alone
	value    func(*T) *float64
	format   func(float64) string
}

var flowColumns = []column[trace.FlowResult]{
	{"THROUGHPUT", "throughput", func(f *trace.FlowResult) *float64 { return f.Throughput }, rate},
	{"CWND MEAN", "cwnd mean", func(f *trace.FlowResult) *float64 { return f.CwndMean }, decimal},
	{"MAX", "cwnd max", func(f *trace.FlowResult) *float64 { return f.CwndMax }, whole},
	{"SRTT P50", "srtt p50", func(f *trace.FlowResult) *float64 { return f.SRTTp50 }, seconds},
	{"P95", "srtt p95", func(f *trace.FlowResult) *float64 { return f.SRTTp95 }, seconds},
	{"RETRANSMITS", "retransmits", func(f *trace.FlowResult) *float64 { return new(float64(f.Retransmits)) }, whole},
	{"LOSS EPISODES", "loss episodes", func(f *trace.FlowResult) *float64 { return new(float64(f.LossEpisodes)) }, whole},
	{"TIMEOUTS", "timeouts", func(f *trace.FlowResult) *float64 { return new(float64(f.Timeouts)) }, whole},
}

// linkColumns are of a run that has a Bottleneck.
var linkColumns = []column[trace.Run]{
	{"QUEUE MEAN", "queue mean", func(r *trace.Run) *float64 { return r.Bottleneck.QueueMean }, decimal},
	{"MAX", "queue max", func(r *trace.Run) *float64 { return new(float64(r.Bottleneck.QueueMax)) }, whole},
	{"DROPS", "drops", func(r *trace.Run) *float64 { return new(float64(r.Bottleneck.Drops)) }, whole},
	{"LOSSES", "losses", func(r *trace.Run) *float64 { return new(float64(r.Bottleneck.Losses)) }, whole},
	{"MARKS", "marks", func(r *trace.Run) *float64 { return new(float64(r.Bottleneck.Marks)) }, whole},
	{"UTILISATION", "utilisation", func(r *trace.Run) *float64 { return r.Bottleneck.Utilisation }, percent},
	{"JAIN", "Jain's index", func(r *trace.Run) *float64 {
		if len(r.Flows) < 2 {
			return nil // there is none of one flow
		}
		return r.Jain
	}, func(v float64) string { return fmt.Sprintf("%.3f", v) }},
}

func heads[T any](before []string, columns []column[T]) []string {
	for _, c := range columns {
		before = append(before, c.head)
	}
	return before
}

func cells[T any](before []string, columns []column[T], of *T) []string {
	for _, c := range columns {
		before = append(before, orDash(c.value(of), c.format))
	}
	return before
}

func (a *app) printFlows(runs []*trace.Run) {
	w := a.table()
	w.row(heads([]string{"RUN", "FLOW", "CC"}, flowColumns)...)
	for _, r := range runs {
		for i := range r.Flows {
			f := &r.Flows[i]
			w.row(cells([]string{runName(r), strconv.Itoa(f.ID), f.CC}, flowColumns, f)...)
		}
	}
	w.Flush()
}

func (a *app) printLinks(runs []*trace.Run) {
	w := a.table()
	w.row(heads([]string{"RUN", "LINK", "KIND", "MEASURED"}, linkColumns)...)
	for _, r := range runs {
		if r.Bottleneck == nil { // the run did not get as far
			continue
		}
		m := r.Link.Measured
		got := fmt.Sprintf("%s, %s", orDash(m.Rate, rate), orDash(m.RTT, seconds))
		if slices.ContainsFunc(r.Checks, func(c trace.Check) bool { return !c.OK && (c.Name == "link rate" || c.Name == "link rtt") }) {
			got += " FAILED"
		}
		w.row(cells([]string{runName(r), describeLink(r), r.Link.Kind, got}, linkColumns, r)...)
	}
	w.Flush()
}

func runName(r *trace.Run) string {
	if r.Incomplete {
		return r.Experiment.Name + " (interrupted)"
	}
	return r.Experiment.Name
}

func describeLink(r *trace.Run) string {
	return fmt.Sprintf("%s, %s, %s", exact(r.Link.Rate, "bit/s"), exact(r.Link.RTT, "s"), counted(r.Link.Buffer, "packet"))
}

// group are things that differ in nothing but chance: flows of one congestion control
// in runs of one experiment, or such runs.
type group[T any] struct {
	names []string // of the runs
	cc    string
	run   *trace.Run // the first
	of    []*T
}

// groups puts together what belongs together. each tells the things of a run, and
// what tells them apart besides their experiment.
func groups[T any](runs []*trace.Run, each func(*trace.Run, func(cc string, of *T))) (out []*group[T]) {
	type key struct {
		link            trace.Link
		kernel, cc, ccs string
		duration        float64
		incomplete      bool
	}
	byKey := map[key]*group[T]{}
	for _, r := range runs {
		var ccs []string
		for _, f := range r.Experiment.Flows {
			ccs = append(ccs, f.CC)
		}
		each(r, func(cc string, of *T) {
			k := key{r.Link.Link, r.Kernel, cc, strings.Join(ccs, " "), r.Experiment.Duration, r.Incomplete}
			g := byKey[k]
			if g == nil {
				g = &group[T]{cc: cc, run: r}
				byKey[k], out = g, append(out, g)
			}
			if name := runName(r); !slices.Contains(g.names, name) {
				g.names = append(g.names, name)
			}
			g.of = append(g.of, of)
		})
	}
	return out
}

func (g *group[T]) name() string {
	if len(g.names) == 1 {
		return g.names[0]
	}
	return g.names[0] + " … " + g.names[len(g.names)-1]
}

// The quantiles of a table, and the heads of their columns.
var (
	quantiles     = []float64{0, .25, .5, .75, 1}
	quantileHeads = []string{"MIN", "P25", "MEDIAN", "P75", "MAX"}
)

// row prints the quantiles of a quantity, each a value that was measured. What has no
// value is counted.
func (c column[T]) row(w table, before []string, of []*T) {
	var values []float64
	for _, t := range of {
		if v := c.value(t); v != nil {
			values = append(values, *v)
		}
	}
	slices.Sort(values)
	n := strconv.Itoa(len(of))
	if len(values) < len(of) {
		n = fmt.Sprintf("%d of %d", len(values), len(of))
	}
	row := append(before, n, c.of)
	for _, q := range quantiles {
		if len(values) == 0 {
			row = append(row, "-")
			continue
		}
		row = append(row, c.format(values[max(0, int(math.Ceil(q*float64(len(values))))-1)]))
	}
	w.row(row...)
}

func (a *app) printFlowQuantiles(runs []*trace.Run) {
	w := a.table()
	w.row(append([]string{"RUN", "CC", "FLOWS", "QUANTITY"}, quantileHeads...)...)
	for _, g := range groups(runs, func(r *trace.Run, add func(string, *trace.FlowResult)) {
		for i := range r.Flows {
			add(r.Flows[i].CC, &r.Flows[i])
		}
	}) {
		for _, c := range flowColumns {
			c.row(w, []string{g.name(), g.cc}, g.of)
		}
	}
	w.Flush()
}

func (a *app) printLinkQuantiles(runs []*trace.Run) {
	w := a.table()
	w.row(append([]string{"RUN", "LINK", "KIND", "RUNS", "QUANTITY"}, quantileHeads...)...)
	for _, g := range groups(runs, func(r *trace.Run, add func(string, *trace.Run)) {
		if r.Bottleneck != nil {
			add("", r)
		}
	}) {
		for _, c := range linkColumns {
			c.row(w, []string{g.name(), describeLink(g.run), g.run.Link.Kind}, g.of)
		}
	}
	w.Flush()
}

// warnRuns prints the warnings of runs.
func (a *app) warnRuns(runs []*trace.Run) {
	var all []string
	for _, r := range runs {
		for _, w := range r.Warnings {
			all = append(all, r.Experiment.Name+": "+w)
		}
	}
	a.warn(all)
}

// toldOf is how many warnings of one kind are told.
const toldOf = 3

var numbers = regexp.MustCompile(`[0-9]+(\.[0-9]+)?`)

// ofOneKind makes one of warnings that differ in their numbers only, such as those of
// a hundred flows: the first few, and how many there are.
func ofOneKind(warnings []string) (out []string) {
	kinds := map[string][]string{}
	var order []string
	for _, w := range warnings {
		kind := numbers.ReplaceAllString(w, "#")
		if kinds[kind] == nil {
			order = append(order, kind)
		}
		kinds[kind] = append(kinds[kind], w)
	}
	for _, kind := range order {
		of := kinds[kind]
		if len(of) <= toldOf {
			out = append(out, strings.Join(of, "; "))
			continue
		}
		out = append(out, fmt.Sprintf("%s; … (%d like this)", strings.Join(of[:toldOf], "; "), len(of)))
	}
	return out
}

// orDash writes a value, or that there is none.
func orDash(v *float64, format func(float64) string) string {
	if v == nil {
		return "-"
	}
	return format(*v)
}

func decimal(v float64) string { return fmt.Sprintf("%.1f", v) }

func percent(v float64) string { return fmt.Sprintf("%.1f %%", 100*v) }

func whole(v float64) string { return fmt.Sprintf("%.0f", v) }

func rate(v float64) string { return measured(v, "bit/s") }

func seconds(v float64) string { return measured(v, "s") }

// measured writes what was measured with four digits, exact what was asked for
// with as many as it has.
func measured(v float64, unit string) string {
	if v == 0 {
		return "0 " + unit
	}
	v, prefix := scale(v)
	decimals := 3
	for a := math.Abs(v); a >= 9.9995 && decimals > 0; a /= 10 {
		decimals--
	}
	return strconv.FormatFloat(v, 'f', decimals, 64) + " " + prefix + unit
}

func exact(v float64, unit string) string {
	v, prefix := scale(v)
	return strconv.FormatFloat(v, 'g', 6, 64) + " " + prefix + unit
}

// scale finds the prefix with which a quantity is between 1 and 1000.
func scale(v float64) (float64, string) {
	prefixes := []string{"n", "µ", "m", "", "k", "M", "G", "T"}
	i := 3
	for ; math.Abs(v) >= 999.95 && i < len(prefixes)-1; i++ {
		v /= 1000
	}
	for ; v != 0 && math.Abs(v) < 0.99995 && i > 0; i-- {
		v *= 1000
	}
	return v, prefixes[i]
}
