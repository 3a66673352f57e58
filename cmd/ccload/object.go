// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"ccload/cc"
	"ccload/registry"
	"ccload/structops"

	"github.com/spf13/pflag"
)

// object is a congestion control beyond the catalogue's, for runs.
type object struct {
	File []byte
	Map  string // of the file; "": the one, or the variant for the running kernel, that is called Own
	Own  string // the name that it has there
	Set  map[string]string
}

// open reads it.
func (o *object) open() (*structops.Spec, *structops.Ops, error) {
	spec, err := structops.Parse(o.File)
	if err != nil {
		return nil, nil, err
	}
	for k, v := range o.Set {
		if err := spec.Set(k, v); err != nil {
			return nil, nil, err
		}
	}
	var ops *structops.Ops
	if o.Map != "" {
		ops, err = spec.Select(o.Map)
	} else {
		ops, err = spec.SelectName(o.Own)
	}
	return spec, ops, err
}

// register puts it into the kernel, under a name.
func (o *object) register(name string) error {
	spec, ops, err := o.open()
	if err != nil {
		return fmt.Errorf("register %q: %w", name, err)
	}
	_, err = registry.Register(spec, registry.Options{Map: ops.Map, Name: name})
	return err
}

// warnOf says what is to be said of the objects of the names that are run, once.
func (a *app) warnOf(objects map[string]object, names []string) {
	var warnings []string
	for _, name := range names {
		if o, ok := objects[name]; ok {
			if spec, err := structops.Parse(o.File); err == nil {
				warnings = append(warnings, spec.Warnings...)
			}
		}
	}
	slices.Sort(warnings)
	a.warn(slices.Compact(warnings))
}

// refusedHere adds to a refusal how to see the log, for verbs that do not print it.
func refusedHere(err error) error {
	if v, ok := errors.AsType[*structops.VerifierError](err); ok {
		return hinted{err, refusedHint(v, "ccload verify FILE.o --log prints the whole log of the verifier, of another kernel with --kernel K")}
	}
	return err
}

// hold puts it into the kernel for as long as the link is open and this process runs.
func (o *object) hold(name string) (*structops.Link, error) {
	spec, ops, err := o.open()
	if err != nil {
		return nil, err
	}
	ops.Name, ops.Link = name, true
	obj, err := spec.Load(ops.Map)
	if err != nil {
		return nil, err
	}
	defer obj.Close()
	l, err := obj.Attach(ops.Map)
	if err == nil && l.LinkID() == 0 { // it would outlive a process that is killed
		err = errors.Join(structops.ErrNoLinks, l.Close())
	}
	if errors.Is(err, structops.ErrNoLinks) {
		return nil, hinted{err, "ccload register FILE.o, and run it by its name"}
	}
	return l, err
}

// objectFlags are what --object says, each with the flags behind it.
type objectFlags []objectFlag

type objectFlag struct {
	path, mapName, as string
	set               []string
}

// add adds the flags: --object, and those that are about the --object before them.
func (f *objectFlags) add(fl *pflag.FlagSet) {
	about := func(name, usage string, put func(o *objectFlag, v string)) {
		fl.Var(objectValue(func(v string) error {
			if len(*f) == 0 {
				return errors.New("it is about the --object before it, and there is none")
			}
			put(&(*f)[len(*f)-1], v)
			return nil
		}), name, usage)
	}
	fl.Var(objectValue(func(v string) error { *f = append(*f, objectFlag{path: v}); return nil }),
		"object", "`FILE.o` with a congestion control, which is there for the runs only; may be repeated, each followed by its --map, --as and --set")
	about("map", "which (`M`) of several in the --object before it, by its variable", func(o *objectFlag, v string) { o.mapName = v })
	about("as", "another `NAME` for the --object before it", func(o *objectFlag, v string) { o.as = v })
	about("set", "set a tunable of the --object before it, `K=V`; may be repeated", func(o *objectFlag, v string) { o.set = append(o.set, v) })
}

