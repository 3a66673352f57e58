//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* A program of another type in a member. */
#include "ccload.bpf.h"

SEC("xdp") int so_xdp(void *ctx) { return 2; }
STRUCT_OPS(__u32, so_cwnd, struct sock *, sk) { return 10; }

SEC(".struct_ops.link") struct tcp_congestion_ops so_program = {
	.ssthresh = (void *)so_cwnd,
	.cong_avoid = (void *)so_xdp,
	.undo_cwnd = (void *)so_cwnd,
	.name = "so_program",
};
