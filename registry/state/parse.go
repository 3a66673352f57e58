// SPDX-License-Identifier: Apache-2.0

package state

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"go.yaml.in/yaml/v4"

	"ccload/internal/yamlfile"
	"ccload/registry"
	"ccload/structops"
)

// State is what is wanted. What it does not name is left as it is.
type State struct {
	Names []Name // in the order of the file
	Uses  []Use

	file string
}

// at adds the place in the file to an error.
func (s *State) at(n *yaml.Node, err error) error {
	return fmt.Errorf("%s:%d:%d: %w", s.file, n.Line, n.Column, err)
}

// Name is a congestion control that is to be registered.
type Name struct {
	Name  string
	From  string            // of the catalogue, or an object file
	Map   string            // which of several in the object; "": the only one
	Set   map[string]string // tunables
	Allow bool              // for unprivileged sockets and other network namespaces

	at *yaml.Node
}

// Use is a place where a congestion control is to be selected: the default of a
// network namespace, a route, or a control group.
type Use struct {
	CC    string
	Split []registry.Arm // of a control group: several by weight, in the place of CC
	Netns string         // name or path; "": this one
	Route netip.Prefix   // invalid: none
	Lock  bool           // sockets over the route may not choose another
	Group string         // directory of a control group; "": none
	Allow bool           // let the namespace have it as its default

	at *yaml.Node
}

// Parse reads a file. Errors begin with its name, the line and the column.
func Parse(file string, b []byte) (*State, error) {
	s := &State{}
	err := yamlfile.Parse(file, b, func(n *yaml.Node) error {
		return yamlfile.Fields{"register": s.parseNames, "use": s.parseUses}.Parse(n)
	})
	if err != nil {
		return nil, err
	}
	s.file = file
	return s, nil
}

func (s *State) parseNames(n *yaml.Node) error {
	return yamlfile.Each(n, func(key string, at, n *yaml.Node) error {
		if err := structops.CheckName(key); err != nil {
			return yamlfile.Wrong(at, "%w", err)
		}
		c := Name{Name: key, From: key, Set: map[string]string{}, at: at}
		if !yamlfile.Nothing(n) {
			err := yamlfile.Fields{
				"from":  yamlfile.Value(&c.From, yamlfile.AsIs),
				"map":   yamlfile.Value(&c.Map, yamlfile.AsIs),
				"allow": yamlfile.Value(&c.Allow, yamlfile.Bool),
				"set": func(n *yaml.Node) error {
					return yamlfile.Each(n, func(key string, _, n *yaml.Node) (err error) {
						c.Set[key], err = yamlfile.Text(n)
						return err
					})
				},
			}.Parse(n)
			if err != nil {
				return err
			}
		}
		s.Names = append(s.Names, c)
		return nil
	})
}

func (s *State) parseUses(n *yaml.Node) error {
	return yamlfile.List(n, func(n *yaml.Node) error {
		n = yamlfile.Resolved(n)
		u := Use{at: n}
		err := yamlfile.Fields{
			"cc":     yamlfile.Value(&u.CC, name),
			"netns":  yamlfile.Value(&u.Netns, yamlfile.AsIs),
			"route":  yamlfile.Value(&u.Route, prefix),
			"lock":   yamlfile.Value(&u.Lock, yamlfile.Bool),
			"cgroup": yamlfile.Value(&u.Group, yamlfile.AsIs),
			"allow":  yamlfile.Value(&u.Allow, yamlfile.Bool),
			"split": func(n *yaml.Node) error {
				u.Split = []registry.Arm{}
				return yamlfile.Each(n, func(key string, _, n *yaml.Node) error {
					var weight int
					err := yamlfile.Value(&weight, yamlfile.Whole(1, registry.MaxWeight))(n)
					u.Split = append(u.Split, registry.Arm{Name: key, Weight: uint32(weight)})
					return err
				})
			},
		}.Parse(n)
		if err != nil {
			return err
		}
		if err := u.check(); err != nil {
			return yamlfile.Wrong(n, "%w", err)
		}
		if i := slices.IndexFunc(s.Uses, u.same); i >= 0 {
			return yamlfile.Wrong(n, "%s: there is another for that", u.place())
		}
		s.Uses = append(s.Uses, u)
		return nil
	})
}

// check says what does not go together.
func (u *Use) check() error {
	switch {
	case u.Route.IsValid() && u.Group != "":
		return fmt.Errorf("route and cgroup: one of them")
	case u.Split != nil && u.CC != "":
		return fmt.Errorf("cc and split: one of them")
	case u.Split != nil && u.Group == "":
		return fmt.Errorf("split: only for a cgroup")
	case u.CC == "" && u.Split == nil:
		return fmt.Errorf("it has no cc")
	case u.Lock && !u.Route.IsValid():
		return fmt.Errorf("lock: only for a route")
	case u.Group != "" && u.Netns != "":
		return fmt.Errorf("netns and cgroup: one of them")
	}
	return nil
}

// same says whether two are for the same place.
func (u *Use) same(v Use) bool {
	return u.Netns == v.Netns && u.Route == v.Route && u.Group == v.Group
}

// place says where it is.
func (u *Use) place() string {
	var s string
	switch {
	case u.Group != "":
		return "cgroup " + u.Group
	case u.Route.IsValid():
		s = "route " + u.Route.String()
	default:
		s = "default"
	}
	if u.Netns != "" {
		s += " in network namespace " + u.Netns
	}
	return s
}

func name(s string) (string, error) {
	if s == "" || strings.ContainsAny(s, "/ \t\n") {
		return "", fmt.Errorf("congestion control %q: not a name", s)
	}
	return s, nil
}

func prefix(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return p, fmt.Errorf("route %q: not of the form 10.0.0.0/8 or 2001:db8::/32", s)
	}
	if p != p.Masked() {
		return p, fmt.Errorf("route %q: there are bits beyond the prefix: say %s", s, p.Masked())
	}
	return p, nil
}
