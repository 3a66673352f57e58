// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"ccload/internal/kerneltest"
	"ccload/internal/netns"
	"ccload/structops"

	"golang.org/x/sys/unix"
)

func TestParseSplit(t *testing.T) {
	got, err := ParseSplit("bpf_cubic=10,cubic=90")
	if want := []Arm{{"bpf_cubic", 10}, {"cubic", 90}}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	for _, bad := range []string{"", "a", "a=", "=1", "a=0", "a=-1", "a=1.5", "a=1000001", "a=1,a=2", "a=1,", strings.Repeat("a=1,", 8) + "b=1"} {
		if got, err := ParseSplit(bad); err == nil {
			t.Errorf("%q: %+v", bad, got)
		}
	}
}

// The thresholds are where user space and the program meet: every draw of 32 bits is
// of exactly one arm.
func TestConfigure(t *testing.T) {
	c, err := configure([]Arm{{"a", 1}, {"b", 2}, {"c", 1}}, func(name string) (bool, error) { return name == "b", nil })
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []uint64{1 << 30, 3 << 30, 1 << 32} {
		if a := c.Arm[i]; a.Below != want || (a.ECN == 1) != (i == 1) || a.Weight != uint32(1+i%2) {
			t.Errorf("arm %d: %+v, want below %d", i, a, want)
		}
	}
	if n := binary.Size(c); c.Arms != 3 || c.Mixed != 1 || n != 8+8*32 {
		t.Errorf("%d arms in %d bytes", c.Arms, n)
	}
}

func TestFindGroup(t *testing.T) {
	root := t.TempDir()
	if err := os.MkdirAll(filepath.Join(root, "proc/self"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "proc/self/mountinfo"), []byte("36 25 0:32 / /sys rw - sysfs sysfs rw\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := findGroup(root, "/"); err == nil || !strings.Contains(err.Error(), "not mounted") {
		t.Error(err)
	}
}

// groups makes a control group with another in it, wherever cgroup2 is or can be
// mounted.
func groups(t testing.TB) (outer, inner string) {
	t.Helper()
	mount, err := groupMount("/")
	if err != nil {
		mount = t.TempDir()
		if err := unix.Mount("none", mount, "cgroup2", 0, ""); err != nil {
			kerneltest.Skip(t, "cgroup2: "+err.Error())
		}
		t.Cleanup(func() { unix.Unmount(mount, 0) })
	}
	outer = filepath.Join(mount, fmt.Sprintf("ccr-%d", os.Getpid()))
	inner = filepath.Join(outer, "inner")
	for _, d := range []string{outer, inner} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			for deadline := time.Now().Add(time.Second); ; time.Sleep(time.Millisecond) {
				if err := os.Remove(d); err == nil || errors.Is(err, os.ErrNotExist) {
					return
				} else if time.Now().After(deadline) {
					t.Error(err)
					return
				}
			}
		})
	}
	home, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	_, back, _ := strings.Cut(string(home), "0::")
	back, _, _ = strings.Cut(back, "\n")
	t.Cleanup(func() { move(t, filepath.Join(mount, back)) })
	return outer, inner
}

// move puts this process into a control group: the sockets that it opens from then
// on are the group's.
func move(t testing.TB, group string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(group, "cgroup.procs"), []byte("0"), 0); err != nil {
		t.Fatal(err)
	}
}

// loopback is a namespace of its own with its loopback device up.
func loopback(t testing.TB) *netns.NS {
	t.Helper()
	ns := newNS(t)
	up(t, rt(t, ns), "lo", "127.0.0.1/8", "::1/128")
	return ns
}

