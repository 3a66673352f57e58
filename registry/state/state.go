// SPDX-License-Identifier: Apache-2.0

// Package state makes the kernel as a file says: which congestion controls are
// registered, with which tunables, and where they are selected.
//
//	register:
//	  bpf_cubic:                                   # of the catalogue
//	  gentle: {from: bpf_cubic, set: {beta: 0.85}, allow: true}
//	  mine: {from: /usr/local/lib/mine.bpf.o}
//	use:
//	  - {cc: bpf_cubic}                            # default of this network namespace
//	  - {cc: gentle, netns: blue}
//	  - {cc: gentle, route: 198.18.0.0/15, lock: true}
//	  - {split: {mine: 10, cubic: 90}, cgroup: system.slice/web.service}
//
// The steps are Parse, Plan, which only looks, and Apply. A plan is the least that
// has to be done: for a kernel that is as wanted it is empty. What the file does
// not name stays as it is. What cannot be done keeps nothing else from being done: a
// machine that boots without one of its control groups gets the rest of what is wanted.
//
// The package does not know the catalogue: whoever plans says how the object of a
// name is made.
package state

import (
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"ccload/internal/change"
	"ccload/internal/netns"
	"ccload/registry"
	"ccload/structops"

	"go.yaml.in/yaml/v4"
	"golang.org/x/sys/unix"
)

// Plan is what has to be done to make the kernel as wanted, in this order.
type Plan struct {
	Steps    []Step   `json:"steps"`
	Warnings []string `json:"warnings,omitempty"`
}

// Step is one change.
type Step struct {
	Do    string `json:"do"`             // "register", "replace", "set", "allow" or "use"
	What  string `json:"what"`           // a congestion control, or a place
	From  string `json:"from,omitempty"` // what is there now
	To    string `json:"to,omitempty"`   // what is wanted
	Done  bool   `json:"done"`
	Error string `json:"error,omitempty"` // why it cannot be done, as a plan sees it or as Apply did

	err   error
	at    func(error) error
	apply func() (warnings []string, err error)
}

// Err is why the step cannot be done: nil if it can, or was.
func (s *Step) Err() error { return s.err }

func (s *Step) fail(err error) { s.err, s.Error = err, err.Error() }

// Source knows the objects of names.
type Source interface {
	// Object makes the object of a name, with its tunables set, and says which of
	// its maps is meant; "": the only one.
	Object(*Name) (spec *structops.Spec, mapName string, err error)
	// Format writes a tunable's value as users do.
	Format(n *Name, tunable string, value any) string
}

// Plan compares what is wanted with what is. It loads the objects, to compare their
// code with what runs, and registers nothing. What it finds that cannot be done is a
// step with an error. It needs CAP_SYS_ADMIN and CAP_NET_ADMIN.
func (s *State) Plan(from Source) (*Plan, error) {
	missing, err := registry.Missing("/", "CAP_SYS_ADMIN", "CAP_NET_ADMIN")
	if err != nil {
		return nil, err
	}
	if len(missing) > 0 {
		return nil, &structops.PermissionError{Missing: missing, Errno: unix.EPERM}
	}
	p := &Plan{Steps: []Step{}}
	plan := func(at *yaml.Node, do, what string, fn func() error) {
		first := len(p.Steps)
		if err := fn(); err != nil {
			p.Steps = append(p.Steps[:first], Step{Do: do, What: what})
			p.Steps[first].fail(s.at(at, err))
		}
		for i := first; i < len(p.Steps); i++ {
			p.Steps[i].at = func(err error) error { return s.at(at, err) }
		}
	}
	for i := range s.Names {
		n := &s.Names[i]
		plan(n.at, "register", n.Name, func() error { return p.register(n, from) })
	}
	for i := range s.Uses {
		u := &s.Uses[i]
		plan(u.at, "use", u.place(), func() error {
			if err := p.use(u); err != nil {
				return fmt.Errorf("use %s: %w", u.place(), err)
			}
			return nil
		})
	}
	return p, nil
}

func (p *Plan) add(do, what, from, to string, apply func() ([]string, error)) {
	p.Steps = append(p.Steps, Step{Do: do, What: what, From: from, To: to, apply: apply})
}

