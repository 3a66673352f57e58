// SPDX-License-Identifier: Apache-2.0

package main

import (
	"slices"
	"strings"

	"ccload/cc"
	"ccload/harness/vm"
	"ccload/registry"

	"github.com/spf13/cobra"
)

// names completes the names that the kernel knows now: all, or those of one kind.
func names(kind registry.Kind) cobra.CompletionFunc {
	return func(_ *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return live(kind), cobra.ShellCompDirectiveNoFileComp
	}
}

func live(kind registry.Kind) []string {
	entries, _, err := registry.List()
	if err != nil {
		return nil
	}
	var out []string
	for _, e := range entries {
		if kind == "" || e.Kind == kind {
			out = append(out, e.Name)
		}
	}
	return out
}

// nameList completes the last name of a comma-separated list.
func nameList(_ *cobra.Command, _ []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
	before := typed[:strings.LastIndexByte(typed, ',')+1]
	chosen := strings.Split(before, ",")
	var out []string
	for _, n := range live("") {
		if !slices.Contains(chosen, n) {
			out = append(out, before+n)
		}
	}
	return out, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
}

// kernelList completes the last of a comma-separated list of kernels: the running
// one, one that has a name, or a file. guestList leaves out the running one.
func kernelList(_ *cobra.Command, _ []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return completeList(append(vm.Names(), host), typed)
}

func guestList(_ *cobra.Command, _ []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return completeList(vm.Names(), typed)
}

func completeList(names []string, typed string) (found []cobra.Completion, _ cobra.ShellCompDirective) {
	before := typed[:strings.LastIndexByte(typed, ',')+1]
	for _, name := range names {
		if strings.HasPrefix(name, typed[len(before):]) && !slices.Contains(strings.Split(before, ","), name) {
			found = append(found, before+name)
		}
	}
	if found == nil {
		return nil, cobra.ShellCompDirectiveDefault
	}
	return found, cobra.ShellCompDirectiveNoSpace
}

// objects completes what can be registered: the catalogue, and object files.
func objects(_ *cobra.Command, args []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var out []string
	for _, a := range cc.All() {
		if strings.HasPrefix(a.Name, typed) {
			out = append(out, cobra.CompletionWithDesc(a.Name, a.Doc))
		}
	}
	if len(out) == 0 {
		return []string{"o"}, cobra.ShellCompDirectiveFilterFileExt
	}
	return out, cobra.ShellCompDirectiveDefault
}

// settings completes the tunables of the algorithm that is named before.
func settings(_ *cobra.Command, args []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) == 0 || cc.Lookup(args[0]) == nil || strings.Contains(typed, "=") {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var out []string
	for _, t := range cc.Lookup(args[0]).Tunables {
		out = append(out, cobra.CompletionWithDesc(t.Name+"=", t.Doc))
	}
	return out, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
}
