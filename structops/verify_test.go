// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"encoding/json"
	"errors"
	"regexp"
	"slices"
	"strings"
	"testing"

	"ccload/internal/kernelbtf"
	"ccload/internal/kerneltest"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// Logs as kernels wrote them.
const (
	log61write = `reg type unsupported for arg#0 function so_limited#1
0: R1=ctx(off=0,imm=0) R10=fp0
; STRUCT_OPS(void, so_limited, struct sock *, sk) { ((struct tcp_sock___more *)sk)->app_limited = 1; }
0: (79) r1 = *(u64 *)(r1 +0)
func 'init' arg0 has btf_id 771 type STRUCT 'sock'
1: R1_w=ptr_tcp_sock(off=0,imm=0)
1: (b4) w2 = 1                        ; R2_w=1
2: (63) *(u32 *)(r1 +1820) = r2
no write support to tcp_sock at off 1820
processed 3 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0 mark_read 0`
	log61read = `reg type unsupported for arg#0 function so_rs#1
0: R1=ctx(off=0,imm=0) R10=fp0
0: (79) r1 = *(u64 *)(r1 +8)
func 'cong_control' arg1 has btf_id 20037 type STRUCT 'rate_sample'
1: R1_w=ptr_rate_sample(off=0,imm=0)
1: (b4) w2 = 1                        ; R2_w=1
2: (63) *(u32 *)(r1 +16) = r2
only read is supported
processed 3 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0 mark_read 0`
	log61argument = `0: R1=ctx(off=0,imm=0) R10=fp0
; SEC("struct_ops") void so_seven(__u64 *ctx) { tcp_sk((void *)ctx[0])->snd_cwnd = ctx[6]; }
0: (79) r2 = *(u64 *)(r1 +0)
func 'cong_control' arg0 has btf_id 771 type STRUCT 'sock'
1: R1=ctx(off=0,imm=0) R2_w=ptr_tcp_sock(off=0,imm=0)
1: (79) r1 = *(u64 *)(r1 +48)
func 'cong_control' doesn't have 4-th argument
invalid bpf_context access off=48 size=8
processed 2 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0 mark_read 0`
	log61helper = `1: (b4) w2 = 0                        ; R2_w=0
2: (85) call bpf_xdp_adjust_head#44
unknown func bpf_xdp_adjust_head#44
processed 3 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0 mark_read 0`
	log612helper = `Global function so_help2() doesn't return scalar. Only those are supported.
0: R1=ctx() R10=fp0
; STRUCT_OPS(void, so_help2, struct sock *, sk) { bpf_xdp_adjust_head(sk, 0); } @ breakers.bpf.c:51
0: (79) r1 = *(u64 *)(r1 +0)
func 'init' arg0 has btf_id 3075 type STRUCT 'sock'
1: R1_w=trusted_ptr_tcp_sock()
1: (b4) w2 = 0                        ; R2_w=0
2: (85) call bpf_xdp_adjust_head#44
program of this type cannot use helper bpf_xdp_adjust_head#44
processed 3 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0 mark_read 0`
	log612scalar = `0: R1=ctx() R10=fp0
; STRUCT_OPS(void, so_rs, struct sock *, sk, struct rate_sample___x *, rs) { rs->delivered = 1; } @ breakers.bpf.c:41
0: (79) r1 = *(u64 *)(r1 +8)          ; R1_w=scalar()
1: (b4) w2 = 1                        ; R2_w=1
2: (63) *(u32 *)(r1 +16) = r2
R1 invalid mem access 'scalar'
processed 3 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0 mark_read 0`
	log618loop = `Global function so_lp() doesn't return scalar. Only those are supported.
0: R1=ctx() R10=fp0
; for (;;) @ breakers.bpf.c:69
0: (05) goto pc-1
0: (05) goto pc-1
infinite loop detected at insn 0
cur state: R1=ctx() R10=fp0
old state: R1=ctx() R10=fp0
processed 9 insns (limit 1000000) max_states_per_insn 0 total_states 1 peak_states 1 mark_read 0`
	log618field = `1: R1=trusted_ptr_tcp_sock()
; instruction poisoned by CO-RE @ :0
1: (85) call unknown#195896080
invalid func unknown#195896080
processed 2 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0 mark_read 0`
)

