// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"net/netip"
	"os"
	"strings"

	"ccload/internal/netns"
	"ccload/registry"

	"github.com/spf13/cobra"
)

// used is what use did to the default of a network namespace.
type used struct {
	Namespace string `json:"namespace,omitempty"` // as the user named it; absent: this one
	*registry.Change
}

// routed is what use did to a route.
type routed struct {
	Namespace string `json:"namespace,omitempty"`
	*registry.RouteChange
}

// useFlags are the flags of use.
type useFlags struct {
	where, route, cgroup, split, sockets string
	allow, lock, restore, open           bool // open: sockets is given
}

func (a *app) use() *cobra.Command {
	var f useFlags
	cmd := a.withJSON(&cobra.Command{
		Use:   "use [NAME]",
		Short: "Point traffic at a congestion control, and back",
		Long: `Point traffic at a congestion control by its name:

  no flag            new connections of this network namespace: its default
  --netns NS         those of another one
  --route PREFIX     new connections to and from a prefix: its route, or a more
                     specific copy of the one that covers it
  --cgroup DIR       new connections of a control group, in either direction;
                     without a name: what it hands out, counted
  --sockets FILTER   connections that are open already, in ss's words (ss(8)): dst,
                     src, dport, sport, state, and, or, not; and cc NAME

But for --sockets, open connections keep theirs. --restore puts back what was
there before, also when another process or several selected: with flags that one
thing, without any everything that use has changed, wherever that was.`,
		Example: `  ccload use bpf_cubic
  ccload use bpf_cubic --netns blue --allow
  ccload use bpf_cubic --route 198.18.0.0/15 --lock
  ccload use --cgroup system.slice/web.service --split bpf_cubic=10,cubic=90
  ccload use bpf_cubic --sockets 'dst 198.18.0.0/15 and cc cubic'
  ccload use --restore`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: names(""),
		RunE: func(cmd *cobra.Command, args []string) error {
			name := ""
			if len(args) > 0 {
				name = args[0]
			}
			f.open = cmd.Flags().Changed("sockets")
			if err := f.check(cmd, name); err != nil {
				return err
			}
			if reads := f.cgroup != "" && f.split == "" && name == "" && !f.restore; !reads {
				if err := a.recover("use"); err != nil {
					return err
				}
			}
			return a.useWhere(&f, name)
		},
	})
	flags := cmd.Flags()
	flags.StringVar(&f.where, "netns", "", "another network namespace: `NS` is a name, a path or a process id")
	flags.BoolVar(&f.allow, "allow", false, "add it to the allowed ones if the namespace asks for that")
	flags.StringVar(&f.route, "route", "", "connections to and from `PREFIX`, such as 198.18.0.0/15, 2001:db8::/32 or default")
	flags.BoolVar(&f.lock, "lock", false, "with --route: sockets may not choose another")
	flags.StringVar(&f.cgroup, "cgroup", "", "connections of a control group: `DIR` is its directory, or its path below the root of cgroup2")
	flags.StringVar(&f.split, "split", "", "with --cgroup: several, by weight: `NAME=WEIGHT,…`")
	flags.StringVar(&f.sockets, "sockets", "", "open connections that `FILTER` chooses; '': all of them")
	flags.BoolVar(&f.restore, "restore", false, "put back what was there before use")
	cmd.RegisterFlagCompletionFunc("netns", func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
		var out []string
		named, _ := os.ReadDir("/run/netns")
		for _, n := range named {
			out = append(out, n.Name())
		}
		return out, cobra.ShellCompDirectiveDefault
	})
	cmd.RegisterFlagCompletionFunc("cgroup", func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
		return nil, cobra.ShellCompDirectiveFilterDirs
	})
	cmd.RegisterFlagCompletionFunc("route", cobra.NoFileCompletions)
	cmd.RegisterFlagCompletionFunc("split", nameList)
	cmd.RegisterFlagCompletionFunc("sockets", cobra.NoFileCompletions)
	return cmd
}

// check says what makes no sense on the command line.
func (f *useFlags) check(cmd *cobra.Command, name string) error {
	given := func(flags ...string) (found []string) {
		for _, flag := range flags {
			if cmd.Flags().Changed(flag) {
				found = append(found, "--"+flag)
			}
		}
		return found
	}
	where := given("route", "cgroup", "sockets")
	switch {
	case f.lock && f.route == "":
		return usagef("--lock goes with --route")
	case f.split != "" && f.cgroup == "":
		return usagef("--split goes with --cgroup")
	case len(where) > 1:
		return usagef("%s: one at a time", strings.Join(where, " and "))
	case f.cgroup != "" && f.where != "":
		return usagef("a control group has connections in any network namespace: --cgroup does not go with --netns")
	case f.restore && name != "":
		return usagef("--restore: what was there before comes back, not %q", name)
	case f.restore && given("allow", "lock", "split") != nil:
		return usagef("--restore does not go with %s", given("allow", "lock", "split")[0])
	case f.allow && where != nil:
		return usagef("--allow is for defaults: %s does not ask for it", where[0])
	case f.split != "" && name != "":
		return usagef("a name or --split, not both")
	case name == "" && !f.restore && f.cgroup == "":
		return usagef("a name is missing")
	}
	return nil
}