func TestUseGroup(t *testing.T) {
	kerneltest.Privileged(t)
	const name = "ccr_group"
	register(t, Options{Name: name}) // it is restricted, which does not matter here
	outer, inner := groups(t)
	ns := loopback(t)
	def, err := Default(ns)
	if err != nil {
		t.Fatal(err)
	}
	expect := func(what, want string) {
		t.Helper()
		for _, addr := range []string{"127.0.0.1", "::1"} {
			if opener, accepter, _ := between(t, ns, ns, addr); opener != want || accepter != want {
				t.Errorf("%s: %s: it opens with %s, accepts with %s, want %s", what, addr, opener, accepter, want)
			}
		}
	}
	use := func(dir, name string) *GroupChange {
		t.Helper()
		c, err := UseGroup(dir, []Arm{{name, 1}})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	mount, _ := groupMount("/")
	below, _ := filepath.Rel(mount, outer)
	c := use(outer, name)
	if c.Before != nil || c.Group != "/"+below {
		t.Errorf("%+v", c)
	}
	if st, err := os.Stat(c.Pin); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the pin: %v, %v", st, err)
	}
	expect("outside", def)
	move(t, inner)
	expect("in a group of the group", name)
	use("/"+below+"/inner", "reno")
	expect("the inner group decides", "reno")
	move(t, outer)
	expect("the outer group keeps its own", name)
	found := groupSelections()
	slices.SortFunc(found, func(a, b Selection) int { return strings.Compare(a.Target, b.Target) })
	if len(found) != 2 || found[0].Target != "/"+below || found[0].Name != name || found[0].Share != 1 || *found[0].Chosen != 8 || *found[0].Failed != 0 || found[1].Target != "/"+below+"/inner" || *found[1].Chosen != 4 {
		t.Errorf("selected: %+v", found)
	}
	if c := use(below, "reno"); !slices.Equal(c.Before, []Arm{{name, 1}}) {
		t.Errorf("replaced: %+v", c)
	}
	expect("replaced", "reno")
	use(outer, name)

	// The name goes away while it is selected.
	var inUse *InUseError
	if _, err := Unregister(name, UnregisterOptions{}); !errors.As(err, &inUse) || !slices.Equal(inUse.Places, []string{"cgroup /" + below}) {
		t.Errorf("in use: %v", err)
	}
	e, err := find(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := structops.Unregister(e.info); err != nil {
		t.Fatal(err)
	}
	expect("without the name", def)
	if found := groupSelections(); !slices.ContainsFunc(found, func(s Selection) bool { return s.Name == name && *s.Chosen == 0 && *s.Failed == 4 }) {
		t.Errorf("selected: %+v", found)
	}
	register(t, Options{Name: name})
	expect("with the name again", name)
	u, err := Unregister(name, UnregisterOptions{Reset: "reno"})
	if err != nil || len(u.Moved) != 1 {
		t.Errorf("%+v, %v", u, err)
	}
	expect("reset", "reno")

	for what, dir := range map[string]string{"no such group": "/ccr-none", "not a group": "/proc", "outside": "../../.."} {
		if _, err := UseGroup(dir, []Arm{{"reno", 1}}); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", what, err)
		}
	}
	var missing *NotFoundError
	if _, err := UseGroup(outer, []Arm{{"renno", 1}}); !errors.As(err, &missing) || missing.Nearest != "reno" {
		t.Errorf("unknown name: %v", err)
	}
	for _, arms := range [][]Arm{nil, {{"reno", 0}}, make([]Arm, 9)} {
		if _, err := UseGroup(outer, arms); err == nil {
			t.Errorf("%+v was taken", arms)
		}
	}
	r, err := RestoreGroup(inner)
	if err != nil || len(r.Restored) != 1 || r.Restored[0].Target != "/"+below+"/inner" {
		t.Errorf("%+v, %v", r, err)
	}
	if r, err = Restore(); err != nil || len(r.Restored) != 1 || len(r.Warnings) > 0 {
		t.Errorf("%+v, %v", r, err)
	}
	expect("restored", def)
	nothingLeft(t)

	// A selection goes with its group.
	use(inner, "reno")
	if err := os.Remove(inner); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		if warnings, err := Recover(); err != nil || len(warnings) > 0 {
			t.Fatal(warnings, err)
		}
		if _, err := os.Stat(useDir); errors.Is(err, os.ErrNotExist) {
			break
		} else if time.Now().After(deadline) {
			t.Fatal("the pin of a group that is gone is left")
		}
	}
}

