//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * bpf_cubic: CUBIC of RFC 9438, with HyStart (Ha and Rhee, "Taming the
 * elephants: new TCP slow start", Computer Networks 55, 2011) leaving slow
 * start.
 *
 * It is meant to stand in for the kernel's cubic unseen, so where Linux and the
 * RFC differ it does as Linux does:
 *  - the Reno-friendly window keeps its slope 3(1-b)/(1+b) also above the window
 *    before the last loss, where section 4.3 allows a slope of 1;
 *  - the target is for one smallest round trip ahead, not one smoothed one, and
 *    growth is bounded to half a segment an ACKed segment (section 4.2: at most
 *    1.5 cwnd a round trip);
 *  - before the first loss the window grows by at least 5 % a round trip;
 *  - after a retransmission timeout (section 4.8) all state starts afresh;
 *  - HyStart of 2011, both signs of congestion, rather than HyStart++ (RFC 9406).
 *
 * Units: windows in segments; the cubic's time in 1/1024 s; fractions in 1/1024.
 */
#include "ccload.bpf.h"

/* Tunable, set before load: the curve of an epoch under way was worked out with it. */
const volatile __u32 c = 410;               /* segments/s^3, in 1/1024: steepness; 4..8192 (0.4) */

/* Tunables that may change while it runs: each is looked at afresh where it is needed. */
volatile __u32 beta = 717;            /* 1/1024: cwnd kept after a loss; 512..1023 (0.7) */
volatile __u32 fast_convergence = 1;  /* bool: give way to new flows (section 4.7) */
volatile __u32 tcp_friendliness = 1;  /* bool: never slower than Reno (section 4.3) */
volatile __u32 initial_ssthresh = 0;  /* segments; 0: unlimited. Only without HyStart */
volatile __u32 hystart = 1;           /* bool */
volatile __u32 hystart_detect = 3;    /* 1: ACK train, 2: delay, 3: both */
volatile __u32 hystart_low_window = 16;      /* segments: not below this window */
volatile __u32 hystart_ack_delta_us = 2000;  /* us: ACKs closer than this are one train */
volatile __u32 hystart_delay_min_us = 4000;  /* us: bounds of the rise of RTT, */
volatile __u32 hystart_delay_max_us = 16000; /*     an eighth of the smallest, that means congestion */

enum {
	SCALE_BITS = 10,
	SCALE = 1 << SCALE_BITS,
	HYSTART_ACK_TRAIN = 1,
	HYSTART_DELAY = 2,
	HYSTART_MIN_SAMPLES = 8,  /* of RTT, at the start of each round */
	USEC_PER_SEC = 1000000,
	MAX_WINDOW = 1 << 30,     /* segments: past all that TCP can have in flight */
};

/* Private state of a socket; all zero means: a new start. */
struct bpf_cubic {
	__u32 cnt;          /* ACKed segments for one segment of growth */
	__u32 w_max;        /* segments: window before the last reduction */
	__u32 last_cwnd;    /* segments: window that cnt was worked out for, */
	__u32 last_time;    /* jiffies: and when */
	__u32 origin;       /* segments: the plateau of the cubic */
	__u32 k;            /* 1/1024 s from the start of the epoch to the plateau */
	__u32 delay_min;    /* us: smallest RTT; 0: none yet */
	__u32 epoch_start;  /* jiffies; 0: no epoch (in slow start or recovery) */
	__u32 ack_cnt;      /* ACKed segments that w_est has not used yet */
	__u32 w_est;        /* segments: what Reno would have */
	/* HyStart */
	__u32 round_start;  /* us: start of this round trip */
	__u32 last_ack;     /* us: last ACK of the train */
	__u32 end_seq;      /* the round is over when this is ACKed */
	__u32 curr_rtt;     /* us: smallest RTT of this round's first samples */
	__u8 sample_cnt;    /* how many samples */
	__u8 found;         /* bool: slow start was left */
};

_Static_assert(sizeof(struct bpf_cubic) <= sizeof(((struct inet_connection_sock *)0)->icsk_ca_priv),
	       "private state must fit the socket");

/*
 * Cube root, rounded down. Newton's method from a power of two at or above the
 * root, at most twice as large: the error shrinks from 1 to below 1e-8 in five
 * steps. A fixed count of steps and a scalar argument let the verifier prove
 * the function by itself.
 */
__noinline __u32 cubic_root(__u64 a)
{
	__u64 x;

	if (!a)
		return 0;
	x = 1ULL << ((64 - __builtin_clzll(a) + 2) / 3);
	for (int i = 0; i < 6; i++)
		x = (2 * x + a / (x * x)) / 3;
	if (x * x * x > a)
		x--;
	return x;
}

/* K = cbrt((w_max - cwnd) / C), in 1/1024 s (RFC 9438 s. 4.2, equation 2). */
__noinline __u32 cubic_k(__u32 distance)
{
	/* 1024 for C's scale, 1024^3 for the cube of the time's */
	return cubic_root((1ULL << (4 * SCALE_BITS)) / c * distance);
}

