/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What a congestion control in BPF needs from the kernel, and no more.
 *
 * It takes the place of vmlinux.h: the structures name only the members that
 * are used, and CO-RE relocation finds where the running kernel keeps them, so
 * one object serves every kernel. struct tcp_congestion_ops, too, may be
 * declared in part: its members are matched by name when the map is built.
 *
 * Include it first; nothing else is needed, neither libbpf's headers nor the
 * kernel's.
 */
#ifndef CCLOAD_BPF_H
#define CCLOAD_BPF_H

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef signed int __s32;
typedef signed long long __s64;
typedef _Bool bool;
#define true 1
#define false 0
#define NULL ((void *)0)

#define SEC(name) __attribute__((section(name), used))
#define __noinline __attribute__((noinline))
#define __always_inline inline __attribute__((always_inline))
#define __ksym __attribute__((section(".ksyms")))
#define __weak __attribute__((weak))
#define __kconfig __attribute__((section(".kconfig")))

/* Ticks of bpf_jiffies64() a second; filled in when the object is loaded. */
extern unsigned long CONFIG_HZ __kconfig;

/*
 * STRUCT_OPS(type, name, type1, arg1, ...) { body } defines a callback. The
 * kernel hands the arguments over as an array of 64-bit words, ctx; this unpacks
 * them. In an ops table it stands as (void *)name.
 */
#define STRUCT_OPS(ret, name, ...) STRUCT_OPS_N(__VA_ARGS__, 3, _, 2, _, 1, _)(ret, name, __VA_ARGS__)
#define STRUCT_OPS_N(a, b, c, d, e, f, n, ...) STRUCT_OPS_##n
#define STRUCT_OPS_1(ret, name, T1, a1) \
	STRUCT_OPS_BODY(ret, name, (__u64 *ctx, T1 a1), (ctx, (T1)ctx[0]))
#define STRUCT_OPS_2(ret, name, T1, a1, T2, a2) \
	STRUCT_OPS_BODY(ret, name, (__u64 *ctx, T1 a1, T2 a2), (ctx, (T1)ctx[0], (T2)ctx[1]))
#define STRUCT_OPS_3(ret, name, T1, a1, T2, a2, T3, a3) \
	STRUCT_OPS_BODY(ret, name, (__u64 *ctx, T1 a1, T2 a2, T3 a3), (ctx, (T1)ctx[0], (T2)ctx[1], (T3)ctx[2]))
