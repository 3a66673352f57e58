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
	"strconv"
	"strings"
	"sync"
	"time"

	"ccload/harness"
	"ccload/harness/vm"
	"ccload/structops"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// verified is what kernels make of an object.
type verified struct {
	Object  string     `json:"object"`
	Loads   bool       `json:"loads"` // on every one of the kernels
	Kernels []*verdict `json:"kernels"`
}

// verdict is what one kernel makes of it.
type verdict struct {
	Kernel  string              `json:"kernel"`            // as it was asked for
	Release string              `json:"release,omitempty"` // uname -r
	Loads   bool                `json:"loads"`
	Error   string              `json:"error,omitempty"` // why it could not be tried
	Maps    []*structops.Report `json:"maps"`

	// Of an extension: each of its programs with each congestion control that has
	// the function.
	Extensions []*structops.ExtensionReport `json:"extensions,omitempty"`
}

// host is the running kernel, among the names of kernels.
const host = "host"

// verifyObject is where a guest has the object.
const verifyObject = "/etc/ccload/verify.bpf.o"

// verifyModules are those of the kernel's own congestion controls whose functions
// BPF may call.
var verifyModules = []string{"tcp_bbr", "tcp_cubic", "tcp_dctcp"}

// verifyLimit is how much of its own time a guest may take.
const verifyLimit = 10 * time.Minute

func (a *app) verify() *cobra.Command {
	var mapName string
	var kernels []string
	var log bool
	cmd := a.withJSON(&cobra.Command{
		Use:   "verify NAME|FILE.o",
		Short: "What kernels make of a congestion control, without registering it",
		Long: `Load a congestion control from the catalogue or from an object file without
registering it, and say what the verifier made of each function; and if it does
not load, why. The status is 1 if it does not load on every one of the kernels.

An extension (see ccload extend) is tried with each congestion control that is
registered or in the catalogue. It loads if each of its functions fits one of them
in one way.

INSNS and JITED (bytes) are the length of a function for the kernel and for the
processor; PROCESSED are the instructions that the verifier went through, STATES
those that it made, PEAK those that it kept, MAX/INSN the most for one instruction,
STACK the bytes. A global function is verified once, by itself; a static one with
each of its callers, which have its costs.`,
		Example: `  ccload verify mine.bpf.o
  ccload verify bpf_cubic --kernel host,debian-6.12,debian-6.1
  ccload verify mine.bpf.o --kernel ./vmlinuz --log`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: objects,
		RunE: func(cmd *cobra.Command, args []string) error {
			v, err := verifyOn(cmd.Context(), a, args[0], mapName, kernels, log)
			if err != nil {
				return err
			}
			if err := a.print(v, func() { a.verifyText(v, len(kernels) > 0) }); err != nil {
				return err
			}
			if log {
				a.logs(v)
			} else if v.hasLog() && !a.json {
				a.say("hint: --log prints the whole log of the verifier")
			}
			if !v.Loads {
				return errSilent
			}
			return nil
		},
	})
	f := cmd.Flags()
	f.StringVar(&mapName, "map", "", "which (`M`) of several congestion controls in the file, by its variable (default all)")
	f.StringSliceVar(&kernels, "kernel", nil, "ask these `K,…` instead of the running one: host, a name of ccload kernels, or a path of a vmlinuz")
	f.BoolVar(&log, "log", false, "print the verifier's whole log of what it refuses")
	cmd.RegisterFlagCompletionFunc("map", cobra.NoFileCompletions)
	cmd.RegisterFlagCompletionFunc("kernel", kernelList)
	return cmd
}

