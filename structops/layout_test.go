// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"ccload/internal/kerneltest"

	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// What is fixed to one kernel's layout is found on paper, and only that.
func TestFixed(t *testing.T) {
	s := mustParse(t, "fixed")
	want := map[string]string{
		"so_sample": "[rate_sample: delivered at byte 16]",
		"so_socket": "[sock: sk_gso_max_size at byte 64]",
		"so_static": "[rate_sample: prior_delivered_ce at byte 12]",
		"so_own":    "[]",
	}
	for _, o := range s.Ops {
		got := []string{}
		for _, f := range o.fixed {
			got = append(got, f.of+": "+f.String())
		}
		if fmt.Sprint(got) != want[o.Map] {
			t.Errorf("%s: %v, want %s", o.Map, got, want[o.Map])
		}
		if size := map[string]int{"so_own": 104}[o.Map]; o.private.size != size {
			t.Errorf("%s: %d bytes of private state, want %d", o.Map, o.private.size, size)
		}
	}
	if n := len(s.Warnings); n != 2 || !strings.HasPrefix(s.Warnings[0], "struct rate_sample is fixed to one kernel's layout (delivered at byte 16, in so_sample_p): ") {
		t.Errorf("%q", s.Warnings)
	}
	// Nothing of what uses CO-RE throughout looks so.
	objects, err := filepath.Glob("../bpf/*.bpf.o")
	more, merr := filepath.Glob("testdata/*.bpf.o")
	if err != nil || merr != nil || len(objects) == 0 {
		t.Fatal(objects, err, merr)
	}
	for _, path := range append(objects, more...) {
		if name := filepath.Base(path); name == "fixed.bpf.o" || name == "refusals.bpf.o" {
			continue
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		s, err := Parse(b)
		if err != nil {
			continue
		}
		for _, o := range s.Ops {
			if len(o.fixed) > 0 || o.private.size > 104 {
				t.Errorf("%s: %s: %v, %+v", path, o.Map, o.fixed, o.private)
			}
		}
	}
}

// A structure that only code names is in DWARF, unless that was stripped.
func TestFixedDebug(t *testing.T) {
	clang, err := exec.LookPath("clang-19")
	if err != nil {
		t.Skip("no compiler for BPF")
	}
	const source = `
typedef unsigned int u32; typedef unsigned long long u64;
#define SEC(name) __attribute__((section(name), used))
struct sock { char filler[100]; };
struct tcp_sock { struct sock sk; char filler[200]; struct { u32 x; struct { u32 a, snd_cwnd; } in; }; };
struct tcp_congestion_ops { u32 (*ssthresh)(struct sock *); u32 (*undo_cwnd)(struct sock *); void (*cong_avoid)(struct sock *, u32, u32); char name[16]; };
char LICENSE[] SEC("license") = "GPL";
SEC("struct_ops/f") u32 f(u64 *ctx) { return ((struct tcp_sock *)ctx[0])->in.snd_cwnd; }
SEC("struct_ops/g") void g(u64 *ctx) {}
SEC(".struct_ops.link") struct tcp_congestion_ops so_debug = { .ssthresh = (void *)f, .undo_cwnd = (void *)f, .cong_avoid = (void *)g, .name = "so_debug" };
`
	for level, want := range map[string]string{"-gdwarf-4": "in.snd_cwnd at byte 308", "-gdwarf-5": "in.snd_cwnd at byte 308", "-g": "in.snd_cwnd at byte 308"} {
		out := filepath.Join(t.TempDir(), "x.o")
		cmd := exec.Command(clang, "-target", "bpf", "-mcpu=v3", "-O2", "-g", level, "-x", "c", "-c", "-", "-o", out)
		cmd.Stdin = strings.NewReader(source)
		if b, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, b)
		}
		b, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		s, err := Parse(b)
		if err != nil {
			t.Fatal(err)
		}
		if f := s.Ops[0].fixed; len(f) != 1 || f[0].of != "tcp_sock" || f[0].String() != want {
			t.Errorf("%s: %v", level, f)
		}
	}
}

// Where only the structure's beginning is told, that must be this kernel's.
func TestDifferences(t *testing.T) {
	kernel := kernelSpec(t)
	var sock *btf.Struct
	if err := kernel.TypeByName("sock", &sock); err != nil {
		t.Fatal(err)
	}
	moved := btf.Copy(sock).(*btf.Struct)
	if got := differences(kernel, moved); got != nil {
		t.Errorf("the kernel's own: %v", got)
	}
	moved.Size += 8
	if got := differences(kernel, moved); len(got) != 1 || got[0].What != "sock" || got[0].Detail != fmt.Sprintf("%d bytes in the object, %d in this kernel", sock.Size+8, sock.Size) {
		t.Errorf("%v", got)
	}
	for i := range moved.Members {
		if moved.Members[i].Name == "sk_pacing_rate" {
			moved.Members[i].Offset += 64
		}
	}
	if got := differences(kernel, moved); len(got) != 1 || got[0].What != "sock.sk_pacing_rate" || got[0].Kind != LayoutDiffers {
		t.Errorf("%v", got)
	}
}

// What would use the wrong fields does not run, and is not loaded.
func TestMisfits(t *testing.T) {
	kerneltest.Privileged(t)
	s := mustParse(t, "fixed")
	if r, err := s.Verify("so_own"); err != nil || !r[0].Loads {
		t.Errorf("%+v, %v", r, err)
	}
	r, err := s.Verify("so_socket")
	if err != nil || r[0].Loads || len(r[0].Why) != 1 {
		t.Fatalf("%+v, %v", r, err)
	}
	why := r[0].Why[0]
	if why.Kind != LayoutDiffers || why.What != "sock.sk_gso_max_size" || why.Program != "so_socket_p" || why.Member != "init" || !strings.HasPrefix(why.Detail, "byte 64 in the object, ") {
		t.Errorf("%+v", why)
	}
	// The verifier itself has nothing against it.
	if i := slices.IndexFunc(r[0].Functions, func(f Function) bool { return f.Name == "so_socket_p" }); i < 0 || !r[0].Functions[i].Loads {
		t.Errorf("%+v", r[0].Functions)
	}
	var ve *VerifierError
	if _, err := s.Load("so_socket"); !errors.Is(err, ErrLayout) || !errors.As(err, &ve) || err.Error() != why.String() {
		t.Errorf("%v, want %v", err, why)
	}
	_, err = mustParse(t, "refusals").Load("so_state")
	if err == nil || !strings.HasPrefix(err.Error(), "private state too large: 128 bytes are needed, the kernel has ") {
		t.Error(err)
	}
	// What Load says is what Verify says, also where the library has no log.
	for _, m := range []string{"so_void", "so_branches", "so_key"} {
		s := mustParse(t, "refusals")
		r, err := s.Verify(m)
		if err != nil || len(r[0].Why) != 1 {
			t.Fatalf("%+v, %v", r, err)
		}
		if _, err := s.Load(m); err == nil || err.Error() != r[0].Why[0].String() || errors.Is(err, unix.EPERM) {
			t.Errorf("%s: %v, want %v", m, err, r[0].Why[0])
		}
	}
}