#define STRUCT_OPS_BODY(ret, name, params, args)                                      \
	static __always_inline ret name##_body params;                                \
	SEC("struct_ops/" #name) ret name(__u64 *ctx) { return name##_body args; }     \
	static __always_inline ret name##_body params

/*
 * A policy is a function that a user's program may take the place of while it
 * runs (ccload extend). Weak, so that the compiler assumes nothing of it: its
 * callers have to bear whatever it returns.
 *
 * Kernels that are locked down do not let functions be replaced. There a
 * callback can have a slot for the policy: SLOT(policy) before it, and in it, once
 * its book-keeping is done, CALL_SLOT(policy). A user's program in the slot then
 * does the rest of the callback; without one CALL_SLOT does nothing.
 */
#define POLICY __weak __noinline
#define SLOT(policy)                                                                   \
	struct {                                                                      \
		int (*type)[3]; /* BPF_MAP_TYPE_PROG_ARRAY */                         \
		int (*key_size)[4];                                                   \
		int (*value_size)[4];                                                 \
		int (*max_entries)[1];                                                \
	} policy##_slot SEC(".maps");                                                 \
	_Static_assert(sizeof(#policy "_slot") <= 16, "the kernel cuts names of maps")
#define CALL_SLOT(policy) bpf_tail_call(ctx, &policy##_slot, 0)

/* The section of an ops table: registered through a BPF link where there are links. */
#ifndef CONGESTION_OPS
#define CONGESTION_OPS SEC(".struct_ops.link")
#endif

#define TCP_CONG_NON_RESTRICTED 1 /* any user may choose it */
#define TCP_CONG_NEEDS_ECN 2      /* negotiate ECN, send ECT */

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

enum tcp_ca_state { TCP_CA_Open, TCP_CA_Disorder, TCP_CA_CWR, TCP_CA_Recovery, TCP_CA_Loss };

enum tcp_ca_event {
	CA_EVENT_TX_START,     /* first transmission when nothing is in flight */
	CA_EVENT_CWND_RESTART, /* cwnd restarted after idle (RFC 5681 s. 4.1) */
	CA_EVENT_COMPLETE_CWR, /* end of the reduction after a congestion event */
	CA_EVENT_LOSS,         /* retransmission timeout */
	CA_EVENT_ECN_NO_CE,    /* received ECT without CE */
	CA_EVENT_ECN_IS_CE,    /* received CE */
};

struct sock_common {
	volatile unsigned char skc_state;
};

struct sock {
	struct sock_common __sk_common;
	__u32 sk_pacing_status; /* 0: nobody paces this socket */
	unsigned long sk_pacing_rate; /* bytes a second */
	unsigned int sk_gso_max_size; /* bytes */
};

struct inet_sock {
	struct sock sk;
};

struct inet_connection_sock {
	struct inet_sock icsk_inet;
	__u8 icsk_ca_state : 5; /* enum tcp_ca_state */
	struct {
		__u8 pending; /* ICSK_ACK_* */
	} icsk_ack;
	__u64 icsk_ca_priv[13]; /* 104 bytes for the congestion control's own */
};

struct tcp_rack {
	__u32 rtt_us; /* us: of the segment sent last that was ACKed; 0: without SACK */
};

struct tcp_sock {
	struct inet_connection_sock inet_conn;
	__u32 snd_cwnd;        /* segments */
	__u32 snd_ssthresh;    /* segments */
	__u32 snd_cwnd_cnt;    /* ACKed segments not yet turned into growth */
	__u32 prior_cwnd;      /* segments, before the last reduction */
	__u32 max_packets_out; /* most segments in flight in the last window */
	__u8 is_cwnd_limited : 1;
	__u32 snd_una, snd_nxt, rcv_nxt; /* sequence numbers */
	__u32 lsndtime;        /* jiffies: last data sent */
	struct tcp_rack rack;
	__u32 srtt_us;         /* us, times 8: smoothed RTT */
	__u64 tcp_mstamp;      /* us: the socket's clock at this ACK */
	__u32 delivered, delivered_ce; /* segments, cumulative */
	__u8 ecn_flags;        /* TCP_ECN_* */
};

struct ack_sample {
	__u32 pkts_acked; /* segments */
	__s32 rtt_us;     /* us; negative: no sample */
	__u32 in_flight;  /* segments before this ACK */
};

struct rate_sample;

#pragma clang attribute pop

/* The contract: include/net/tcp.h. Callbacks run with the socket locked. */
struct tcp_congestion_ops {
	__u32 (*ssthresh)(struct sock *sk);                           /* required: segments, after a loss */
	void (*cong_avoid)(struct sock *sk, __u32 ack, __u32 acked);  /* this or cong_control */
	void (*set_state)(struct sock *sk, __u8 new_state);
	void (*cwnd_event)(struct sock *sk, enum tcp_ca_event ev);
	void (*in_ack_event)(struct sock *sk, __u32 flags);
	void (*pkts_acked)(struct sock *sk, const struct ack_sample *sample);
	__u32 (*undo_cwnd)(struct sock *sk);                          /* required: segments, after a false alarm */
	void (*init)(struct sock *sk);
	void (*release)(struct sock *sk);
	__u32 flags;                                                  /* TCP_CONG_* */
	char name[16];                                                /* 1-15 of [A-Za-z0-9_.] */
};

/* Functions of the kernel's TCP (since 5.13). */
extern __u32 tcp_slow_start(struct tcp_sock *tp, __u32 acked) __ksym; /* returns ACKs left over */
extern void tcp_cong_avoid_ai(struct tcp_sock *tp, __u32 w, __u32 acked) __ksym; /* cwnd += acked / w */
extern void tcp_reno_cong_avoid(struct sock *sk, __u32 ack, __u32 acked) __ksym;
extern __u32 tcp_reno_undo_cwnd(struct sock *sk) __ksym;

/* Helpers: bpf-helpers(7). */
static long (*const bpf_tail_call)(void *ctx, void *map, __u32 index) = (void *)12;
static __u64 (*const bpf_jiffies64)(void) = (void *)118;
static long (*const bpf_tcp_send_ack)(void *tp, __u32 rcv_nxt) = (void *)116;
static long (*const bpf_setsockopt)(void *sk, int level, int name, void *value, int len) = (void *)49;

/* The two views of the one socket that every callback is given. */
static __always_inline struct tcp_sock *tcp_sk(const struct sock *sk)
{
	return (struct tcp_sock *)sk;
}

static __always_inline void *inet_csk_ca(const struct sock *sk)
{
	return (void *)((struct inet_connection_sock *)sk)->icsk_ca_priv;
}

static __always_inline __u32 min(__u32 a, __u32 b) { return a < b ? a : b; }
static __always_inline __u32 max(__u32 a, __u32 b) { return a > b ? a : b; }
static __always_inline __u32 clamp(__u32 x, __u32 lo, __u32 hi) { return min(max(x, lo), hi); }

/* Sequence numbers and jiffies wrap: compare their distance (RFC 9293 s. 3.4). */
static __always_inline bool before(__u32 a, __u32 b) { return (__s32)(a - b) < 0; }
static __always_inline bool after(__u32 a, __u32 b) { return before(b, a); }

/*
 * Reads a bit field where the running kernel has it: the offset, the size of
 * the load and the two shifts are relocated separately.
 */
enum { FIELD_BYTE_OFFSET = 0, FIELD_BYTE_SIZE = 1, FIELD_LSHIFT_U64 = 4, FIELD_RSHIFT_U64 = 5 };
#define read_bits(p, field) ({                                                        \
	const char *__p = (const char *)(p) +                                         \
		__builtin_preserve_field_info((p)->field, FIELD_BYTE_OFFSET);         \
	__u64 __v = 0;                                                                \
	switch (__builtin_preserve_field_info((p)->field, FIELD_BYTE_SIZE)) {         \
	case 1: __v = *(const __u8 *)__p; break;                                      \
	case 2: __v = *(const __u16 *)__p; break;                                     \
	case 4: __v = *(const __u32 *)__p; break;                                     \
	case 8: __v = *(const __u64 *)__p; break;                                     \
	}                                                                             \
	__v <<= __builtin_preserve_field_info((p)->field, FIELD_LSHIFT_U64);          \
	__v >> __builtin_preserve_field_info((p)->field, FIELD_RSHIFT_U64);           \
})

static __always_inline bool in_slow_start(const struct tcp_sock *tp)
{
	return tp->snd_cwnd < tp->snd_ssthresh;
}

/*
 * Whether the window is what held the sender back: only then may it grow
 * (RFC 7661; RFC 9438 s. 5.8). In slow start half a window of use is enough,
 * for the window doubles in the round trip that the answer takes.
 */
static __always_inline bool is_cwnd_limited(const struct tcp_sock *tp)
{
	return read_bits(tp, is_cwnd_limited) ||
	       (in_slow_start(tp) && tp->snd_cwnd < 2 * tp->max_packets_out);
}

/* The kernel refuses objects whose licence is not GPL-compatible. */
char LICENSE[] SEC("license") = "Dual BSD/GPL";

#endif
