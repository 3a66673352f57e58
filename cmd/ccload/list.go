// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"ccload/registry"

	"github.com/spf13/cobra"
)

func (a *app) list() *cobra.Command {
	return a.withJSON(&cobra.Command{
		Use:   "list",
		Short: "Every congestion control that the running kernel knows",
		Long: `Every congestion control that the running kernel knows, whoever put it there.

DEFAULT is for this network namespace; ALLOWED ones can be chosen by unprivileged
sockets; SOCKETS counts those in all network namespaces that can be seen; SELECTED
counts the defaults, routes and control groups that name it (see ccload show).`,
		Example: "  ccload list\n  ccload list --json | jq -r '.[] | select(.kind == \"bpf\").name'",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			entries, warnings, err := registry.List()
			if err != nil {
				return err
			}
			a.warn(warnings)
			return a.print(entries, func() {
				w := a.table()
				w.row("NAME", "KIND", "DEFAULT", "ALLOWED", "SOCKETS", "REFS", "MAP", "LINK", "SELECTED", "PIN")
				for _, e := range entries {
					refs := ""
					if e.Refs != nil {
						refs = strconv.Itoa(*e.Refs)
					}
					w.row(e.Name, string(e.Kind), mark(e.Default), mark(e.Allowed), strconv.Itoa(e.Sockets),
						refs, id(e.MapID), id(e.LinkID), counts(e.Selected), e.Pin)
				}
				w.Flush()
			})
		},
	})
}

// counts says of what kinds selections are, and how many.
func counts(selected []registry.Selection) string {
	var out []string
	for i := 0; i < len(selected); {
		n := 1
		for i+n < len(selected) && selected[i+n].Kind == selected[i].Kind {
			n++
		}
		out = append(out, plural(n, selected[i].Kind, selected[i].Kind+"s"))
		i += n
	}
	return strings.Join(out, ", ")
}

// selections prints where a congestion control is selected.
func (a *app) selections(selected []registry.Selection) {
	w := a.table()
	head := []string{"  PLACE", "NAME", "SHARE", "CHOSEN", "FAILED"}
	others := slices.ContainsFunc(selected, func(s registry.Selection) bool { return s.By == "" })
	if others {
		head = append(head, "BY")
	}
	w.row(head...)
	for _, s := range selected {
		name, share, chosen, failed := s.Name, "", "", ""
		if s.Lock {
			name += " lock"
		}
		if s.Chosen != nil {
			share = strconv.FormatFloat(100*s.Share, 'g', 4, 64) + " %"
			chosen, failed = strconv.FormatUint(*s.Chosen, 10), strconv.FormatUint(*s.Failed, 10)
		}
		cells := []string{"  " + s.Place(), name, share, chosen, failed}
		if others {
			cells = append(cells, cmp.Or(s.By, "others"))
		}
		w.row(cells...)
	}
	w.Flush()
}

func mark(b bool) string {
	if b {
		return "yes"
	}
	return ""
}

func id(n uint32) string {
	if n == 0 {
		return ""
	}
	return strconv.FormatUint(uint64(n), 10)
}

// table aligns columns; an empty cell is written as a dash.
type table struct{ *tabwriter.Writer }

func (a *app) table() table { return table{tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)} }

func (t table) row(cells ...string) {
	for i, c := range cells {
		cells[i] = cmp.Or(oneLine(c), "-")
	}
	t.Write([]byte(strings.Join(cells, "\t") + "\n"))
}
