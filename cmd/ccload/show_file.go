// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strconv"
)

// inFile is what an object file has: what can be known without a kernel.
type inFile struct {
	Object   string      `json:"object"`
	Licence  string      `json:"licence"`
	Controls []control   `json:"congestion_controls"`
	Tunables []parameter `json:"tunables,omitempty"`
	Pinned   []string    `json:"pinned_maps,omitempty"` // maps that are pinned by name
	Warnings []string    `json:"warnings,omitempty"`
}

// control is a congestion control in a file.
type control struct {
	Map      string `json:"map"`
	Name     string `json:"name"`
	Link     bool   `json:"link"`
	Optional bool   `json:"optional"`
	Why      string `json:"unusable,omitempty"`
}

// parameter is a tunable in a file.
type parameter struct {
	Name    string `json:"name"`
	Type    string `json:"type"`
	Value   any    `json:"value"`
	Running bool   `json:"running"` // it may be set while it runs
}

func (a *app) showFile(path string) error {
	obj, err := readFile("show", path)
	if err != nil {
		return err
	}
	spec, err := parseFile("show", path, obj, nil)
	if err != nil {
		return err
	}
	f := &inFile{Object: path, Licence: spec.License, Pinned: spec.PinsMaps(), Warnings: spec.Warnings}
	for _, o := range spec.Ops {
		c := control{Map: o.Map, Name: o.Name, Link: o.Link, Optional: o.Optional}
		if err := o.Check(); err != nil {
			c.Why = err.Error()
		}
		f.Controls = append(f.Controls, c)
	}
	for _, p := range spec.Params() {
		f.Tunables = append(f.Tunables, parameter(p))
	}
	a.warn(f.Warnings)
	return a.print(f, func() { a.fileText(f) })
}

func (a *app) fileText(f *inFile) {
	a.printf("%s: licence %q\n\ncongestion controls\n", f.Object, f.Licence)
	yes := map[bool]string{true: "yes", false: "no"}
	w := a.table()
	w.row("  MAP", "NAME", "LINK", "OPTIONAL")
	for _, c := range f.Controls {
		w.row("  "+visible(c.Map), visible(c.Name), yes[c.Link], yes[c.Optional])
	}
	w.Flush()
	for _, c := range f.Controls {
		if c.Why != "" {
			a.printf("  cannot be used: %s\n", c.Why)
		}
	}
	if len(f.Tunables) > 0 {
		a.printf("\ntunables\n")
		w := a.table()
		w.row("  NAME", "TYPE", "VALUE", "SET")
		for _, p := range f.Tunables {
			w.row("  "+visible(p.Name), visible(p.Type), fmt.Sprint(p.Value), settableAt[p.Running])
		}
		w.Flush()
	}
	if len(f.Pinned) > 0 {
		a.printf("\nmaps that are pinned by name\n")
		for _, name := range f.Pinned {
			a.printf("  %s\n", visible(name))
		}
	}
}

// visible is a name out of a file, in quotes where it could be more than a word to a
// terminal, or is nothing.
func visible(name string) string {
	if quoted := strconv.QuoteToASCII(name); name == "" || quoted != `"`+name+`"` {
		return quoted
	}
	return name
}
