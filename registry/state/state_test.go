// SPDX-License-Identifier: Apache-2.0

package state

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"ccload/internal/kerneltest"
	"ccload/internal/netns"
	"ccload/registry"
	"ccload/structops"

	"github.com/jsimonetti/rtnetlink/v2"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const whole = `
register:
  ccs_a:
    from: reno.o
    set: {beta: 0.85}
    allow: true
  ccs_b: {from: reno.o, map: bpf_reno}
use:
  - {cc: ccs_a}
  - {cc: ccs_b, netns: blue, allow: true}
  - {cc: ccs_b, netns: blue, route: 198.18.0.0/15, lock: true}
  - {split: {ccs_a: 10, cubic: 90}, cgroup: a.slice}
`

func TestParse(t *testing.T) {
	s, err := Parse("f", []byte(whole))
	if err != nil {
		t.Fatal(err)
	}
	for i := range s.Names {
		s.Names[i].at = nil
	}
	if want := []Name{
		{Name: "ccs_a", From: "reno.o", Set: map[string]string{"beta": "0.85"}, Allow: true},
		{Name: "ccs_b", From: "reno.o", Map: "bpf_reno", Set: map[string]string{}},
	}; !reflect.DeepEqual(s.Names, want) {
		t.Errorf("names %+v", s.Names)
	}
	var places []string
	for _, u := range s.Uses {
		places = append(places, u.place())
	}
	if want := []string{"default", "default in network namespace blue", "route 198.18.0.0/15 in network namespace blue", "cgroup a.slice"}; !slices.Equal(places, want) {
		t.Errorf("places %q", places)
	}
	if want := []registry.Arm{{Name: "ccs_a", Weight: 10}, {Name: "cubic", Weight: 90}}; !slices.Equal(s.Uses[3].Split, want) {
		t.Errorf("arms %v", s.Uses[3].Split)
	}
}

func TestParseErrors(t *testing.T) {
	for _, c := range []struct{ file, want string }{
		{"", "f: it is empty"},
		{"[", "f:2:1: "},
		{"- a", "f:1:1: a list where keys with values should be"},
		{"names: {}", `f:1:1: unknown key "names": there are register, use`},
		{"register: {a: {}, a: {}}", `f:1:19: key "a": twice`},
		{"register: {a-b: {}}", `f:1:12: name "a-b"`},
		{"register: {a: {set: [b]}}", "f:1:21: a list where keys with values should be"},
		{"register: {a: {allow: perhaps}}", `f:1:23: "perhaps": true or false`},
		{"use: {}", "f:1:6: a mapping where a list should be"},
		{"use: [{}]", "f:1:7: it has no cc"},
		{"use: [{cc: a, route: 10.0.0.1/8}]", `f:1:22: route "10.0.0.1/8": there are bits beyond the prefix: say 10.0.0.0/8`},
		{"use: [{cc: a, route: 10.0.0.1}]", `f:1:22: route "10.0.0.1": not of the form`},
		{"use: [{cc: a, lock: true}]", "f:1:7: lock: only for a route"},
		{"use: [{cc: a, split: {a: 1}, cgroup: b}]", "f:1:7: cc and split: one of them"},
		{"use: [{split: {a: 1}}]", "f:1:7: split: only for a cgroup"},
		{"use: [{split: {a: 0}, cgroup: b}]", `f:1:19: "0": a whole number from 1 to`},
		{"use: [{cc: a, cgroup: b, netns: c}]", "f:1:7: netns and cgroup: one of them"},
		{"use: [{cc: a, cgroup: b, route: 10.0.0.0/8}]", "f:1:7: route and cgroup: one of them"},
		{"use: [{cc: a}, {cc: b}]", "f:1:16: default: there is another for that"},
	} {
		if _, err := Parse("f", []byte(c.file)); err == nil || !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("%s\n got %v\nwant %s", c.file, err, c.want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(whole))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := Parse("f", b)
		if err != nil {
			if !strings.HasPrefix(err.Error(), "f:") {
				t.Errorf("an error without its place: %v", err)
			}
			return
		}
		for _, n := range s.Names {
			if structops.CheckName(n.Name) != nil || n.From == "" && n.Set == nil {
				t.Errorf("%+v", n)
			}
		}
		for _, u := range s.Uses {
			if err := u.check(); err != nil {
				t.Errorf("%+v: %v", u, err)
			}
		}
	})
}