func TestParseRefusal(t *testing.T) {
	for _, c := range []struct {
		log  string
		want refusal // without the defaults
	}{
		{log61write, refusal{reason: "no write support to tcp_sock at off 1820", source: "STRUCT_OPS(void, so_limited, struct sock *, sk) { ((struct tcp_sock___more *)sk)->app_limited = 1; }",
			at: 2, unknown: -1, structure: "tcp_sock", offset: 1820}},
		{log61read, refusal{reason: "only read is supported", at: 2, unknown: -1, structure: "rate_sample", offset: 16}},
		{log61argument, refusal{reason: "invalid bpf_context access off=48 size=8", source: `SEC("struct_ops") void so_seven(__u64 *ctx) { tcp_sk((void *)ctx[0])->snd_cwnd = ctx[6]; }`,
			before: "func 'cong_control' doesn't have 4-th argument", at: 1, unknown: -1, offset: -1, argument: 7}},
		{log61helper, refusal{reason: "unknown func bpf_xdp_adjust_head#44", at: 2, unknown: -1, offset: -1, helper: "bpf_xdp_adjust_head"}},
		{log612helper, refusal{reason: "program of this type cannot use helper bpf_xdp_adjust_head#44",
			source: "breakers.bpf.c:51: STRUCT_OPS(void, so_help2, struct sock *, sk) { bpf_xdp_adjust_head(sk, 0); }", at: 2, unknown: -1, offset: -1, helper: "bpf_xdp_adjust_head"}},
		{log612scalar, refusal{reason: "R1 invalid mem access 'scalar'", source: "breakers.bpf.c:41: STRUCT_OPS(void, so_rs, struct sock *, sk, struct rate_sample___x *, rs) { rs->delivered = 1; }",
			at: 2, unknown: -1, offset: -1, scalar: true}},
		{log618loop, refusal{reason: "infinite loop detected at insn 0", source: "breakers.bpf.c:69: for (;;)", at: 0, unknown: -1, offset: -1}},
		{log618field, refusal{reason: "invalid func unknown#195896080", source: ":0: instruction poisoned by CO-RE", at: 1, unknown: poisonedField, offset: -1}},
		{"calling kernel function bpf_sock_destroy is not allowed", refusal{reason: "calling kernel function bpf_sock_destroy is not allowed", at: -1, unknown: -1, offset: -1, function: "bpf_sock_destroy"}},
		{"", refusal{at: -1, unknown: -1, offset: -1}},
		{"99999999999999999999: (95) exit\ninvalid func unknown#99999999999999999999", refusal{reason: "invalid func unknown#99999999999999999999", at: -1, unknown: -1, offset: -1}},
	} {
		if got := parseRefusal(strings.Split(c.log, "\n")); got != c.want {
			t.Errorf("%s\ngot  %+v\nwant %+v", c.log, got, c.want)
		}
	}
}

func TestParseStats(t *testing.T) {
	for _, c := range []struct {
		log  string
		want *stats
	}{
		{"verification time 71 usec\nstack depth 64+0+32\nprocessed 384 insns (limit 1000000) max_states_per_insn 4 total_states 17 peak_states 13 mark_read 2\n",
			&stats{384, 4, 17, 13, []int{64, 0, 32}}},
		{"stack depth 8 max 24\nprocessed 1 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0", &stats{1, 0, 0, 0, []int{8}}},
		{"stack depth 0+x\nprocessed 1 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0 mark_read 0", &stats{processed: 1}},
		{log61write, &stats{processed: 3}},
		{"processed x insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0 mark_read 0", nil},
		{"processed 5 insns", nil},
		{"", nil},
	} {
		got, ok := parseStats(strings.Split(c.log, "\n"))
		if ok != (c.want != nil) || ok && (got.processed != c.want.processed || got.maxPerInsn != c.want.maxPerInsn || got.states != c.want.states ||
			got.peak != c.want.peak || !slices.Equal(got.stack, c.want.stack)) {
			t.Errorf("%q: %+v, %v", c.log, got, ok)
		}
	}
}

