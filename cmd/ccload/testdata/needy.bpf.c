//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * Asks much of a guest: a ring buffer as large as half the memory that guests get,
 * an option that only the kernel's configuration file tells, and a function of a
 * congestion control that is a module.
 */
#include "ccload.bpf.h"

struct {
	int (*type)[27]; /* BPF_MAP_TYPE_RINGBUF */
	int (*max_entries)[256 << 20];
} events SEC(".maps");

static void *(*const bpf_ringbuf_reserve)(void *ringbuf, __u64 size, __u64 flags) = (void *)131;
static void (*const bpf_ringbuf_discard)(void *data, __u64 flags) = (void *)133;

extern int CONFIG_NR_CPUS __kconfig;
extern void dctcp_init(struct sock *sk) __ksym;

STRUCT_OPS(void, needy_init, struct sock *, sk)
{
	__u64 *event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);

	if (event)
		bpf_ringbuf_discard(event, 0);
	dctcp_init(sk);
}

STRUCT_OPS(__u32, needy_ssthresh, struct sock *, sk)
{
	return max(tcp_sk(sk)->snd_cwnd / 2, CONFIG_NR_CPUS ? 2 : 3);
}

STRUCT_OPS(void, needy_cong_avoid, struct sock *, sk, __u32, ack, __u32, acked)
{
	tcp_cong_avoid_ai(tcp_sk(sk), tcp_sk(sk)->snd_cwnd, acked);
}

STRUCT_OPS(__u32, needy_undo_cwnd, struct sock *, sk)
{
	return tcp_sk(sk)->snd_cwnd;
}

CONGESTION_OPS struct tcp_congestion_ops needy = {
	.init = (void *)needy_init,
	.ssthresh = (void *)needy_ssthresh,
	.cong_avoid = (void *)needy_cong_avoid,
	.undo_cwnd = (void *)needy_undo_cwnd,
	.name = "needy",
};
