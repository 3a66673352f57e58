// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"ccload/harness/suite"
	"ccload/harness/trace"
	"ccload/harness/vm"
	"ccload/internal/change"
	"ccload/plots"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// runSuite runs an experiment file.
func (a *app) runSuite(ctx context.Context, cmd *cobra.Command, file string, f *runFlags) (err error) {
	garbage(true)
	var wrong []string
	cmd.LocalFlags().Visit(func(flag *pflag.Flag) {
		switch flag.Name {
		case "cc", "vm", "realtime", "object", "map", "as", "set", "output", "json", "all":
		default:
			wrong = append(wrong, "--"+flag.Name)
		}
	})
	if len(wrong) > 0 {
		return usagef("%s: the file says that; with a file go --cc, --vm, --realtime, --object with --map, --as and --set, --output and --all", strings.Join(wrong, ", "))
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("experiments: %w", err)
	}
	s, err := suite.Parse(file, b)
	if err != nil {
		return err
	}
	plan, err := s.Plan(f.cc)
	if err != nil {
		return usageError{fmt.Errorf("experiments %q: %w", file, err)}
	}
	f.place(s.Name)
	kernels, err := f.openKernels()
	if err != nil {
		return err
	}
	if len(kernels) == 0 {
		kernels = []*vm.Kernel{nil}
	}
	var tasks []task
	for _, k := range kernels {
		for _, t := range plan.Tasks {
			dir := f.to
			if len(kernels) > 1 {
				dir = filepath.Join(dir, k.Release)
			}
			run, _, _ := strings.Cut(t.Dir, "/")
			tasks = append(tasks, task{
				dir: filepath.Join(dir, filepath.FromSlash(t.Dir)), run: filepath.Join(dir, run), exp: t.Experiment, kernel: k,
			})
		}
	}
	f.cc = nil
	for _, t := range tasks {
		for _, flow := range t.exp.Flows {
			if !slices.Contains(f.cc, flow.CC) {
				f.cc = append(f.cc, flow.CC)
			}
		}
	}
	over, err := change.Begin() // what there is when a signal comes is kept
	if err != nil {
		return err
	}
	defer over()
	set, err := f.createSet(tasks)
	if err != nil {
		return err
	}
	whole := false
	defer func() { err = errors.Join(err, set.Close(whole)) }()
	runs, err := a.runTasks(ctx, f, tasks)
	if err != nil {
		if a.someRuns(runs, err) {
			err = errors.Join(err, a.printRuns(f.to, runs, f.all))
		}
		return err
	}
	var all []*trace.Run
	for i := range kernels {
		mine := tasks[i*len(plan.Tasks) : (i+1)*len(plan.Tasks)]
		checked, err := checkSuite(plan, mine)
		if err != nil {
			return errors.Join(err, a.printRuns(f.to, runs, f.all))
		}
		all = append(all, checked...)
	}
	runs = all
	pictures, warnings, err := drawRuns(tasks)
	whole = err == nil
	a.warn(warnings)
	if err := errors.Join(err, a.printSuite(f.to, runs, f.all)); err != nil {
		return err
	}
	if !a.json {
		a.say("results in %s, a picture of each run among them (%d)", f.to, pictures)
	}
	if err := checksFailed(runs); err != nil {
		return fmt.Errorf("experiments %q: %w", s.Name, err)
	}
	return nil
}

// checkSuite holds results against what the file claims, and adds what it finds to
// them.
func checkSuite(plan *suite.Plan, tasks []task) (runs []*trace.Run, err error) {
	dirs := map[string]string{}
	for i, t := range plan.Tasks {
		dirs[t.Dir] = tasks[i].dir
	}
	outcomes, err := plan.Check(func(t suite.Task) (*trace.Result, error) { return trace.Open(dirs[t.Dir]) })
	if err != nil {
		return nil, err
	}
	for i, o := range outcomes {
		r, err := trace.Open(tasks[i].dir)
		if err != nil {
			return nil, err
		}
		r.Run.Checks = append(r.Run.Checks, o.Checks...)
		r.Run.Theory = o.Theory
		if err := trace.Rewrite(tasks[i].dir, r.Run); err != nil {
			return nil, err
		}
		runs = append(runs, r.Run)
	}
	return runs, nil
}

// drawRuns draws the congestion controls of each run on one picture, beside their
// results.
func drawRuns(tasks []task) (pictures int, warnings []string, err error) {
	var dirs []string
	for _, t := range tasks {
		if !slices.Contains(dirs, t.run) {
			dirs = append(dirs, t.run)
		}
	}
	for _, dir := range dirs {
		results, incomplete, err := trace.OpenAll([]string{dir})
		if err != nil {
			return 0, nil, err
		}
		said, err := plots.Save(filepath.Join(dir, "plot.png"), results)
		if err != nil {
			return 0, nil, err
		}
		warnings = append(append(warnings, incomplete...), said...)
	}
	return len(dirs), warnings, nil
}

// printSuite prints the runs and their checks.
func (a *app) printSuite(dir string, runs []*trace.Run, all bool) error {
	if err := a.printRuns(dir, runs, all); err != nil || a.json {
		return err
	}
	a.printf("\n")
	w := a.table()
	w.row("RUN", "CHECK", "WANT", "GOT", "")
	for _, r := range runs {
		for _, c := range r.Checks {
			verdict := "ok"
			if !c.OK {
				verdict = "FAILED"
			}
			w.row(r.Experiment.Name, c.Name, c.Want, c.Got, verdict)
		}
	}
	w.Flush()
	return nil
}