// verifyOn tries the object on each of the kernels; the running one if there are
// none.
func verifyOn(ctx context.Context, a *app, what, mapName string, kernels []string, log bool) (*verified, error) {
	obj, alg, err := readObject("verify", what)
	if err != nil {
		return nil, err
	}
	if alg != nil && mapName == "" {
		mapName = alg.Name
	}
	if len(kernels) == 0 {
		kernels = []string{host}
	}
	v := &verified{Object: what, Loads: true}
	guests := map[*verdict]*vm.Kernel{}
	for _, name := range kernels {
		d := &verdict{Kernel: name, Maps: []*structops.Report{}}
		v.Kernels = append(v.Kernels, d)
		if name == host {
			var u unix.Utsname
			if err := unix.Uname(&u); err != nil {
				return nil, fmt.Errorf("uname: %w", err)
			}
			d.Release = unix.ByteSliceToString(u.Release[:])
			continue
		}
		k, err := vm.FindKernel(name)
		if err != nil {
			return nil, err
		}
		guests[d], d.Release = k, k.Release
	}
	spec, err := structops.Parse(obj)
	var extension *structops.Extension
	if errors.Is(err, structops.ErrNoOps) {
		if x, xerr := structops.ParseExtension(obj); !errors.Is(xerr, structops.ErrNoExtension) {
			extension, err = x, xerr
		}
	}
	if why, ok := structops.Refusal(err); ok {
		v.refuse(why)
		return v, nil
	}
	if err == nil && mapName != "" && extension == nil {
		_, err = spec.Select(mapName)
	}
	if err != nil {
		return nil, fmt.Errorf("verify %q: %w", what, err)
	}
	if extension != nil {
		a.warn(extension.Warnings)
	} else {
		a.warn(spec.Warnings)
		if !usable(spec, mapName) { // on any kernel
			guests = nil
		}
	}

	if need := verifyMemory(obj); len(guests) > 0 && need > vm.LeastMemory {
		a.say("the maps of %s are large: guests get %d MiB of memory", what, need>>20)
		if err := harness.Fits(need); err != nil {
			return nil, fmt.Errorf("verify %q: %w", what, err)
		}
	}
	slots := make(chan struct{}, runtime.NumCPU())
	var wg sync.WaitGroup
	for _, d := range v.Kernels {
		if guests[d] == nil {
			continue
		}
		slots <- struct{}{}
		a.sayv("booting %s", d.Release)
		wg.Go(func() {
			defer func() { <-slots }()
			if err := d.inGuest(ctx, guests[d], obj, mapName, log); err != nil {
				d.Error = err.Error()
			}
		})
	}
	for _, d := range v.Kernels {
		if guests[d] == nil {
			if extension != nil {
				err = d.extensionHere(extension, log)
			} else {
				err = d.here(spec, mapName, log)
			}
			if err != nil {
				wg.Wait()
				return nil, fmt.Errorf("verify %q: %w", what, err)
			}
		}
	}
	wg.Wait()
	for _, d := range v.Kernels {
		v.Loads = v.Loads && d.Loads
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("verify %q: interrupted", what)
	}
	return v, nil
}

// usable says whether any of the congestion controls that are to be tried could load
// on some kernel.
func usable(spec *structops.Spec, mapName string) bool {
	return slices.ContainsFunc(spec.Ops, func(o *structops.Ops) bool {
		return (o.Map == mapName || mapName == "") && o.Check() == nil
	})
}

// refuse is the verdict on an object that no kernel takes.
func (v *verified) refuse(why structops.Reason) {
	v.Loads = false
	for _, d := range v.Kernels {
		d.Maps = append(d.Maps, &structops.Report{Why: []structops.Reason{why}, Functions: []structops.Function{}})
	}
}

// here tries the object on the running kernel.
func (d *verdict) here(spec *structops.Spec, mapName string, log bool) (err error) {
	var names []string
	if mapName != "" {
		names = []string{mapName}
	}
	if d.Maps, err = spec.Verify(names...); err != nil {
		return err
	}
	loads := 0
	for _, r := range d.Maps {
		if r.Loads {
			loads++
		}
	}
	d.Loads = loads == len(d.Maps) || loads > 0 && spec.Variants()
	d.dropLogs(log)
	return nil
}

func (d *verdict) dropLogs(wanted bool) {
	for _, w := range d.reasons() {
		if !wanted {
			w.Log = nil
		}
	}
}

// verifyMemory is what a guest needs to load an object, in bytes.
func verifyMemory(obj []byte) int64 { return 256<<20 + mapMemory(obj) }

// inGuest tries it in a guest, which does as this program would do there.
func (d *verdict) inGuest(ctx context.Context, k *vm.Kernel, obj []byte, mapName string, log bool) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	args := []string{"verify", verifyObject, "--json"}
	if mapName != "" {
		args = append(args, "--map", mapName)
	}
	if log {
		args = append(args, "--log")
	}
	g := &vm.Guest{
		Kernel: k, Binary: self, Args: args, Files: map[string][]byte{verifyObject: obj},
		Optional: verifyModules, Limit: verifyLimit, Memory: verifyMemory(obj),
	}
	var out, errs bytes.Buffer
	status, err := g.Run(ctx, &out, &errs, nil)
	if err != nil {
		return err
	}
	var there verified
	if err := json.Unmarshal(out.Bytes(), &there); err != nil || len(there.Kernels) != 1 {
		return fmt.Errorf("guest: status %d: %s", status, strings.TrimSpace(errs.String()))
	}
	name := d.Kernel
	*d = *there.Kernels[0]
	d.Kernel = name
	return nil
}

