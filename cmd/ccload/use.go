// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"

	"ccload/internal/netns"
	"ccload/registry"

	"github.com/spf13/cobra"
)

// used is what use did.
type used struct {
	Namespace string `json:"namespace,omitempty"` // as the user named it; absent: this one
	*registry.Change
}

func (a *app) use() *cobra.Command {
	var where string
	var allow bool
	cmd := a.withJSON(&cobra.Command{
		Use:   "use NAME",
		Short: "Make a congestion control the default for new connections",
		Long: `Make a congestion control the default for new connections in this network
namespace or another. Open connections keep theirs.`,
		Example:           "  ccload use bpf_cubic\n  ccload use bpf_cubic --netns blue --allow\n  ccload use cubic --netns 1234",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: names(""),
		RunE: func(_ *cobra.Command, args []string) error {
			var ns *netns.NS
			if where != "" {
				var err error
				if ns, err = netns.Find(where); err != nil {
					return err
				}
				defer ns.Close()
			}
			c, err := registry.SetDefault(ns, args[0], allow)
			if err != nil {
				return err
			}
			u := used{where, c}
			flag, place := "", ""
			if where != "" {
				flag, place = " --netns "+where, " in network namespace "+where
			}
			err = a.print(u, func() {
				if c.Before == c.After {
					a.printf("the default%s was %s already\n", place, c.After)
				} else {
					a.printf("the default%s was %s, is %s\n", place, c.Before, c.After)
				}
			})
			if c.Allowed {
				a.say("%s was added to net.ipv4.tcp_allowed_congestion_control", c.After)
			}
			if !a.json && c.Before != c.After {
				a.say("to go back: ccload use %s%s", c.Before, flag)
			}
			return err
		},
	})
	cmd.Flags().StringVar(&where, "netns", "", "another network namespace: `NS` is a name, a path or a process id")
	cmd.Flags().BoolVar(&allow, "allow", false, "add it to the allowed ones if the namespace asks for that")
	cmd.RegisterFlagCompletionFunc("netns", func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
		var out []string
		named, _ := os.ReadDir("/run/netns")
		for _, n := range named {
			out = append(out, n.Name())
		}
		return out, cobra.ShellCompDirectiveDefault
	})
	return cmd
}
