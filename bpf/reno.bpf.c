//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * bpf_reno: slow start and congestion avoidance of RFC 5681, the smallest
 * complete congestion control. To write your own, copy this file, give the
 * functions and the table new names, and change what they do.
 */
#include "ccload.bpf.h"

/* A loss: go on with half the window (RFC 5681 s. 3.1, equation 4). */
STRUCT_OPS(__u32, bpf_reno_ssthresh, struct sock *, sk)
{
	return max(tcp_sk(sk)->snd_cwnd / 2, 2);
}

/* ACKs for new data: grow by a segment an ACK, or a segment a round trip. */
STRUCT_OPS(void, bpf_reno_cong_avoid, struct sock *, sk, __u32, ack, __u32, acked)
{
	struct tcp_sock *tp = tcp_sk(sk);

	if (!is_cwnd_limited(tp))
		return;
	if (in_slow_start(tp))
		acked = tcp_slow_start(tp, acked);
	if (acked) /* what slow start did not use up */
		tcp_cong_avoid_ai(tp, tp->snd_cwnd, acked);
}

/* The loss was none: take the old window back. */
STRUCT_OPS(__u32, bpf_reno_undo_cwnd, struct sock *, sk)
{
	return max(tcp_sk(sk)->snd_cwnd, tcp_sk(sk)->prior_cwnd);
}

CONGESTION_OPS struct tcp_congestion_ops bpf_reno = {
	.ssthresh = (void *)bpf_reno_ssthresh,
	.cong_avoid = (void *)bpf_reno_cong_avoid,
	.undo_cwnd = (void *)bpf_reno_undo_cwnd,
	.name = "bpf_reno",
};