/*
 * W(t) = C (t - K)^3 + origin, in segments (equation 1); t and k in 1/1024 s.
 * Up to 128 s from the plateau the cube fits 64 bits; further out some of its
 * low bits are given up, and past 18 hours it stands still.
 */
__noinline __u32 cubic_window(__u64 t, __u32 k, __u32 origin)
{
	bool past = t >= k;
	__u64 d = past ? t - k : k - t, delta;

	if (d < 1 << 17)
		delta = c * d * d * d >> (4 * SCALE_BITS);
	else {
		if (d > 1 << 26)
			d = 1 << 26;
		delta = ((d * d >> 2 * SCALE_BITS) * d >> SCALE_BITS) * c >> SCALE_BITS;
	}
	if (!past)
		return origin - delta;
	return delta < MAX_WINDOW - origin ? origin + delta : MAX_WINDOW;
}

/*
 * ACKed segments in which Reno, made to share fairly with a flow that keeps
 * beta of its window, grows by one: cwnd / (3 (1-b)/(1+b)) (section 4.3). In
 * eighths, as Linux rounds it.
 */
__noinline __u32 reno_friendly_acks(__u32 cwnd)
{
	__u32 eighths = 8 * (SCALE + beta) / 3 / (SCALE - beta);

	return (__u64)cwnd * eighths >> 3;
}

static __always_inline __u32 usecs_to_jiffies(__u32 us)
{
	return ((__u64)us * CONFIG_HZ + USEC_PER_SEC - 1) / USEC_PER_SEC;
}

/* Out of line: it runs once a round, and so struct bpf_cubic stands in the program's BTF. */
static __noinline void hystart_new_round(struct tcp_sock *tp, struct bpf_cubic *ca)
{
	ca->round_start = ca->last_ack = tp->tcp_mstamp;
	ca->end_seq = tp->snd_nxt;
	ca->curr_rtt = ~0U;
	ca->sample_cnt = 0;
}

/* An ACK outside slow start: how many ACKed segments are worth one of growth? */
static __always_inline void cubic_update(struct bpf_cubic *ca, __u32 cwnd, __u32 acked)
{
	__u32 now = bpf_jiffies64();
	__u32 target;

	ca->ack_cnt += acked;

	/* The curve is flat within a 32nd of a second. */
	if (ca->last_cwnd == cwnd && (__s32)(now - ca->last_time) <= (__s32)(CONFIG_HZ / 32))
		return;

	/* Nor does it move within a tick; only w_est may have. */
	if (ca->epoch_start && now == ca->last_time)
		goto friendly;

	ca->last_cwnd = cwnd;
	ca->last_time = now;

	if (!ca->epoch_start) {
		ca->epoch_start = now;
		ca->ack_cnt = acked;
		ca->w_est = cwnd;
		ca->origin = max(cwnd, ca->w_max);
		ca->k = ca->w_max > cwnd ? cubic_k(ca->w_max - cwnd) : 0;
	}

	/* Where the window shall be one round trip from now. */
	target = cubic_window(((__u64)(now - ca->epoch_start + usecs_to_jiffies(ca->delay_min))
			       << SCALE_BITS) / CONFIG_HZ, ca->k, ca->origin);
	ca->cnt = target > cwnd ? cwnd / (target - cwnd) : 100 * cwnd;

	/* No plateau is known before the first loss: look for it faster. */
	if (!ca->w_max)
		ca->cnt = min(ca->cnt, 20);

friendly:
	if (tcp_friendliness) {
		/* With beta at least a half it takes no less than a window. */
		__u32 acks = ca->ack_cnt > cwnd ? reno_friendly_acks(cwnd) : 0;

		if (acks && ca->ack_cnt > acks) {
			__u32 steps = (ca->ack_cnt - 1) / acks;

			ca->ack_cnt -= steps * acks;
			ca->w_est += steps;
		}
		if (ca->w_est > cwnd)
			ca->cnt = min(ca->cnt, cwnd / (ca->w_est - cwnd));
	}
	ca->cnt = max(ca->cnt, 2);
}

/*
 * HyStart: the window has reached the path's when the ACKs of one round, sent
 * back to back, last longer than half the smallest RTT, or when the RTTs at the
 * start of a round have risen.
 */
static __always_inline void hystart_update(struct sock *sk, struct bpf_cubic *ca, __u32 rtt)
{
	struct tcp_sock *tp = tcp_sk(sk);

	if (after(tp->snd_una, ca->end_seq))
		hystart_new_round(tp, ca);

	if (tp->snd_cwnd < hystart_low_window)
		return;

	if (hystart_detect & HYSTART_ACK_TRAIN) {
		__u32 now = tp->tcp_mstamp;

		if ((__s32)(now - ca->last_ack) <= (__s32)hystart_ack_delta_us) {
			__u64 rate = sk->sk_pacing_rate;
			__u32 threshold = ca->delay_min;

			ca->last_ack = now;
			/* Allow for the time that four of the largest bursts take to send, at most 1 ms. */
			if (rate) {
				__u64 burst = 4ULL * sk->sk_gso_max_size * USEC_PER_SEC / rate;

				threshold += burst < 1000 ? burst : 1000;
			}
			/* Pacing spreads a round's segments over half of it. */
			if (!sk->sk_pacing_status)
				threshold /= 2;
			if ((__s32)(now - ca->round_start) > (__s32)threshold)
				ca->found = 1;
		}
	}
	if (hystart_detect & HYSTART_DELAY) {
		ca->curr_rtt = min(ca->curr_rtt, rtt);
		if (ca->sample_cnt < HYSTART_MIN_SAMPLES)
			ca->sample_cnt++;
		else if (ca->curr_rtt > ca->delay_min + clamp(ca->delay_min >> 3, hystart_delay_min_us,
							      hystart_delay_max_us))
			ca->found = 1;
	}
	if (ca->found)
		tp->snd_ssthresh = tp->snd_cwnd;
}