// Connections are split by weight, each connection's two ends for themselves, and
// counted.
func TestSplit(t *testing.T) {
	kerneltest.Privileged(t)
	const name, n = "ccr_split", 200
	register(t, Options{Name: name})
	group, _ := groups(t)
	ns := loopback(t)
	if _, err := UseGroup(group, []Arm{{name, 30}, {"reno", 70}}); err != nil {
		t.Fatal(err)
	}
	move(t, group)
	got := map[string]uint64{}
	for range n {
		opener, accepter, _ := between(t, ns, ns, "127.0.0.1")
		got[opener]++
		got[accepter]++
	}
	// Binomial with p = 0.3: three in a million are more than five deviations off.
	if ours := int(got[name]); ours < 120-46 || ours > 120+46 || got[name]+got["reno"] != 2*n {
		t.Errorf("split: %v", got)
	}
	for _, s := range groupSelections() {
		if *s.Chosen != got[s.Name] || *s.Failed != 0 || s.Share != map[string]float64{name: 0.3, "reno": 0.7}[s.Name] {
			t.Errorf("%s: share %v, %d chosen, %d failed; connections have %v", s.Name, s.Share, *s.Chosen, *s.Failed, got)
		}
	}
	if _, err := Restore(); err != nil {
		t.Error(err)
	}
	nothingLeft(t)
}

// One that needs ECN gets it: the connection asks for it and offers it, though the
// sysctl says that connections do not; and one that does not need it goes without.
func TestGroupECN(t *testing.T) {
	kerneltest.Privileged(t)
	const name = "ccr_ecn"
	b, err := os.ReadFile("../bpf/dctcp.bpf.o")
	if err != nil {
		t.Fatal(err)
	}
	spec, err := structops.Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Register(spec, Options{Name: name}); err != nil {
		t.Fatal(err)
	}
	defer Unregister(name, UnregisterOptions{})
	group, _ := groups(t)
	ns := loopback(t)
	move(t, group)
	for _, arms := range [][]Arm{{{name, 1}}, {{"reno", 1}}, {{name, 1}, {"reno", 1}}} {
		if _, err := UseGroup(group, arms); err != nil {
			t.Fatal(err)
		}
		seen := map[bool]bool{}
		for range 20 {
			for _, addr := range []string{"127.0.0.1", "::1"} {
				// Who does not need ECN refuses it to a peer who needs it (ECT in the SYN).
				on, opener, accepter := ecn(t, ns, addr)
				if both := opener == name && accepter == name; on != both {
					t.Errorf("%+v: %s: from %s to %s with ECN: %v", arms, addr, opener, accepter, on)
				}
				seen[on] = true
			}
		}
		if want := map[bool]bool{arms[0].Name == name: true, arms[len(arms)-1].Name == name: true}; !maps.Equal(seen, want) {
			t.Errorf("%+v: with ECN: %v", arms, seen)
		}
	}
	if _, err := Restore(); err != nil {
		t.Error(err)
	}
}

// ecn opens a connection, and says whether it has ECN and which congestion controls.
func ecn(t *testing.T, ns *netns.NS, addr string) (on bool, opener, accepter string) {
	t.Helper()
	var l net.Listener
	var c *net.TCPConn
	err := ns.Do(func() (err error) {
		if l, err = net.Listen("tcp", net.JoinHostPort(addr, "0")); err == nil {
			c, err = dialHere(netip.MustParseAddrPort(l.Addr().String()))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	defer c.Close()
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	opener, err1 := congestionOf(c)
	accepter, err2 := congestionOf(s.(*net.TCPConn))
	raw, err3 := c.SyscallConn()
	if err := errors.Join(err1, err2, err3); err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		const optECN = 8 // TCPI_OPT_ECN
		var info *unix.TCPInfo
		if info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			on = info.Options&optECN != 0
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return on, opener, accepter
}
