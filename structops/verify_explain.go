// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"regexp"
	"strconv"
)

// explanations are what the verifier's sentences mean to who wrote the C. They
// stand beside its own words, never in their place: a sentence that is not here is
// shown as it is.
var explanations = []struct {
	sentence *regexp.Regexp
	means    func(m []string) string
}{
	{re(`^R(\d) type=(\w+?)_or_null_? expected=`), func(m []string) string { return "argument " + m[1] + " may be NULL: check it first" }},
	{re(`^R(\d) type=(?:scalar|inv) expected=`), func(m []string) string {
		return "argument " + m[1] + " of the call is a number, and a pointer is wanted"
	}},
	{re(`^R(\d) type=\w+ expected=`), func(m []string) string {
		return "argument " + m[1] + " of the call points to something else than what is wanted"
	}},
	{re(`_or_null'|null-check it first|possibly NULL pointer`), said("it may be NULL: check it before it is used")},
	{re(`min value is negative|unbounded min value`), said("the index may be negative: make it unsigned, or mask it, just before it is used")},
	{re(`[Uu]nbounded memory access|unbounded variable-offset|unbounded (max )?value`), said("the index has no upper bound: compare it with the size, or mask it, just before it is used")},
	{re(`value is outside of the allowed memory range|^invalid access to map value|^invalid variable-offset`), said("it may reach beyond the end of the value or the array: check the index against the size")},
	{re(`^Global function \w+\(\) doesn't return scalar|^Global function \w+\(\) return`), said("a function that is not static must return an integer: let it return int, or make it static")},
	{re(`^R\d invalid mem access '(scalar|inv)'`), said("a number is used as a pointer; a pointer that was computed with, or read from memory without CO-RE, is a number to the verifier")},
	{re(`^invalid bpf_context access`), said("the callback's arguments come as an array of 64-bit words, to be read as they are: wrap it in BPF_PROG or STRUCT_OPS")},
	{re(`!read_ok|^invalid (indirect )?(read from|access to) stack`), said("it is used before anything was put there")},
	{re(`reserved field|^unknown opcode|^unknown (alu|insn)|invalid atomic opcode|^invalid may_goto`), said("it was built for a newer instruction set than this kernel's: rebuild with -mcpu=v3")},
	{re(`^\[\d+\] FUNC .*Invalid arg#`), said("the function's arguments have no names in the object's BTF: was it built without -O2?")},
	{re(`^\[\d+\] [A-Z_0-9]+ `), said("the kernel does not take the object's type information (BTF): was it built by a newer compiler?")},
	{re(`[Tt]oo large\. Processed|jumps is too complex|^BPF program is too large`), said("there are more ways through it than the verifier will try: bound loops by small constants, or use bpf_loop()")},
	{re(`^infinite loop detected|^back-edge`), said("the loop does not end, for all that the verifier can see: bound it by a constant, or use bpf_loop()")},
	{re(`^unreachable insn`), said("there is code that nothing leads to: was it built without -O2?")},
	{re(`^combined stack size|^stack depth|^invalid (write to|stack)`), said("the functions of a chain of calls have 512 bytes of stack together")},
	{re(`^the call stack of \d+ frames`), said("calls may be nested 8 deep")},
	{re(`^write access at off \d+ with size \d+ beyond`), said("the store begins in a field that may be written, and goes beyond it")},
	{re(`^(no write support to|only read is supported)`), said("callbacks may write a few fields of the socket only; everything else belongs in the private state or in a map")},
	{re(`^access beyond struct \(anon\)`), said("the function's argument points to something else than it is declared to")},
	{re(`^access beyond struct (\w+)`), func(m []string) string { return "the field is beyond the end of the kernel's struct " + m[1] }},
	{re(`^[Mm]isaligned`), said("the address is no multiple of the size that is accessed")},
	{re(`^helper call might sleep|^kernel func .* is sleepable`), said("it may sleep, and congestion controls may not")},
	{re(`^(unknown func|program of this type cannot use helper)`), said("congestion controls, or this callback of theirs, may not call this helper")},
	{re(`^arg#(\d+) (pointer|expected|reference|is|doesn't)`), argument},
	{re(`^kernel function \w+ args#(\d+) expected`), argument},
	{re(`^R(\d+) must (have zero offset|be referenced)`), func(m []string) string {
		return "argument " + m[1] + " of the kernel's function must be the pointer itself, as the kernel gave it"
	}},
	{re(`pointer arithmetic|pointer [-+*/|&^<>]+= pointer|^math between`), said("only bounded numbers can be added to this pointer, and nothing else done with it")},
	{re(`^function calls are not allowed while holding a lock`), said("release the spin lock before anything is called")},
	{re(`_lock-ed region|^bpf_(spin|rcu_read)_unlock is missing|without taking a lock|^unmatched rcu`), said("each lock must be released on each way out, and only what was taken")},
	{re(`^Unreleased reference`), said("what was reserved or acquired must be submitted or released on each way out")},
	{re(`^div by zero`), said("it divides by the constant 0")},
	{re(`^invalid shift`), said("it shifts by more bits than the number has")},
	{re(`^write into map forbidden|cannot write into rdonly`), said("the map, or the const variable, cannot be written")},
	{re(`^At (callback|program)|^R0 (not a known|has|leaks)|should have been in`), said("it returns a value that is not allowed here")},
	{re(`^jump out of range|^last insn is not|^no jump|subprog doesn't end|^jump into the middle`), said("the program runs over its end, or jumps out of it")},
}

func re(s string) *regexp.Regexp { return regexp.MustCompile(s) }

func said(s string) func([]string) string { return func([]string) string { return s } }

func argument(m []string) string {
	n, _ := strconv.Atoi(m[1])
	return "argument " + strconv.Itoa(n+1) + " of the function is not what it is declared to take"
}

// explain says what a sentence of the verifier means; "" if that is not known here.
func explain(sentence string) string {
	for _, e := range explanations {
		if m := e.sentence.FindStringSubmatch(sentence); m != nil {
			return e.means(m)
		}
	}
	return ""
}
