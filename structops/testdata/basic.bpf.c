//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The least that registers, with parameters of every type. The tests also patch its bytes. */
#include "ccload.bpf.h"

enum so_mode { SO_OFF, SO_ON = 70000 };
struct so_pair { __u32 a, b; };

const volatile __u8 p_u8 = 200;
const volatile short p_s16 = -300;
const volatile __u32 p_u32 = 70000;
const volatile __s32 p_s32 = -70000;
const volatile __u64 p_u64 = 1ull << 63;
const volatile __s64 p_s64 = -(1ll << 62);
const volatile bool p_bool = true;
const volatile enum so_mode p_enum = SO_ON;
const volatile float p_float = 1.5;
const volatile double p_double = 0.1;
const volatile struct so_pair p_pair = { 1, 2 };
const __u32 not_volatile = 9;
volatile __u32 not_constant = 9;

STRUCT_OPS(__u32, so_ssthresh, struct sock *, sk)
{
	return p_u8 + p_s16 + p_u32 + p_s32 + p_u64 + p_s64 + p_bool + p_enum + p_pair.a + not_constant;
}

STRUCT_OPS(void, so_cong_avoid, struct sock *, sk, __u32, ack, __u32, acked)
{
	tcp_reno_cong_avoid(sk, ack, acked);
}

STRUCT_OPS(__u32, so_undo_cwnd, struct sock *, sk)
{
	return tcp_reno_undo_cwnd(sk);
}

/* Nothing refers to these two. */
STRUCT_OPS(void, so_forgotten, struct sock *, sk) {}

SEC("?struct_ops/so_optional") void so_optional(__u64 *ctx) {}

CONGESTION_OPS struct tcp_congestion_ops so_basic = {
	.ssthresh = (void *)so_ssthresh,
	.cong_avoid = (void *)so_cong_avoid,
	.undo_cwnd = (void *)so_undo_cwnd,
	.flags = TCP_CONG_NON_RESTRICTED,
	.name = "so_basic",
};
