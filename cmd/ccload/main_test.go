// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"ccload/cc"
	"ccload/harness/vm"
	"ccload/internal/fault"
	"ccload/internal/kerneltest"
	"ccload/internal/vmtest"
	"ccload/registry"
	"ccload/structops"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/parquet-go/parquet-go"
	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

func init() {
	kerneltest.More = func() ([]string, error) {
		live, err := structops.Live()
		return []string{fmt.Sprintf("%d congestion controls in BPF", len(live))}, err
	}
}

var update = flag.Bool("update", false, "write the golden parts of testdata/*.txtar anew")

func TestMain(m *testing.M) {
	if vm.Inside() {
		inGuest()
	}
	refuse(os.Getenv("REFUSE"))
	testscript.Main(m, map[string]func(){
		"ccload": main,
		"nobody": asNobody,
		"admin":  asAdmin,
		"locked": lockedDown,
		"hold":   hold,
		"at":     at,
	})
}

// refuse lets the kernel refuse some of our programs, whose names are divided by
// commas, and duplicates of others' descriptors.
func refuse(programs string) {
	if programs == "" {
		return
	}
	names := strings.Split(programs, ",")
	fault.Set(func(step string) error {
		if slices.Contains(names, strings.TrimPrefix(step, "load program ")) {
			return unix.EPERM
		}
		return nil
	})
}

// TestSessions runs testdata/*.txtar through the real main on the real kernel. A
// script that leaves the kernel other than it found it fails; "unchanged" looks
// in between. Besides the usual commands there are
//
//	status N COMMAND…     the exit status must be N
//	measured COMMAND…     a run on the clock: 0, or 3 where the machine did not keep up
//	unchanged             the kernel is as it was when the script began
//	other FILE.o PIN      another tool registers the object's congestion control
//	stale PIN             a pin of something that is no congestion control
//	many N PREFIX         N congestion controls, PREFIX000 and on, until the script ends
//	patch IN OLD NEW OUT  bytes in the place of others, written as in Go strings
//	nobody COMMAND…       as a user without any capability
//	admin COMMAND…        as a user with CAP_SYS_ADMIN and CAP_NET_ADMIN, and no other
//	locked COMMAND…       where the kernel refuses BPF even to root
//	hold PORT…            a connection to each port of loopback, and who listens there,
//	                      until it is killed; then there is a file named held
//	at STEP FILE COMMAND… makes the file when the command comes to a step (package
//	                      fault), and waits there for as long as it is there
//	appears FILE          waits for it
//	signalled SIGNAL[,SIGNAL…] FILE|TIME COMMAND…
//	                      sends signals once the file is there or the time is over; the
//	                      exit status must be the last one's. The output is in said
//	uncolumn FILE NAME    a Parquet file loses a column
//	fulldisk SIZE DIR     a disk of that many MiB until the script ends
//
// The condition [live:NAME] holds if the kernel has that congestion control.
// $OBJECTS holds the law-breaking objects of structops/testdata, $BPF the objects
// of the catalogue, $EXPERIMENTS the experiment files, $TESTDATA the objects of
// this package. With $REFUSE the kernel refuses those of our programs to ccload that
// it names, divided by commas.
func TestSessions(t *testing.T) {
	kerneltest.Privileged(t)
	sessions(t, "testdata")
}

// TestGuestSessions runs the scripts that boot guests.
func TestGuestSessions(t *testing.T) {
	kerneltest.Privileged(t)
	vmtest.Kernel(t, "debian-6.12")
	sessions(t, "testdata/guest")
}

