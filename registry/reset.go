// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// inUse says where a name is selected; nil if it is nowhere.
func (s *seen) inUse(name string) *InUseError {
	e := &InUseError{Namespaces: labels(s.defaults[name])}
	for _, sel := range s.selections[name] {
		if sel.Kind != byDefault {
			e.Places = append(e.Places, sel.Place())
		}
	}
	if len(e.Namespaces)+len(e.Places) == 0 {
		return nil
	}
	return e
}

// reset selects another name wherever one is selected, everywhere or nowhere, and
// returns what takes it back. Restore still knows what was there before both. It is
// for who has the lock.
func (s *seen) reset(from, to string) (undo func() error, err error) {
	var undos []func() error
	undo = func() error {
		var errs []error
		for _, u := range slices.Backward(undos) {
			errs = append(errs, u())
		}
		return errors.Join(errs...)
	}
	j, err := openJournal(false)
	if err != nil {
		return nil, err
	}
	if j != nil {
		defer j.close()
	}
	if err := Require(to); err != nil {
		return nil, fmt.Errorf("reset: %w", err)
	}
	for _, n := range s.defaults[from] {
		if err := n.do(func() error { return checkDefault("/", to) }); err != nil {
			return nil, fmt.Errorf("reset network namespace %q to %q: %w", n.label(), to, err)
		}
	}
	step := func(what string, do func() (back func() error, err error)) error {
		back, err := do()
		if back != nil {
			undos = append(undos, back)
		}
		if err != nil {
			return errors.Join(fmt.Errorf("reset %s to %q: %w", what, to, err), undo())
		}
		return nil
	}
	for _, n := range s.defaults[from] {
		err := step(fmt.Sprintf("network namespace %q", n.label()), func() (func() error, error) {
			if err := n.do(func() error { return j.moveDefault(from, to) }); err != nil {
				return nil, err
			}
			return func() error { return n.do(func() error { return j.moveDefault(to, from) }) }, nil
		})
		if err != nil {
			return nil, err
		}
	}
	for _, n := range s.routes[from] {
		err := step(fmt.Sprintf("routes in network namespace %q", n.label()), func() (func() error, error) {
			var moved []target
			err := n.do(func() (err error) {
				moved, err = j.moveRoutes(from, to, func(target) bool { return true })
				return err
			})
			return func() error {
				return n.do(func() error {
					_, err := j.moveRoutes(to, from, func(t target) bool { return slices.Contains(moved, t) })
					return err
				})
			}, err
		})
		if err != nil {
			return nil, err
		}
	}
	for pin, g := range liveGroups() {
		arms := g.arms()
		if !slices.ContainsFunc(arms, func(a Arm) bool { return a.Name == from }) {
			continue
		}
		err := step("cgroup "+g.path(), func() (func() error, error) {
			if err := replaceGroup(pin, renamed(arms, from, to)); err != nil {
				return nil, err
			}
			return func() error { return replaceGroup(pin, arms) }, nil
		})
		if err != nil {
			return nil, err
		}
	}
	return undo, nil
}

// moveDefault changes the default of the network namespace that the thread is in.
func (j *journal) moveDefault(from, to string) error {
	k, err := keyOf(keyDefault, nil)
	if err != nil {
		return err
	}
	changed, err := j.moved(k, from, to)
	if err != nil {
		return err
	}
	err = setDefault("/", to)
	changed(err)
	return err
}

// moveRoutes changes the routes of the network namespace that the thread is in that
// match. It returns which it has changed, also if it fails in between.
func (j *journal) moveRoutes(from, to string, match func(target) bool) (moved []target, err error) {
	conn, err := dialRoutes()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		all, err := dumpRoutes(conn, family)
		if err != nil {
			return moved, err
		}
		for _, r := range all {
			name, lock, _ := strings.Cut(r.congestion(), " ")
			if name != from || !match(r.target()) {
				continue
			}
			k, err := keyOf(keyRoute, r.target().bytes())
			if err != nil {
				return moved, err
			}
			next := selection(to, lock != "")
			changed, err := j.moved(k, r.congestion(), next)
			if err != nil {
				return moved, err
			}
			err = r.with(next).send(conn, unix.RTM_NEWROUTE, netlink.Replace)
			changed(err)
			if err != nil {
				return moved, err
			}
			moved = append(moved, r.target())
		}
	}
	return moved, nil
}

// renamed puts one name in the place of another; if it is there already their
// weights add up.
func renamed(arms []Arm, from, to string) (out []Arm) {
	for _, a := range arms {
		if a.Name == from {
			a.Name = to
		}
		if i := slices.IndexFunc(out, func(o Arm) bool { return o.Name == a.Name }); i >= 0 {
			out[i].Weight = min(out[i].Weight+a.Weight, MaxWeight)
		} else {
			out = append(out, a)
		}
	}
	return out
}
