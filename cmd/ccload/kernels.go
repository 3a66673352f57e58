// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"path/filepath"

	"ccload/harness/vm"
	"ccload/internal/change"

	"github.com/spf13/cobra"
)

func (a *app) kernels() *cobra.Command {
	list := func(cmd *cobra.Command, _ []string) error {
		kernels := vm.Kernels()
		return a.print(kernels, func() {
			w := a.table()
			w.row("NAME", "RELEASE", "DIRECTORY")
			for _, k := range kernels {
				release := k.Release
				if k.Dir == "" {
					release = "not here"
				}
				w.row(k.Name, release, k.Dir)
			}
			w.Flush()
			for _, k := range kernels {
				if k.Problem != "" {
					a.say("ccload: warning: %s", k.Problem)
				}
			}
		})
	}
	cmd := a.withJSON(&cobra.Command{
		Use:   "kernels [list]",
		Short: "Kernels for guests: which are at hand, and fetching them",
		Long: `Kernels for guests by name: which there are, and which of them are here. Besides
these, --vm and --kernel take the path of any vmlinuz for x86-64; its modules are
looked for in ../lib/modules beside it.`,
		Example: `  ccload kernels pull debian-6.12
  ccload run --cc bpf_cubic,cubic --vm debian-6.12`,
		Args: cobra.NoArgs,
		RunE: list,
	})
	cmd.AddCommand(
		a.withJSON(&cobra.Command{Use: "list", Short: "Kernels for guests that have a name", Args: cobra.NoArgs, RunE: list}),
		a.withJSON(&cobra.Command{
			Use:               "pull NAME…",
			Short:             "Fetch kernels with the system's package manager",
			Args:              cobra.MinimumNArgs(1),
			ValidArgsFunction: cobra.FixedCompletions(toCompletions(vm.Names()), cobra.ShellCompDirectiveNoFileComp),
			RunE: func(cmd *cobra.Command, args []string) error {
				garbage(true)
				over, err := change.Begin() // the programs that fetch them are ended first
				if err != nil {
					return err
				}
				defer over()
				pulled := []vm.Known{}
				var errs []error // one that cannot be had does not keep the others
				for _, name := range args {
					k, err := vm.Pull(cmd.Context(), name, a.say)
					if err != nil {
						errs = append(errs, err)
						continue
					}
					pulled = append(pulled, vm.Known{Name: name, Release: k.Release, Dir: filepath.Join(vm.CacheDir(), name)})
				}
				errs = append(errs, a.print(pulled, func() {
					for _, k := range pulled {
						a.printf("%s is here: %s\n", k.Name, k.Release)
					}
				}))
				return errors.Join(errs...)
			},
		}))
	return cmd
}

func toCompletions(names []string) (c []cobra.Completion) { return append(c, names...) }
