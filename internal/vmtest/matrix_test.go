// SPDX-License-Identifier: Apache-2.0

package vmtest_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ccload/harness/vm"
	"ccload/internal/kerneltest"
	"ccload/internal/vmtest"
)

// suites are the tests that run on every kernel that has a name: of a package,
// those that -test.run chooses. What one needs of the repository is below its
// testdata, or an object of the catalogue or of structops' tests.
var suites = []struct{ pkg, run string }{
	{"structops", "."},
	{"registry", "."},
	{"registry/state", "."},
	{"bpf", "."},
	{"cmd/ccload", "^(TestDCTCP|TestCatalogue|TestExtend|TestKilled)"},
	{"harness", "^(TestKindsAgree|TestAuto|TestKillNetem|TestStopped|TestHeavyLoss)$"},
	{"harness/link", "Netem|Choose"},
	{"harness/sampler", "."},
	{"internal/inetdiag", "."},
}

// modules are those that the tests make use of, where the kernel has them.
var modules = strings.Fields("tun veth sch_netem inet_diag tcp_diag tcp_dctcp")

// Limits of a suite, in the guest's time: of the tests, which then tell where they
// are, and of all.
const (
	testLimit  = 5 * time.Minute
	guestLimit = testLimit + time.Minute
)

// root is where the repository is in the guest.
const root = "/ccload"

func TestMain(m *testing.M) {
	if vm.Inside() {
		vm.Init(nil, inGuest)
	}
	os.Exit(m.Run())
}

// inGuest runs the test program in a directory, as "go test" would.
func inGuest(args []string, stdout, stderr io.Writer) int {
	if err := loopbackUp(); err != nil {
		fmt.Fprintln(stderr, err)
		return 1
	}
	cmd := exec.Command("./test", args[1:]...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = args[0], stdout, stderr
	cmd.Env = append(os.Environ(), kerneltest.Require+"=1")
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.Exited() {
		return exit.ExitCode()
	}
	if err != nil {
		fmt.Fprintln(stderr, err)
		return 1
	}
	return 0
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	r, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	r.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, r)
}

// TestKernels runs the suites on every kernel that has a name, each in a guest of
// its own. Their tests are its subtests: what fails there fails here, and what is
// skipped there is skipped here, with the same reason.
func TestKernels(t *testing.T) {
	kernels := map[string]*vm.Kernel{} // those that are here
	for _, name := range vm.Names() {
		t.Run(name, func(t *testing.T) { kernels[name] = vmtest.Kernel(t, name) })
	}
	if len(kernels) == 0 {
		return
	}
	runner := vmtest.Test(t, "ccload/internal/vmtest")
	for _, s := range suites {
		guest := vm.Guest{Binary: runner, Files: files(t, s.pkg)}
		for name, k := range kernels {
			t.Run(name+"/"+s.pkg, func(t *testing.T) {
				t.Parallel()
				runSuite(t, k, guest, s.pkg, s.run)
			})
		}
	}
}