func sessions(t *testing.T, dir string) {
	objects, err := filepath.Abs("../../structops/testdata")
	if err != nil {
		t.Fatal(err)
	}
	bpf, err := filepath.Abs("../../bpf")
	if err != nil {
		t.Fatal(err)
	}
	experiments, err := filepath.Abs("../../experiments")
	if err != nil {
		t.Fatal(err)
	}
	testdata, err := filepath.Abs("testdata")
	if err != nil {
		t.Fatal(err)
	}
	testscript.RunT(sequential{t}, testscript.Params{
		Dir:                 dir,
		UpdateScripts:       *update,
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			env.Setenv("OBJECTS", objects)
			env.Setenv("BPF", bpf)
			env.Setenv("EXPERIMENTS", experiments)
			env.Setenv("TESTDATA", testdata)
			env.Setenv("XDG_CACHE_HOME", filepath.Dir(filepath.Dir(vm.CacheDir()))) // the guests' kernels are there
			before, err := kerneltest.Take()
			env.Values["before"] = before
			env.Defer(func() {
				err := before.Check()
				cleanUp()
				if err != nil {
					env.T().Fatal(err)
				}
			})
			return err
		},
		Condition: func(cond string) (bool, error) {
			name, ok := strings.CutPrefix(cond, "live:")
			if !ok {
				return false, fmt.Errorf("unknown condition %q", cond)
			}
			return slices.Contains(live(""), name), nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"status":    status,
			"measured":  measuredRun,
			"unchanged": unchanged,
			"other":     other,
			"stale":     stale,
			"patch":     patch,
			"fulldisk":  fullDisk,
			"uncolumn":  uncolumn,
			"many":      many,
			"appears":   appears,
			"signalled": signalled,
		},
	})
}

// sequential keeps scripts from running at the same time: there is one kernel.
type sequential struct{ *testing.T }

func (sequential) Parallel() {}

func (s sequential) Run(name string, f func(testscript.T)) {
	s.T.Run(name, func(t *testing.T) { f(sequential{t}) })
}

func (sequential) Verbose() bool { return testing.Verbose() }

func status(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: status N COMMAND…")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	if got := exitStatus(ts, args[1:]); got != want {
		ts.Fatalf("exit status is %d, want %d", got, want)
	}
}

func measuredRun(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 {
		ts.Fatalf("usage: measured COMMAND…")
	}
	if got := exitStatus(ts, args); got != exitDone && got != exitChecks {
		ts.Fatalf("exit status is %d, want %d or %d", got, exitDone, exitChecks)
	}
}

func exitStatus(ts *testscript.TestScript, args []string) int {
	err := ts.Exec(args[0], args[1:]...)
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return exit.ExitCode()
	}
	ts.Check(err)
	return 0
}

func unchanged(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) > 0 {
		ts.Fatalf("usage: unchanged")
	}
	ts.Check(ts.Value("before").(kerneltest.Snapshot).Check())
}

// cleanUp takes out what a failed script has left, so that the next may pass: all
// names of the scripts begin with cct.
func cleanUp() {
	registry.Restore()
	entries, _, _ := registry.List()
	for _, e := range entries {
		if strings.HasPrefix(e.Name, "cct") {
			registry.Unregister(e.Name, registry.UnregisterOptions{Reset: "reno"})
		}
	}
}

// other does what a loader over the library does that knows nothing of ccload.
func other(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: other FILE.o PIN")
	}
	coll, err := ebpf.LoadCollection(ts.MkAbs(args[0]))
	ts.Check(err)
	defer coll.Close()
	for _, m := range coll.Maps {
		if m.Type() == ebpf.StructOpsMap {
			l, err := link.AttachStructOps(link.StructOpsOptions{Map: m})
			ts.Check(err)
			defer l.Close()
			ts.Check(l.Pin(args[1]))
		}
	}
}

func stale(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: stale PIN")
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	ts.Check(err)
	defer m.Close()
	ts.Check(m.Pin(args[0]))
}

func many(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: many N PREFIX")
	}
	spec, err := structops.Parse(cc.Lookup("bpf_reno").Object())
	ts.Check(err)
	obj, err := spec.Load()
	ts.Check(err)
	defer obj.Close()
	one, err := obj.Info("")
	ts.Check(err)
	for i := range must(strconv.Atoi(args[0])) {
		l, err := one.Copy(fmt.Sprintf("%s%03d", args[1], i), func(*structops.Link) error { return nil })
		ts.Check(err)
		ts.Defer(func() { ts.Check(l.Close()) })
	}
}

func fullDisk(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: fulldisk SIZE DIR")
	}
	dir := ts.MkAbs(args[1])
	ts.Check(os.Mkdir(dir, 0o755))
	ts.Check(unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+args[0]+"m"))
	ts.Defer(func() { ts.Check(unix.Unmount(dir, 0)) })
}

