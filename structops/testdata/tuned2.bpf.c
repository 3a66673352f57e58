//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The next version of tuned.bpf.c: another default, a narrower type, one less, one more. */
#include "ccload.bpf.h"

const volatile __u32 so_gain = 5;
volatile __u8 so_floor = 6;
const volatile __u32 so_added = 1;

STRUCT_OPS(__u32, so_ssthresh, struct sock *, sk) { return so_gain * so_floor + so_added; }

STRUCT_OPS(void, so_cong_avoid, struct sock *, sk, __u32, ack, __u32, acked)
{
	tcp_reno_cong_avoid(sk, ack, acked);
}

STRUCT_OPS(__u32, so_undo_cwnd, struct sock *, sk) { return tcp_reno_undo_cwnd(sk); }

CONGESTION_OPS struct tcp_congestion_ops so_tuned = {
	.ssthresh = (void *)so_ssthresh,
	.cong_avoid = (void *)so_cong_avoid,
	.undo_cwnd = (void *)so_undo_cwnd,
	.name = "so_tuned",
};