// why is the reason in one line.
func (d *verdict) why() string {
	if d.Error != "" {
		first, _, _ := strings.Cut(d.Error, "\n")
		return "not tried: " + first
	}
	if d.Loads {
		return ""
	}
	var lines []string
	for _, w := range d.reasons() {
		if line := w.Brief(); !slices.Contains(lines, line) {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "; ")
}

// reasons are all why something does not load.
func (d *verdict) reasons() (all []*structops.Reason) {
	for _, r := range d.Maps {
		for i := range r.Why {
			all = append(all, &r.Why[i])
		}
	}
	for _, x := range d.Extensions {
		if x.Why != nil {
			all = append(all, x.Why)
		}
	}
	return all
}

// verifyText prints the verdicts: for named kernels first all of them in brief.
func (a *app) verifyText(v *verified, named bool) {
	if named {
		t := a.table()
		t.row("KERNEL", "RELEASE", "LOADS", "WHY")
		for _, d := range v.Kernels {
			loads := "no"
			if d.Loads {
				loads = "yes"
			} else if d.Error != "" {
				loads = ""
			}
			t.row(d.Kernel, d.Release, loads, d.why())
		}
		t.Flush()
	}
	for i, d := range v.Kernels {
		if named || i > 0 {
			a.printf("\n")
		}
		if d.Error != "" {
			a.printf("%s: %s: not tried: %s\n", d.Release, v.Object, lines(d.Error))
		}
		for n, r := range d.Maps {
			if n > 0 {
				a.printf("\n")
			}
			a.reportText(d.Release, v.Object, r)
		}
		if len(d.Extensions) > 0 {
			a.extensionText(d, v.Object)
		}
	}
}

func (a *app) reportText(release, object string, r *structops.Report) {
	if r.Name != "" && r.Name != object {
		object += ": " + visible(r.Name)
	}
	if r.Map != r.Name { // as of variants, or of a bad name
		object += fmt.Sprintf(" (map %s)", visible(r.Map))
	}
	if r.Loads {
		a.printf("%s: %s loads\n", release, object)
	} else {
		a.printf("%s: %s does not load\n", release, object)
	}
	for _, w := range r.Why {
		a.reasonText(w)
	}
	a.functionsText(r.Functions)
}

// reasonText prints a reason: in one line, then where it is and what it means.
func (a *app) reasonText(w structops.Reason) {
	a.printf("  %s\n", w.Brief())
	if w.Source != "" {
		a.printf("    at %s\n", w.Source)
	}
	if w.Means != "" {
		a.printf("    %s\n", w.Means)
	}
}

func (a *app) functionsText(functions []structops.Function) {
	if len(functions) == 0 {
		return
	}
	t := a.table()
	t.row("FUNCTION", "IS", "LOADS", "INSNS", "PROCESSED", "STATES", "PEAK", "MAX/INSN", "STACK", "JITED")
	for _, f := range functions {
		name, is := f.Name, f.Member
		if f.Kind != structops.EntryFunction {
			name, is = "  "+name, string(f.Kind)
		}
		loads := "yes"
		if !f.Loads {
			loads = "no"
		}
		t.row(name, is, loads, known(f.Instructions), known(f.Processed), known(f.States), known(f.PeakStates),
			known(f.MaxStatesPerInsn), known(f.Stack), known(f.Jited))
	}
	t.Flush()
}

func known(n *int) string {
	if n == nil {
		return ""
	}
	return strconv.Itoa(*n)
}

func (v *verified) hasLog() bool {
	for _, d := range v.Kernels {
		if slices.ContainsFunc(d.reasons(), func(w *structops.Reason) bool { return w.Function != "" }) {
			return true
		}
	}
	return false
}

// logs prints the verifier's logs of the programs that were refused.
func (a *app) logs(v *verified) {
	for _, d := range v.Kernels {
		for _, w := range d.reasons() {
			if len(w.Log) > 0 {
				a.say("%s: %s for %s:\n\t%s", d.Release, w.Program, w.Member, strings.Join(w.Log, "\n\t"))
			}
		}
	}
}
