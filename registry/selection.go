// SPDX-License-Identifier: Apache-2.0

package registry

// Selection is a place where a congestion control is selected by name, whoever did
// it: what is new there runs what the name stands for.
type Selection struct {
	Kind      string  `json:"kind"` // "default", "route" or "cgroup"
	Name      string  `json:"name"`
	Namespace string  `json:"namespace,omitempty"` // of a default or route: name, "pid N", or "this one"
	Target    string  `json:"target,omitempty"`    // the route's prefix; the control group, below the root of its hierarchy
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
