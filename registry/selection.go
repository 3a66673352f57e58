// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"fmt"

	"ccload/internal/netns"
)

// Selection is a place where a congestion control is selected by name, whoever did
// it: what is new there runs what the name stands for.
type Selection struct {
	Kind      string  `json:"kind"` // "default", "route" or "cgroup"
	Name      string  `json:"name"`
	Namespace string  `json:"namespace,omitempty"` // of a default or route: name, "pid N", or "this one"
	Target    string  `json:"target,omitempty"`    // the route's prefix; the control group, below the root of its hierarchy
	By        string  `json:"by,omitempty"`        // "ccload", or "not known"; absent: somebody else, or a ccload with another bpffs
	Lock      bool    `json:"lock,omitempty"`      // of a route: sockets may not choose another
	Share     float64 `json:"share,omitempty"`     // of a group's connections, 0 to 1
	Chosen    *uint64 `json:"chosen,omitempty"`    // connections of a group that got it
	Failed    *uint64 `json:"failed,omitempty"`    // connections that should have, and kept what they had
}

// Kinds of selections.
const (
	byDefault = "default"
	byRoute   = "route"
	byGroup   = "cgroup"
)

// kinds is their order.
var kinds = []string{byDefault, byRoute, byGroup}

// Who has made a selection, if it was not somebody else.
const (
	byCcload  = "ccload"
	byUnknown = "not known" // the caller may not know
)

// thisOne is what the caller's own network namespace is called.
const thisOne = "this one"

// Place says where it is, as users read it.
func (s *Selection) Place() string {
	place := s.Kind
	if s.Target != "" {
		place += " " + s.Target
	}
	if s.Namespace != "" && s.Namespace != thisOne {
		place += " in network namespace " + s.Namespace
	}
	return place
}

// Selections lists the default of a network namespace (nil: the caller's) and its
// routes that name a congestion control.
func Selections(ns *netns.NS) (found []Selection, err error) {
	err = in(ns, func() error {
		def, err := readDefault("/")
		if err != nil {
			return err
		}
		routes, err := routeSelections("")
		found = append([]Selection{{Kind: byDefault, Name: def}}, routes...)
		return err
	})
	return found, err
}

// GroupArms is what a control group hands out, named as for UseGroup; nil if it
// selects nothing.
func GroupArms(dir string) ([]Arm, error) {
	g, err := findGroup("/", dir)
	if err != nil {
		return nil, fmt.Errorf("control group %q: %w", dir, err)
	}
	if live := liveGroups()[g.pin()]; live != nil {
		return live.arms(), nil
	}
	return nil, nil
}
