// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"ccload/harness"
	"ccload/harness/link"
	"ccload/harness/suite"
	"ccload/harness/trace"
	"ccload/harness/vm"
	"ccload/internal/change"
	"ccload/registry"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// runFlags are an experiment as the user writes it.
type runFlags struct {
	cc                             []string
	link                           string
	rate, rtt, buffer, loss, ecn   string
	mtu                            string
	duration, interval, perAck, to string
	jitter                         string
	flows, repeat                  int
	seed                           uint64
	together, realtime, all        bool
	kernels                        []string
	objects                        objectFlags

	top string // what holds the results: to, or what to is in where the user has not named it
}

func (a *app) run() *cobra.Command {
	var f runFlags
	cmd := a.withJSON(&cobra.Command{
		Use:   "run [FILE.yaml] [--cc A,B]",
		Short: "Measure congestion controls on an emulated link",
		Long: `Measure congestion controls on an emulated link: each in a run of its own, or all
at once with --together, in network namespaces that vanish afterwards. A
directory of results for each run is left behind.

With a FILE the experiments are what it says, and so is what is checked of their
results; --cc names another congestion control to test, and its reference.

Each run checks itself, too: whether the link was what was asked for, the machine
kept up, and every flow sent something. The status is 3 if a check fails.`,
		Example: `  ccload run --cc bpf_cubic,cubic --rate 20mbit --rtt 40ms --buffer 1bdp
  ccload run --cc bpf_dctcp --ecn 20p --flows 2
  ccload run --cc cubic,reno --together --loss 0.01% -o results/rivals
  ccload run --cc bpf_cubic,cubic --vm debian-6.12
  ccload run --cc mine,cubic --vm debian-6.12 --object mine.bpf.o
  ccload run --cc bpf_cubic,gentle --vm debian-6.12 --object cubic.bpf.o --as gentle --set beta=900
  ccload run experiments/equivalence.yaml --vm debian-6.12`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: cobra.FixedCompletions([]cobra.Completion{"yaml", "yml"}, cobra.ShellCompDirectiveFilterFileExt),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(f.kernels) == 0 && f.realtime {
				return usagef("--realtime is for guests: --vm KERNEL")
			}
			if len(args) > 0 {
				return a.runSuite(cmd.Context(), cmd, args[0], &f)
			}
			return a.runAll(cmd.Context(), &f)
		},
	})
	fl := cmd.Flags()
	fl.StringSliceVar(&f.cc, "cc", nil, "congestion controls, `A,B`")
	fl.StringVar(&f.link, "link", link.Auto, "kind of link: `KIND` auto, userspace (ccload's own, exact) or netem (the kernel's)")
	fl.StringVar(&f.rate, "rate", "50mbit", "`RATE` of the bottleneck: bit, kbit, mbit, gbit")
	fl.StringVar(&f.rtt, "rtt", "40ms", "two-way delay of the empty link, a `TIME`: us, ms, s")
	fl.StringVar(&f.buffer, "buffer", "1bdp", "`SIZE` of the bottleneck's buffer: 1bdp, 100p (packets), 150kb")
	fl.StringVar(&f.mtu, "mtu", "1500", "`BYTES` of the link's largest packets, 576 to 9000")
	fl.StringVar(&f.loss, "loss", "", "inject `LOSS`: 0.01% at random, or exactly 1/10000")
	fl.StringVar(&f.ecn, "ecn", "", "mark CE when more than `N` packets wait, such as 20p")
	fl.IntVar(&f.flows, "flows", 1, "`N` flows of each congestion control")
	fl.StringVar(&f.duration, "duration", "20s", "`TIME` that the flows send")
	fl.Uint64Var(&f.seed, "seed", 1, "`N`, from which all that is random comes")
	fl.StringVar(&f.jitter, "jitter", "", "delay each flow's start by a random `TIME` of at most this, from the seed; 0s for none (default one RTT)")
	fl.IntVar(&f.repeat, "repeat", 1, "`N` runs of each, the seed one more each time")
	fl.StringVar(&f.interval, "interval", "10ms", "`TIME` between samples of every socket")
	fl.StringVar(&f.perAck, "per-ack", "auto", "sample on every ACK too: `auto`, on or off")
	fl.BoolVar(&f.together, "together", false, "all congestion controls in one run, side by side")
	fl.StringVarP(&f.to, "output", "o", "", "`DIR` for the results (default results/TIME-CC…)")
	fl.StringSliceVar(&f.kernels, "vm", nil, "run in guests with these kernels, in virtual time: `KERNEL[,KERNEL…]`, a name of ccload kernels or a path of a vmlinuz")
	fl.BoolVar(&f.realtime, "realtime", false, "let the guests' clock be the host's")
	f.objects.add(fl)
	fl.BoolVar(&f.all, "all", false, "print a row for each flow, also of more than 20")
	cmd.RegisterFlagCompletionFunc("cc", nameList)
	cmd.RegisterFlagCompletionFunc("link", cobra.FixedCompletions([]string{link.Auto, link.Userspace, link.Netem}, cobra.ShellCompDirectiveNoFileComp))
	cmd.RegisterFlagCompletionFunc("per-ack", cobra.FixedCompletions([]string{"auto", "on", "off"}, cobra.ShellCompDirectiveNoFileComp))
	cmd.RegisterFlagCompletionFunc("vm", guestList)
	cmd.MarkFlagDirname("output")
	return cmd
}

