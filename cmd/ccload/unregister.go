// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"

	"ccload/registry"

	"github.com/spf13/cobra"
)

func (a *app) unregister() *cobra.Command {
	var o registry.UnregisterOptions
	cmd := a.withJSON(&cobra.Command{
		Use:   "unregister NAME",
		Short: "Take a BPF congestion control out of the kernel",
		Long: `Take a BPF congestion control out of the kernel, whoever put it there, and remove
its pins. Sockets that run it go on until they close.`,
		Example:           "  ccload unregister bpf_cubic\n  ccload unregister bpf_cubic --reset cubic",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: names(registry.BPF),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := a.recover("unregister"); err != nil {
				return err
			}
			u, err := registry.Unregister(args[0], o)
			if err != nil {
				return err
			}
			a.warn(u.Warnings)
			return a.print(u, func() {
				a.printf("unregistered %s", u.Name)
				if u.Sockets > 0 {
					a.printf("; %s it until they close", plural(u.Sockets, "socket runs", "sockets run"))
				}
				if len(u.Reset) > 0 {
					a.printf("; %s is the default now in network namespaces: %s", o.Reset, strings.Join(u.Reset, ", "))
				}
				if len(u.Moved) > 0 {
					a.printf("; %s is selected instead for %s", o.Reset, strings.Join(u.Moved, ", "))
				}
				a.printf("\n")
				if len(u.Left) > 0 {
					a.printf("maps that it used stay pinned at %s\n", strings.Join(u.Left, ", "))
				}
			})
		},
	})
	cmd.Flags().StringVar(&o.Reset, "reset", "", "`TO` takes its place as default, on routes and for control groups")
	cmd.RegisterFlagCompletionFunc("reset", func(cmd *cobra.Command, _ []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
		return names("")(cmd, nil, typed)
	})
	return cmd
}

func plural(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
