//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * Calls the arithmetic of the algorithms from outside, so that a test can hold
 * what the kernel's verifier and JIT made of it against exact numbers.
 */
#include "../cubic.bpf.c"
#undef SCALE_BITS
#define g dctcp_g
#define SCALE_BITS DCTCP_SCALE_BITS
#define new_window dctcp_new_window
#define backoff dctcp_backoff
#include "../dctcp.bpf.c"

struct call {
	__u64 function, a, b, c, result;
};

SEC("syscall") int call(struct call *call)
{
	switch (call->function) {
	case 0: call->result = cubic_root(call->a); break;
	case 1: call->result = cubic_k(call->a); break;
	case 2: call->result = cubic_window(call->a, call->b, call->c); break;
	case 3: call->result = reno_friendly_acks(call->a); break;
	case 4: call->result = dctcp_alpha(call->a, call->b, call->c); break;
	default: return 1;
	}
	return 0;
}