// task is one run to be done.
type task struct {
	dir    string
	run    string // of an experiment file: the directory of all that belong to one run of it
	exp    trace.Experiment
	kernel *vm.Kernel // of the guest; nil: here
}

func (a *app) runAll(ctx context.Context, f *runFlags) error {
	garbage(true)
	base, err := f.experiment()
	if err != nil {
		return usageError{err}
	}
	f.place(strings.Join(f.cc, "-"))
	kernels, err := f.openKernels()
	if err != nil {
		return err
	}
	over, err := change.Begin() // what there is when a signal comes is kept
	if err != nil {
		return err
	}
	defer over()
	tasks := f.tasks(base, kernels)
	set, err := f.createSet(tasks)
	if err != nil {
		return err
	}
	runs, err := a.runTasks(ctx, f, tasks)
	err = errors.Join(err, set.Close(err == nil))
	if err == nil || a.someRuns(runs, err) {
		err = errors.Join(err, a.printRuns(f.to, runs, f.all))
	}
	if err == nil && !a.json {
		a.say("results in %s; to draw them: ccload plot %[1]s", f.to)
	}
	if err == nil {
		err = checksFailed(runs)
	}
	return err
}

// errChecks says that what was to be done was done, but checks of it failed.
var errChecks = errors.New("failed")

// checksFailed is errChecks, with how many, if any check of the runs has failed.
func checksFailed(runs []*trace.Run) error {
	failed := 0
	for _, r := range runs {
		for _, c := range r.Checks {
			if !c.OK {
				failed++
			}
		}
	}
	switch failed {
	case 0:
		return nil
	case 1:
		return fmt.Errorf("1 check %w", errChecks)
	}
	return fmt.Errorf("%d checks %w", failed, errChecks)
}

// createSet makes the directory for the results of all tasks.
func (f *runFlags) createSet(tasks []task) (*trace.Set, error) {
	var runs []string
	for _, t := range tasks {
		if err := noLinks(f.top, t.dir); err != nil {
			return nil, err
		}
		run, err := filepath.Rel(f.to, t.dir)
		if err != nil {
			return nil, err
		}
		runs = append(runs, run)
	}
	return trace.CreateSet(f.to, runs)
}

// runTasks runs the tasks where they are to run: all here, or all in guests.
func (a *app) runTasks(ctx context.Context, f *runFlags, tasks []task) (_ []*trace.Run, err error) {
	for i := range tasks {
		if tasks[i].exp, err = harness.Defaults(tasks[i].exp); err != nil {
			return nil, usageError{err}
		}
	}
	if len(f.kernels) > 0 {
		return a.runInGuests(ctx, f, tasks)
	}
	return a.runHere(ctx, f, tasks)
}

// place chooses the directory for the results where the user has not.
func (f *runFlags) place(name string) {
	if f.top = f.to; f.to == "" {
		f.top = "results"
		f.to = filepath.Join(f.top, time.Now().Format("20060102-150405")+"-"+name)
	}
}

