//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * One congestion control for each reason for which a kernel may refuse one. They are optional: each is
 * loaded only when it is named.
 */
#include "ccload.bpf.h"

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct tcp_sock___more {
	__u32 app_limited; /* writable since 6.12 */
	struct {
		__u32 so_no_such_field;
	} so_inner;
};
struct rate_sample___here { __u32 delivered; };
struct ack_sample___here { __u32 pkts_acked; };
struct sock___here { unsigned int sk_gso_max_size; };
#pragma clang attribute pop

struct tcp_congestion_ops___now {
	__u32 (*ssthresh)(struct sock *sk);
	void (*cong_avoid)(struct sock *sk, __u32 ack, __u32 acked);
	__u32 (*undo_cwnd)(struct sock *sk);
	void (*init)(struct sock *sk);
	void (*release)(struct sock *sk);
	__u32 (*min_tso_segs)(struct sock *sk);
	void (*pkts_acked)(struct sock *sk, const struct ack_sample *sample);
	void (*cong_control)(struct sock *sk, __u32 ack, int flag, const struct rate_sample *rs); /* since 6.10 */
	__u32 (*so_no_such_member)(struct sock *sk);
	__u32 flags;
	char name[16];
};

struct tcp_congestion_ops___old {
	__u32 (*ssthresh)(struct sock *sk);
	__u32 (*undo_cwnd)(struct sock *sk);
	void (*cong_control)(struct sock *sk, const struct rate_sample *rs); /* until 6.9 */
	char name[16];
};

STRUCT_OPS(__u32, so_cwnd, struct sock *, sk) { return 10; }
STRUCT_OPS(void, so_avoid, struct sock *, sk, __u32, ack, __u32, acked) {}

#define BREAKER(n, member, value)                                       \
	SEC("?.struct_ops.link") struct tcp_congestion_ops___now n = {  \
		.ssthresh = (void *)so_cwnd,                            \
		.cong_avoid = (void *)so_avoid,                         \
		.undo_cwnd = (void *)so_cwnd,                           \
		.member = value,                                        \
		.name = #n,                                             \
	}

/* Signatures: the fourth argument, the seventh, and what was the second. */
SEC("struct_ops") void so_fourth(__u64 *ctx)
{
	if (ctx[3])
		tcp_sk((void *)ctx[0])->snd_cwnd = ctx[1];
}
BREAKER(so_arg4, cong_control, (void *)so_fourth);

SEC("struct_ops") void so_seventh(__u64 *ctx) { tcp_sk((void *)ctx[0])->snd_cwnd = ctx[6]; }
BREAKER(so_arg7, cong_control, (void *)so_seventh);

STRUCT_OPS(void, so_sample, struct sock *, sk, struct rate_sample___here *, rs)
{
	tcp_sk(sk)->snd_cwnd = rs->delivered;
}
SEC("?.struct_ops.link") struct tcp_congestion_ops___old so_arg2 = {
	.ssthresh = (void *)so_cwnd,
	.undo_cwnd = (void *)so_cwnd,
	.cong_control = (void *)so_sample,
	.name = "so_arg2",
};

/* Writes. */
STRUCT_OPS(void, so_limited, struct sock *, sk) { ((struct tcp_sock___more *)sk)->app_limited = 1; }
BREAKER(so_write_new, init, (void *)so_limited);

STRUCT_OPS(void, so_gso, struct sock *, sk) { ((struct sock___here *)sk)->sk_gso_max_size = 1; }
BREAKER(so_write_sock, init, (void *)so_gso);

STRUCT_OPS(void, so_acked, struct sock *, sk, struct ack_sample___here *, sample) { sample->pkts_acked = 1; }
BREAKER(so_write_ack, pkts_acked, (void *)so_acked);

/* Fields, helpers, functions and members that are not there or not for us. */
STRUCT_OPS(void, so_reads, struct sock *, sk)
{
	tcp_sk(sk)->snd_cwnd = ((struct tcp_sock___more *)sk)->so_inner.so_no_such_field;
}
BREAKER(so_field, init, (void *)so_reads);

