// SPDX-License-Identifier: Apache-2.0

// Package suite reads experiment files: many runs on many links, each for several
// congestion controls, and what their results have to be.
//
// Parse reads a file, Suite.Plan says which experiments it makes with which
// congestion controls, and Plan.Check holds their results against what the file
// claims: against a reference (the kernel's own algorithm, say), against a theory
// (see Theories), or against plain numbers. All of it is pure: the experiments are
// run by whoever has a kernel for them.
//
// # The file
//
// A file is YAML. Every quantity is in the command line's words, and an unknown
// key or a value that makes no sense is an error with its line and column.
//
//	name: mine                       # a word
//	description: what it is for
//	cc: [mine, cubic]                # under test, and its reference (optional)
//	pairs: [[mine, cubic], [a, b]]   # or several of these
//	defaults: …                      # of every run: all that a run has, but its name
//	runs:
//	  - name: slow                   # a word: the directory of its results
//	    link: {kind: auto, rate: 2mbit, rtt: 40ms, buffer: 1bdp, mtu: 1500, loss: 1/1000, ecn: 20p, burst: 1p}
//	    duration: 20s
//	    flows: 2                     # so many of the congestion control under test, or:
//	    flows: [{start: 1s, duration: 5s, bytes: 100000, rate: 1mbit, cc: reno}]
//	    cc: … or pairs: …            # in place of the file's
//	    seed: 1
//	    jitter: 40ms                 # flows start up to so much later, by the seed: one RTT unless it is said
//	    silent: true                 # flows that get nothing through are no failure
//	    repeat: 3                    # runs, the seed one more each time
//	    interval: 10ms
//	    per_ack: true
//	    from: 5s                     # what is measured: from here,
//	    until: 20s                   #     until here,
//	    epochs: whole                #     from the end of the first reduction of the window in it to that of the last
//	    checks:                      # with those of the defaults
//	      - {compare: cwnd_mean, within: 1%, why: …}
//	      - {measure: cwnd_mean, theory: cubic-window, within: 10%, why: …}
//	      - {measure: drops, is: 0}  # or least, or most
//	      - {compare: throughput, flows: together, within: 1%}
//
// A flow's rate is what an application offers it; its cc is the one under test
// unless another is named. A band is relative (5%) or in the unit of what is
// measured (2); see Quantities. Quantities of a flow are checked for every flow of
// the congestion control under test, or with flows: together for all in one.
package suite

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"

	"ccload/harness/trace"
)

// Suite is an experiment file.
type Suite struct {
	Name        string
	Description string
	runs        []run
}

// run is one link with what is sent over it, for some congestion controls.
type run struct {
	name        string
	experiment  trace.Experiment // flows of underTest are of the one under test
	pairs       [][]string       // each: under test, and its reference if there is one
	repeat      int
	from, until float64 // s
	epochs      bool    // measure whole epochs
	checks      []check
}

// What a file may ask for.
const (
	maxRuns  = 10_000
	maxFlows = 1_000_000
)

// underTest stands for the congestion control under test where a flow's is named.
const underTest = "$cc"

// Plan is what a suite has run: one experiment for each run and congestion control.
type Plan struct {
	Tasks  []Task
	groups []group
}

// Task is one experiment of a plan.
type Task struct {
	// Dir is where its results go, below the plan's: RUN/CC, and the number of the
	// repetition where there are several.
	Dir        string
	Experiment trace.Experiment // without the defaults; see harness.Defaults
}

// group is a run for a pair: the tasks whose results are looked at together.
type group struct {
	run       *run
	tasks     []int // by index in Plan.Tasks; the reference is the second
	reference string
}

// Plan makes the experiments. cc, where it is not empty, takes the place of all the
// congestion controls that the file would test: one, and its reference.
func (s *Suite) Plan(cc []string) (*Plan, error) {
	if len(cc) > 2 {
		return nil, fmt.Errorf("%d congestion controls: one under test, and its reference", len(cc))
	}
	p := &Plan{}
	known := map[string]int{} // by directory
	flows := 0
	for i := range s.runs {
		r := &s.runs[i]
		pairs := r.pairs
		if len(cc) > 0 {
			pairs = [][]string{cc}
		}
		if len(pairs) == 0 {
			return nil, fmt.Errorf("run %q: which congestion control? the file names none", r.name)
		}
		for _, pair := range pairs {
			if len(pair) < 2 && slices.ContainsFunc(r.checks, func(c check) bool { return c.kind == compare }) {
				return nil, fmt.Errorf("run %q: %s is compared, but with which reference?", r.name, pair[0])
			}
			for n := range r.repeat {
				if flows += len(pair) * len(r.experiment.Flows); flows > maxFlows || len(p.groups) == maxRuns {
					return nil, fmt.Errorf("more than %d runs, or %d flows in all", maxRuns, maxFlows)
				}
				g := group{run: r}
				for _, name := range pair {
					t := r.task(name, n)
					at, ok := known[t.Dir]
					if !ok {
						at = len(p.Tasks)
						known[t.Dir] = at
						p.Tasks = append(p.Tasks, t)
					}
					g.tasks = append(g.tasks, at)
				}
				if len(pair) > 1 {
					g.reference = pair[1]
				}
				p.groups = append(p.groups, g)
			}
		}
	}
	return p, nil
}

// task is the nth repetition of a run.
func (r *run) task(cc string, n int) Task {
	t := Task{Dir: path.Join(r.name, cc), Experiment: r.experiment}
	e := &t.Experiment
	e.Name = r.name + " " + cc
	e.Seed += uint64(n)
	if r.repeat > 1 {
		t.Dir = path.Join(t.Dir, strconv.Itoa(n+1))
		e.Name += " " + strconv.Itoa(n+1)
	}
	e.Flows = slices.Clone(e.Flows)
	for i := range e.Flows {
		if e.Flows[i].CC == underTest {
			e.Flows[i].CC = cc
		}
	}
	return t
}

// Outcome is what was found out about one task.
type Outcome struct {
	Checks []trace.Check
	Theory []trace.Curve
}

// Check looks at the results, which open has for each task, and says for each what
// has been found out. Where a result cannot be opened, what depends on it is left
// out, and the error says so.
func (p *Plan) Check(open func(Task) (*trace.Result, error)) ([]Outcome, error) {
	outcomes := make([]Outcome, len(p.Tasks))
	done := make([]bool, len(p.Tasks))
	errs := make([]error, len(p.Tasks))
	for _, g := range p.groups {
		var results []*trace.Result
		for _, t := range g.tasks {
			r, err := open(p.Tasks[t])
			if err != nil {
				errs[t] = fmt.Errorf("check %q: %w", p.Tasks[t].Dir, err)
				break
			}
			results = append(results, r)
		}
		if len(results) < len(g.tasks) {
			continue
		}
		for i, t := range g.tasks {
			if !done[t] {
				checks, curves := g.run.alone(results[i])
				outcomes[t].Checks = append(outcomes[t].Checks, checks...)
				outcomes[t].Theory = curves
				done[t] = true
			}
		}
		if len(g.tasks) > 1 {
			first := &outcomes[g.tasks[0]]
			first.Checks = append(first.Checks, g.run.compare(results[0], results[1], g.reference)...)
		}
	}
	return outcomes, errors.Join(errs...)
}
