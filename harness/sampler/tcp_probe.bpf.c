//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * A sample for each segment that reaches a sender in an established connection,
 * of one network namespace: the tracepoint tcp:tcp_probe, through BTF, so that
 * it is found without tracefs. It fires before the segment is processed, so the
 * window is the one that held until now.
 *
 * And one whenever the state of the congestion machine is set, which happens
 * between such segments, too: tcp:tcp_cong_state_set. A kernel that refuses that
 * program is sampled without it.
 */
#include "ccload.bpf.h"

/* Which sockets to look at. The other end may be in the same namespace. */
const volatile __u32 netns = 0;      /* inode of their namespace */
const volatile __u16 first_port = 0; /* local ports */
const volatile __u16 last_port = 0;

__u64 lost; /* events that did not fit the ring */

/* Also known to user space: sampler/ack.go. All of it is the kernel's own units. */
struct event {
	__u64 time;         /* ns, CLOCK_MONOTONIC */
	__u64 bytes_acked;  /* cumulative */
	__u64 pacing_rate;  /* bytes a second; all ones: none */
	__u32 cwnd, ssthresh;                    /* segments */
	__u32 srtt, min_rtt;                     /* us/8, us */
	__u32 packets_out, sacked, lost, retrans_out; /* segments now */
	__u32 delivered, delivered_ce, retrans;  /* segments, cumulative */
	__u16 port;         /* local */
	__u8 ca_state;
	__u8 flags;
};

#define TCP_CLOSE 7 /* include/net/tcp_states.h */

#define PACED 1 /* by the socket or by a queueing discipline */
#define EVENT 2 /* not for a segment that has come */

struct {
	int (*type)[27]; /* BPF_MAP_TYPE_RINGBUF */
	int (*max_entries)[8 << 20];
} events SEC(".maps");

/*
 * The members that the shared header does not name. What follows three
 * underscores does not count when the kernel's type is looked for.
 */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct ns_common___probe {
	unsigned int inum;
};

struct net___probe {
	struct ns_common___probe ns;
};

struct possible_net___probe {
	struct net___probe *net;
};

struct sock_common___probe {
	__u16 skc_num;
	volatile unsigned char skc_state;
	struct possible_net___probe skc_net;
};

struct sock___probe {
	struct sock_common___probe __sk_common;
	__u32 sk_pacing_status;
	unsigned long sk_pacing_rate;
};

struct minmax_sample___probe {
	__u32 t, v;
};

struct minmax___probe {
	struct minmax_sample___probe s[3];
};

struct tcp_sock___probe {
	struct minmax___probe rtt_min;
	__u32 srtt_us, packets_out, sacked_out, lost_out, retrans_out, total_retrans;
	__u64 bytes_acked;
};

#pragma clang attribute pop

static void *(*const bpf_ringbuf_reserve)(void *map, __u64 size, __u64 flags) = (void *)131;
static void (*const bpf_ringbuf_submit)(void *data, __u64 flags) = (void *)132;
static __u64 (*const bpf_ktime_get_ns)(void) = (void *)5;
static struct tcp_sock *(*const bpf_skc_to_tcp_sock)(void *sk) = (void *)137;
#define BPF_RB_NO_WAKEUP 1

/* state is the one that is being set; -1: as it is. */
static __always_inline int sample(struct sock *sk, int state, __u8 flags)
{
	struct sock___probe *s = (struct sock___probe *)sk;
	__u16 port = s->__sk_common.skc_num;

	if (port < first_port || port > last_port || s->__sk_common.skc_net.net->ns.inum != netns)
		return 0;
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);
	if (!tp)
		return 0;
	struct event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e) {
		__sync_fetch_and_add(&lost, 1);
		return 0;
	}
	struct tcp_sock___probe *t = (struct tcp_sock___probe *)tp;
	e->time = bpf_ktime_get_ns();
	e->bytes_acked = t->bytes_acked;
	e->pacing_rate = s->sk_pacing_rate;
	e->cwnd = tp->snd_cwnd;
	e->ssthresh = tp->snd_ssthresh;
	e->srtt = t->srtt_us;
	e->min_rtt = t->rtt_min.s[0].v;
	e->packets_out = t->packets_out;
	e->sacked = t->sacked_out;
	e->lost = t->lost_out;
	e->retrans_out = t->retrans_out;
	e->delivered = tp->delivered;
	e->delivered_ce = tp->delivered_ce;
	e->retrans = t->total_retrans;
	e->port = port;
	e->ca_state = state < 0 ? read_bits(&tp->inet_conn, icsk_ca_state) : state;
	e->flags = flags | (s->sk_pacing_status ? PACED : 0);
	/* The reader comes by often enough: waking it for each would cost more than the event. */
	bpf_ringbuf_submit(e, BPF_RB_NO_WAKEUP);
	return 0;
}

SEC("tp_btf/tcp_probe")
int tcp_probe(__u64 *ctx)
{
	return sample((struct sock *)ctx[0], -1, 0);
}

SEC("tp_btf/tcp_cong_state_set")
int tcp_state(__u64 *ctx)
{
	/* An abort sets all to what it was before the handshake. */
	if (((struct sock___probe *)ctx[0])->__sk_common.skc_state == TCP_CLOSE)
		return 0;
	return sample((struct sock *)ctx[0], (__u8)ctx[1], EVENT);
}
