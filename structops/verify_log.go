// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// stats are what the verifier says at the end of its log.
type stats struct {
	processed, maxPerInsn, states, peak int
	stack                               []int // bytes, of each function in the order of the program
}

// parseStats reads the statistics of a log. The line that is always there is
//
//	processed N insns (limit N) max_states_per_insn N total_states N peak_states N mark_read N
//
// and, of programs that were accepted, there is "stack depth N+N+N".
func parseStats(log []string) (st stats, ok bool) {
	for _, line := range log {
		if rest, found := strings.CutPrefix(line, "stack depth "); found {
			st.stack = nil
			depths, _, _ := strings.Cut(rest, " ")
			for d := range strings.SplitSeq(depths, "+") {
				n, err := strconv.Atoi(d)
				if err != nil {
					st.stack = nil
					break
				}
				st.stack = append(st.stack, n)
			}
		}
		f := strings.Fields(line)
		if len(f) < 11 || f[0] != "processed" || f[2] != "insns" || f[5] != "max_states_per_insn" || f[7] != "total_states" || f[9] != "peak_states" {
			continue
		}
		ok = true
		for i, to := range map[int]*int{1: &st.processed, 6: &st.maxPerInsn, 8: &st.states, 10: &st.peak} {
			var err error
			if *to, err = strconv.Atoi(f[i]); err != nil {
				ok = false
			}
		}
	}
	return st, ok
}

// What a verifier's log is made of, besides the sentences in which it says what is
// wrong. Each has a form of its own.
var (
	// Statistics, at the end.
	logStats = regexp.MustCompile(`^(processed \d+ insns|verification time |stack depth |insns processed )`)

	// Where it is: source lines, instructions, states, jumps, functions.
	logTrace = regexp.MustCompile(`^(;|\d+: |from \d+ to \d+|(frame\d+: ?)?R\d+(_\w+)?=|safe$|func#\d+ @|Validating \w+\(\) func#|Func#\d+ .*is safe for any args|live regs before insn|caller:|callee:|returning from callee:|to caller at \d+)`)

	// How it went on: what it remembers of states.
	logState = regexp.MustCompile(`^(cur state:|old state:|mark_precise|last_idx \d|regs=|parent (didn't have|already had|state) |propagating |falling back to |(old|new) insn |\s*(frame\d+: ?)?R\d+(_\w+)?=)`)

	// Sentences that it also says when nothing is wrong: they count only where it says
	// nothing else.
	logAside = regexp.MustCompile(`^(func '\w+' arg\d+ has btf_id |arg#\d+ reference type\('UNKNOWN '\)|reg type unsupported for arg#\d+|max struct nesting depth exceeded|Global function \w+\(\) doesn't return scalar)`)

	// What it says after the sentence that matters.
	logTrailer = regexp.MustCompile(`^Caller passes invalid args into func#`)
)

// decisive finds in a verifier's log the sentence that says why it refused, what it
// said just before that, and the line of C that it was at.
//
// The verifier stops at the first thing that is wrong: why is what it says last,
// after the last instruction, state or jump and before the statistics. So the log
// is read from its end, and what is passed over is what has a form that no sentence
// has. A list of sentences that are no reasons would never be complete.
func decisive(log []string) (reason, before, source string) {
	at := len(log) - 1
	var said []string // the last first
	for ; at >= 0; at-- {
		line := log[at]
		if i := strings.Index(line, "processed "); i > 0 && logStats.MatchString(line[i:]) {
			line = line[:i] // some sentences lack the end of their line
		}
		if line == "" || logStats.MatchString(line) || logState.MatchString(line) {
			continue
		}
		if logTrace.MatchString(line) {
			break
		}
		said = append(said, line)
	}
	for ; at >= 0 && source == ""; at-- {
		if rest, ok := strings.CutPrefix(log[at], "; "); ok {
			// "; text @ file:line" since Linux 6.8
			if text, place, ok := strings.Cut(rest, " @ "); ok {
				rest = place + ": " + strings.TrimSpace(text)
			}
			source = rest
		}
	}
	if len(said) > 1 && logTrailer.MatchString(said[0]) {
		said = said[1:]
	}
	rest := slices.DeleteFunc(slices.Clone(said), logAside.MatchString)
	if len(rest) == 0 {
		rest = said
	}
	if len(rest) > 0 {
		reason = rest[0]
	}
	if len(rest) > 1 && !strings.HasPrefix(reason, "[") { // before a type that is refused are the others
		before = rest[1]
	}
	return reason, before, source
}

