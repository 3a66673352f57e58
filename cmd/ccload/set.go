// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"ccload/cc"
	"ccload/registry"
	"ccload/structops"

	"github.com/spf13/cobra"
)

func (a *app) set() *cobra.Command {
	return a.withJSON(&cobra.Command{
		Use:   "set NAME K=V…",
		Short: "Change tunables of a congestion control while it runs",
		Long: `Change tunables of a registered BPF congestion control at once, for all of its
connections: those that may change while it runs. ccload show NAME lists them; the
others are set by ccload replace NAME --set.`,
		Example:           "  ccload set bpf_cubic beta=0.8 hystart=off",
		Args:              cobra.MinimumNArgs(2),
		ValidArgsFunction: settable,
		RunE: func(_ *cobra.Command, args []string) error {
			wanted, err := splitSettings(args[1:])
			if err != nil {
				return err
			}
			d, _, err := registry.Lookup(args[0])
			if err != nil {
				return err
			}
			alg := algorithm(d)
			values := map[string]any{}
			if alg != nil {
				vars, err := alg.Configure(wanted)
				if err != nil {
					return fmt.Errorf("set %q: %w", args[0], err)
				}
				for k, v := range vars {
					values[k] = v
				}
			} else {
				for k, v := range wanted {
					values[k] = v
				}
			}
			if err := a.recover("set"); err != nil {
				return err
			}
			done, warnings, err := registry.Set(args[0], values)
			if errors.Is(err, structops.ErrFixed) {
				var all []string
				for _, k := range slices.Sorted(maps.Keys(wanted)) {
					all = append(all, "--set "+k+"="+wanted[k])
				}
				return hinted{err, "ccload replace " + args[0] + " " + strings.Join(all, " ")}
			}
			if errors.Is(err, structops.ErrNotFound) && alg == nil {
				for k := range wanted {
					if _, there := d.Params[k]; !there {
						return hinted{err, didYouMean(registry.Nearest(k, slices.Collect(maps.Keys(d.Params))), "")}
					}
				}
			}
			if err != nil {
				return err
			}
			a.warn(warnings)
			return a.print(done, func() {
				for _, s := range done {
					a.printf("%s was %s, is %s\n", s.Name, format(alg, s.Name, s.Before), format(alg, s.Name, s.After))
				}
			})
		},
	})
}

// format writes a parameter's value as users do. The algorithm may be nil.
func format(alg *cc.Algorithm, name string, value any) string {
	if alg != nil {
		if t := alg.Tunable(name); t != nil {
			if v, ok := number(value); ok {
				return t.Format(v)
			}
		}
	}
	return fmt.Sprint(value)
}

// settable completes a BPF name and its tunables that may change.
func settable(_ *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) == 0 {
		return live(registry.BPF), cobra.ShellCompDirectiveNoFileComp
	}
	d, _, err := registry.Lookup(args[0])
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var out []string
	for _, k := range d.Running {
		out = append(out, k+"=")
	}
	return out, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
}
