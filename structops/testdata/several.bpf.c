//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Several maps: other programs for one member, one program in two members, all four kinds of section. */
#include "ccload.bpf.h"

STRUCT_OPS(__u32, so_first, struct sock *, sk) { return 10; }
STRUCT_OPS(__u32, so_second, struct sock *, sk) { return 20; }
STRUCT_OPS(__u32, so_a_name_that_the_kernel_cuts, struct sock *, sk) { return 30; }
STRUCT_OPS(void, so_cong_avoid, struct sock *, sk, __u32, ack, __u32, acked) {}
STRUCT_OPS(void, so_init, struct sock *, sk) {}

SEC(".struct_ops.link") struct tcp_congestion_ops so_one = {
	.ssthresh = (void *)so_first,
	.undo_cwnd = (void *)so_a_name_that_the_kernel_cuts,
	.cong_avoid = (void *)so_cong_avoid,
	.init = (void *)so_init,
	.name = "so_one",
};

SEC(".struct_ops.link") struct tcp_congestion_ops so_two = {
	.ssthresh = (void *)so_second,
	.undo_cwnd = (void *)so_second,
	.cong_avoid = (void *)so_cong_avoid,
	.name = "so_two",
};

SEC(".struct_ops") struct tcp_congestion_ops so_plain = {
	.ssthresh = (void *)so_first,
	.undo_cwnd = (void *)so_second,
	.cong_avoid = (void *)so_cong_avoid,
	.name = "so_plain",
};

/* Of the name of the first, which it can replace. */
SEC("?.struct_ops.link") struct tcp_congestion_ops so_next = {
	.ssthresh = (void *)so_second,
	.undo_cwnd = (void *)so_first,
	.cong_avoid = (void *)so_cong_avoid,
	.name = "so_one",
};

SEC("?.struct_ops") struct tcp_congestion_ops so_spare = {
	.ssthresh = (void *)so_first,
	.undo_cwnd = (void *)so_first,
	.cong_avoid = (void *)so_cong_avoid,
	.name = "so_spare",
};
