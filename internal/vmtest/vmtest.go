// SPDX-License-Identifier: Apache-2.0

// Package vmtest lets ordinary tests boot guests: with kernels that "ccload
// kernels pull" has fetched, and programs that a guest can have as its init.
package vmtest

import (
	"cmp"
	"errors"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"ccload/harness/vm"
	"ccload/internal/kerneltest"
)

// Kernel opens a kernel by its name. Where it or QEMU is not there the test is
// skipped; where privileged tests are required, and the kernel is among the
// packages of this system, it fails.
func Kernel(t testing.TB, name string) *vm.Kernel {
	t.Helper()
	k, err := vm.FindKernel(name)
	_, missing := errors.AsType[*vm.NotPulledError](err)
	if missing || err == nil && vm.Available() != nil {
		why := cmp.Or(vm.Available(), err)
		if offered, oerr := vm.Offered(t.Context(), name); oerr == nil && !offered {
			t.Skipf("%v, and this system has no package with it", why)
		}
		kerneltest.Skip(t, why.Error())
	}
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// Test builds the test program of a package such that a guest can run it: static.
func Test(t testing.TB, pkg string) string {
	t.Helper()
	return build(t, "test", "-c", "-ldflags=-s -w", pkg)
}

// Program likewise builds a program.
func Program(t testing.TB, pkg string) string {
	t.Helper()
	return build(t, "build", "-ldflags=-s -w", pkg)
}

func build(t testing.TB, args ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "program")
	cmd := exec.Command("go", slices.Insert(args, len(args)-1, "-o", path)...)
	cmd.Env = append(cmd.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
	}
	return path
}
