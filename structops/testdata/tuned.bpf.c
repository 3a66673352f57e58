//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Variables of all sorts: some can be set when it is loaded, some while it runs, some not at all. */
#include "ccload.bpf.h"

const volatile __u32 so_gain = 3;     /* when it is loaded */
__u32 so_floor = 4;                   /* while it runs */
short so_narrow = -2;                 /* while it runs */
volatile bool so_off;                 /* while it runs, though zero */
__u64 so_rounds;                      /* what it counts */
__u32 so_table[2] = { 1, 2 };         /* not a number */
const __u32 so_folded = 9;            /* a constant */
static volatile __u32 so_hidden = 7;  /* static */
static const volatile __u32 so_fixed = 8;

STRUCT_OPS(__u32, so_ssthresh, struct sock *, sk)
{
	static volatile __u32 calls = 1;

	calls++;
	so_rounds++;
	so_hidden += so_fixed;
	return so_off ? so_folded : so_gain * so_floor + so_narrow + so_table[so_rounds & 1];
}

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