// useWhere does what the flags say.
func (a *app) useWhere(f *useFlags, name string) error {
	var ns *netns.NS
	if f.where != "" {
		var err error
		if ns, err = netns.Find(f.where); err != nil {
			return err
		}
		defer ns.Close()
	}
	if name != "" && registry.Apart() {
		a.warn([]string{"this bpffs is not that of process 1: the selection can be undone only from this mount namespace"})
	}
	switch {
	case f.open:
		return a.useSockets(ns, f, name)
	case f.cgroup != "":
		return a.useGroup(f, name)
	case f.route != "":
		return a.useRoute(ns, f, name)
	case f.restore && f.where != "":
		return a.restored(registry.RestoreDefault(ns))
	case f.restore:
		return a.restored(registry.Restore())
	}
	return a.useDefault(ns, f, name)
}

func (a *app) useDefault(ns *netns.NS, f *useFlags, name string) error {
	c, err := registry.SetDefault(ns, name, f.allow)
	if err != nil {
		return err
	}
	err = a.print(used{f.where, c}, func() {
		if c.Before == c.After {
			a.printf("default%s: %s, as it was\n", f.place(), c.After)
		} else {
			a.printf("default%s: %s → %s\n", f.place(), c.Before, c.After)
		}
	})
	if c.Allowed {
		a.say("%s was added to net.ipv4.tcp_allowed_congestion_control", c.After)
	}
	a.back(f, "", c.Undo)
	return err
}

// place is the network namespace, as it stands in a sentence.
func (f *useFlags) place() string {
	if f.where == "" {
		return ""
	}
	return " in network namespace " + f.where
}

// back says how to take it back, if there is something to take back.
func (a *app) back(f *useFlags, flags string, undo bool) {
	if !undo {
		return
	}
	if f.where != "" {
		flags += " --netns " + shellWord(f.where)
	}
	if !a.json {
		a.say("to undo: ccload use --restore%s", flags)
	}
}

func (a *app) useRoute(ns *netns.NS, f *useFlags, name string) error {
	prefix, err := parsePrefix(f.route)
	if err != nil {
		return err
	}
	if f.restore {
		return a.restored(registry.RestoreRoute(ns, prefix))
	}
	c, err := registry.UseRoute(ns, prefix, name, f.lock)
	if err != nil {
		return err
	}
	a.warn(c.Warnings)
	err = a.print(routed{f.where, c}, func() {
		switch {
		case c.Made:
			a.printf("route %s%s, new: %s\n", prefix, f.place(), c.After)
		case c.Before == c.After:
			a.printf("route %s%s: %s, as it was\n", prefix, f.place(), c.After)
		default:
			a.printf("route %s%s: %s → %s\n", prefix, f.place(), cmp.Or(c.Before, "none"), c.After)
		}
	})
	a.back(f, " --route "+f.route, c.Undo)
	return err
}

// parsePrefix reads a prefix as ip(8) does: "default" is IPv4's, an address alone
// is itself.
func parsePrefix(text string) (netip.Prefix, error) {
	if text == "default" {
		text = "0.0.0.0/0"
	}
	if addr, err := netip.ParseAddr(text); err == nil && addr.Zone() == "" {
		return addr.Unmap().Prefix(addr.Unmap().BitLen())
	}
	p, err := netip.ParsePrefix(text)
	if err != nil {
		return p, usagef("prefix %q: not an address, or an address, a slash and a length", text)
	}
	return p, nil
}

func (a *app) useGroup(f *useFlags, name string) error {
	arms := []registry.Arm{{Name: name, Weight: 1}}
	switch {
	case f.restore:
		return a.restored(registry.RestoreGroup(f.cgroup))
	case f.split != "":
		var err error
		if arms, err = registry.ParseSplit(f.split); err != nil {
			return usageError{err}
		}
	case name == "":
		selected, err := registry.GroupSelections(f.cgroup)
		if err != nil {
			return err
		}
		return a.print(selected, func() { a.selections(selected) })
	}
	c, err := registry.UseGroup(f.cgroup, arms)
	if err != nil {
		return err
	}
	err = a.print(c, func() {
		a.printf("new connections of control group %s get %s", c.Group, armsText(c.After))
		if c.Before != nil {
			a.printf("; before: %s", armsText(c.Before))
		}
		a.printf("\n")
	})
	a.back(f, " --cgroup "+shellWord(f.cgroup), true)
	return err
}

func armsText(arms []registry.Arm) string {
	if len(arms) == 1 {
		return arms[0].Name
	}
	var parts []string
	for _, arm := range arms {
		parts = append(parts, arm.String())
	}
	return strings.Join(parts, ",")
}

// restored prints what was put back. What was before that failed is printed all
// the same.
func (a *app) restored(r *registry.Restoration, err error) error {
	if r == nil {
		return err
	}
	a.warn(r.Warnings)
	perr := a.print(r, func() {
		for _, one := range r.Restored {
			to := one.To
			if to == "" {
				to = "nothing"
			}
			a.printf("%s: %s was selected, %s is again\n", one.Place(), one.From, to)
		}
		if r.Sockets != nil {
			a.moved(r.Sockets, "what they had")
		}
		if len(r.Restored)+len(r.Warnings) == 0 && r.Sockets == nil && err == nil {
			a.printf("there is nothing to put back\n")
		}
	})
	if err != nil {
		return err
	}
	return perr
}
