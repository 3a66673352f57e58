// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"ccload/internal/fault"
	"ccload/internal/inetdiag"
	"ccload/internal/kerneltest"
	"ccload/internal/netns"
	"ccload/registry"
	"ccload/structops"
)

var errFault = errors.New("a test wants it so")

// faults has some steps fail while a command runs here, in this process, and notes all
// that there were.
func faults(fails func(n int) bool, args ...string) (status int, steps []string, output string) {
	defer fault.Set(func(step string) error {
		steps = append(steps, step)
		if fails(len(steps) - 1) {
			return errFault
		}
		return nil
	})()
	var out bytes.Buffer
	status = run(context.Background(), args, strings.NewReader(""), &out, &out)
	return status, steps, out.String()
}

// Whichever step of a command the kernel refuses, afterwards all is as it was before, or
// is done; and if it refuses that step and all later ones, so that nothing can be taken
// back, the next command sees to it, or use --restore knows what was there.
//
// The latter is tried of every third step, unless CCLOAD_LONG is 1.
func TestFaults(t *testing.T) {
	kerneltest.Privileged(t)
	ns, group, plain := place(t)
	was, err := registry.Default(ns)
	if err != nil {
		t.Fatal(err)
	}
	const name = "cct_f"
	dir := t.TempDir()
	wanted, extension := filepath.Join(dir, "wanted.yaml"), "../../bpf/examples/gentle.bpf.o"
	write(t, wanted, fmt.Appendf(nil, `
register:
  cct_f: {from: bpf_reno, allow: true}
  cct_g: {from: bpf_cubic, set: {beta: 0.8}}
use:
  - {cc: cct_f, netns: %q}
  - {cc: cct_g, netns: %[1]q, route: 198.18.0.0/15, lock: true}
  - {split: {cct_f: 1, cct_g: 2}, cgroup: %q}
`, ns.Path(), group))
	type commands = [][]string
	at := []string{"--netns", ns.Path()}
	use := func(more ...string) []string { return slices.Concat([]string{"use"}, more) }
	registered := []string{"register", "bpf_reno", "--as", name, "--allow"}
	cubic := []string{"register", "bpf_cubic", "--as", name, "--allow"}
	gone := []string{"unregister", name}
	back := []string{"use", "--restore"}
	selected := commands{
		use(append(at, name)...),
		use(append(at, name, "--route", "198.18.0.0/15", "--lock")...),
		use("--cgroup", group, "--split", name+"=1,cubic=2"),
	}
	listener := use(append(at, name, "--sockets", "state listening")...)
	for _, c := range []struct {
		name   string
		before commands
		verb   []string
		undo   commands // after before and verb: as after before
		after  commands // after before: as at the beginning
		partly bool     // what could be done is, and a repeat does the rest
		guest  bool     // in guests, too, which are slow
		swept  bool     // or the next command finishes it
		long   bool     // only where CCLOAD_LONG is 1: a slot may be emptied late on a busy machine
	}{
		{name: "register", verb: []string{"register", "bpf_reno", "--as", name}, undo: commands{gone}},
		{name: "register an allowed one", verb: registered, undo: commands{gone}},
		{name: "register without link", verb: []string{"register", plain, "--as", name}, undo: commands{gone}},
		{name: "register as default", verb: []string{"register", "bpf_reno", "--as", name, "--default"}, undo: commands{back, gone}},
		{name: "use default", before: commands{registered}, verb: use(name), undo: commands{back}, after: commands{gone}},
		{name: "use default elsewhere", before: commands{registered}, verb: use(append(at, name)...), undo: commands{back}, after: commands{gone}},
		{name: "use default with allow", before: commands{{"register", "bpf_reno", "--as", name}}, verb: use(append(at, name, "--allow")...), undo: commands{back}, after: commands{gone}, guest: true},
		{name: "use default by hand back", before: commands{registered, use(append(at, "reno")...)}, verb: use(append(at, name)...), undo: commands{use(append(at, "reno")...)}, after: commands{back, gone}},
		{name: "use route", before: commands{registered}, verb: use(append(at, name, "--route", "198.18.0.0/15")...), undo: commands{back}, after: commands{gone}},
		{name: "use made route", before: commands{registered}, verb: use(append(at, name, "--route", "198.18.7.0/24", "--lock")...), undo: commands{back}, after: commands{gone}},
		{name: "use cgroup", before: commands{registered}, verb: use("--cgroup", group, "--split", name+"=1,cubic=2"), undo: commands{back}, after: commands{gone}},
		{name: "use sockets", before: commands{registered}, verb: listener, undo: commands{back}, after: commands{gone}},
		{name: "restore default", before: commands{registered, selected[0]}, verb: append(back, at...), undo: commands{selected[0]}, after: commands{back, gone}, partly: true},
		{name: "restore all", before: slices.Concat(commands{registered}, selected, commands{listener}), verb: back, undo: append(selected, listener), after: commands{back, gone}, partly: true},
		{name: "unregister", before: commands{cubic}, verb: gone, undo: commands{cubic}, after: commands{gone}},
		{name: "unregister without link", before: commands{{"register", plain, "--as", name}}, verb: gone, undo: commands{{"register", plain, "--as", name}}, after: commands{gone}},
		{name: "unregister with an extension", before: commands{cubic, {"extend", name, "backoff", extension}}, verb: gone, undo: commands{cubic, {"extend", name, "backoff", extension}}, after: commands{gone}, long: true},
		{name: "unregister and reset", before: append(commands{registered}, selected...), verb: append(gone, "--reset", "reno"), undo: slices.Concat(commands{back, registered}, selected), after: commands{back, gone}, guest: true},
		{name: "unregister and reset to what was there", before: append(commands{registered}, selected...), verb: append(gone, "--reset", was),
			undo: slices.Concat(commands{back, registered}, selected), after: commands{back, gone}},
		{name: "replace", before: commands{cubic, selected[0], listener}, verb: []string{"replace", name, "bpf_cubic", "--set", "c=0.6"}, undo: commands{{"replace", name, "bpf_cubic", "--set", "c=0.4"}}, after: commands{back, gone}},
		{name: "replace and migrate", before: commands{cubic, listener}, verb: []string{"replace", name, "bpf_cubic", "--set", "c=0.6", "--migrate"}, undo: commands{{"replace", name, "bpf_cubic", "--migrate", "--set", "c=0.4"}}, after: commands{back, gone}},
		{name: "replace without link", before: append(commands{{"register", plain, "--as", name, "--allow"}}, selected...), verb: []string{"replace", name, plain, "--set", "c=600"}, undo: commands{{"replace", name, plain, "--set", "c=410"}}, after: commands{back, gone}, guest: true, swept: true},
		{name: "replace with an extension", before: commands{cubic, {"extend", name, "backoff", extension}}, verb: []string{"replace", name, "bpf_cubic", "--set", "c=0.6"}, undo: commands{{"replace", name, "bpf_cubic", "--set", "c=0.4"}}, after: commands{gone}, long: true},
		{name: "extend", before: commands{cubic}, verb: []string{"extend", name, "backoff", extension}, undo: commands{{"extend", name, "--remove", "backoff"}}, after: commands{gone}},
		{name: "extend --remove", before: commands{cubic, {"extend", name, "backoff", extension}}, verb: []string{"extend", name, "--remove", "backoff"}, undo: commands{{"extend", name, "backoff", extension}}, after: commands{gone}, swept: true},
		{name: "set", before: commands{cubic}, verb: []string{"set", name, "beta=0.8", "hystart=off"}, undo: commands{{"set", name, "beta=0.7", "hystart=on"}}, after: commands{gone}},
		{name: "apply", verb: []string{"apply", wanted}, undo: commands{back, gone, {"unregister", "cct_g"}}, partly: true, guest: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			long := os.Getenv("CCLOAD_LONG") == "1"
			if c.long && !long {
				t.Skip("CCLOAD_LONG is not 1")
			}
			if !c.guest && testing.Short() {
				t.Skip("a guest is slow")
			}
			kerneltest.Unchanged(t)
			never := func(int) bool { return false }
			all := func(commands commands) {
				t.Helper()
				for _, args := range commands {
					if status, _, out := faults(never, args...); status != exitDone {
						t.Fatalf("%q: status %d\n%s", args, status, out)
					}
				}
			}
			clean := func() { // whatever is there
				faults(never, back...)
				cleanUp()
			}
			defer clean()
			here := func() string { t.Helper(); return lookAround(t, ns, group) }
			same := func(what, got string, want ...string) {
				t.Helper()
				if !slices.Contains(want, got) {
					t.Fatalf("%s it is\n%s\nand should be\n%s", what, got, strings.Join(want, "\nor\n"))
				}
			}
			all(c.before)
			begin := here()
			// anew makes it so again. The kernel may empty a slot late that it began to
			// empty before it was filled (see structops), and then it takes another try.
			anew := func() {
				t.Helper()
				for range 5 {
					clean()
					all(c.before)
					if here() == begin {
						return
					}
				}
				same("made anew,", here(), begin)
			}
			extends := slices.ContainsFunc(slices.Concat(c.before, c.undo), func(args []string) bool { return args[0] == "extend" && len(args) > 3 && args[2] != "--remove" })
			status, steps, out := faults(never, c.verb...)
			if status != exitDone {
				t.Fatalf("status %d\n%s", status, out)
			}
			done := here()
			all(commands{back})
			doneRestored := here()
			anew()
			all(commands{back})
			beginRestored := here()
			anew()

			stride := 1
			if testing.Short() {
				stride = 5
			}
			for n := 0; n < len(steps); n += stride {
				step := steps[n]
				// The one step.
				what := fmt.Sprintf("step %d of %d, %q, failed:", n+1, len(steps), step)
				status, tried, out := faults(func(i int) bool { return i == n }, c.verb...)
				faults(never, "unregister", "cct_none") // any verb sweeps first
				now := here()
				switch {
				case status == exitDone && c.partly: // which may have said what is left to do
					all(commands{c.verb})
					now = here()
					fallthrough
				case status == exitDone:
					same(what+" and all the same", now, done)
				case !c.partly:
					if c.swept && now == done {
						break
					}
					same(what+"\n"+out, now, begin)
					fallthrough
				default:
					all(commands{c.verb})
					same(what+" and after a repeat", here(), done)
				}
				if all(c.undo); extends {
					anew()
				}
				same(what+" undone,", here(), begin)

				// It and all later ones, if there were any.
				every := 3
				if long {
					every = 1
				}
				if len(tried) == n+1 || n%every > 0 {
					continue
				}
				what = fmt.Sprintf("all steps from %d of %d on, %q, failed:", n+1, len(steps), step)
				status, _, out = faults(func(i int) bool { return i >= n }, c.verb...)
				all(commands{back})
				if now := here(); !c.partly {
					same(what+"\n"+out+"restored", now, beginRestored, doneRestored)
				}
				anew()
			}
			all(c.after)
		})
	}
}