// A log comes from the kernel, but a part of it is text of whoever wrote the object.
func FuzzVerifierLog(f *testing.F) {
	for _, log := range []string{log61write, log61read, log61argument, log61helper, log612helper, log612scalar, log618loop, log618field} {
		f.Add(log)
	}
	f.Fuzz(func(t *testing.T, log string) {
		lines := strings.Split(log, "\n")
		r := parseRefusal(lines)
		if r.at < -1 || r.unknown < -1 || r.argument < 0 || !strings.Contains(log, r.reason) {
			t.Errorf("%+v", r)
		}
		parseStats(lines)
	})
}

func kernelSpec(t *testing.T) *btf.Spec {
	t.Helper()
	kernel, err := kernelbtf.Types().Kernel()
	if err != nil {
		t.Fatal(err)
	}
	return kernel
}

// Each law-breaker is refused for its own reason, or loads where the kernel has
// what it needs.
func TestVerifyReasons(t *testing.T) {
	kerneltest.Privileged(t)
	kernel := kernelSpec(t)
	_, control := (&Ops{}).signatures("cong_control")
	if control == nil {
		t.Fatal("the kernel's cong_control is not found")
	}
	newControl := len(control.Params) > 2
	var destroy *btf.Func
	hasDestroy := kernel.TypeByName("bpf_sock_destroy", &destroy) == nil

	type want struct {
		kind           ReasonKind
		what, function string
	}
	some := func(loads bool, kind ReasonKind, what, function string) []want {
		if loads {
			return nil
		}
		return []want{{kind, what, function}}
	}
	forbidden := some(false, FunctionMissing, "bpf_sock_destroy", "")
	if hasDestroy {
		forbidden = some(false, FunctionForbidden, "bpf_sock_destroy", "so_destroys")
	}
	s := mustParse(t, "breakers")
	cases := map[string][]want{
		"so_arg4":       some(newControl, SignatureChanged, "", "so_fourth"),
		"so_arg7":       some(false, SignatureChanged, "cong_control, argument 7", "so_seventh"),
		"so_arg2":       some(!newControl, SignatureChanged, "", "so_sample"),
		"so_write_new":  some(writable(t, s), FieldNotWritable, "tcp_sock.app_limited", "so_limited"),
		"so_write_sock": some(false, FieldNotWritable, "sock.sk_gso_max_size", "so_gso"),
		"so_write_ack":  some(false, FieldNotWritable, "ack_sample.pkts_acked", "so_acked"),
		"so_field":      some(false, FieldMissing, "tcp_sock.so_inner.so_no_such_field", "so_reads"),
		"so_helper":     some(false, HelperMissing, "number 9999", "so_helps"),
		"so_xdp":        some(false, HelperMissing, "bpf_xdp_adjust_head", "so_adjusts"),
		"so_release":    some(false, HelperMissing, "bpf_setsockopt", "so_leaves"),
		"so_kfunc":      some(false, FunctionMissing, "so_no_such_function", ""),
		"so_weak":       some(false, FunctionMissing, "so_perhaps_a_function", "so_hopes"),
		"so_forbidden":  forbidden,
		"so_proto":      some(false, SignatureChanged, "tcp_reno_ssthresh", ""),
		"so_member":     some(false, MemberUnknown, "so_no_such_member", ""),
		"so_flags":      some(false, FlagsUnknown, "0x40", ""),
		"so_loop":       some(false, VerifierRefusal, "", "so_turns"),
		"so_long":       some(false, VerifierRefusal, "", ""),
		"so_global_bad": some(false, VerifierRefusal, "", "so_outside"),
		"so_globals":    nil,
	}
	for _, o := range s.Ops {
		wants, ok := cases[o.Map]
		if !ok {
			t.Errorf("%s: no case", o.Map)
		}
		reports, err := s.Verify(o.Map)
		if err != nil || len(reports) != 1 {
			t.Fatal(reports, err)
		}
		r := reports[0]
		if r.Map != o.Map || r.Name != o.Name || r.Loads != (len(wants) == 0) || len(r.Why) != len(wants) {
			t.Errorf("%s: %+v", o.Map, r)
			continue
		}
		for i, w := range wants {
			got := r.Why[i]
			if got.Kind != w.kind || got.What != w.what || got.Function != w.function || strings.Contains(got.String(), "\n") {
				t.Errorf("%s: %+v", o.Map, got)
			}
			if got.Function != "" && len(got.Log) == 0 || len(got.Log) > 200 {
				t.Errorf("%s: the log has %d lines", o.Map, len(got.Log))
			}
		}
		for _, f := range r.Functions {
			if refused := len(wants) > 0 && f.Program == r.Why[0].Program && f.Member == r.Why[0].Member; f.Loads == refused {
				t.Errorf("%s: %+v", o.Map, f)
			}
		}
		if registered(t, o.Name) {
			t.Errorf("%s: it is registered", o.Map)
		}
	}
	live, err := Live()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range live {
		if slices.ContainsFunc(s.Ops, func(o *Ops) bool { return o.Name == i.Name }) {
			t.Errorf("left behind: %s", i.Name)
		}
	}
}