// noLinks refuses symbolic links from one directory on to another below it: who else
// may write there could have made them, and have results written elsewhere.
func noLinks(from, to string) error {
	rel, err := filepath.Rel(from, to)
	if err != nil {
		return err
	}
	for part := range strings.SplitSeq("./"+rel, "/") {
		from = filepath.Join(from, part)
		if st, err := os.Lstat(from); err == nil && st.Mode()&os.ModeSymlink != 0 {
			return fmt.Errorf("results %q: refusing a symbolic link: name the directory itself", from)
		}
	}
	return nil
}

// runHere runs the tasks one after the other on this machine's kernel.
func (a *app) runHere(ctx context.Context, f *runFlags, tasks []task) (runs []*trace.Run, err error) {
	objects, err := f.objects.read(f.cc, tasks)
	if err != nil {
		return nil, err
	}
	a.warnOf(objects, f.cc)
	for _, name := range f.cc {
		if o, ok := objects[name]; ok {
			l, err := o.hold(name)
			if err != nil {
				return nil, fmt.Errorf("run %q: %w", name, refusedHere(err))
			}
			defer l.Close()
			continue
		}
		if err := registry.Require(name); err != nil {
			return nil, err
		}
	}
	if f.perAck == "on" {
		if err := tryTracepoint("tcp_probe", "tcp_probe"); err != nil {
			return nil, fmt.Errorf("samples on every ACK: tracepoint tcp_probe: %w", err)
		}
	}
	opts := harness.Options{Objects: objectsOf(f.cc), Versions: versions()}
	for _, t := range tasks {
		a.sayv("running %s for %s into %s", t.exp.Name, exact(t.exp.Duration, "s"), t.dir)
		opts.Dir, opts.Progress = t.dir, a.progress(t.exp.Name)
		r, err := harness.Run(ctx, t.exp, opts)
		a.progressOver()
		if r != nil {
			runs = append(runs, r)
		}
		if err == nil && ctx.Err() != nil {
			err = errors.New("interrupted; what there is was kept")
		}
		if err != nil {
			return runs, fmt.Errorf("run %q: %w", t.exp.Name, err)
		}
	}
	return runs, nil
}

// experiment reads the flags: what all runs have in common.
func (f *runFlags) experiment() (e trace.Experiment, err error) {
	if len(f.cc) == 0 {
		return e, errors.New("which congestion controls? --cc A,B")
	}
	for i, name := range f.cc {
		if slices.Contains(f.cc[:i], name) {
			return e, fmt.Errorf("--cc %q: twice; --flows N gives it several flows", name)
		}
		if _, err := harness.ParseCC(name); err != nil {
			return e, fmt.Errorf("--cc: %w", err)
		}
	}
	if f.flows < 1 || f.flows > harness.MaxFlows {
		return e, fmt.Errorf("--flows %d: from 1 to %d", f.flows, harness.MaxFlows)
	}
	if f.repeat < 1 || f.repeat > suite.MaxRepeat {
		return e, fmt.Errorf("--repeat %d: from 1 to %d", f.repeat, suite.MaxRepeat)
	}
	switch f.perAck {
	case "auto", "on":
		e.PerAck = true
	case "off":
	default:
		return e, fmt.Errorf("--per-ack %q: auto, on or off", f.perAck)
	}
	switch f.link {
	case link.Auto, link.Userspace, link.Netem:
		e.Link.Kind = f.link
	default:
		return e, fmt.Errorf("--link %q: %s, %s or %s", f.link, link.Auto, link.Userspace, link.Netem)
	}
	e.Seed = f.seed
	if e.Link.MTU, err = harness.ParseMTU(f.mtu); err != nil { // before the buffer
		return e, fmt.Errorf("--mtu: %w", err)
	}
	for _, q := range []struct {
		flag, text string
		parse      func(string) (float64, error)
		to         *float64
	}{
		{"rate", f.rate, harness.ParseRate, &e.Link.Rate},
		{"rtt", f.rtt, harness.ParseTime, &e.Link.RTT},
		{"duration", f.duration, harness.ParseTime, &e.Duration},
		{"interval", f.interval, harness.ParseTime, &e.Interval},
	} {
		if *q.to, err = q.parse(q.text); err != nil {
			return e, fmt.Errorf("--%s: %w", q.flag, err)
		}
	}
	if e.Duration == 0 || e.Interval == 0 {
		return e, errors.New("--duration and --interval: more than 0")
	}
	if e.Link.Buffer, e.Link.BufferBDP, e.Link.BufferBytes, err = harness.ParseBuffer(f.buffer); err != nil {
		return e, fmt.Errorf("--buffer: %w", err)
	}
	e.Jitter = e.Link.RTT
	if f.jitter != "" {
		if e.Jitter, err = harness.ParseTime(f.jitter); err != nil {
			return e, fmt.Errorf("--jitter: %w", err)
		}
	}
	if f.loss != "" {
		if e.Link.Loss, err = harness.ParseLoss(f.loss); err != nil {
			return e, fmt.Errorf("--loss: %w", err)
		}
	}
	if f.ecn != "" {
		if e.Link.ECN, err = harness.ParseECN(f.ecn); err != nil {
			return e, fmt.Errorf("--ecn: %w", err)
		}
	}
	return e, nil
}

