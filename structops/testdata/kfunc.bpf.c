//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* It calls a function that no kernel has. */
#include "ccload.bpf.h"

extern void so_no_such_function(struct sock *sk) __ksym;

STRUCT_OPS(__u32, so_cwnd, struct sock *, sk) { return 10; }
STRUCT_OPS(void, so_calls, struct sock *, sk, __u32, ack, __u32, acked)
{
	so_no_such_function(sk);
}

SEC(".struct_ops.link") struct tcp_congestion_ops so_kfunc = {
	.ssthresh = (void *)so_cwnd,
	.cong_avoid = (void *)so_calls,
	.undo_cwnd = (void *)so_cwnd,
	.name = "so_kfunc",
};
