// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"ccload/internal/kerneltest"
	"ccload/internal/vmtest"
	"ccload/registry"
)

// BenchmarkRegister registers and unregisters one object as whole processes, by
// turns with ccload and with bpftool, so that what else the machine does meets
// both. The object has a plain .struct_ops section, which every bpftool takes.
func BenchmarkRegister(b *testing.B) {
	kerneltest.Privileged(b)
	object := variant(b, "plain.o", ".struct_ops.link", ".struct_ops\x00link")
	alternate(b,
		[][]string{{"register", object}, {"unregister", "bpf_cubic"}},
		[][]string{{"struct_ops", "register", object}, {"struct_ops", "unregister", "name", "bpf_cubic"}})
}

// BenchmarkReplace is how long it takes from the command until new connections run
// the new code. With bpftool, which cannot replace, it is to unregister and register
// again; meanwhile there is none of that name.
func BenchmarkReplace(b *testing.B) {
	kerneltest.Privileged(b)
	ours := variant(b, "ours.o", "bpf_cubic", "cct_cubic")
	theirs := variant(b, "theirs.o", "bpf_cubic", "bpf_dubic", ".struct_ops.link", ".struct_ops\x00link")
	ccload := built(b)
	for _, args := range [][]string{{"register", ours}, {"register", theirs}} {
		if out, err := exec.Command(ccload, args...).CombinedOutput(); err != nil {
			b.Fatalf("%q: %v\n%s", args, err, out)
		}
	}
	defer exec.Command(ccload, "unregister", "cct_cubic").Run()
	defer exec.Command("bpftool", "struct_ops", "unregister", "name", "bpf_dubic").Run()
	before, _, err := registry.Lookup("cct_cubic")
	if err != nil {
		b.Fatal(err)
	}
	alternate(b,
		[][]string{{"replace", "cct_cubic", ours}},
		[][]string{{"struct_ops", "unregister", "name", "bpf_dubic"}, {"struct_ops", "register", theirs}})
	now, _, err := registry.Lookup("cct_cubic")
	if err != nil || now.MapID == before.MapID {
		b.Errorf("map %d before, %d now, %v", before.MapID, now.MapID, err)
	}
}

// variant is a file with the object of bpf_cubic in which each old is a new.
func variant(b *testing.B, name string, oldnew ...string) string {
	b.Helper()
	obj, err := os.ReadFile("../../bpf/cubic.bpf.o")
	if err != nil {
		b.Fatal(err)
	}
	path := filepath.Join(b.TempDir(), name)
	if err := os.WriteFile(path, []byte(strings.NewReplacer(oldnew...).Replace(string(obj))), 0o600); err != nil {
		b.Fatal(err)
	}
	return path
}

// BenchmarkList lists what is registered, by turns with ccload and with bpftool.
func BenchmarkList(b *testing.B) {
	kerneltest.Privileged(b)
	alternate(b, [][]string{{"list"}}, [][]string{{"struct_ops", "show"}})
}

// alternate reports the mean wall time of two ways to do the same and their
// ratio.
func alternate(b *testing.B, ours, theirs [][]string) {
	bpftool, err := exec.LookPath("bpftool")
	if err != nil {
		b.Skip(err)
	}
	ccload := built(b)
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

// built is ccload as users have it.
func built(b *testing.B) string {
	b.Helper()
	path := filepath.Join(b.TempDir(), "ccload")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", path, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("%v\n%s", err, out)
	}
	return path
}

// BenchmarkGuest is the wall time of whole runs in a guest, from the command's start
// to its end, and what a second of the guest's time takes beyond the shortest run.
// Last are two at a time against one.
func BenchmarkGuest(b *testing.B) {
	const kernel = "debian-6.12"
	vmtest.Kernel(b, kernel)
	ccload := built(b)
	run := func(b *testing.B, args ...string) (wall float64) {
		dir := filepath.Join(b.TempDir(), "result")
		args = slices.Concat([]string{"run", "--vm", kernel, "-o", dir}, args)
		begin := time.Now()
		if out, err := exec.Command(ccload, args...).CombinedOutput(); err != nil {
			b.Fatalf("%q: %v\n%s", args, err, out)
		}
		wall = time.Since(begin).Seconds()
		if err := os.RemoveAll(dir); err != nil {
			b.Fatal(err)
		}
		return wall
	}
	var shortest float64
	for _, c := range []struct {
		name     string
		duration float64
		args     []string
	}{
		{"first", 0.1, nil}, // which boots
		{"shortest", 0.1, []string{"--rate", "20mbit", "--rtt", "40ms"}},
		{"20mbit", 10, []string{"--rate", "20mbit", "--rtt", "40ms"}},
		{"100mbit", 10, []string{"--rate", "100mbit", "--rtt", "20ms"}},
		{"500mbit", 4, []string{"--rate", "500mbit", "--rtt", "20ms"}},
		{"20mbit-10flows", 10, []string{"--rate", "20mbit", "--rtt", "40ms", "--flows", "10"}},
		{"20mbit-100flows", 10, []string{"--rate", "20mbit", "--rtt", "40ms", "--flows", "100"}},
	} {
		b.Run(c.name, func(b *testing.B) {
			wall := 0.0
			for b.Loop() {
				wall += run(b, append(c.args, "--cc", "cubic", "--duration", fmt.Sprintf("%gs", c.duration))...)
			}
			wall /= float64(b.N)
			b.ReportMetric(wall, "wall-s")
			if shortest > 0 {
				b.ReportMetric((wall-shortest)/(c.duration-0.1), "wall-s/virtual-s")
			} else if c.name == "shortest" {
				shortest = wall
			}
		})
	}
	b.Run("two", func(b *testing.B) {
		var one, two float64
		for b.Loop() {
			args := []string{"--rate", "20mbit", "--rtt", "40ms", "--duration", "10s", "--cc"}
			one += run(b, append(args, "cubic")...)
			two += run(b, append(args, "cubic,reno")...)
		}
		b.ReportMetric(one/float64(b.N), "one-wall-s")
		b.ReportMetric(two/float64(b.N), "two-wall-s")
		b.ReportMetric(two/one, "ratio")
	})
}
