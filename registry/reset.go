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
		if sel.By == "" {
			e.Foreign = append(e.Foreign, sel.Place())
		}
	}
	if len(e.Namespaces)+len(e.Places) == 0 {
		return nil
	}
	return e
}

// displacement is that another name is selected wherever one was, because that goes
// away.
type displacement struct {
	j     *journal
	from  string
	to    string
	backs []func() error // put back what was selected, in the order of the changes
	ends  []func() error // tell the journal that it is final
}

// reset selects another name wherever one is selected, everywhere or nowhere. Restore
// knows what was there before until undo or done is called. It is for who has the lock.
func (s *seen) reset(from, to string) (_ *displacement, err error) {
	if err := Require(to); err != nil {
		return nil, fmt.Errorf("reset: %w", err)
	}
	for _, n := range s.defaults[from] {
		if err := n.do(func() error { return checkDefault("/", to) }); err != nil {
			return nil, fmt.Errorf("reset network namespace %q to %q: %w", n.label(), to, err)
		}
	}
	d := &displacement{from: from, to: to}
	if d.j, err = openJournal(true); err != nil {
		return nil, err
	}
	for _, n := range s.defaults[from] {
		if err := n.do(func() error { return d.setDefault(n) }); err != nil {
			return nil, d.failed("network namespace "+n.label(), err)
		}
	}
	for _, n := range s.routes[from] {
		if err := n.do(func() error { return d.setRoutes(n) }); err != nil {
			return nil, d.failed("routes in network namespace "+n.label(), err)
		}
	}
	for pin, g := range liveGroups() {
		arms := g.arms()
		if !slices.ContainsFunc(arms, func(a Arm) bool { return a.Name == from }) {
			continue
		}
		if err := replaceGroup(pin, renamed(arms, from, to)); err != nil {
			return nil, d.failed("cgroup "+g.path(), err)
		}
		d.backs = append(d.backs, func() error { return replaceGroup(pin, arms) })
	}
	return d, nil
}

func (d *displacement) failed(what string, err error) error {
	return errors.Join(fmt.Errorf("reset %s to %q: %w", what, d.to, err), d.undo())
}

// undo selects the name again everywhere.
func (d *displacement) undo() error {
	if d == nil {
		return nil
	}
	defer d.j.close()
	var errs []error
	for _, back := range slices.Backward(d.backs) {
		errs = append(errs, back())
	}
	return errors.Join(errs...)
}

// done is for when the name is gone.
func (d *displacement) done() (err error) {
	if d == nil {
		return nil
	}
	defer func() { err = errors.Join(err, d.j.close()) }()
	var errs []error
	for _, end := range d.ends {
		errs = append(errs, end())
	}
	return errors.Join(errs...)
}

// made notes a change, and how to take it back.
func (d *displacement) made(p *pending, back func() error) {
	d.ends = append(d.ends, p.final)
	d.backs = append(d.backs, func() error {
		if err := back(); err != nil {
			return err
		}
		return p.taken()
	})
}

// setDefault changes the default of the network namespace that the thread is in.
func (d *displacement) setDefault(n namespace) error {
	k, err := keyOf(keyDefault, nil)
	if err != nil {
		return err
	}
	p, err := d.j.displace(k, d.from, d.to)
	if err != nil {
		return err
	}
	if err := setDefault("/", d.to); err != nil {
		return errors.Join(err, p.taken())
	}
	d.made(p, func() error {
		return n.do(func() error {
			if err := d.j.allow(d.from); err != nil { // see Restored.namespaceDefault
				return err
			}
			return setDefault("/", d.from)
		})
	})
	return nil
}

// setRoutes changes the routes of the network namespace that the thread is in.
func (d *displacement) setRoutes(n namespace) error {
	conn, err := dialRoutes()
	if err != nil {
		return err
	}
	defer conn.Close()
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		all, err := dumpRoutes(conn, family)
		if err != nil {
			return err
		}
		for _, r := range all {
			was := r.congestion()
			name, lock, _ := strings.Cut(was, " ")
			if name != d.from {
				continue
			}
			k, err := keyOf(keyRoute, r.target().bytes())
			if err != nil {
				return err
			}
			is := selection(d.to, lock != "")
			p, err := d.j.displace(k, was, is)
			if err != nil {
				return err
			}
			if err := r.with(is).send(conn, unix.RTM_NEWROUTE, netlink.Replace); err != nil {
				return errors.Join(err, p.taken())
			}
			d.made(p, func() error {
				return n.do(func() error {
					conn, err := dialRoutes()
					if err != nil {
						return err
					}
					defer conn.Close()
					return r.with(was).send(conn, unix.RTM_NEWROUTE, netlink.Replace)
				})
			})
		}
	}
	return nil
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