// writable says whether the kernel lets app_limited be written. It asks without
// the code under test: the program loads, or it does not.
func writable(t *testing.T, s *Spec) bool {
	t.Helper()
	o, err := s.Load("so_write_new")
	if err == nil {
		o.Close()
	}
	return err == nil
}

// Plain sections would register at once: they do not when they are verified.
func TestVerifyPlain(t *testing.T) {
	kerneltest.Privileged(t)
	s := mustParse(t, "several")
	reports, err := s.Verify()
	if err != nil || len(reports) != 3 { // the others are optional
		t.Fatal(reports, err)
	}
	for _, r := range reports {
		if !r.Loads || len(r.Why) > 0 || registered(t, r.Name) {
			t.Errorf("%+v", r)
		}
	}
	if _, err := s.Verify("so_other"); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	for _, o := range s.Ops {
		if o.Map == "so_plain" && o.Link {
			t.Error("the object was changed")
		}
	}
	tail, err := mustParse(t, "tail").Verify()
	if err != nil || !tail[0].Loads || !slices.ContainsFunc(tail[0].Functions, func(f Function) bool { return f.Name == "so_tail" && f.Member == "cong_avoid" && f.Processed != nil }) {
		t.Errorf("%+v, %v", tail, err)
	}
}

// What each function is said to cost is what the log of every instruction shows.
func TestVerifyCosts(t *testing.T) {
	kerneltest.Privileged(t)
	s := mustParse(t, "breakers")
	reports, err := s.Verify("so_globals")
	if err != nil || !reports[0].Loads {
		t.Fatal(reports, err)
	}
	p := s.program("so_entry", "init")
	prog, err := s.loadAlone(p, ebpf.ProgramOptions{LogLevel: ebpf.LogLevelInstruction | ebpf.LogLevelStats})
	if err != nil {
		t.Fatal(err)
	}
	defer prog.Close()
	log := strings.Split(prog.VerifierLog, "\n")
	st, ok := parseStats(log)
	if !ok {
		t.Fatal(prog.VerifierLog)
	}
	begins := regexp.MustCompile(`^Validating (\w+)\(\) func#\d+\.\.\.`)
	ends := regexp.MustCompile(`^Func#\d+ .*is safe for any args`)
	step := regexp.MustCompile(`^(\d+: \([0-9a-f]{2}\) |(from \d+ to )?\d+.*: safe$)`)
	counts := map[string]int{}
	function := "so_entry"
	for _, line := range log {
		if m := begins.FindStringSubmatch(line); m != nil {
			function = m[1]
		} else if ends.MatchString(line) {
			function = "so_entry"
		} else if step.MatchString(line) {
			counts[function]++
		}
	}
	kinds := map[string]FunctionKind{"so_entry": EntryFunction, "so_global": GlobalFunction, "so_leaf": GlobalFunction, "so_static": StaticFunction}
	stack := map[string]int{"so_entry": 0, "so_global": 0, "so_leaf": 64, "so_static": 32}
	var processed, states, peak int
	for _, f := range reports[0].Functions {
		if f.Program != "so_entry" {
			continue
		}
		kind, ok := kinds[f.Name]
		if !ok || f.Kind != kind || f.Section != "struct_ops/so_entry" || f.Member != "init" || f.Instructions == nil || *f.Instructions < 5 ||
			f.Jited == nil || *f.Jited < *f.Instructions || f.Stack == nil || *f.Stack != stack[f.Name] || (f.MaxStatesPerInsn != nil) != (f.Name == "so_entry") {
			b, _ := json.Marshal(f)
			t.Errorf("%s", b)
		}
		delete(kinds, f.Name)
		if f.Kind == StaticFunction {
			if f.Processed != nil || f.States != nil || f.PeakStates != nil {
				t.Errorf("%s: its costs are its callers'", f.Name)
			}
			continue
		}
		if f.Processed == nil || f.States == nil || f.PeakStates == nil {
			t.Fatalf("%s: its costs are not known", f.Name)
		}
		if *f.Processed != counts[f.Name] {
			t.Errorf("%s: processed %d, in the log there are %d", f.Name, *f.Processed, counts[f.Name])
		}
		processed, states, peak = processed+*f.Processed, states+*f.States, peak+*f.PeakStates
	}
	if len(kinds) > 0 || processed != st.processed || states != st.states || peak != st.peak {
		t.Errorf("missing %v; the sum is %d, %d, %d, not as %+v", kinds, processed, states, peak, st)
	}
}