func uncolumn(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: uncolumn FILE NAME")
	}
	b, err := os.ReadFile(ts.MkAbs(args[0]))
	ts.Check(err)
	f, err := parquet.OpenFile(bytes.NewReader(b), int64(len(b)))
	ts.Check(err)
	columns := parquet.Group{}
	for _, c := range f.Schema().Fields() {
		if c.Name() != args[1] {
			columns[c.Name()] = c
		}
	}
	schema := parquet.NewSchema("row", columns)
	conv, err := parquet.Convert(schema, f.Schema())
	ts.Check(err)
	var out bytes.Buffer
	w := parquet.NewWriter(&out, schema)
	for _, g := range f.RowGroups() {
		_, err := parquet.CopyRows(w, parquet.ConvertRowReader(g.Rows(), conv))
		ts.Check(err)
	}
	ts.Check(w.Close())
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), out.Bytes(), 0o600))
}

func patch(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 4 {
		ts.Fatalf("usage: patch IN OLD NEW OUT")
	}
	obj, err := os.ReadFile(ts.MkAbs(args[0]))
	ts.Check(err)
	var part [2][]byte
	for i := range part {
		s, err := strconv.Unquote(`"` + args[1+i] + `"`)
		ts.Check(err)
		part[i] = []byte(s)
	}
	if len(part[0]) != len(part[1]) || !bytes.Contains(obj, part[0]) {
		ts.Fatalf("cannot patch %s to %s", args[1], args[2])
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[3]), bytes.ReplaceAll(obj, part[0], part[1]), 0o600))
}

// asNobody runs a command of TestMain as a user without capabilities. That user
// may not look into the directory of the test binary, so it runs what root opened.
func asNobody() {
	self := must(os.Executable())
	fd := must(unix.Open(self, unix.O_RDONLY, 0))
	check(unix.Chdir("/"))
	check(unix.Setgroups(nil))
	check(unix.Setgid(65534))
	check(unix.Setuid(65534))
	check(unix.Exec(fmt.Sprintf("/proc/self/fd/%d", fd), os.Args[1:], os.Environ()))
}

// asAdmin is asNobody with two capabilities.
func asAdmin() {
	runtime.LockOSThread()
	self := must(os.Executable())
	fd := must(unix.Open(self, unix.O_RDONLY, 0))
	check(unix.Chdir("/"))
	check(unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0))
	check(unix.Setgroups(nil))
	_, _, errno := unix.RawSyscall(unix.SYS_SETUID, 65534, 0, 0) // of this thread, which execs
	if errno != 0 {
		log.Fatal(errno)
	}
	const caps = 1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_NET_ADMIN
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	both := [2]unix.CapUserData{{Effective: caps, Permitted: caps, Inheritable: caps}}
	check(unix.Capset(&header, &both[0]))
	for _, c := range []uintptr{unix.CAP_SYS_ADMIN, unix.CAP_NET_ADMIN} {
		check(unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, c, 0, 0))
	}
	check(unix.Exec(fmt.Sprintf("/proc/self/fd/%d", fd), os.Args[1:], os.Environ()))
}

// lockedDown runs a command of TestMain where bpf(2) is refused with EPERM, as a
// locked-down kernel or a container's seccomp filter does.
func lockedDown() {
	runtime.LockOSThread()
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS}, // seccomp_data.nr
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_BPF, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	check(unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
	check(unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&prog)), 0, 0))
	check(unix.Exec(must(os.Executable()), os.Args[1:], os.Environ()))
}

func must[T any](v T, err error) T {
	check(err)
	return v
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func hold() {
	for _, port := range os.Args[1:] {
		l, err := net.Listen("tcp4", "127.0.0.1:"+port)
		if err != nil {
			log.Fatal(err)
		}
		c, err := net.Dial("tcp4", l.Addr().String())
		if err != nil {
			log.Fatal(err)
		}
		s, err := l.Accept()
		if err != nil {
			log.Fatal(err)
		}
		defer func() { l.Close(); c.Close(); s.Close() }()
	}
	if err := os.WriteFile("held", nil, 0o600); err != nil {
		log.Fatal(err)
	}
	time.Sleep(time.Minute)
}
