//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * bpf_dctcp: Data Center TCP of RFC 8257. The sender estimates which fraction
 * of its segments met congestion (alpha) and reduces its window in that
 * proportion; the receiver echoes each change of CE at once. Between
 * reductions, and after a loss, it is Reno (RFC 5681).
 *
 * Deviations:
 *  - alpha is worked out from segments, not bytes (section 3.3 counts bytes), as
 *    Linux does: the kernel counts what was delivered with an echo in segments;
 *  - where ECN was not agreed the socket is handed to the kernel's reno, which
 *    also stops it from sending ECT (section 3.5 leaves the choice open).
 */
#include "ccload.bpf.h"

/* Tunables that may change while it runs: alpha is worked out afresh once a window. */
volatile __u32 g = 64;                /* 1/1024: weight of a new sample of alpha; 1..1024 (1/16) */
volatile __u32 alpha_on_init = 1024;  /* 1/1024: alpha of a new connection; 0..1024 (1) */

enum {
	SCALE_BITS = 10,
	DCTCP_MAX_ALPHA = 1 << SCALE_BITS,
	TCP_ECN_OK = 1,
	TCP_ECN_DEMAND_CWR = 4, /* set ECE on what is sent, until told otherwise */
	ICSK_ACK_TIMER = 2,     /* an ACK is being delayed */
	ICSK_ACK_NOW = 16,      /* send one now */
	SOL_TCP = 6,
	TCP_CONGESTION = 13,
};

/* Private state of a socket. */
struct bpf_dctcp {
	__u32 old_delivered;    /* segments delivered, */
	__u32 old_delivered_ce; /*     and with an echo, at the start of this window */
	__u32 prior_rcv_nxt;    /* sequence number up to which ce_state held */
	__u32 alpha;            /* 1/1024 */
	__u32 next_seq;         /* the window is over when this is ACKed */
	__u32 ce_state;         /* bool: the last data received bore CE */
	__u32 loss_cwnd;        /* segments: window before the last reduction */
};

/* Out of line: it runs once a window, and so struct bpf_dctcp stands in the program's BTF. */
static __noinline void new_window(const struct tcp_sock *tp, struct bpf_dctcp *ca)
{
	ca->next_seq = tp->snd_nxt;
	ca->old_delivered = tp->delivered;
	ca->old_delivered_ce = tp->delivered_ce;
}

/*
 * alpha = (1 - g) alpha + g F, F the echoed share of the delivered (RFC 8257
 * s. 3.3, equation 1). An alpha too small for g to take a part of goes to zero,
 * so that a path without congestion is not punished for ever.
 */
__noinline __u32 dctcp_alpha(__u32 alpha, __u32 delivered, __u32 delivered_ce)
{
	__u32 decay = (__u64)alpha * g >> SCALE_BITS;
	__u64 next = alpha - (decay ? decay : alpha);

	if (delivered_ce)
		next += (__u64)delivered_ce * g / max(delivered, 1);
	return next < DCTCP_MAX_ALPHA ? next : DCTCP_MAX_ALPHA;
}

/* A loss counts in full: half the window, in segments, is kept (section 3.4). */
POLICY __u32 backoff(__u32 cwnd)
{
	return cwnd / 2;
}

static __always_inline void react_to_loss(struct sock *sk)
{
	struct tcp_sock *tp = tcp_sk(sk);
	struct bpf_dctcp *ca = inet_csk_ca(sk);

	ca->loss_cwnd = tp->snd_cwnd;
	tp->snd_ssthresh = max(backoff(tp->snd_cwnd), 2);
}

/* Sets or clears ECE on what this end sends. */
static __always_inline void echo(struct tcp_sock *tp, bool ce)
{
	if (ce)
		tp->ecn_flags |= TCP_ECN_DEMAND_CWR;
	else
		tp->ecn_flags &= ~TCP_ECN_DEMAND_CWR;
}

/*
 * The receiver's state machine (section 3.2, figure 1): when CE changes, an ACK
 * that is being delayed goes out first with the old state, for the data up to
 * the change; then the new state is acknowledged at once.
 */
