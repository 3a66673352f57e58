// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"ccload/cc"
	"ccload/harness"
	"ccload/harness/trace"
	"ccload/harness/vm"
	"ccload/internal/kernelbtf"
	"ccload/registry"
	"ccload/structops"

	"github.com/spf13/cobra"
)

// job is what the host tells a guest to run.
type job struct {
	Experiment trace.Experiment
	Objects    map[string]object // congestion controls beyond the catalogue's, by their names
}

const (
	jobVerb = "guest-run"
	jobFile = "/etc/ccload/job.json"
)

// guestSlack is what a guest may take of its own time beyond the experiment's.
const guestSlack = 10 * time.Minute

// guestModules are those of the guest's kernel that an experiment may need. What a
// kernel lacks is not loaded, and met where it is used.
var guestModules = strings.Fields("tun veth ifb sch_netem inet_diag tcp_diag")

// guest makes a guest for one experiment.
func guest(k *vm.Kernel, e trace.Experiment, objects map[string]object, realtime bool) (*vm.Guest, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(job{e, objects})
	if err != nil {
		return nil, err
	}
	g := &vm.Guest{
		Kernel: k, Binary: self, Args: []string{jobVerb}, Files: map[string][]byte{jobFile: b},
		Optional: guestModules, Memory: needs(e, objects), Seed: uint32(e.Seed ^ e.Seed>>32), RealTime: realtime, Limit: time.Duration(e.Duration*float64(time.Second)) + guestSlack,
	}
	for _, f := range e.Flows {
		if objects[f.CC].File != nil {
			g.Late = append(g.Late, verifyModules...) // whose functions it may call
		}
		g.Late = append(g.Late, "tcp_"+f.CC)
	}
	return g, nil
}

// guestMemory is what a guest's kernel and ccload itself need beside what they are for,
// in bytes.
const guestMemory = 320 << 20

// needs is the memory of a guest for an experiment, in bytes.
func needs(e trace.Experiment, objects map[string]object) int64 {
	n := guestMemory + harness.Memory(e)
	for _, o := range objects {
		n += mapMemory(o.File)
	}
	return n
}

// mapMemory is what to give a guest for an object's maps: twice their size, for the
// kernel wants some of it in one piece.
func mapMemory(object []byte) int64 {
	spec, err := structops.Parse(object)
	if err != nil {
		return 0 // the guest says why
	}
	return 2 * spec.MapMemory()
}

// has returns an error if a congestion control is neither among the objects nor in
// the catalogue, and the kernel does not have it either.
func has(k *vm.Kernel, name string, objects map[string]object) error {
	if objects[name].File != nil || cc.Lookup(name) != nil {
		return nil
	}
	names, err := k.CongestionControls()
	if err != nil || names == nil || slices.Contains(names, name) {
		return err
	}
	for _, a := range cc.All() {
		names = append(names, a.Name)
	}
	err = &registry.NotFoundError{Name: name, Nearest: registry.Nearest(name, names)}
	return fmt.Errorf("congestion control %q on %s: %w", name, k.Release, err)
}

// prepare reads the guest's kernel's types: a fifth of a second, and each BPF program
// that is loaded wants them.
func prepare() { kernelbtf.Types().Kernel() }

// guestRun is the verb that a guest is told: not for users.
func (a *app) guestRun() *cobra.Command {
	return &cobra.Command{
		Use: jobVerb, Hidden: true, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !vm.Inside() {
				return usagef("verb %q: only guests do that", jobVerb)
			}
			return runJob(cmd.Context())
		},
	}
}

func runJob(ctx context.Context) error {
	b, err := os.ReadFile(jobFile)
	if err != nil {
		return err
	}
	var j job
	if err := json.Unmarshal(b, &j); err != nil {
		return err
	}
	var names []string
	for _, f := range j.Experiment.Flows {
		if !slices.Contains(names, f.CC) {
			names = append(names, f.CC)
		}
	}
	for _, name := range names {
		if err := provide(name, j.Objects); err != nil {
			return refusedHere(err)
		}
	}
	results := &vm.Results{}
	_, err = harness.Run(ctx, j.Experiment, harness.Options{
		Sink: results, Progress: results.Progress, Objects: objectsOf(names),
	})
	return err
}

// provide registers a congestion control from the objects or else from the
// catalogue; one that neither has must be the kernel's own.
func provide(name string, objects map[string]object) error {
	o, ok := objects[name]
	if !ok {
		a := cc.Lookup(name)
		if a == nil {
			return registry.Require(name)
		}
		o = object{File: a.Object(), Map: a.Name}
	}
	return o.register(name)
}

// openKernels finds the guests' kernels.
func (f *runFlags) openKernels() (kernels []*vm.Kernel, err error) {
	for _, name := range f.kernels {
		k, err := vm.FindKernel(name)
		if err != nil {
			return nil, err
		}
		// The release names the directory of what is measured there.
		if i := slices.IndexFunc(kernels, func(o *vm.Kernel) bool { return o.Release == k.Release }); i >= 0 {
			return nil, usagef("--vm: %q and %q are both %s: run them one by one", f.kernels[i], name, k.Release)
		}
		kernels = append(kernels, k)
	}
	return kernels, nil
}

