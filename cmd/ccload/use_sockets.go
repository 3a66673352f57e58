// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"ccload/internal/netns"
	"ccload/registry"
)

// movedSockets is what use did to open sockets.
type movedSockets struct {
	Namespace string `json:"namespace,omitempty"` // as the user named it
	Filter    string `json:"filter"`
	Name      string `json:"name,omitempty"` // absent: what they had before
	*registry.Moved
}

func (a *app) useSockets(ns *netns.NS, f *useFlags, name string) error {
	filter, err := registry.ParseFilter(f.sockets)
	if err != nil {
		return usageError{err}
	}
	var m *registry.Moved
	to := name
	if f.restore {
		m, err = registry.RestoreSockets(ns, filter)
		to = "what they had"
	} else {
		m, err = registry.MoveSockets(ns, filter, name)
	}
	if err != nil {
		return err
	}
	a.warn(m.Warnings)
	err = a.print(movedSockets{f.where, filter.String(), name, m}, func() { a.moved(m, to) })
	if m.Moved > 0 && !f.restore {
		a.back(f, " --sockets ''", m.Undo)
	}
	if m.Failed > 0 {
		return fmt.Errorf("%d of %d sockets could not be moved", m.Failed, m.Matched)
	}
	return err
}

// moved says what became of open sockets.
func (a *app) moved(m *registry.Moved, to string) {
	if m.Matched == 0 {
		a.printf("no open socket matches\n")
		return
	}
	var parts []string
	part := func(n int, format string, args ...any) {
		if n > 0 {
			parts = append(parts, fmt.Sprintf("%d "+format, append([]any{n}, args...)...))
		}
	}
	part(m.Moved, "moved to %s", to)
	part(m.Kept, "ran that already")
	part(m.Left, "left alone, because somebody else has moved them since")
	part(m.Gone, "closed meanwhile")
	part(m.Failed, "failed")
	a.printf("%d open sockets: %s\n", m.Matched, strings.Join(parts, ", "))
	for _, why := range slices.Sorted(maps.Keys(m.Reasons)) {
		a.printf("  %d failed: %s\n", m.Reasons[why], why)
	}
	if m.Window > 0 {
		a.printf("  of %d that were moved the new algorithm has set the window anew\n", m.Window)
	}
}
