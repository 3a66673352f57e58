// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"errors"
	"path/filepath"
	"strings"

	"ccload/cc"
	"ccload/registry/state"
	"ccload/structops"

	"github.com/spf13/cobra"
)

func (a *app) apply() *cobra.Command {
	var dry bool
	cmd := a.withJSON(&cobra.Command{
		Use:   "apply FILE.yaml",
		Short: "Make the kernel as a file says: names, tunables, selections",
		Long: `Make the kernel as a file says: which congestion controls are registered, with which
tunables, and where they are selected. It does the least that is needed: a second
time that is nothing. What the file does not name stays as it is. What cannot be done
is said, the rest is done all the same, and the exit status is 1.

  register:
    bpf_cubic:
    gentle: {from: bpf_cubic, set: {beta: 0.85}, allow: true}
    mine: {from: mine.bpf.o}
  use:
    - {cc: bpf_cubic}
    - {cc: gentle, netns: blue}
    - {cc: gentle, route: 10.0.0.0/8, lock: true}
    - {split: {mine: 10, cubic: 90}, cgroup: system.slice/web.service}

Object files are looked for from the file's directory.`,
		Example: "  ccload apply --dry-run /etc/ccload.yaml\n  ccload apply /etc/ccload.yaml",
		Args:    cobra.ExactArgs(1),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return []cobra.Completion{"yaml", "yml"}, cobra.ShellCompDirectiveFilterFileExt
		},
		RunE: func(_ *cobra.Command, args []string) error {
			b, err := readFile("apply", args[0])
			if err != nil {
				return err
			}
			wanted, err := state.Parse(args[0], b)
			if err != nil {
				return err
			}
			if !dry {
				if err := a.recover("apply"); err != nil {
					return err
				}
			}
			plan, err := wanted.Plan(source{filepath.Dir(args[0])})
			if err != nil {
				return err
			}
			if !dry {
				plan.Apply() // what fails is in the steps
			}
			a.warn(plan.Warnings)
			err = a.print(plan, func() { a.planText(plan) })
			for _, s := range plan.Steps {
				if s.Err() != nil {
					a.failed(s.Err())
					err = errors.Join(err, errSilent)
				}
			}
			return err
		},
	})
	cmd.Flags().BoolVar(&dry, "dry-run", false, "only say what would be done")
	return cmd
}

func (a *app) planText(p *state.Plan) {
	if len(p.Steps) == 0 {
		a.printf("nothing to do\n")
	}
	for _, s := range p.Steps {
		if s.Err() != nil {
			continue // it says why
		}
		text := s.To
		if s.From != "" {
			text = s.From + " → " + s.To
		}
		a.printf("%s %s: %s\n", s.Do, s.What, text)
	}
}

// source makes the objects that a state file names: of the catalogue, or from files
// below its directory.
type source struct{ dir string }

func (s source) Object(n *state.Name) (spec *structops.Spec, mapName string, err error) {
	what, mapName := n.From, n.Map
	if alg := cc.Lookup(what); alg != nil {
		mapName = cmp.Or(mapName, alg.Name)
	} else if strings.HasSuffix(what, ".o") && !filepath.IsAbs(what) {
		what = filepath.Join(s.dir, what)
	}
	spec, err = configured("register", what, n.Set)
	return spec, mapName, err
}

func (s source) Format(n *state.Name, tunable string, value any) string {
	return format(cc.Lookup(n.From), tunable, value)
}