// objects are those of bpf/.
type objects struct{}

func (objects) Object(n *Name) (*structops.Spec, string, error) {
	b, err := os.ReadFile(filepath.Join("../../bpf", n.From))
	if err != nil {
		return nil, "", err
	}
	s, err := structops.Parse(b)
	if err != nil {
		return nil, "", err
	}
	for k, v := range n.Set {
		if err := s.Set(k, v); err != nil {
			return nil, "", err
		}
	}
	return s, n.Map, nil
}

func (objects) Format(_ *Name, _ string, value any) string { return "stored" }

// What a file wants comes to be, in one go; then there is nothing to do; and what
// was selected can be taken back as by any other way.
func TestApply(t *testing.T) {
	kerneltest.Privileged(t)
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	parse := func(file string) *State {
		s, err := Parse("f", []byte(strings.ReplaceAll(file, "NS", ns.Path())))
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	steps := func(p *Plan) (all []string) {
		for _, s := range p.Steps {
			all = append(all, s.Do+" "+s.From+">"+s.To)
		}
		return all
	}
	plan := func(file string, want ...string) *Plan {
		t.Helper()
		p, err := parse(file).Plan(objects{})
		if err != nil {
			t.Fatal(err)
		}
		if got := steps(p); !slices.Equal(got, want) {
			t.Fatalf("the plan is %q, not %q", got, want)
		}
		return p
	}
	before, err := registry.Default(ns)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := registry.RestoreDefault(ns); err != nil {
			t.Error(err)
		}
		if now, err := registry.Default(ns); err != nil || now != before {
			t.Errorf("the default is %q, %v; it was %q", now, err, before)
		}
		for _, n := range []string{"ccs_a", "ccs_b"} {
			if _, err := registry.Unregister(n, registry.UnregisterOptions{}); err != nil {
				t.Error(err)
			}
		}
	})

	const file = `
register:
  ccs_a: {from: cubic.bpf.o, set: {beta: 800}, allow: true}
  ccs_b: {from: reno.bpf.o}
use: [{cc: ccs_a, netns: NS}]
`
	p := plan(file, "register >cubic.bpf.o beta=800", "register >reno.bpf.o", "use "+before+">ccs_a")
	if _, _, err := registry.Lookup("ccs_a"); err == nil {
		t.Fatal("a plan has registered it")
	}
	if err := p.Apply(); err != nil {
		t.Fatal(err)
	}
	if now, err := registry.Default(ns); err != nil || now != "ccs_a" {
		t.Errorf("the default is %q, %v", now, err)
	}
	plan(file)

	first, _, err := registry.Lookup("ccs_a")
	if err != nil {
		t.Fatal(err)
	}
	p = plan(strings.Replace(file, "800", "900", 1), "set beta=stored>beta=stored")
	if err := p.Apply(); err != nil {
		t.Fatal(err)
	}
	p = plan(strings.Replace(file, "reno.bpf.o", "cubic.bpf.o", 1), "set beta=stored>beta=stored", "replace >cubic.bpf.o: other code")
	if err := p.Apply(); err != nil {
		t.Fatal(err)
	}
	now, _, err := registry.Lookup("ccs_a")
	if err != nil || now.MapID != first.MapID {
		t.Errorf("what was only set is another map: %v", err)
	}

	// What cannot be done keeps nothing else from being done, be it before or after.
	p = plan("register: {reno: {from: reno.bpf.o}, ccs_b: {from: reno.bpf.o}}\nuse: [{cc: ccs_none, netns: NS}, {cc: ccs_b, netns: nowhere}, {cc: ccs_a, netns: NS, route: 203.0.113.0/24}]",
		"register >", "replace >reno.bpf.o: other code", "use ccs_a>ccs_none", "use >", "use >ccs_a")
	err = p.Apply()
	_, taken := errors.AsType[*registry.TakenError](err)
	_, missing := errors.AsType[*registry.NotFoundError](err)
	if !taken || !missing || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the error has not all: %v", err)
	}
	for i, want := range []string{"f:1:12: ", "", "f:2:7: ", "f:2:", "f:2:"} {
		s := p.Steps[i]
		if s.Done != (want == "") || !strings.HasPrefix(s.Error, want) || want == "" && s.Error != "" {
			t.Errorf("step %d: %+v", i, s)
		}
	}
}

