// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"ccload/internal/kerneltest"

	"golang.org/x/tools/txtar"
)

// The corpus in testdata/refusals has the ends of verifiers' logs, a file for each
// kernel and an entry for each table of refusals.bpf.c and breakers.bpf.c that it
// refuses. An entry begins with what is read out of the log. To collect it anew:
//
//	ccload verify structops/testdata/refusals.bpf.o --kernel host,debian-6.12,debian-6.1 --log --json >logs.json
//	go test ./structops -run TestRefusalCorpus -update logs.json
var updateCorpus = flag.String("update", "", "collect the corpus anew from the `FILE` that verify --log --json printed; - for only what is read out of it")

const corpusDir = "testdata/refusals"

func TestRefusalCorpus(t *testing.T) {
	if *updateCorpus != "" && *updateCorpus != "-" {
		collectCorpus(t, *updateCorpus)
	}
	files, err := filepath.Glob(corpusDir + "/*.txtar")
	if err != nil || len(files) < 3 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		a, err := txtar.ParseFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for i, f := range a.Files {
			var log, want []string
			for _, line := range strings.Split(strings.TrimRight(string(f.Data), "\n"), "\n") {
				if head, ok := strings.CutPrefix(line, "# "); ok {
					want = append(want, head)
				} else {
					log = append(log, line)
				}
			}
			r := parseRefusal(log)
			got := []string{"reason: " + r.reason}
			for _, more := range []struct{ name, text string }{{"before", r.before}, {"means", explain(r.reason)}, {"source", r.source}} {
				if more.text != "" {
					got = append(got, more.name+": "+more.text)
				}
			}
			if *updateCorpus != "" {
				a.Files[i].Data = []byte("# " + strings.Join(got, "\n# ") + "\n" + strings.Join(log, "\n") + "\n")
			} else if !slices.Equal(got, want) {
				t.Errorf("%s: %s:\ngot  %q\nwant %q", file, f.Name, got, want)
			}
			// The kernel's sentence is what stands before the statistics, wherever the log was cut.
			if !slices.Contains(log, r.reason) || explain(r.reason) == "" && !unexplained.MatchString(r.reason) {
				t.Errorf("%s: %s: %q is no sentence of the log's, or is not explained", file, f.Name, r.reason)
			}
		}
		if *updateCorpus != "" {
			if err := os.WriteFile(file, txtar.Format(a), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// unexplained are sentences that say it themselves.
var unexplained = regexp.MustCompile(`^(invalid func unknown#|bpf_map_lookup_elem\(\) may write|R2 is not a known constant|invalid zero-sized read|R5 invalid zero-sized read|R\d is ptr_|Only fentry|bpf_spin_lock cannot be accessed|calling kernel function)`)

// collectCorpus writes the corpus from what ccload verify --log --json printed.
func collectCorpus(t *testing.T, file string) {
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var v struct {
		Kernels []struct {
			Release string
			Maps    []*Report
		}
	}
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatal(err)
	}
	for _, k := range v.Kernels {
		release, _, _ := strings.Cut(k.Release, "-")
		version := strings.Join(strings.SplitN(release, ".", 3)[:2], ".")
		a := &txtar.Archive{Comment: []byte("What the verifier of Linux " + release + " says. See verify_corpus_test.go.\n")}
		for _, r := range k.Maps {
			for _, w := range r.Why {
				if len(w.Log) == 0 {
					continue
				}
				// From the last line of C on, or a few lines.
				from := max(len(w.Log)-5, 0)
				for i := from; i >= max(len(w.Log)-25, 0); i-- {
					if strings.HasPrefix(w.Log[i], "; ") {
						from = i
						break
					}
				}
				a.Files = append(a.Files, txtar.File{Name: r.Map, Data: []byte(strings.Join(w.Log[from:], "\n") + "\n")})
			}
		}
		if err := os.WriteFile(filepath.Join(corpusDir, version+".txtar"), txtar.Format(a), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// Each table of refusals.bpf.c is refused in the sentence that is meant, by every
// kernel; a kernel may accept what is marked so.
func TestRefusals(t *testing.T) {
	kerneltest.Privileged(t)
	s := mustParse(t, "refusals")
	reports, err := s.Verify()
	if err != nil || len(reports) != len(s.Ops) {
		t.Fatal(err)
	}
	for _, r := range reports {
		sentence, ok := sentences[r.Map]
		if !ok {
			t.Errorf("%s: no sentence", r.Map)
			continue
		}
		if r.Loads {
			if !strings.HasPrefix(sentence, "?") {
				t.Errorf("%s: it loads", r.Map)
			}
			continue
		}
		why := r.Why[0]
		if len(r.Why) != 1 || !regexp.MustCompile(strings.TrimPrefix(sentence, "?")).MatchString(why.Brief()) {
			t.Errorf("%s: %s\nwant %s", r.Map, why.Brief(), sentence)
		}
		if why.Means == "" && !unexplained.MatchString(why.Detail) {
			t.Errorf("%s: not explained: %s", r.Map, why.Brief())
		}
		// Before the first instruction 6.1 does not tell which it refuses.
		if log := strings.Join(why.Log, "\n"); !regexp.MustCompile(`(?m)^\d+: |\binsn \d`).MatchString(log) {
			continue
		}
		if why.Source == "" && !regexp.MustCompile(`[Tt]oo large|combined stack|jumps is too complex|Only fentry`).MatchString(why.Detail) {
			t.Errorf("%s: no line of C: %s", r.Map, why.Brief())
		}
	}
}

// sentences are what the verifier says of each table, since 6.1; a question mark
// stands before those that a kernel may accept.
var sentences = map[string]string{
	"so_key":          `R2 type=scalar expected=fp, pkt, `,
	"so_sock_key":     `R2 type=(trusted_)?ptr_`,
	"so_no_map":       `R1 type=fp expected=map_ptr`,
	"so_short_key":    `invalid (indirect access to|read from) stack R2 off=-4 size=8`,
	"so_flags_arg":    `R3 type=scalar expected=`,
	"so_size":         `invalid zero-sized read`,
	"so_size_below":   `R5 unbounded memory access`,
	"so_size_past":    `invalid (indirect access to|read from) stack R4 off=-8 size=64`,
	"so_reserve":      `R2 is not a known constant`,
	"so_ring_lookup":  `invalid zero-sized read`,
	"so_perf_event":   `helper not available: bpf_perf_event_output: `,
	"so_ack_of":       `R1 type=fp expected=ptr_`,
	"so_tail":         `R1 type=(trusted_)?ptr_ expected=ctx`,
	"so_user":         `bpf_copy_from_user|helper call might sleep`,
	"so_unknown":      `helper not available: number 20000: `,
	"so_null":         `R0 invalid mem access 'map_value_or_null'`,
	"so_null_late":    `R0 invalid mem access 'map_value_or_null'`,
	"so_index":        `R0 unbounded memory access, make sure to bounds check`,
	"so_negative":     `unbounded min value|min value is negative`,
	"so_below":        `unbounded min value|min value is negative`,
	"so_past":         `R0 min value is outside of the allowed memory range \(invalid access to map value, value_size=32 off=32 size=8\)`,
	"so_past_by":      `R0 max value is outside of the allowed memory range \(invalid access to map value`,
	"so_stack_past":   `invalid write to stack R10 off=-520 size=8`,
	"so_stack_big":    `invalid variable-offset read from stack R3`,
	"so_unset":        `R8 !read_ok`,
	"so_number":       `R2 invalid mem access 'scalar'`,
	"so_zero":         `R2 invalid mem access 'scalar'`,
	"so_past_sock":    `access beyond struct tcp_sock at off 100000 size 4`,
	"so_before_sock":  `R1 is ptr_tcp_sock invalid negative access: off=-8`,
	"so_sock_index":   `R3 is ptr_tcp_sock invalid variable offset`,
	"so_misaligned":   `misaligned value access`,
	"so_stack_skew":   `misaligned stack access`,
	"so_read_only":    `write into map forbidden`,
	"so_wide":         `?field not writable: .*: no write support to tcp_sock at off`,
	"so_write_nxt":    `field not writable: tcp_sock.snd_nxt: no write support to tcp_sock at off`,
	"so_write_common": `field not writable: sock_common.skc_state: no write support to tcp_sock at off 18`,
	"so_multiply":     `R2 pointer arithmetic with <<= operator prohibited`,
	"so_difference":   `R2 pointer \*= pointer prohibited`,
	"so_divide":       `div by zero`,
	"so_shift":        `invalid shift 64`,
	"so_null_plus":    `R0 pointer arithmetic on map_value_or_null prohibited`,
	"so_forever":      `infinite loop detected at insn 0`,
	"so_while":        `BPF program is too large. Processed 1000001 insn|jumps is too complex`,
	"so_million":      `BPF program is too large. Processed 1000001 insn|jumps is too complex`,
	"so_branches":     `The sequence of 8193 jumps is too complex`,
	"so_dead":         `unreachable insn 1`,
	"so_beyond":       `jump out of range from insn 0 to 32001`,
	"so_into_wide":    `unreachable insn 1|jump into the middle`,
	"so_calls":        `the call stack of 9 frames is too deep`,
	"so_stacks":       `combined stack size of 3 calls is [67]`,
	"so_callback":     `R0|At callback return`,
	"so_loop_flags":   `At callback return`,
	"so_void":         `Global function so_note\(\) doesn't return scalar`,
	"so_global_sock":  `access beyond struct \(anon\)|R1 (type=ptr_|invalid mem access 'mem_or_null')`,
	"so_global_null":  `R1 invalid mem access 'mem_or_null'`,
	"so_global_arg":   `access beyond struct \(anon\)|R1 type=ptr_`,
	"so_global_num":   `R1 type=scalar expected=fp`,
	"so_global_bad":   `invalid unbounded variable-offset read from stack R2`,
	"so_kfunc_number": `arg#0 pointer type STRUCT sock must point to scalar`,
	"so_kfunc_stack":  `arg#0 pointer type STRUCT sock must point to scalar`,
	"so_kfunc_type":   `arg#0 pointer type STRUCT tcp_sock must point to scalar`,
	"so_kfunc_value":  `arg#0 pointer type STRUCT tcp_sock must point to scalar`,
	"so_kfunc_offset": `kernel function tcp_cong_avoid_ai args#0 expected pointer to STRUCT tcp_sock`,
	"so_rcu":          `bpf_rcu_read_lock-ed region|bpf_rcu_read_unlock is missing|kernel function missing: bpf_rcu_read_lock`,
	"so_rcu_unlock":   `unmatched rcu read unlock|kernel function missing: bpf_rcu_read_unlock`,
	"so_reference":    `?Unreleased reference id=`,
	"so_twice":        `R1 type=scalar expected=(ringbuf|alloc)_mem`,
	"so_submit":       `R1 type=fp expected=(ringbuf|alloc)_mem`,
	"so_unchecked":    `R0 invalid mem access '(ringbuf|alloc)_mem_or_null'`,
	"so_lock_kept":    `bpf_spin_lock-ed region|bpf_spin_unlock is missing`,
	"so_lock_twice":   `function calls are not allowed while holding a lock`,
	"so_unlock":       `bpf_spin_unlock without taking a lock`,
	"so_lock_call":    `function calls are not allowed while holding a lock`,
	"so_lock_read":    `bpf_spin_lock cannot be accessed directly`,
	"so_lock_stack":   `R1 type=fp expected=map_value`,
	"so_v4_move":      `?BPF_MOV uses reserved fields`,
	"so_v4_swap":      `?unknown opcode d7`,
	"so_v4_divide":    `?BPF_ALU uses reserved fields`,
	"so_v4_load":      `?BPF_LDX uses reserved fields`,
	"so_v4_jump":      `?reserved fields`,
	"so_may_goto":     `?unknown opcode|invalid may_goto`,
	"so_acquire":      `?BPF_ATOMIC uses invalid atomic opcode`,
	"so_bare":         `R2 !read_ok`,
	"so_bare_first":   `invalid bpf_context access off=\d+ size=4`,
	"so_context":      `invalid bpf_context access off=0 size=8`,
	"so_context_at":   `invalid bpf_context access off=4 size=4 \(func 'init' offset 4 is not multiple of 8\)`,
	"so_third":        `signature changed: set_state, argument 4: the kernel has \(sock \*, u8\)`,
	"so_no_value":     `unreachable insn 1`,
	"so_sleeps":       `?Only fentry/fexit/fmod_ret, lsm, and kprobe/uprobe programs can be sleepable`,
	"so_state":        `private state too large: 128 bytes are needed, the kernel has 104: no write support to tcp_sock at off`,
	"so_state_across": `private state too large: 108 bytes are needed, the kernel has 104: write access at off \d+ with size 8 beyond the member`,
	"so_state_var":    `R3 is ptr_tcp_sock invalid variable offset`,
}
