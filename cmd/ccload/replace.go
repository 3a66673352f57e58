// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"errors"
	"fmt"
	"strings"

	"ccload/cc"
	"ccload/registry"
	"ccload/structops"

	"github.com/spf13/cobra"
)

func (a *app) replace() *cobra.Command {
	var o registry.ReplaceOptions
	var set []string
	var log bool
	cmd := a.withJSON(&cobra.Command{
		Use:   "replace NAME [FILE.o]",
		Short: "Swap the code under a name, while it is in use",
		Long: `Swap the code under the name of a registered BPF congestion control at once: new
connections get the new code, also in the network namespaces that have the name as
their default. Open ones go on with the old, unless --migrate moves them.

Tunables that were set keep their values, but for those that --set names and those
that the new code has not. Without FILE.o the code is the same, or what the catalogue
has of it now: so --set changes tunables that are fixed while it runs. If anything
fails the old code serves on.`,
		Example: `  ccload replace bpf_cubic --set c=0.6
  ccload replace mine mine-2.bpf.o --migrate`,
		Args:              cobra.RangeArgs(1, 2),
		ValidArgsFunction: replaceable,
		RunE: func(_ *cobra.Command, args []string) error {
			spec, alg, err := replacement(args, set, &o)
			if err != nil {
				return err
			}
			if err := a.recover("replace"); err != nil {
				return err
			}
			r, err := registry.Replace(args[0], spec, o)
			if v, ok := errors.AsType[*structops.VerifierError](err); ok && log {
				return hinted{fmt.Errorf("replace %q:\n%+v", args[0], v), ""}
			}
			if err != nil {
				return err
			}
			a.warn(r.Warnings)
			return a.print(r, func() {
				a.printf("replaced %s (map %d, before %d)\n", r.Name, r.MapID, r.Before)
				if len(r.Kept) > 0 {
					var kept []string
					for _, k := range r.Kept {
						kept = append(kept, k.Name+"="+format(alg, k.Name, k.After))
					}
					a.printf("tunables that keep their values: %s\n", strings.Join(kept, " "))
				}
				if len(r.Namespaces) > 0 {
					a.printf("it is the default, and new connections get the new code, in network namespaces: %s\n", strings.Join(r.Namespaces, ", "))
				}
				if r.Migrated != nil {
					a.moved(r.Migrated, "the new code")
				}
			})
		},
	})
	f := cmd.Flags()
	f.StringVar(&o.Map, "map", "", "which (`M`) of several congestion controls in the file, by its variable")
	f.StringArrayVar(&set, "set", nil, "set a tunable, `K=V`; may be repeated")
	f.StringVar(&o.MapPins, "map-pins", "", "`DIR` on bpffs of maps that the object pins by name (default where they are, or ccload's own)")
	f.BoolVar(&o.Migrate, "migrate", false, "give open sockets the new code, too; they keep their window")
	f.BoolVar(&log, "log", false, "when the verifier refuses it, print its whole log")
	cmd.RegisterFlagCompletionFunc("set", settings)
	cmd.RegisterFlagCompletionFunc("map", cobra.NoFileCompletions)
	return cmd
}

// replaceable completes a BPF name and an object.
func replaceable(cmd *cobra.Command, args []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) == 0 {
		return live(registry.BPF), cobra.ShellCompDirectiveNoFileComp
	}
	return objects(cmd, args[1:], typed)
}

// replacement is the object that is to take a name's place, and which of the
// catalogue's it is, if any.
func replacement(args, set []string, o *registry.ReplaceOptions) (*structops.Spec, *cc.Algorithm, error) {
	o.Keep = true
	if len(args) == 2 {
		alg := cc.Lookup(args[1])
		if alg != nil && o.Map == "" {
			o.Map = alg.Name
		}
		spec, err := parse("replace", args[1], set)
		return spec, alg, err
	}
	wanted, err := splitSettings(set)
	if err != nil {
		return nil, nil, err
	}
	d, _, err := registry.Lookup(args[0])
	if err != nil {
		return nil, nil, err
	}
	spec, ops, known := d.Object()
	alg := algorithm(d)
	if alg == nil {
		if errors.Is(known, structops.ErrNotFound) {
			return nil, nil, hinted{fmt.Errorf("replace %q: it is not of the catalogue (%s), and its object is not known", args[0], catalogue()),
				"ccload replace " + args[0] + " FILE.o"}
		}
		if known != nil {
			return nil, nil, fmt.Errorf("replace %q: %w", args[0], known)
		}
		o.Map = cmp.Or(o.Map, ops.Map)
		return spec, nil, settle("replace", args[0], spec, wanted)
	}
	o.Map = cmp.Or(o.Map, alg.Name)
	if spec, err = parse("replace", alg.Name, set); err != nil || known == nil {
		return spec, alg, err
	}
	// An earlier ccload has registered it: what was set is not known, but what it is now.
	o.Keep = false
	for _, t := range alg.Tunables {
		v, _ := number(d.Params[t.Name])
		if _, given := wanted[t.Name]; given || v == t.Default {
			continue
		}
		if err := spec.Set(t.Name, d.Params[t.Name]); err != nil {
			return nil, nil, err
		}
	}
	return spec, alg, nil
}

// algorithm is what of the catalogue has a name; nil: something else.
func algorithm(d *registry.Details) *cc.Algorithm {
	// Under another name than its own an algorithm is known by its map; the kernel
	// cuts that to 15 bytes.
	alg := cmp.Or(cc.Lookup(d.Name), cc.Lookup(d.Map))
	if alg == nil || d.Kind != registry.BPF {
		return nil
	}
	for _, t := range alg.Tunables {
		if _, ok := number(d.Params[t.Name]); !ok {
			return nil // somebody else's program of that name
		}
	}
	return alg
}