type objectValue func(string) error

func (objectValue) String() string { return "" }
func (objectValue) Type() string   { return "string" }
func (f objectValue) Set(v string) error {
	if v == "" {
		return errors.New("it is empty")
	}
	return f(v)
}

// read reads the files: each congestion control's object, by the name that it is to
// have. One that is to be run must have the name for itself, for results go by names.
func (f objectFlags) read(run []string, tasks []task) (map[string]object, error) {
	objects, from := map[string]object{}, map[string]string{}
	for _, o := range f {
		b, err := os.ReadFile(o.path)
		if err != nil {
			return nil, fmt.Errorf("--object: %w", err)
		}
		names, err := o.names(b, objects)
		if err != nil {
			return nil, fmt.Errorf("--object %q: %w", o.path, err)
		}
		if !slices.ContainsFunc(names, func(name string) bool { return slices.Contains(run, name) }) {
			return nil, fmt.Errorf("--object %q: %s is not among the congestion controls to run: %s", o.path, strings.Join(names, ", "), strings.Join(run, ", "))
		}
		for _, name := range names {
			if !slices.Contains(run, name) {
				continue
			}
			whose, err := owner(name, tasks)
			if err != nil {
				return nil, err
			}
			if whose = cmp.Or(from[name], whose); whose != "" {
				return nil, hinted{fmt.Errorf("--object %q: %q is also the name of %s", o.path, name, whose),
					fmt.Sprintf("another name for it: --object %s --as NAME", shellWord(o.path))}
			}
			from[name] = fmt.Sprintf("one in --object %q", o.path)
		}
	}
	return objects, nil
}

// owner says whose a name is already: the catalogue's, or that of a kernel of the tasks.
func owner(name string, tasks []task) (string, error) {
	if cc.Lookup(name) != nil {
		return "one in the catalogue", nil
	}
	if slices.Contains([]string{"reno", "cubic", "bbr"}, name) { // whatever the kernel
		return "one of the kernel's own", nil
	}
	for _, t := range tasks {
		if t.kernel == nil {
			if registry.Require(name) == nil {
				return "one that is registered", nil
			}
			continue
		}
		names, err := t.kernel.CongestionControls()
		if err != nil {
			return "", err
		}
		if slices.Contains(names, name) {
			return "one that the kernel " + t.kernel.Release + " has", nil
		}
	}
	return "", nil
}

// names adds what the file has to the objects, and gives the names.
func (o *objectFlag) names(file []byte, to map[string]object) (names []string, err error) {
	spec, err := structops.Parse(file)
	if err != nil {
		return nil, err
	}
	settings, err := splitSettings(o.set)
	if err != nil {
		return nil, err
	}
	for k, v := range settings {
		if err := spec.Set(k, v); err != nil {
			return nil, err
		}
	}
	add := func(name string, ops *structops.Ops) error {
		trial := *ops
		trial.Name = name
		if err := trial.Check(); err != nil {
			return err
		}
		names = append(names, name)
		to[name] = object{file, o.mapName, ops.Name, settings}
		return nil
	}
	several := slices.ContainsFunc(spec.Ops, func(ops *structops.Ops) bool { return ops.Name != spec.Ops[0].Name })
	if o.mapName != "" || o.as != "" && several {
		ops, err := spec.Select(o.mapName)
		if err != nil {
			return nil, err
		}
		o.mapName = ops.Map
		err = add(cmp.Or(o.as, ops.Name), ops)
		return names, err
	}
	var first error
	for _, ops := range spec.Ops {
		name := cmp.Or(o.as, ops.Name)
		if slices.Contains(names, name) {
			continue
		}
		if err := add(name, ops); err != nil {
			first = cmp.Or(first, err)
		}
	}
	if len(names) == 0 {
		return nil, first
	}
	return names, nil
}