// runInGuests runs the tasks in a guest each, as many side by side as there are
// processors and memory for. The first that fails ends the others.
func (a *app) runInGuests(ctx context.Context, f *runFlags, tasks []task) ([]*trace.Run, error) {
	objects, err := f.objects.read(f.cc, tasks)
	if err != nil {
		return nil, err
	}
	a.warnOf(objects, f.cc)
	var most int64
	for _, t := range tasks {
		for _, f := range t.exp.Flows {
			if err := has(t.kernel, f.CC, objects); err != nil {
				return nil, err
			}
		}
		need := needs(t.exp, objects)
		if err := harness.Fits(need); err != nil {
			return nil, fmt.Errorf("run %q: %w", t.exp.Name, err)
		}
		most = max(most, need)
	}
	side := runtime.NumCPU()
	for side > 1 && harness.Fits(int64(side)*most) != nil {
		side--
	}
	runs, errs := make([]*trace.Run, len(tasks)), make([]error, len(tasks))
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	p := a.guestProgress(tasks)
	slots := make(chan struct{}, side)
	var wg sync.WaitGroup
	for i, t := range tasks {
		slots <- struct{}{}
		if ctx.Err() != nil {
			break
		}
		wg.Go(func() {
			defer func() { <-slots }()
			a.sayv("running %s on %s for %s into %s", t.exp.Name, t.kernel.Release, exact(t.exp.Duration, "s"), t.dir)
			g, err := guest(t.kernel, t.exp, objects, f.realtime)
			if err == nil {
				var talk bytes.Buffer
				opts := harness.Options{Dir: t.dir, Versions: versions(), Progress: p.of(i)}
				runs[i], err = g.Experiment(ctx, t.exp, opts, &talk)
				if why := strings.TrimPrefix(strings.TrimSpace(talk.String()), "ccload: "); why != "" {
					if _, ok := errors.AsType[*vm.StatusError](err); ok {
						err = fmt.Errorf("guest: %s", why)
					} else {
						err = errors.Join(err, errors.New(why))
					}
				}
			}
			p.ended()
			if err != nil && ctx.Err() == nil {
				errs[i] = fmt.Errorf("run %q: %w", t.exp.Name, err)
				cancel(errs[i])
			}
		})
	}
	wg.Wait()
	p.close()
	runs = slices.DeleteFunc(runs, func(r *trace.Run) bool { return r == nil })
	err = errors.Join(errs...)
	if err == nil && ctx.Err() != nil {
		if err = errors.New("interrupted; what there is was kept"); len(runs) == 0 {
			err = errors.New("interrupted before anything was measured")
		}
	}
	return runs, err
}

// guestsProgress is one line for all guests: how much of their own time has gone by,
// and what that took of ours.
type guestsProgress struct {
	a       *app
	begun   time.Time
	over    chan struct{}
	drawing sync.WaitGroup

	mu    sync.Mutex
	spent []time.Duration // virtual, by run
	total time.Duration   // virtual, of all
	done  int
}

func (a *app) guestProgress(tasks []task) *guestsProgress {
	p := &guestsProgress{a: a, begun: time.Now(), over: make(chan struct{}), spent: make([]time.Duration, len(tasks))}
	for _, t := range tasks {
		p.total += time.Duration(t.exp.Duration * float64(time.Second))
	}
	if !a.terminal() {
		return p
	}
	p.drawing.Go(func() {
		for tick := time.Tick(200 * time.Millisecond); ; {
			p.draw()
			select {
			case <-tick:
			case <-p.over:
				p.a.progressOver()
				return
			}
		}
	})
	return p
}

// of is told how far a run is.
func (p *guestsProgress) of(run int) func(elapsed, total time.Duration) {
	return func(elapsed, _ time.Duration) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.spent[run] = elapsed
	}
}

func (p *guestsProgress) ended() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done++
}

func (p *guestsProgress) draw() {
	p.mu.Lock()
	defer p.mu.Unlock()
	var spent time.Duration
	for _, d := range p.spent {
		spent += d
	}
	const width = 20
	full := int(width * min(1, spent.Seconds()/p.total.Seconds()))
	line := fmt.Sprintf("[%s%s] %.1f of %.0f s of virtual time, %.0f s of wall time", strings.Repeat("#", full), strings.Repeat(".", width-full),
		spent.Seconds(), p.total.Seconds(), time.Since(p.begun).Seconds())
	if len(p.spent) > 1 {
		line += fmt.Sprintf("; %d of %d runs done", p.done, len(p.spent))
	}
	if spent == 0 {
		line += "; booting"
	}
	fmt.Fprintf(p.a.tty, "\r%s\x1b[K", line)
}

func (p *guestsProgress) close() {
	close(p.over)
	p.drawing.Wait()
}