// objectsOf tells what the BPF congestion controls are made of: the tags of their
// programs, which are hashes of the code, and their parameters.
func objectsOf(names []string) map[string]string {
	entries, _, err := registry.List()
	if err != nil {
		return nil
	}
	objects := map[string]string{}
	for _, e := range entries {
		if e.Kind != registry.BPF || !slices.Contains(names, e.Name) {
			continue
		}
		var parts []string
		for _, p := range e.Programs {
			parts = append(parts, p.Member+":"+p.Tag)
		}
		for _, k := range slices.Sorted(maps.Keys(e.Params)) {
			parts = append(parts, fmt.Sprintf("%s=%v", k, e.Params[k]))
		}
		objects[e.Name] = strings.Join(parts, " ")
	}
	return objects
}

func versions() map[string]string {
	v := map[string]string{"ccload": release(), "go": runtime.Version()}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, d := range info.Deps {
			if d.Path == "github.com/cilium/ebpf" {
				v[d.Path] = d.Version
			}
		}
	}
	return v
}

// progress shows how far a run is on one line of a terminal; elsewhere nothing.
func (a *app) progress(name string) func(elapsed, total time.Duration) {
	if !a.terminal() {
		return nil
	}
	return func(elapsed, total time.Duration) {
		fmt.Fprintf(a.tty, "\r%s: %.0f of %.0f s\x1b[K", oneLine(name), elapsed.Seconds(), total.Seconds())
	}
}

func (a *app) progressOver() {
	if a.terminal() {
		fmt.Fprint(a.tty, "\r\x1b[K")
	}
}

// terminal says whether the talk goes to a terminal.
func (a *app) terminal() bool {
	f, ok := a.tty.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// tasks are the runs that the flags ask for: one for each congestion control, or
// one for all together, and each as often as wanted. Where there are several,
// each has a directory of its own in the one for the results.
func (f *runFlags) tasks(base trace.Experiment, kernels []*vm.Kernel) []task {
	if len(kernels) == 0 {
		kernels = []*vm.Kernel{nil} // this machine's
	}
	groups := [][]string{f.cc}
	if !f.together {
		groups = nil
		for _, name := range f.cc {
			groups = append(groups, []string{name})
		}
	}
	var tasks []task
	for _, kernel := range kernels {
		for _, group := range groups {
			for i := range f.repeat {
				t := task{dir: f.to, exp: base, kernel: kernel}
				t.exp.Name = strings.Join(group, "+")
				t.exp.Seed += uint64(i)
				if len(kernels) > 1 {
					t.dir = filepath.Join(t.dir, kernel.Release)
				}
				if len(groups) > 1 {
					t.dir = filepath.Join(t.dir, t.exp.Name)
				}
				if f.repeat > 1 {
					t.dir = filepath.Join(t.dir, strconv.Itoa(i+1))
					t.exp.Name += " " + strconv.Itoa(i+1)
				}
				if len(kernels) > 1 {
					t.exp.Name += " on " + kernel.Release
				}
				for _, name := range group {
					for range f.flows {
						t.exp.Flows = append(t.exp.Flows, trace.Flow{ID: len(t.exp.Flows) + 1, CC: name})
					}
				}
				tasks = append(tasks, t)
			}
		}
	}
	return tasks
}
