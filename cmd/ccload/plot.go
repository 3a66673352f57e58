// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"path/filepath"

	"ccload/harness/trace"
	"ccload/plots"

	"github.com/spf13/cobra"
)

func (a *app) plot() *cobra.Command {
	var to string
	cmd := &cobra.Command{
		Use:   "plot DIR…",
		Short: "Draw results: window, RTT, throughput and queue over time",
		Long: `Draw results on one time axis: window and ssthresh, smoothed RTT, throughput and
the queue of the bottleneck. A DIR is a directory of results, or holds such.`,
		Example: "  ccload plot results/20260101-120000-bpf_cubic-cubic\n  ccload plot results/a results/b -o rivals.pdf",
		Args:    cobra.MinimumNArgs(1),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveFilterDirs
		},
		RunE: func(_ *cobra.Command, dirs []string) error {
			garbage(true)
			if to == "" {
				to = "plot.png"
				if len(dirs) == 1 {
					to = filepath.Join(dirs[0], to)
				}
			}
			results, warnings, err := trace.OpenAll(dirs)
			if err != nil {
				return err
			}
			a.warn(warnings)
			warnings, err = plots.Save(to, results)
			if errors.Is(err, plots.ErrFormat) {
				return usageError{err}
			}
			if err != nil {
				return err
			}
			a.warn(warnings)
			a.printf("%s\n", to)
			return nil
		},
	}
	cmd.Flags().StringVarP(&to, "output", "o", "", "picture: `FILE`.png, .svg or .pdf (default DIR/plot.png)")
	return cmd
}