// lookAround is what commands change: names with their code, parameters and extensions,
// selections, the journal, pins, and what the sockets run.
func lookAround(t *testing.T, ns *netns.NS, group string) string {
	t.Helper()
	var b strings.Builder
	live, err := structops.Live()
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(live, func(a, b *structops.Info) int { return strings.Compare(a.Name, b.Name) })
	names := map[string]uint32{}
	for _, i := range live {
		if !i.Registered() || !strings.HasPrefix(i.Name, "cct") {
			continue
		}
		names[i.Name] = i.MapID
		fmt.Fprint(&b, i.Name)
		for _, m := range i.Members {
			fmt.Fprint(&b, " ", m.Tag)
		}
		for _, p := range i.Params {
			fmt.Fprintf(&b, " %s=%v", p.Name, p.Value)
		}
		fmt.Fprintln(&b)
	}
	allowed, err := registry.Allowed()
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(allowed)
	arms, err := registry.GroupArms(group)
	if err != nil {
		t.Fatal(err)
	}
	for _, ns := range []*netns.NS{nil, ns} {
		s, err := registry.Selections(ns)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "%+v\n", s)
	}
	fmt.Fprintf(&b, "allowed %s\ngroup %v\n", allowed, arms)
	err = ns.Do(func() error {
		c, err := inetdiag.Dial()
		if err != nil {
			return err
		}
		defer c.Close()
		const listen = 1 << 10
		return c.Dump(listen, false, func(s *inetdiag.Socket) error {
			fmt.Fprintf(&b, "listener %s\n", s.Cong)
			return nil
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	journal, err := ebpf.LoadPinnedMap("/sys/fs/bpf/ccload/use/undo", nil)
	if err == nil {
		defer journal.Close()
		var k, v []byte
		var lines []string
		for i := journal.Iterate(); i.Next(&k, &v); {
			lines = append(lines, "journal "+hex.EncodeToString(k)+" "+unix.ByteSliceToString(v[8:32])) // what comes back
		}
		slices.Sort(lines)
		fmt.Fprintln(&b, strings.Join(lines, "\n"))
	}
	filepath.WalkDir("/sys/fs/bpf/ccload", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return nil
		}
		if !strings.Contains(path, "/extend/") {
			fmt.Fprintln(&b, path)
			return nil
		}
		// Its name begins with the id of a map, which is another one each time.
		id, member, _ := strings.Cut(d.Name(), "-")
		by, err := structops.OpenPlace(path)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintln(&b, filepath.Dir(path), member, by.Program, id == fmt.Sprint(names[filepath.Base(filepath.Dir(filepath.Dir(path)))]))
		return nil
	})
	return b.String()
}