STRUCT_OPS(void, bpf_cubic_init, struct sock *, sk)
{
	struct bpf_cubic *ca = inet_csk_ca(sk);

	*ca = (struct bpf_cubic){};
	if (hystart)
		hystart_new_round(tcp_sk(sk), ca);
	else if (initial_ssthresh)
		tcp_sk(sk)->snd_ssthresh = initial_ssthresh;
}

STRUCT_OPS(void, bpf_cubic_cwnd_event, struct sock *, sk, enum tcp_ca_event, event)
{
	struct bpf_cubic *ca = inet_csk_ca(sk);
	__u32 now = bpf_jiffies64();
	__s32 idle = now - tcp_sk(sk)->lsndtime;

	/* Time in which nothing was sent does not count (section 5.8). */
	if (event == CA_EVENT_TX_START && ca->epoch_start && idle > 0) {
		ca->epoch_start += idle;
		if (after(ca->epoch_start, now))
			ca->epoch_start = now;
	}
}

/*
 * What this ACK says of the RTT. It could come by a callback of its own, pkts_acked,
 * which costs more than all of this: RACK keeps the RTT of the segment sent last
 * that was ACKed (RFC 8985 s. 6.2), if the peer does SACK.
 */
static __always_inline void rtt_update(struct sock *sk, struct bpf_cubic *ca)
{
	struct tcp_sock *tp = tcp_sk(sk);
	__u32 rtt = tp->rack.rtt_us;

	if (!rtt)
		rtt = max(tp->srtt_us >> 3, 1);
	if (!ca->delay_min || rtt < ca->delay_min) {
		/* Right after recovery RTTs are those of retransmissions' queues. */
		if (ca->epoch_start && (__s32)((__u32)bpf_jiffies64() - ca->epoch_start) < (__s32)CONFIG_HZ)
			return;
		ca->delay_min = rtt;
	}
	if (in_slow_start(tp) && !ca->found && hystart)
		hystart_update(sk, ca, rtt);
}

STRUCT_OPS(void, bpf_cubic_cong_avoid, struct sock *, sk, __u32, ack, __u32, acked)
{
	struct tcp_sock *tp = tcp_sk(sk);
	struct bpf_cubic *ca = inet_csk_ca(sk);

	rtt_update(sk, ca);
	if (!is_cwnd_limited(tp))
		return;
	if (in_slow_start(tp)) {
		acked = tcp_slow_start(tp, acked);
		if (!acked)
			return;
	}
	cubic_update(ca, tp->snd_cwnd, acked);
	tcp_cong_avoid_ai(tp, ca->cnt, acked);
}

/* Segments of the window that are kept after a loss (section 4.6). */
POLICY __u32 backoff(__u32 cwnd)
{
	return cwnd * beta / SCALE;
}

SLOT(backoff);

STRUCT_OPS(__u32, bpf_cubic_ssthresh, struct sock *, sk)
{
	struct bpf_cubic *ca = inet_csk_ca(sk);
	__u32 cwnd = tcp_sk(sk)->snd_cwnd;

	ca->epoch_start = 0;
	/* Losing below the last plateau: others want room (section 4.7). */
	if (fast_convergence && cwnd < ca->w_max)
		ca->w_max = cwnd * (SCALE + beta) / (2 * SCALE);
	else
		ca->w_max = cwnd;
	CALL_SLOT(backoff);
	return max(backoff(cwnd), 2);
}

STRUCT_OPS(void, bpf_cubic_set_state, struct sock *, sk, __u8, state)
{
	if (state == TCP_CA_Loss) {
		struct bpf_cubic *ca = inet_csk_ca(sk);

		*ca = (struct bpf_cubic){};
		hystart_new_round(tcp_sk(sk), ca);
	}
}

STRUCT_OPS(__u32, bpf_cubic_undo_cwnd, struct sock *, sk)
{
	return tcp_reno_undo_cwnd(sk);
}

CONGESTION_OPS struct tcp_congestion_ops bpf_cubic = {
	.init = (void *)bpf_cubic_init,
	.ssthresh = (void *)bpf_cubic_ssthresh,
	.cong_avoid = (void *)bpf_cubic_cong_avoid,
	.set_state = (void *)bpf_cubic_set_state,
	.undo_cwnd = (void *)bpf_cubic_undo_cwnd,
	.cwnd_event = (void *)bpf_cubic_cwnd_event,
	.name = "bpf_cubic",
};