// register compares a name with what has it in the kernel.
func (p *Plan) register(n *Name, from Source) error {
	spec, mapName, err := from.Object(n)
	if err != nil {
		return err
	}
	ops, err := spec.Select(mapName)
	if err != nil {
		return fmt.Errorf("register %q: %w", n.Name, err)
	}
	ops.Name = n.Name
	now, _, err := registry.Lookup(n.Name)
	if _, missing := errors.AsType[*registry.NotFoundError](err); missing {
		p.add("register", n.Name, "", n.describe(), func() ([]string, error) {
			r, err := registry.Register(spec, registry.Options{Map: ops.Map, Name: n.Name, Allow: n.Allow})
			if err != nil {
				return nil, err
			}
			return r.Warnings, nil
		})
		return nil
	}
	if err != nil {
		return err
	}
	if now.Kind != registry.BPF {
		return fmt.Errorf("register %q: %w", n.Name, &registry.TakenError{Entry: now.Entry})
	}
	same, err := sameCode(spec, ops.Map, now)
	if err != nil {
		return fmt.Errorf("register %q: %w", n.Name, err)
	}
	fixed, running := map[string]bool{}, map[string]any{}
	for _, t := range spec.Params() {
		switch {
		case reflect.DeepEqual(t.Value, now.Params[t.Name]):
		case t.Running && !spec.IsSet(t.Name) && !slices.Contains(now.Set, t.Name): // its programs have changed it
		case t.Running:
			running[t.Name] = t.Value
		default:
			fixed[t.Name] = true
		}
	}
	if !same || len(fixed) > 0 {
		why := "other code"
		if same {
			why = "other " + strings.Join(slices.Sorted(maps.Keys(fixed)), ", ")
		}
		p.add("replace", n.Name, "", fmt.Sprintf("%s: %s", n.describe(), why), func() ([]string, error) {
			r, err := registry.Replace(n.Name, spec, registry.ReplaceOptions{Map: ops.Map})
			if err != nil {
				return nil, err
			}
			return r.Warnings, nil
		})
	} else if len(running) > 0 {
		var was, is []string
		for _, t := range slices.Sorted(maps.Keys(running)) {
			was = append(was, t+"="+from.Format(n, t, now.Params[t]))
			is = append(is, t+"="+from.Format(n, t, running[t]))
		}
		p.add("set", n.Name, strings.Join(was, " "), strings.Join(is, " "), func() ([]string, error) {
			_, warnings, err := registry.Set(n.Name, running)
			return warnings, err
		})
	}
	if n.Allow && !now.Allowed {
		p.add("allow", n.Name, "", "for everyone", func() ([]string, error) { return nil, registry.Allow(n.Name) })
	}
	return nil
}

// describe says what a name is made from.
func (n *Name) describe() string {
	s := n.From
	if n.Map != "" {
		s += " " + n.Map
	}
	for _, k := range slices.Sorted(maps.Keys(n.Set)) {
		s += " " + k + "=" + n.Set[k]
	}
	return s
}

// sameCode says whether what is registered has the code of an object: programs
// whose instructions have the same hash.
func sameCode(spec *structops.Spec, mapName string, now *registry.Details) (bool, error) {
	obj, err := spec.Load(mapName)
	if err != nil {
		return false, err
	}
	defer obj.Close()
	info, err := obj.Info(mapName)
	if err != nil {
		return false, err
	}
	wanted, live := map[string]string{}, map[string]string{}
	for _, m := range info.Members {
		wanted[m.Member] = m.Tag
	}
	for _, p := range now.Programs {
		live[p.Member] = p.Tag
	}
	return maps.Equal(wanted, live), nil
}

// use compares a place with what is selected there.
func (p *Plan) use(u *Use) error {
	if u.Group != "" {
		return p.useGroup(u)
	}
	selected, err := inNamespace(u.Netns, registry.Selections)
	if err != nil {
		return err
	}
	from, to := "", u.CC
	if u.Route.IsValid() {
		if u.Lock {
			to += " lock"
		}
		for _, s := range selected {
			if s.Target == u.Route.String() {
				if from = s.Name; s.Lock {
					from += " lock"
				}
			}
		}
	} else {
		from = selected[0].Name
	}
	if from == to {
		return nil
	}
	p.add("use", u.place(), from, to, func() ([]string, error) {
		return inNamespace(u.Netns, func(ns *netns.NS) ([]string, error) {
			if !u.Route.IsValid() {
				_, err := registry.SetDefault(ns, u.CC, u.Allow)
				return nil, err
			}
			c, err := registry.UseRoute(ns, u.Route, u.CC, u.Lock)
			if err != nil {
				return nil, err
			}
			return c.Warnings, nil
		})
	})
	return nil
}

func (p *Plan) useGroup(u *Use) error {
	now, err := registry.GroupArms(u.Group)
	if err != nil {
		return err
	}
	wanted := u.Split
	if wanted == nil {
		wanted = []registry.Arm{{Name: u.CC, Weight: 1}}
	}
	if from, to := arms(now), arms(wanted); from != to {
		p.add("use", u.place(), from, to, func() ([]string, error) {
			_, err := registry.UseGroup(u.Group, wanted)
			return nil, err
		})
	}
	return nil
}

// arms writes down what a control group hands out, in no order; the weight of one
// alone says nothing.
func arms(arms []registry.Arm) string {
	if len(arms) == 1 {
		return arms[0].Name
	}
	var out []string
	for _, a := range arms {
		out = append(out, fmt.Sprintf("%s=%d", a.Name, a.Weight))
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

// inNamespace calls fn with the network namespace of a name or path; nil for "".
func inNamespace[T any](name string, fn func(*netns.NS) (T, error)) (v T, err error) {
	if name == "" {
		return fn(nil)
	}
	ns, err := netns.Find(name)
	if err != nil {
		return v, err
	}
	defer ns.Close()
	return fn(ns)
}

// Apply does it. When a step fails the others are done all the same, and the error has
// what all of them say, also those that Plan has found. A signal does not end the process
// between the steps.
func (p *Plan) Apply() error {
	defer change.Together()()
	var errs []error
	for i := range p.Steps {
		s := &p.Steps[i]
		if s.err == nil {
			warnings, err := s.apply()
			p.Warnings = append(p.Warnings, warnings...)
			if err != nil {
				s.fail(s.at(fmt.Errorf("%s %s: %w", s.Do, s.What, err)))
			}
		}
		s.Done = s.err == nil
		errs = append(errs, s.err)
	}
	return errors.Join(errs...)
}
