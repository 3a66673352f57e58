//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The verifier takes its time over each function: it follows every path, for each leaves
 * another number behind, and that number is an index. */
#include "ccload.bpf.h"

#define opaque(x) asm volatile("" : "+r"(x))

static __always_inline __u32 paths(__u32 bits)
{
	volatile __u8 tell[64] = {};
	__u32 n = 1;

#pragma clang loop unroll(full)
	for (int i = 0; i < 15; i++) {
		opaque(bits);
		n = bits & 1 ? n * 3 + 1 : n * 2;
		opaque(n);
		bits >>= 1;
	}
	tell[n & 63] = 1;
	return tell[bits & 63];
}

STRUCT_OPS(__u32, slow_ssthresh, struct sock *, sk) { return paths(tcp_sk(sk)->snd_nxt); }
STRUCT_OPS(__u32, slow_undo, struct sock *, sk) { return paths(tcp_sk(sk)->snd_nxt); }
STRUCT_OPS(void, slow_avoid, struct sock *, sk, __u32, ack, __u32, acked)
{
	tcp_sk(sk)->snd_cwnd = 10 + (paths(ack) & 1);
}

SEC(".struct_ops.link") struct tcp_congestion_ops slow = {
	.ssthresh = (void *)slow_ssthresh,
	.cong_avoid = (void *)slow_avoid,
	.undo_cwnd = (void *)slow_undo,
	.name = "cct_slow",
};