static __always_inline void ce_changed(struct sock *sk, bool ce)
{
	struct inet_connection_sock *icsk = (void *)sk;
	struct tcp_sock *tp = tcp_sk(sk);
	struct bpf_dctcp *ca = inet_csk_ca(sk);

	if (ca->ce_state != ce) {
		if (icsk->icsk_ack.pending & ICSK_ACK_TIMER) {
			echo(tp, ca->ce_state);
			bpf_tcp_send_ack(tp, ca->prior_rcv_nxt);
		}
		icsk->icsk_ack.pending |= ICSK_ACK_NOW;
	}
	ca->prior_rcv_nxt = tp->rcv_nxt;
	ca->ce_state = ce;
	echo(tp, ce);
}

STRUCT_OPS(void, bpf_dctcp_init, struct sock *, sk)
{
	struct tcp_sock *tp = tcp_sk(sk);
	struct bpf_dctcp *ca = inet_csk_ca(sk);

	if (!(tp->ecn_flags & TCP_ECN_OK)) {
		char reno[] = "reno";

		bpf_setsockopt(sk, SOL_TCP, TCP_CONGESTION, reno, sizeof(reno));
		return;
	}
	*ca = (struct bpf_dctcp){
		.prior_rcv_nxt = tp->rcv_nxt,
		.alpha = alpha_on_init,
	};
	new_window(tp, ca);
}

/* Marks: the window, in segments, is reduced by alpha / 2 (section 3.3, equation 2). */
POLICY __u32 reduce(__u32 cwnd, __u32 alpha)
{
	return cwnd - ((__u64)cwnd * alpha >> (SCALE_BITS + 1));
}

SLOT(reduce);

STRUCT_OPS(__u32, bpf_dctcp_ssthresh, struct sock *, sk)
{
	struct bpf_dctcp *ca = inet_csk_ca(sk);
	__u32 cwnd = tcp_sk(sk)->snd_cwnd;

	ca->loss_cwnd = cwnd;
	CALL_SLOT(reduce);
	return max(reduce(cwnd, ca->alpha), 2);
}

/* Every ACK: at the end of a window's worth of data, take the sample. */
STRUCT_OPS(void, bpf_dctcp_in_ack_event, struct sock *, sk, __u32, flags)
{
	struct tcp_sock *tp = tcp_sk(sk);
	struct bpf_dctcp *ca = inet_csk_ca(sk);

	if (before(tp->snd_una, ca->next_seq))
		return;
	ca->alpha = dctcp_alpha(ca->alpha, tp->delivered - ca->old_delivered,
				tp->delivered_ce - ca->old_delivered_ce);
	new_window(tp, ca);
}

STRUCT_OPS(void, bpf_dctcp_set_state, struct sock *, sk, __u8, state)
{
	struct inet_connection_sock *icsk = (void *)sk;

	if (state == TCP_CA_Recovery && read_bits(icsk, icsk_ca_state) != TCP_CA_Recovery)
		react_to_loss(sk);
}

STRUCT_OPS(void, bpf_dctcp_cwnd_event, struct sock *, sk, enum tcp_ca_event, event)
{
	if (event == CA_EVENT_ECN_IS_CE || event == CA_EVENT_ECN_NO_CE)
		ce_changed(sk, event == CA_EVENT_ECN_IS_CE);
	else if (event == CA_EVENT_LOSS)
		react_to_loss(sk);
}

STRUCT_OPS(void, bpf_dctcp_cong_avoid, struct sock *, sk, __u32, ack, __u32, acked)
{
	tcp_reno_cong_avoid(sk, ack, acked);
}

STRUCT_OPS(__u32, bpf_dctcp_undo_cwnd, struct sock *, sk)
{
	struct bpf_dctcp *ca = inet_csk_ca(sk);

	return max(tcp_sk(sk)->snd_cwnd, ca->loss_cwnd);
}

CONGESTION_OPS struct tcp_congestion_ops bpf_dctcp = {
	.init = (void *)bpf_dctcp_init,
	.in_ack_event = (void *)bpf_dctcp_in_ack_event,
	.cwnd_event = (void *)bpf_dctcp_cwnd_event,
	.ssthresh = (void *)bpf_dctcp_ssthresh,
	.cong_avoid = (void *)bpf_dctcp_cong_avoid,
	.undo_cwnd = (void *)bpf_dctcp_undo_cwnd,
	.set_state = (void *)bpf_dctcp_set_state,
	.flags = TCP_CONG_NEEDS_ECN,
	.name = "bpf_dctcp",
};