func TestRefusal(t *testing.T) {
	for _, c := range []struct {
		obj  []byte
		kind ReasonKind
	}{
		{patch(t, fixture(t, "basic"), "Dual BSD/GPL", "Proprietary!"), Licence},
		{patch(t, fixture(t, "basic"), "\x00ssthresh\x00", "\x00pkts_ack\x00"), BadObject},
		{fixture(t, "owner"), BadObject},
		{fixture(t, "none"), ""},
		{[]byte("no object"), ""},
	} {
		s, err := Parse(c.obj)
		if err == nil {
			err = s.Ops[0].Check()
		}
		if r, ok := Refusal(err); err == nil || r.Kind != c.kind || ok != (c.kind != "") {
			t.Errorf("%v: %+v", err, r)
		}
	}
	if r := generalReason(&PermissionError{Errno: unix.EPERM, Lockdown: "integrity"}); r.Kind != LockedDown {
		t.Errorf("%+v", r)
	}
	if r := generalReason(&PermissionError{Errno: unix.EPERM, Missing: []string{"CAP_BPF"}}); r.Kind != NotPermitted || !strings.Contains(r.String(), "CAP_BPF") {
		t.Errorf("%+v", r)
	}
	if r := generalReason(ErrKernelBTF); r.Kind != NoBTF {
		t.Errorf("%+v", r)
	}
}

func TestFieldAt(t *testing.T) {
	u32 := &btf.Int{Name: "u32", Size: 4}
	inner := &btf.Struct{Name: "inner", Size: 8, Members: []btf.Member{{Name: "a", Type: u32}, {Name: "b", Type: u32, Offset: 32}}}
	anon := &btf.Struct{Size: 4, Members: []btf.Member{{Name: "x", Type: u32}}}
	outer := &btf.Struct{Name: "outer", Size: 20, Members: []btf.Member{
		{Name: "in", Type: &btf.Const{Type: inner}},
		{Name: "named", Type: anon, Offset: 64},
		{Type: anon, Offset: 96},
		{Name: "arr", Type: &btf.Array{Type: u32, Index: u32, Nelems: 1}, Offset: 128},
	}}
	b, err := btf.NewBuilder([]btf.Type{outer}, nil)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := b.Marshal(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	spec, err := btf.LoadSpecFromReader(strings.NewReader(string(raw)))
	if err != nil {
		t.Fatal(err)
	}
	for off, want := range map[int]string{
		0: "inner.a", 4: "inner.b", 6: "inner.b", 8: "outer.named.x", 12: "outer.x", 16: "outer.arr", 20: "outer", -1: "outer",
	} {
		if got := fieldAt(spec, "outer", off); got != want {
			t.Errorf("%d: %q, want %q", off, got, want)
		}
	}
	if got := fieldAt(spec, "none", 0); got != "none" {
		t.Error(got)
	}
}
