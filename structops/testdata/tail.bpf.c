//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* A program that no table refers to, but a map of programs does: its section names the member. */
#include "ccload.bpf.h"

SEC("struct_ops/cong_avoid") void so_tail(__u64 *ctx) {}

struct {
	int (*type)[3]; /* BPF_MAP_TYPE_PROG_ARRAY */
	int (*key_size)[4];
	int (*max_entries)[1];
	void (*values[])(__u64 *ctx);
} so_jumps __attribute__((section(".maps"), used)) = { .values = { so_tail } };

STRUCT_OPS(__u32, so_cwnd, struct sock *, sk) { return 10; }
SEC("struct_ops") void so_cong_avoid(__u64 *ctx) { bpf_tail_call(ctx, &so_jumps, 0); }

SEC(".struct_ops.link") struct tcp_congestion_ops so_tailing = {
	.ssthresh = (void *)so_cwnd,
	.cong_avoid = (void *)so_cong_avoid,
	.undo_cwnd = (void *)so_cwnd,
	.name = "so_tailing",
};
