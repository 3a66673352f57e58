//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* owner is the kernel's to set. */
#include "ccload.bpf.h"

struct tcp_congestion_ops___owner {
	__u32 (*ssthresh)(struct sock *sk);
	void (*cong_avoid)(struct sock *sk, __u32 ack, __u32 acked);
	__u32 (*undo_cwnd)(struct sock *sk);
	void *owner;
	char name[16];
};

STRUCT_OPS(__u32, so_cwnd, struct sock *, sk) { return 10; }
STRUCT_OPS(void, so_cong_avoid, struct sock *, sk, __u32, ack, __u32, acked) {}

SEC(".struct_ops.link") struct tcp_congestion_ops___owner so_owner = {
	.ssthresh = (void *)so_cwnd,
	.cong_avoid = (void *)so_cong_avoid,
	.undo_cwnd = (void *)so_cwnd,
	.owner = (void *)1,
	.name = "so_owner",
};