static long (*const so_no_such_helper)(void *) = (void *)9999;
STRUCT_OPS(void, so_helps, struct sock *, sk) { so_no_such_helper(sk); }
BREAKER(so_helper, init, (void *)so_helps);

static long (*const bpf_xdp_adjust_head)(void *, int) = (void *)44;
STRUCT_OPS(void, so_adjusts, struct sock *, sk) { bpf_xdp_adjust_head(sk, 0); }
BREAKER(so_xdp, init, (void *)so_adjusts);

/* A socket that closes cannot be given another one: the kernel would release it twice. */
STRUCT_OPS(void, so_leaves, struct sock *, sk)
{
	char reno[] = "reno";

	bpf_setsockopt(sk, 6 /* SOL_TCP */, 13 /* TCP_CONGESTION */, reno, sizeof(reno));
}
BREAKER(so_release, release, (void *)so_leaves);

extern void so_no_such_function(struct sock *sk) __ksym;
STRUCT_OPS(void, so_calls, struct sock *, sk) { so_no_such_function(sk); }
BREAKER(so_kfunc, init, (void *)so_calls);

extern void so_perhaps_a_function(struct sock *sk) __ksym __weak;
STRUCT_OPS(void, so_hopes, struct sock *, sk)
{
	tcp_sk(sk)->snd_cwnd = 2;
	so_perhaps_a_function(sk);
}
BREAKER(so_weak, init, (void *)so_hopes);

extern int bpf_sock_destroy(struct sock_common *sock) __ksym; /* since 6.5, for iterators */
STRUCT_OPS(void, so_destroys, struct sock *, sk) { bpf_sock_destroy(&sk->__sk_common); }
BREAKER(so_forbidden, init, (void *)so_destroys);

extern __u32 tcp_reno_ssthresh(struct sock *sk, __u32 more) __ksym; /* the kernel's has one argument */
STRUCT_OPS(__u32, so_more, struct sock *, sk) { return tcp_reno_ssthresh(sk, 3); }
BREAKER(so_proto, min_tso_segs, (void *)so_more);

BREAKER(so_member, so_no_such_member, (void *)so_cwnd);
BREAKER(so_flags, flags, 0x40);

/* What no kernel lets pass. */
STRUCT_OPS(void, so_turns, struct sock *, sk)
{
	for (;;)
		asm volatile("");
}
BREAKER(so_loop, init, (void *)so_turns);

STRUCT_OPS(void, so_counts, struct sock *, sk)
{
	volatile __u32 n = 0;

	for (__u32 i = 0; i < 3000000; i++)
		n++;
}
BREAKER(so_long, init, (void *)so_counts);

__noinline __u32 so_outside(__u32 i)
{
	volatile __u64 x[2] = {};

	return x[i];
}
STRUCT_OPS(void, so_reaches, struct sock *, sk) { tcp_sk(sk)->snd_cwnd = so_outside(tcp_sk(sk)->snd_nxt); }
BREAKER(so_global_bad, init, (void *)so_reaches);

/* And one that loads: a global function that calls another, and a static one that both call. */
static __noinline __u32 so_static(__u32 a)
{
	volatile __u64 x[4] = { a };

	for (int i = 0; i < 4; i++)
		x[i] += i;
	return x[a & 3];
}

__noinline __u32 so_leaf(__u32 a)
{
	volatile __u64 x[8] = { a };

	for (__u32 i = 0; i < 8; i++)
		if (a > i * 7)
			x[i] += a * i;
	return x[a & 7] + so_static(a);
}

__noinline __u32 so_global(__u32 a)
{
	__u32 n = 0;

	for (int i = 0; i < 5; i++)
		n += so_leaf(a + i);
	return n;
}

STRUCT_OPS(void, so_entry, struct sock *, sk)
{
	tcp_sk(sk)->snd_cwnd = so_global(tcp_sk(sk)->snd_nxt) + so_static(tcp_sk(sk)->snd_una);
}
BREAKER(so_globals, init, (void *)so_entry);
