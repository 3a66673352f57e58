// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"ccload/registry"

	"github.com/spf13/cobra"
)

// shown is what the kernel and the catalogue know of a congestion control.
type shown struct {
	*registry.Details
	Doc       string   `json:"doc,omitempty"`
	Reference string   `json:"reference,omitempty"`
	Tunables  []tuned  `json:"tunables,omitempty"`
	Private   *private `json:"private_state,omitempty"`
}

// tuned is a tunable of the catalogue and its value in the kernel, both as users
// write them.
type tuned struct {
	Name    string `json:"name"`
	Value   string `json:"value"`
	Default string `json:"default"`
	Min     string `json:"min"`
	Max     string `json:"max"`
	Unit    string `json:"unit,omitempty"`
	Running bool   `json:"running"` // it may be set while it runs
	Doc     string `json:"doc"`
}

// settableAt says when a tunable may be set, by whether that is also while it runs.
var settableAt = map[bool]string{true: "any time", false: "at load"}

// private is the state that an algorithm keeps in each socket.
type private struct {
	Type   string   `json:"type"`
	Bytes  uintptr  `json:"bytes"`
	Fields []string `json:"fields"`
}

func (a *app) show() *cobra.Command {
	return a.withJSON(&cobra.Command{
		Use:   "show NAME|FILE.o",
		Short: "One congestion control, whole, or what an object file has",
		Example: `  ccload show cubic
  ccload show bpf_cubic --json
  ccload show mine.bpf.o`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: names(""),
		RunE: func(_ *cobra.Command, args []string) error {
			if strings.ContainsRune(args[0], '/') || strings.HasSuffix(args[0], ".o") { // no name has or does
				return a.showFile(args[0])
			}
			d, warnings, err := registry.Lookup(args[0])
			if err != nil {
				return err
			}
			a.warn(warnings)
			s := describe(d)
			return a.print(s, func() { a.showText(s) })
		},
	})
}

// describe adds what the catalogue knows.
func describe(d *registry.Details) *shown {
	s := &shown{Details: d}
	alg := algorithm(d)
	if alg == nil {
		return s
	}
	for _, t := range alg.Tunables {
		v, _ := number(d.Params[t.Name])
		s.Tunables = append(s.Tunables, tuned{t.Name, t.Format(v), t.Format(t.Default), t.Format(t.Min), t.Format(t.Max), t.Unit,
			slices.Contains(d.Running, t.Name), t.Doc})
	}
	s.Doc, s.Reference = alg.Doc, alg.Reference
	if alg.NewState != nil {
		t := reflect.TypeOf(alg.NewState()).Elem()
		s.Private = &private{Type: t.Name(), Bytes: t.Size()}
		for f := range t.Fields() {
			if f.Name != "_" {
				s.Private.Fields = append(s.Private.Fields, f.Name)
			}
		}
	}
	return s
}

// number is a parameter as a tunable is stored.
func number(v any) (uint32, bool) {
	switch v := v.(type) {
	case uint64:
		return uint32(v), true
	case int64:
		return uint32(v), true
	case bool:
		if v {
			return 1, true
		}
		return 0, true
	}
	return 0, false
}

func (a *app) showText(s *shown) {
	a.printf("%s", s.Name)
	if s.Doc != "" {
		a.printf(": %s (%s)", s.Doc, s.Reference)
	}
	a.printf("\n")
	w := a.table()
	line := func(key, value string) {
		if value != "" {
			w.Write([]byte("  " + key + "\t" + oneLine(value) + "\n"))
		}
	}
	line("kind", strings.TrimSpace(string(s.Kind)+" "+s.Module))
	line("state", s.State)
	if s.Refs != nil {
		line("references", strconv.Itoa(*s.Refs))
	}
	line("default in", strings.Join(s.DefaultIn, ", "))
	line("allowed", map[bool]string{true: "for everyone", false: "for privileged sockets only"}[s.Allowed])
	if s.MapID != 0 {
		line("map", fmt.Sprintf("%d %s", s.MapID, s.Map))
	}
	line("link", id(s.LinkID))
	line("pin", s.Pin)
	line("flags", strings.Join(s.Flags, ", "))
	if p := s.Private; p != nil {
		line("private state", fmt.Sprintf("%s, %d bytes in each socket", p.Type, p.Bytes))
	}
	line("sockets", strconv.Itoa(s.Sockets))
	w.Flush()

	if len(s.Programs) > 0 {
		a.printf("\nprograms\n")
		w := a.table()
		w.row("  MEMBER", "PROGRAM", "ID", "VERIFIED", "MACHINE CODE")
		for _, p := range s.Programs {
			w.row("  "+p.Member, p.Name, id(p.ID), quantity(p.Verified, "instructions"), quantity(p.Jited, "bytes"))
		}
		w.Flush()
	}
	if len(s.Functions) > 0 {
		a.printf("\nfunctions that can be extended\n")
		w := a.table()
		w.row("  FUNCTION", "DECLARATION", "COPIES IN", "SLOT IN", "EXTENDED BY")
		for _, f := range s.Functions {
			by := ""
			if f.Extended != nil {
				by = fmt.Sprintf("%s (%s)", f.Extended.Program, f.Extended.How)
			}
			w.row("  "+f.Name, f.Signature, strings.Join(f.Copies, ", "), f.Slot, by)
		}
		w.Flush()
	}
	switch {
	case len(s.Tunables) > 0:
		a.printf("\ntunables\n")
		w := a.table()
		w.row("  NAME", "VALUE", "DEFAULT", "BOUNDS", "SET", "MEANING")
		for _, t := range s.Tunables {
			unit := t.Unit
			if unit != "" {
				unit = " " + unit
			}
			w.row("  "+t.Name, t.Value+unit, t.Default, t.Min+" to "+t.Max, settableAt[t.Running], t.Doc)
		}
		w.Flush()
	case len(s.Params) > 0:
		a.printf("\ntunables\n")
		w := a.table()
		w.row("  NAME", "VALUE", "SET", "WAS SET")
		for _, k := range slices.Sorted(maps.Keys(s.Params)) {
			w.row("  "+k, fmt.Sprint(s.Params[k]), settableAt[slices.Contains(s.Running, k)], map[bool]string{true: "yes", false: "no"}[slices.Contains(s.Set, k)])
		}
		w.Flush()
	}
	if len(s.Maps) > 0 {
		a.printf("\nmaps that are pinned\n")
		w := a.table()
		w.row("  NAME", "TYPE", "ID", "PIN")
		for _, m := range s.Maps {
			w.row("  "+m.Name, m.Type, id(m.ID), strings.Join(m.Pins, ", "))
		}
		w.Flush()
	}
	if len(s.Selected) > 0 {
		a.printf("\nselected\n")
		a.selections(s.Selected)
	}
	if len(s.SocketList) > 0 {
		a.printf("\nsockets\n")
		w := a.table()
		w.row("  STATE", "LOCAL", "REMOTE", "NETWORK NAMESPACE")
		for _, k := range s.SocketList {
			w.row("  "+k.State, k.Local.String(), k.Remote.String(), k.Namespace)
		}
		w.Flush()
	}
}

func quantity(n uint32, unit string) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprintf("%d %s", n, unit)
}
