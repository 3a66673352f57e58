//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Two that hand a connection without ECN to reno from init: one asks for ECN, the other does not. */
#include "ccload.bpf.h"

enum { SOL_TCP = 6, TCP_CONGESTION = 13, TCP_ECN_OK = 1 };

volatile __u32 so_fell; /* connections handed over */

STRUCT_OPS(void, so_init, struct sock *, sk)
{
	char reno[] = "reno";

	if (!(tcp_sk(sk)->ecn_flags & TCP_ECN_OK) &&
	    !bpf_setsockopt(sk, SOL_TCP, TCP_CONGESTION, reno, sizeof(reno)))
		so_fell++;
}

STRUCT_OPS(__u32, so_cwnd, struct sock *, sk) { return tcp_sk(sk)->snd_cwnd; }
STRUCT_OPS(void, so_avoid, struct sock *, sk, __u32, ack, __u32, acked) {}

#define FALLS(map, more)                                   \
	CONGESTION_OPS struct tcp_congestion_ops map = {   \
		.init = (void *)so_init,                   \
		.ssthresh = (void *)so_cwnd,               \
		.cong_avoid = (void *)so_avoid,            \
		.undo_cwnd = (void *)so_cwnd,              \
		.flags = TCP_CONG_NON_RESTRICTED | more,   \
		.name = #map,                              \
	}
FALLS(so_falls, 0);
FALLS(so_asks, TCP_CONG_NEEDS_ECN);
