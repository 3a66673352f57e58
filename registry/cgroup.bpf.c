//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * Gives each new TCP connection of a control group one of several congestion
 * controls, by weight: a sockops program, which the kernel calls for connections
 * of either direction and both families.
 *
 * The choice is made when the connection is established, just before its
 * congestion control is initialised: earlier, one that needs ECN could not know
 * whether the peer agreed to it. Whether to ask for ECN is another call, at the
 * SYN and at the SYN-ACK; where it matters both give one answer for one connection,
 * since they go by the socket's cookie, which a request hands on to its socket.
 */
#include "ccload.bpf.h"

#define ARMS 8

/* Both also known to user space: registry/cgroup.go. */
const volatile struct {
	__u32 arms;
	__u32 mixed; /* some need ECN, and some do not */
	struct {
		__u64 below; /* of 2^32: draws below this, and not below that of an arm before */
		char name[16];
		__u32 ecn;    /* it needs ECN */
		__u32 weight; /* as the user gave it */
	} arm[ARMS];
} config = {.arms = 1};

struct {
	__u64 chosen[ARMS]; /* connections that got it */
	__u64 failed[ARMS]; /* that should have, and kept what they had */
} count;

/* The context, as far as it is used (linux/bpf.h). */
struct bpf_sock_ops {
	__u32 op;
	__u32 reply;
	__u32 unused[44];
	void *sk;
};

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct tcp_congestion_ops___group {
	char name[16];
};

struct inet_connection_sock___group {
	const struct tcp_congestion_ops___group *icsk_ca_ops;
};
#pragma clang attribute pop

enum { ACTIVE_ESTABLISHED = 4, PASSIVE_ESTABLISHED = 5, NEEDS_ECN = 6 }; /* BPF_SOCK_OPS_*_CB */

/*
 * Programs of nested groups run from the inside out on one context. The innermost
 * decides, and tells by its reply; the kernel heeds that for NEEDS_ECN only, where
 * 1 is yes.
 */
enum { UNDECIDED = 0, YES = 1, NO = 2 };

#define SOL_TCP 6
#define TCP_CONGESTION 13

static __u64 (*const bpf_get_socket_cookie)(void *ctx) = (void *)46;
static __u32 (*const bpf_get_prandom_u32)(void) = (void *)7;
static struct tcp_sock *(*const bpf_skc_to_tcp_sock)(void *sk) = (void *)137;

/* Cookies count up; this spreads them over 32 bits. */
static __always_inline __u32 spread(__u64 x)
{
	x ^= x >> 31;
	x *= 0x9e3779b97f4a7c15;
	x ^= x >> 29;
	x *= 0xbf58476d1ce4e5b9;
	return x >> 32;
}

/* The arm of this connection. */
static __always_inline __u32 draw(struct bpf_sock_ops *ctx)
{
	__u32 i = 0;

	if (config.arms == 1)
		return 0;
	__u64 x = config.mixed ? spread(bpf_get_socket_cookie(ctx)) : bpf_get_prandom_u32();
	for (; i < ARMS - 1; i++)
		if (x < config.arm[i].below)
			break;
	return i;
}

/* To look is much faster than to set what is there already. */
static __always_inline bool has(struct bpf_sock_ops *ctx, const volatile char *name)
{
	void *sk = ctx->sk;
	struct tcp_sock *tp = sk ? bpf_skc_to_tcp_sock(sk) : NULL;
	if (!tp)
		return false;
	const __u64 *now = (const void *)((struct inet_connection_sock___group *)&tp->inet_conn)->icsk_ca_ops->name;
	const volatile __u64 *then = (const volatile void *)name;
	return now[0] == then[0] && now[1] == then[1];
}

SEC("sockops")
int choose(struct bpf_sock_ops *ctx)
{
	__u32 i, op = ctx->op;

	if ((op != ACTIVE_ESTABLISHED && op != PASSIVE_ESTABLISHED && op != NEEDS_ECN) || ctx->reply != UNDECIDED)
		return 1;
	if (op == NEEDS_ECN) {
		i = config.mixed ? draw(ctx) : 0;
		ctx->reply = config.arm[i].ecn ? YES : NO;
		return 1;
	}
	i = draw(ctx);
	ctx->reply = YES;
	const volatile char *name = config.arm[i].name;
	if (!has(ctx, name) && bpf_setsockopt(ctx, SOL_TCP, TCP_CONGESTION, (void *)name, sizeof(config.arm[i].name)))
		__sync_fetch_and_add(&count.failed[i], 1);
	else
		__sync_fetch_and_add(&count.chosen[i], 1);
	return 1;
}