// files are the guest's: a package's test program, and what it reads.
func files(t *testing.T, pkg string) map[string][]byte {
	t.Helper()
	read := func(file string) []byte {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	const repository = "../.."
	out := map[string][]byte{path.Join(root, pkg, "test"): read(vmtest.Test(t, "ccload/"+pkg))}
	for _, dir := range []string{"bpf", "bpf/examples", "structops/testdata"} {
		objects, err := filepath.Glob(filepath.Join(repository, dir, "*.bpf.o"))
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range objects {
			out[path.Join(root, dir, filepath.Base(o))] = read(o)
		}
	}
	data := filepath.Join(repository, pkg, "testdata")
	err := filepath.WalkDir(data, func(file string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			out[path.Join(root, pkg, "testdata", strings.TrimPrefix(file, data))] = read(file)
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return out
}

// runSuite runs one suite on one kernel.
func runSuite(t *testing.T, k *vm.Kernel, g vm.Guest, pkg, run string) {
	g.Kernel, g.Optional, g.Limit = k, modules, guestLimit
	g.Args = []string{path.Join(root, pkg), "-test.v=test2json", "-test.short", "-test.run=" + run, "-test.timeout=" + testLimit.String()}
	var out, console bytes.Buffer
	started := time.Now()
	status, err := g.Run(t.Context(), &out, &out, &console)
	if err != nil {
		t.Errorf("%v\n%s", err, out.String())
		return
	}
	outcomes, rest, err := parse(t.Context(), &out)
	if err != nil {
		t.Fatal(err)
	}
	counts := map[string]int{}
	for _, o := range outcomes {
		counts[o.action]++
		if o.action == passed {
			continue
		}
		t.Run(o.test, func(t *testing.T) {
			if o.action == skipped {
				t.Skip(strings.TrimSpace(o.output))
			}
			t.Errorf("on %s:\n%s", k.Release, o.output)
		})
	}
	if why := verdict(counts, status); why != "" {
		t.Errorf("%s on %s:\n%s\nthe kernel's log:\n%s", why, k.Release, rest, console.String())
	}
	t.Logf("%s: %d passed, %d skipped, %d failed, in %.1f s", k.Release, counts[passed], counts[skipped], counts[failed], time.Since(started).Seconds())
}

// verdict says what is wrong with a suite beyond the tests that failed.
func verdict(counts map[string]int, status int) string {
	switch {
	case counts[failed] == 0 && status != 0:
		return fmt.Sprintf("exit status %d, and no test failed", status)
	case counts[passed]+counts[failed] == 0:
		return "no test ran"
	}
	return ""
}

// outcome is how one test ended.
type outcome struct{ test, action, output string }

const (
	passed  = "pass"
	skipped = "skip"
	failed  = "fail"
)

// parse reads what a test program printed with -test.v=test2json: its tests and
// how each ended, in the order of their beginning. One that did not end has failed.
// The rest is what belongs to no test.
func parse(ctx context.Context, out io.Reader) (outcomes []outcome, rest string, err error) {
	cmd := exec.CommandContext(ctx, "go", "tool", "test2json")
	cmd.Stdin = out
	events, err := cmd.Output()
	if err != nil {
		return nil, "", fmt.Errorf("%v: %w", cmd.Args, err)
	}
	index := map[string]int{}
	for d := json.NewDecoder(bytes.NewReader(events)); ; {
		var e struct{ Action, Test, Output string }
		if err := d.Decode(&e); err == io.EOF {
			break
		} else if err != nil {
			return nil, "", err
		}
		if e.Test == "" {
			rest += e.Output
			continue
		}
		i, ok := index[e.Test]
		if !ok {
			i = len(outcomes)
			index[e.Test], outcomes = i, append(outcomes, outcome{test: e.Test, action: failed})
		}
		switch e.Action {
		case passed, skipped, failed:
			outcomes[i].action = e.Action
		case "output":
			if line := strings.TrimSpace(e.Output); line != "" && !strings.HasPrefix(line, "=== ") && !strings.HasPrefix(line, "--- ") {
				outcomes[i].output += e.Output
			}
		}
	}
	return outcomes, rest, nil
}

// What a guest's tests print is told right: also of those that did not end, and of
// none at all.
func TestParse(t *testing.T) {
	const run, end, name = "\x16=== RUN   ", "\x16--- ", "\x16=== NAME  "
	for _, c := range []struct {
		name, out string
		status    int
		want      []outcome
		rest, why string
	}{
		{
			"all kinds", run + "TestA\n    a_test.go:1: said\n" + end + "PASS: TestA (0.01s)\n" + name + "\n" +
				run + "TestB\n" + run + "TestB/x\n    b_test.go:2: no links\n" + name + "TestB\n" + end + "PASS: TestB (0.00s)\n    " + end + "SKIP: TestB/x (0.00s)\n" + name + "\n" +
				run + "TestC\n    c_test.go:3: bad\n" + end + "FAIL: TestC (0.00s)\n" + name + "\n\x16FAIL\n",
			1, []outcome{{"TestA", passed, "    a_test.go:1: said\n"}, {"TestB", passed, ""}, {"TestB/x", skipped, "    b_test.go:2: no links\n"}, {"TestC", failed, "    c_test.go:3: bad\n"}},
			"FAIL\n", "",
		},
		{"no end", run + "TestA\npanic: test timed out\n", 2, []outcome{{"TestA", failed, "panic: test timed out\n"}}, "", ""},
		{"none", "testing: warning: no tests to run\n\x16PASS\n", 0, nil, "testing: warning: no tests to run\nPASS\n", "no test ran"},
		{"skipped alone", run + "TestA\n" + end + "SKIP: TestA (0.00s)\n" + name + "\n\x16PASS\n", 0, []outcome{{"TestA", skipped, ""}}, "PASS\n", "no test ran"},
		{"before the tests", "no such file\n", 1, nil, "no such file\n", "exit status 1, and no test failed"},
		{"after the tests", run + "TestA\n" + end + "PASS: TestA (0.00s)\n" + name + "\nexit\n", 3, []outcome{{"TestA", passed, ""}}, "exit\n", "exit status 3, and no test failed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, rest, err := parse(t.Context(), strings.NewReader(c.out))
			if err != nil || !slices.Equal(got, c.want) || rest != c.rest {
				t.Errorf("%q, %q, %v", got, rest, err)
			}
			counts := map[string]int{}
			for _, o := range got {
				counts[o.action]++
			}
			if why := verdict(counts, c.status); why != c.why {
				t.Errorf("verdict %q, want %q", why, c.why)
			}
		})
	}
}
