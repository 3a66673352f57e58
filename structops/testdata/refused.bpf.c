//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The verifier refuses it: snd_nxt is not writable. */
#include "ccload.bpf.h"

STRUCT_OPS(__u32, so_cwnd, struct sock *, sk) { return 10; }
STRUCT_OPS(void, so_writes, struct sock *, sk, __u32, ack, __u32, acked)
{
	tcp_sk(sk)->snd_nxt = ack;
}

SEC(".struct_ops.link") struct tcp_congestion_ops so_refused = {
	.ssthresh = (void *)so_cwnd,
	.cong_avoid = (void *)so_writes,
	.undo_cwnd = (void *)so_cwnd,
	.name = "so_refused",
};
