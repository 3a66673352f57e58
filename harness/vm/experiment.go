// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"ccload/harness"
	"ccload/harness/trace"
)

// consoleFile is the kernel's log in a result directory.
const consoleFile = "console.log"

// StatusError reports that what ran in a guest failed; it says why itself.
type StatusError struct{ Status int }

func (e *StatusError) Error() string { return fmt.Sprintf("guest: exit status %d", e.Status) }

// Experiment boots the guest, which is to run one experiment with Results as its
// sink, and writes what it sends to a new result directory, with the kernel's log.
// The experiment is what it has been told to do; what the guest's program itself
// writes goes to talk.
//
// If the guest fails, or the context ends it, the error says why, and what came
// until then is kept as an incomplete result, which is returned as well.
func (g *Guest) Experiment(ctx context.Context, e trace.Experiment, opt harness.Options, talk io.Writer) (_ *trace.Run, err error) {
	started := time.Now().UTC().Format(time.RFC3339)
	w, err := trace.Create(opt.Dir)
	if err != nil {
		return nil, err
	}
	defer w.Close()
	console, err := w.File(consoleFile)
	if err != nil {
		return nil, err
	}
	defer console.Close()

	guest := *g
	guest.results = &received{sink: w, progress: opt.Progress}
	status, err := guest.Run(ctx, talk, talk, console)
	r := guest.results.run
	if err == nil && (status != 0 || r == nil) {
		err = &StatusError{status}
	}
	if r == nil {
		r = &trace.Run{
			Format: trace.Format, Kernel: g.Kernel.Release, Seed: e.Seed, Experiment: e, Incomplete: true,
			Link: trace.LinkResult{Link: e.Link}, Flows: []trace.FlowResult{}, Checks: []trace.Check{}, Warnings: []string{},
			Sysctls: map[string]string{}, Offloads: map[string]bool{},
		}
		if err != nil {
			r.Warnings = append(r.Warnings, err.Error())
		}
	}
	if g.RealTime && !kvm.works {
		r.Warnings = append(r.Warnings, "KVM does not work here: the guest was emulated, and slow for its clock")
	}
	if w.Empty() && r.Incomplete {
		// It did not come as far as to measure: the error has the end of the log.
		return nil, errors.Join(err, os.Remove(console.Name()), w.Finish(r))
	}
	r.Dir, r.Started, r.VirtualTime = opt.Dir, started, !g.RealTime
	r.Versions = opt.Versions
	return r, errors.Join(err, w.Finish(r))
}

// received takes the results of a run that a guest sends.
type received struct {
	sink     harness.Sink
	progress func(elapsed, total time.Duration)
	run      *trace.Run
}

func (r *received) take(k kind, payload []byte) error {
	switch k {
	case frameSamples:
		return readSamples(payload, r.sink.Sample)
	case frameLinks:
		return readLinks(payload, r.sink.Link)
	case frameProgress:
		if len(payload) != 16 {
			return errors.New("progress frame of a wrong size")
		}
		if r.progress != nil {
			r.progress(time.Duration(le.Uint64(payload)), time.Duration(le.Uint64(payload[8:])))
		}
		return nil
	}
	run := &trace.Run{}
	if err := json.Unmarshal(payload, run); err != nil {
		return fmt.Errorf("run: %w", err)
	}
	r.run = run
	return nil
}