// Routes and control groups, too, are compared with what is there.
func TestApplyPlaces(t *testing.T) {
	kerneltest.Privileged(t)
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() }) // after what is selected there is put back
	c, err := rtnetlink.Dial(&netlink.Config{NetNS: ns.FD()})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Link.Set(&rtnetlink.LinkMessage{Index: 1, Flags: unix.IFF_UP, Change: unix.IFF_UP}); err != nil {
		t.Fatal(err)
	}
	if err := c.Route.Add(&rtnetlink.RouteMessage{
		Family: unix.AF_INET, DstLength: 15, Table: unix.RT_TABLE_MAIN, Protocol: unix.RTPROT_STATIC,
		Scope: unix.RT_SCOPE_LINK, Type: unix.RTN_UNICAST,
		Attributes: rtnetlink.RouteAttributes{Dst: net.IPv4(198, 18, 0, 0).To4(), OutIface: 1},
	}); err != nil {
		t.Fatal(err)
	}
	group := cgroup(t)
	t.Cleanup(func() {
		_, err := registry.Recover() // the namespace is gone
		if _, rerr := registry.Restore(); err != nil || rerr != nil {
			t.Error(err, rerr)
		}
		if arms, err := registry.GroupArms(group); err != nil || arms != nil {
			t.Errorf("the control group has %v, %v", arms, err)
		}
	})
	file := strings.NewReplacer("NS", ns.Path(), "GROUP", group).Replace(`
use:
  - {cc: cubic, netns: NS, route: 198.18.0.0/15, lock: true}
  - {split: {reno: 10, cubic: 90}, cgroup: GROUP}
`)
	apply := func(file string, want ...string) {
		t.Helper()
		s, err := Parse("f", []byte(file))
		if err != nil {
			t.Fatal(err)
		}
		p, err := s.Plan(objects{})
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, s := range p.Steps {
			got = append(got, s.From+">"+s.To)
		}
		if !slices.Equal(got, want) {
			t.Errorf("the steps are %q, not %q", got, want)
		}
		if err := p.Apply(); err != nil {
			t.Fatal(err)
		}
	}
	apply(file, ">cubic lock", ">cubic=90 reno=10")
	apply(file)
	apply(strings.NewReplacer(", lock: true", "", "cubic: 90", "cubic: 10").Replace(file), "cubic lock>cubic", "cubic=90 reno=10>cubic=10 reno=10")
}

// cgroup makes a control group, wherever cgroup2 is or can be mounted.
func cgroup(t *testing.T) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	mount := ""
	for line := range strings.Lines(string(mounts)) {
		if point, ok := structops.MountPoint(line, "cgroup2"); ok {
			mount = point
			break
		}
	}
	if mount == "" {
		mount = t.TempDir()
		if err := unix.Mount("none", mount, "cgroup2", 0, ""); err != nil {
			kerneltest.Skip(t, "cgroup2: "+err.Error())
		}
		t.Cleanup(func() { unix.Unmount(mount, 0) })
	}
	dir, err := os.MkdirTemp(mount, "ccs")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}
