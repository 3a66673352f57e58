// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"ccload/internal/kerneltest"
)

// BenchmarkRegister registers and unregisters one object as whole processes, by
// turns with ccload and with bpftool, so that what else the machine does meets
// both. The object has a plain .struct_ops section, which every bpftool takes.
func BenchmarkRegister(b *testing.B) {
	object := filepath.Join(b.TempDir(), "cubic.o")
	obj, err := os.ReadFile("../../bpf/cubic.bpf.o")
	if err != nil {
		b.Fatal(err)
	}
	obj = bytes.ReplaceAll(obj, []byte(".struct_ops.link"), []byte(".struct_ops\x00link"))
	if err := os.WriteFile(object, obj, 0o600); err != nil {
		b.Fatal(err)
	}
	alternate(b,
		[][]string{{"register", object}, {"unregister", "bpf_cubic"}},
		[][]string{{"struct_ops", "register", object}, {"struct_ops", "unregister", "name", "bpf_cubic"}})
}

// BenchmarkList lists what is registered, by turns with ccload and with bpftool.
func BenchmarkList(b *testing.B) {
	alternate(b, [][]string{{"list"}}, [][]string{{"struct_ops", "show"}})
}

// alternate reports the mean wall time of two ways to do the same and their
// ratio.
func alternate(b *testing.B, ours, theirs [][]string) {
	kerneltest.Privileged(b)
	bpftool, err := exec.LookPath("bpftool")
	if err != nil {
		b.Skip(err)
	}
	ccload := filepath.Join(b.TempDir(), "ccload")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", ccload, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("%v\n%s", err, out)
	}
	var spent [2]time.Duration
	for b.Loop() {
		for i, way := range [2]struct {
			program string
			steps   [][]string
		}{{ccload, ours}, {bpftool, theirs}} {
			begin := time.Now()
			for _, args := range way.steps {
				if out, err := exec.Command(way.program, args...).CombinedOutput(); err != nil {
					b.Fatalf("%s %q: %v\n%s", way.program, args, err, out)
				}
			}
			spent[i] += time.Since(begin)
		}
	}
	ms := func(d time.Duration) float64 { return d.Seconds() * 1000 / float64(b.N) }
	b.ReportMetric(ms(spent[0]), "ccload-ms/op")
	b.ReportMetric(ms(spent[1]), "bpftool-ms/op")
	b.ReportMetric(spent[0].Seconds()/spent[1].Seconds(), "ratio")
}