// refusal is what a log tells of a refusal, taken apart.
type refusal struct {
	reason, before, source string // see decisive

	at int // the last instruction that was looked at; -1: none

	unknown  int64  // number of a helper that does not exist; -1: none
	helper   string // one that exists, and is not for struct_ops
	function string // of the kernel's, that BPF or struct_ops must not call

	structure string // that may not be written; "" if it is not about that
	offset    int    // in it, bytes; -1: not told

	argument int  // number of an argument that is not there, from 1; 0: none
	scalar   bool // a number was used as a pointer
}

var (
	instruction = regexp.MustCompile(`^(\d+): \([0-9a-f]{2}\) (.*)`)
	writeRefuse = regexp.MustCompile(`^no write support to (\w+) at off (\d+)`)
	unknownFunc = regexp.MustCompile(`^invalid func unknown#(\d+)`)
	noHelper    = regexp.MustCompile(`^(?:unknown func|program of this type cannot use helper) (\w+)#\d+`)
	noCall      = regexp.MustCompile(`^calling kernel function (\w+) is not allowed`)
	noArgument  = regexp.MustCompile(`^func '\w+' doesn't have \d+-th argument`)
	badContext  = regexp.MustCompile(`^invalid bpf_context access off=(\d+) `)
	scalarUsed  = regexp.MustCompile(`^R\d+ invalid mem access '(?:scalar|inv)'`)
	store       = regexp.MustCompile(`^\*\(u\d+ \*\)\((r\d+) ([+-]\d+)\) = `)
	pointer     = regexp.MustCompile(`\b(R\d+)(?:_\w+)?=(?:\w+_)?ptr_(\w+)\((?:off=(-?\d+))?`)
)

// parseRefusal takes a log apart. Numbers that do not fit count as not told.
func parseRefusal(log []string) refusal {
	r := refusal{at: -1, unknown: -1, offset: -1}
	r.reason, r.before, r.source = decisive(log)
	number := func(s string) int {
		n, err := strconv.Atoi(s)
		if err != nil {
			return -1
		}
		return n
	}
	type place struct {
		structure string
		off       int
	}
	pointers := map[string]place{} // what is known of the registers
	var last string                // instruction
	missing := false
	for _, line := range log {
		if m := instruction.FindStringSubmatch(line); m != nil {
			r.at, last = number(m[1]), m[2]
		}
		for _, m := range pointer.FindAllStringSubmatch(line, -1) {
			p := place{structure: m[2]}
			if m[3] != "" {
				p.off = number(m[3])
			}
			pointers["r"+m[1][1:]] = p
		}
		missing = missing || noArgument.MatchString(line)
	}
	if m := writeRefuse.FindStringSubmatch(r.reason); m != nil {
		r.structure, r.offset = m[1], number(m[2])
	} else if m := store.FindStringSubmatch(last); m != nil && r.reason == "only read is supported" {
		if p, ok := pointers[m[1]]; ok {
			r.structure, r.offset = p.structure, p.off+number(m[2])
		}
	}
	if m := unknownFunc.FindStringSubmatch(r.reason); m != nil {
		r.unknown = int64(number(m[1]))
	}
	if m := noHelper.FindStringSubmatch(r.reason); m != nil {
		r.helper = m[1]
	}
	if m := noCall.FindStringSubmatch(r.reason); m != nil {
		r.function = m[1]
	}
	// The kernel before 6.12 does not tell the right number, so it is worked out
	// from the offset: every argument takes eight bytes.
	if m := badContext.FindStringSubmatch(r.reason); m != nil && missing {
		if off := number(m[1]); off >= 0 {
			r.argument = off/8 + 1
		}
	}
	r.scalar = scalarUsed.MatchString(r.reason)
	return r
}
