// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"strings"

	"ccload/registry"
	"ccload/structops"

	"github.com/spf13/cobra"
)

func (a *app) extend() *cobra.Command {
	var how, remove string
	var log bool
	cmd := a.withJSON(&cobra.Command{
		Use:   "extend NAME FUNCTION FILE.o | extend NAME --remove FUNCTION",
		Short: "Put a small program in the place of a function of a congestion control, while it runs",
		Long: `Put a program from an object file in the place of a function of a registered BPF
congestion control, or give the function back to itself: at once, and for open
connections too. ccload show NAME lists the functions that can be extended, and
ccload verify FILE.o says where a program fits.

freplace replaces the function, where the kernel is not locked down; a tail call
does the rest of a callback that has a slot for the function.`,
		Example: `  ccload extend bpf_cubic backoff gentle.bpf.o
  ccload extend bpf_cubic --remove backoff`,
		Args: func(_ *cobra.Command, args []string) error {
			if want := map[bool]int{false: 3, true: 1}[remove != ""]; len(args) != want {
				return errors.New("usage: ccload extend NAME FUNCTION FILE.o, or ccload extend NAME --remove FUNCTION")
			}
			return nil
		},
		ValidArgsFunction: extendable,
		RunE: func(_ *cobra.Command, args []string) error {
			if remove != "" {
				if err := a.recover("extend"); err != nil {
					return err
				}
				return a.unextend(args[0], remove)
			}
			if h := structops.How(how); h != "" && h != structops.Freplace && h != structops.TailCall {
				return usagef("--how %q: it is %s or %s", how, structops.Freplace, structops.TailCall)
			}
			obj, err := readFile("extend", args[2])
			if err != nil {
				return err
			}
			e, err := structops.ParseExtension(obj)
			if err != nil {
				return fmt.Errorf("extend %q: %w", args[2], err)
			}
			if err := a.recover("extend"); err != nil {
				return err
			}
			x, err := registry.Extend(args[0], args[1], e, structops.How(how))
			if v, ok := errors.AsType[*structops.VerifierError](err); ok && log {
				return hinted{fmt.Errorf("extend %q:\n%+v", args[0], v), ""}
			}
			if err != nil {
				return err
			}
			a.warn(x.Warnings)
			err = a.print(x, func() {
				a.printf("extended %s: %s is in the place of %s (%s, in %s)\n", x.Name, x.Program, x.Function, x.How, strings.Join(x.Members, ", "))
			})
			if !a.json {
				if x.Instead != "" {
					a.say("a tail call, because functions cannot be replaced here: %s", x.Instead)
				}
				a.say("to undo: ccload extend %s --remove %s", x.Name, x.Function)
			}
			return err
		},
	})
	f := cmd.Flags()
	f.StringVar(&remove, "remove", "", "give this `FUNCTION` back to itself")
	f.StringVar(&how, "how", "", "`WAY` of doing it, freplace or tail-call (default what the file has and the kernel allows)")
	f.BoolVar(&log, "log", false, "when the verifier refuses it, print its whole log")
	cmd.RegisterFlagCompletionFunc("how", cobra.FixedCompletions([]string{string(structops.Freplace), string(structops.TailCall)}, cobra.ShellCompDirectiveNoFileComp))
	cmd.RegisterFlagCompletionFunc("remove", func(_ *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		return functionsOf(args, true), cobra.ShellCompDirectiveNoFileComp
	})
	return cmd
}

func (a *app) unextend(name, function string) error {
	x, err := registry.Unextend(name, function)
	if err != nil {
		return err
	}
	return a.print(x, func() { a.printf("%s: %s is its own again, without %s\n", x.Name, x.Function, x.Program) })
}

// extendable completes a name, a function of it, and an object file.
func extendable(cmd *cobra.Command, args []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
	switch len(args) {
	case 0:
		return names(registry.BPF)(cmd, args, typed)
	case 1:
		return functionsOf(args, false), cobra.ShellCompDirectiveNoFileComp
	case 2:
		return []string{"o"}, cobra.ShellCompDirectiveFilterFileExt
	}
	return nil, cobra.ShellCompDirectiveNoFileComp
}

// functionsOf are the functions of a congestion control that are extended, or that
// can be.
func functionsOf(args []string, extended bool) (found []string) {
	if len(args) == 0 {
		return nil
	}
	d, _, err := registry.Lookup(args[0])
	if err != nil {
		return nil
	}
	for _, f := range d.Functions {
		if (f.Extended != nil) == extended {
			found = append(found, f.Name)
		}
	}
	return found
}
