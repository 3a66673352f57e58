// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"ccload/harness/vm"
	"ccload/internal/kerneltest"
	"ccload/internal/vmtest"
	"ccload/structops"
)

// guestKernels are the kernels that have a name, for guests that are this test
// program.
func guestKernels(t *testing.T) []string {
	t.Helper()
	for _, name := range vm.Names() {
		vmtest.Kernel(t, name)
	}
	self, err := elf.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	if slices.ContainsFunc(self.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }) {
		kerneltest.Skip(t, "this program is not static, as a guest's init must be: CGO_ENABLED=0")
	}
	return vm.Names()
}

// verifyJSON runs ccload verify and decodes what it prints.
func verifyJSON(t *testing.T, args ...string) (status int, v verified, talk string) {
	t.Helper()
	var out, errs bytes.Buffer
	status = run(context.Background(), append([]string{"verify", "--json"}, args...), nil, &out, &errs)
	if err := json.Unmarshal(out.Bytes(), &v); err != nil {
		t.Fatalf("%v: %s\n%s", err, out.String(), errs.String())
	}
	return status, v, errs.String()
}

// A guest says what this machine would say if it ran that kernel.
func TestVerifyInGuests(t *testing.T) {
	kernels := guestKernels(t)
	status, v, talk := verifyJSON(t, "bpf_cubic", "--kernel", strings.Join(kernels, ","))
	if status != exitDone || !v.Loads || len(v.Kernels) != len(kernels) || talk != "" {
		t.Fatalf("status %d, %+v\n%s", status, v, talk)
	}
	for i, d := range v.Kernels {
		if d.Kernel != kernels[i] || d.Release == "" || !d.Loads || d.Error != "" || len(d.Maps) != 1 {
			t.Errorf("%+v", d)
			continue
		}
		globals := 0
		for _, f := range d.Maps[0].Functions {
			if f.Kind != structops.StaticFunction && (f.Processed == nil || *f.Processed == 0 || f.PeakStates == nil) || f.Stack == nil || f.Jited == nil {
				t.Errorf("%s: %s: its costs are not known", d.Release, f.Name)
			}
			if f.Kind == structops.GlobalFunction {
				globals++
			}
		}
		if globals == 0 {
			t.Errorf("%s: no global function", d.Release)
		}
	}

	const object = "../../structops/testdata/breakers.bpf.o"
	status, v, talk = verifyJSON(t, object, "--map", "so_write_sock", "--log", "--kernel", strings.Join(kernels, ","))
	if status != exitFailed || v.Loads || len(v.Kernels) != len(kernels) {
		t.Fatalf("status %d, %+v\n%s", status, v, talk)
	}
	for _, d := range v.Kernels {
		if d.Loads || d.Error != "" || len(d.Maps) != 1 || len(d.Maps[0].Why) != 1 {
			t.Errorf("%+v", d)
			continue
		}
		why := d.Maps[0].Why[0]
		if why.Kind != structops.FieldNotWritable || why.What != "sock.sk_gso_max_size" || why.Program != "so_gso" || why.Member != "init" ||
			!slices.ContainsFunc(why.Log, func(l string) bool { return strings.HasPrefix(l, "no write support to tcp_sock") }) {
			t.Errorf("%s: %+v", d.Release, why)
		}
		if !strings.Contains(talk, d.Release+": so_gso for init:") {
			t.Errorf("%s: its log is not printed: %s", d.Release, talk)
		}
	}
}

// A guest that does not come up is no verdict.
func TestVerifyNotTried(t *testing.T) {
	kernels := guestKernels(t)
	t.Setenv("PATH", "")
	status, v, _ := verifyJSON(t, "bpf_reno", "--kernel", kernels[0])
	if status != exitFailed || v.Loads || len(v.Kernels) != 1 || v.Kernels[0].Error != vm.ErrNoQEMU.Error() || len(v.Kernels[0].Maps) != 0 {
		t.Errorf("status %d, %+v", status, v.Kernels[0])
	}
}
