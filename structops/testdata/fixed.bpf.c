//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * Congestion controls that find fields of the kernel's without CO-RE, for their types have no
 * preserve_access_index; and some that only look so. They are optional: each is loaded only when it is named.
 */
#include "ccload.bpf.h"

struct rate_sample___plain { __u64 prior_mstamp; __u32 prior_delivered, prior_delivered_ce; __s32 delivered; };
struct sock___other { __u8 filler[64]; __u32 sk_gso_max_size; };

struct tcp_congestion_ops___all {
	__u32 (*ssthresh)(struct sock *sk);
	void (*cong_avoid)(struct sock *sk, __u32 ack, __u32 acked);
	__u32 (*undo_cwnd)(struct sock *sk);
	void (*init)(struct sock___other *sk);
	void (*release)(struct sock *sk);
	void (*pkts_acked)(struct sock *sk, const struct ack_sample *sample);
	void (*cong_control)(struct sock *sk, __u32 ack, int flag, const struct rate_sample___plain *rs);
	char name[16];
};

#define TABLE(n, member)                                                       \
	SEC("?.struct_ops.link") struct tcp_congestion_ops___all n = {         \
		.ssthresh = (void *)so_cwnd, .undo_cwnd = (void *)so_cwnd,     \
		.cong_avoid = (void *)so_avoid, .member = (void *)n##_p, .name = #n, \
	}

STRUCT_OPS(__u32, so_cwnd, struct sock *, sk) { return tcp_sk(sk)->snd_cwnd; }
STRUCT_OPS(void, so_avoid, struct sock *, sk, __u32, ack, __u32, acked) { tcp_sk(sk)->snd_cwnd += acked; }

/* Where every kernel has it, so far. */
SEC("struct_ops/so_sample_p") void so_sample_p(__u64 *ctx)
{
	tcp_sk((void *)ctx[0])->snd_cwnd += ((struct rate_sample___plain *)ctx[3])->delivered;
}
TABLE(so_sample, cong_control);

/* Where no kernel has it. */
SEC("struct_ops/so_socket_p") void so_socket_p(__u64 *ctx)
{
	tcp_sk((void *)ctx[0])->snd_cwnd = ((struct sock___other *)ctx[0])->sk_gso_max_size & 15;
}
TABLE(so_socket, init);

/* In a static function, through the stack and behind a branch. */
static __noinline __u32 so_flight(const struct rate_sample___plain *rs, __u32 n) { return n ? rs->prior_delivered_ce : n; }
SEC("struct_ops/so_static_p") void so_static_p(__u64 *ctx)
{
	struct rate_sample___plain *volatile rs = (void *)ctx[3];

	tcp_sk((void *)ctx[0])->snd_cwnd += so_flight(rs, ctx[1]);
}
TABLE(so_static, cong_control);

/* Types of its own: in the private state, all of which it uses, and in what it is given by itself. */
struct sample { __u32 a, b, c; };
struct state { __u64 first; struct sample sample; __u32 more[20]; __u32 last; };
static __noinline __u32 so_sum(struct sample *s) { return s->a + s->b + s->c; }
STRUCT_OPS(void, so_own_p, struct sock *, sk)
{
	struct state *s = inet_csk_ca(sk);
	volatile struct sample local = { s->sample.b, 2, 3 };

	s->last = so_sum((void *)&local);
}
TABLE(so_own, release);
