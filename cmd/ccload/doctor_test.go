// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"ccload/internal/bpfload"
	"ccload/internal/fault"
	"ccload/internal/kerneltest"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Each kind of BPF program that ccload brings with it has a row of its own: where the
// kernel refuses the programs the row says so, and what that means; errors that come of
// it send the user there.
func TestDoctorPrograms(t *testing.T) {
	kerneltest.Privileged(t)
	objects, err := filepath.Glob("../../registry/*.bpf.o")
	if err != nil {
		t.Fatal(err)
	}
	more, err := filepath.Glob("../../harness/*/*.bpf.o")
	if err != nil {
		t.Fatal(err)
	}
	kinds := map[string][]string{} // section → programs
	for _, o := range append(objects, more...) {
		spec, err := ebpf.LoadCollectionSpec(o)
		if err != nil {
			t.Fatal(err)
		}
		for name, p := range spec.Programs {
			kinds[p.SectionName] = append(kinds[p.SectionName], name)
		}
	}
	if len(kinds) < 4 {
		t.Fatalf("the objects have %v", kinds)
	}
	for kind, programs := range kinds {
		i := slices.IndexFunc(probes, func(p probe) bool { return p.name == kind })
		if i < 0 {
			t.Errorf("the doctor has no row %s, for the programs %v", kind, programs)
			continue
		}
		restore := fault.Set(func(step string) error {
			if what, program, _ := strings.Cut(step, " program "); what == "load" && slices.Contains(programs, program) {
				return unix.EPERM
			}
			return nil
		})
		_, err := probes[i].try()
		restore()
		if err != unix.EPERM || probes[i].means == "" {
			t.Errorf("%s: refused, the doctor says %v, and that it means %q", kind, err, probes[i].means)
		}
		if got := hint(&bpfload.RefusedError{Program: programs[0], Kind: kind, Err: unix.EPERM}); !strings.Contains(got, "ccload doctor") {
			t.Errorf("%s: the hint is %q", kind, got)
		}
	}
}

// What the doctor prints fits a terminal of 80 columns, whatever it found; JSON has the
// same rows.
func TestDoctorScreen(t *testing.T) {
	kerneltest.Privileged(t)
	defer fault.Set(func(step string) error {
		if strings.HasPrefix(step, "load program") {
			return unix.EPERM
		}
		return nil
	})()
	var text, doc bytes.Buffer
	run(context.Background(), []string{"doctor"}, strings.NewReader(""), &text, os.Stderr)
	run(context.Background(), []string{"doctor", "--json"}, strings.NewReader(""), &doc, os.Stderr)
	for line := range strings.Lines(text.String()) {
		if len(strings.TrimSuffix(line, "\n")) > 80 {
			t.Errorf("%d columns: %s", len(line)-1, line)
		}
	}
	var rows []finding
	if err := json.Unmarshal(doc.Bytes(), &rows); err != nil {
		t.Fatalf("%v in %s", err, doc.Bytes())
	}
	if len(rows) != len(probes) {
		t.Errorf("%d rows of %d", len(rows), len(probes))
	}
	for _, r := range rows {
		if !strings.Contains(text.String(), r.verdict()) || !r.OK && r.Means == "" {
			t.Errorf("%+v", r)
		}
	}
}

func TestConfined(t *testing.T) {
	for _, c := range []struct{ seccomp, ids, want string }{
		{"0", "         0          0 4294967295\n", ""},
		{"2", "         0          0 4294967295\n", "a seccomp filter"},
		{"0", "         0     100000      65536\n", "a user namespace"},
		{"2", "         0     100000      65536\n", "a seccomp filter and a user namespace"},
	} {
		root := t.TempDir()
		proc := filepath.Join(root, "proc/self")
		if err := os.MkdirAll(proc, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(proc, "status"), []byte("Name:\tx\nSeccomp:\t"+c.seccomp+"\nSeccomp_filters:\t1\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(proc, "uid_map"), []byte(c.ids), 0o600); err != nil {
			t.Fatal(err)
		}
		got := ""
		if err := confined(root); err != nil {
			got = err.Error()
		}
		if got != c.want {
			t.Errorf("seccomp %s, ids %q: %q, want %q", c.seccomp, c.ids, got, c.want)
		}
	}
}
