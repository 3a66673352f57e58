//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Has functions and slots for extensions; init makes them seen in a socket's ssthresh. */
#include "ccload.bpf.h"

POLICY __u32 scale(__u32 cwnd) { return cwnd * 2; }
POLICY __u32 wide(__u32 a, bool b) { return b ? a : 0; }
static __noinline __u32 hidden(__u32 a) { return a * a; }

SLOT(scale);
SLOT(only);

STRUCT_OPS(__u32, so_ssthresh, struct sock *, sk)
{
	return scale(tcp_sk(sk)->snd_cwnd) + hidden(wide(1, true));
}

STRUCT_OPS(void, so_cong_avoid, struct sock *, sk, __u32, ack, __u32, acked)
{
	CALL_SLOT(only);
}

STRUCT_OPS(__u32, so_undo, struct sock *, sk) { return tcp_sk(sk)->snd_cwnd; }

STRUCT_OPS(void, so_init, struct sock *, sk)
{
	CALL_SLOT(scale);
	tcp_sk(sk)->snd_ssthresh = scale(50);
}

SEC(".struct_ops.link") struct tcp_congestion_ops so_extensible = {
	.ssthresh = (void *)so_ssthresh,
	.cong_avoid = (void *)so_cong_avoid,
	.undo_cwnd = (void *)so_undo,
	.init = (void *)so_init,
	.name = "so_extensible",
};
