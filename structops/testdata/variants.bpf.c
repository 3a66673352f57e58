//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* One congestion control for both signatures of cong_control: (sk, rs) before Linux 6.10, (sk, ack, flag, rs) since. */
#include "ccload.bpf.h"

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct rate_sample {
	__s32 delivered;
};
#pragma clang attribute pop

struct tcp_congestion_ops___old {
	__u32 (*ssthresh)(struct sock *sk);
	void (*cong_control)(struct sock *sk, const struct rate_sample *rs);
	__u32 (*undo_cwnd)(struct sock *sk);
	__u32 flags;
	char name[16];
};

struct tcp_congestion_ops___new {
	__u32 (*ssthresh)(struct sock *sk);
	void (*cong_control)(struct sock *sk, __u32 ack, int flag, const struct rate_sample *rs);
	__u32 (*undo_cwnd)(struct sock *sk);
	__u32 flags;
	char name[16];
};

STRUCT_OPS(__u32, so_cwnd, struct sock *, sk) { return tcp_sk(sk)->snd_cwnd; }

SEC("?struct_ops/cong_control") void so_before(__u64 *ctx)
{
	const struct rate_sample *rs = (void *)ctx[1];

	if (rs->delivered > 0)
		tcp_sk((void *)ctx[0])->snd_cwnd = 11;
}

SEC("?struct_ops/cong_control") void so_since(__u64 *ctx)
{
	const struct rate_sample *rs = (void *)ctx[3];

	if (rs->delivered > 0)
		tcp_sk((void *)ctx[0])->snd_cwnd = 12;
}

SEC("?.struct_ops.link") struct tcp_congestion_ops___old so_old = {
	.ssthresh = (void *)so_cwnd,
	.undo_cwnd = (void *)so_cwnd,
	.cong_control = (void *)so_before,
	.flags = TCP_CONG_NON_RESTRICTED,
	.name = "so_variants",
};

SEC("?.struct_ops.link") struct tcp_congestion_ops___new so_new = {
	.ssthresh = (void *)so_cwnd,
	.undo_cwnd = (void *)so_cwnd,
	.cong_control = (void *)so_since,
	.flags = TCP_CONG_NON_RESTRICTED,
	.name = "so_variants",
};
