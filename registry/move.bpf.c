//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * Gives open TCP sockets another congestion control: iterators, which the kernel
 * runs over all TCP sockets of the network namespace in which they were opened,
 * each socket locked. Which of them are meant, user space says by their cookies,
 * and finds there what became of each.
 *
 * The kernel starts the new algorithm as it does for setsockopt(2): the old one's
 * release, private state cleared, the new one's init. It leaves the window and the
 * threshold to init, and there is no way to set them from here (TCP_BPF_IW takes
 * only sockets that have sent nothing, TCP_BPF_SNDCWND_CLAMP leaves a clamp), so
 * what init changed of them is reported.
 */
#include "ccload.bpf.h"

struct name {
	__u64 word[2]; /* char[16], NUL-padded */
};

const volatile struct name to = {};
const volatile bool needs_ecn = false; /* it has TCP_CONG_NEEDS_ECN */
const volatile bool replacing = false; /* the name has other code than before */

__u64 remembered; /* sockets of this walk that remember what they had */

/* What became of a socket. Also known to user space: registry/move.go. */
enum {
	PENDING,
	MOVED,
	KEPT,      /* it had that code already */
	FAILED,    /* error says why */
	NO_ECN,    /* its connection did not agree on ECN */
	FELL_BACK, /* the algorithm's init handed it on to another */
	LEFT,      /* not restored: somebody has moved it again */
	NEVER,     /* not restored: it was not moved; or not meant */
};

struct outcome {
	__u32 state;
	__s32 error;  /* -errno */
	__u32 window; /* 1: its window or threshold is another than before */
};

struct {
	int (*type)[1];        /* BPF_MAP_TYPE_HASH */
	int (*max_entries)[1]; /* user space sets it */
	__u64 *key;            /* cookie */
	struct outcome *value;
} chosen SEC(".maps");

struct former {
	struct name before; /* what it had */
	struct name ours;   /* what we gave it */
};

/* Pinned; goes with the socket, and on to what a listener accepts. */
struct {
	int (*type)[24];       /* BPF_MAP_TYPE_SK_STORAGE */
	int (*map_flags)[513]; /* BPF_F_NO_PREALLOC | BPF_F_CLONE */
	int *key;
	struct former *value;
} former SEC(".maps");

/* What follows three underscores does not count when the kernel's type is looked for. */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct inet_connection_sock___move {
	__u8 icsk_ca_setsockopt : 1; /* it was chosen, not there by default */
	const void *icsk_ca_ops;
};
#pragma clang attribute pop

enum { SOL_TCP = 6, TCP_CONGESTION = 13, TCP_ECN_OK = 1, TCP_CLOSE = 7, TCP_LISTEN = 10, CREATE = 1 };

static void *(*const bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static __u64 (*const bpf_get_socket_cookie)(void *sk) = (void *)46;
static long (*const bpf_getsockopt)(void *sk, int level, int name, void *value, int len) = (void *)57;
static void *(*const bpf_sk_storage_get)(void *map, void *sk, void *value, __u64 flags) = (void *)107;
static long (*const bpf_sk_storage_delete)(void *map, void *sk) = (void *)108;
static struct tcp_sock *(*const bpf_skc_to_tcp_sock)(void *sk) = (void *)137;

static __always_inline bool same(const struct name *a, const struct name *b)
{
	return a->word[0] == b->word[0] && a->word[1] == b->word[1];
}

/* NULL for what is not meant, or was met before. */
static __always_inline struct outcome *meant(void *skc)
{
	__u64 cookie = bpf_get_socket_cookie(skc);
	struct outcome *o = bpf_map_lookup_elem(&chosen, &cookie);
	return o && o->state == PENDING ? o : NULL;
}

static __always_inline long set(void *skc, struct tcp_sock *tp, struct name *name, struct outcome *o)
{
	struct inet_connection_sock___move *icsk = (void *)&tp->inet_conn;
	const void *ops = icsk->icsk_ca_ops;
	__u32 cwnd = tp->snd_cwnd, ssthresh = tp->snd_ssthresh;

	o->error = bpf_setsockopt(skc, SOL_TCP, TCP_CONGESTION, name, sizeof(*name));
	o->state = o->error ? FAILED : icsk->icsk_ca_ops == ops ? KEPT : MOVED;
	o->window = tp->snd_cwnd != cwnd || tp->snd_ssthresh != ssthresh;
	return o->error;
}

static __always_inline void move_one(void *skc, struct tcp_sock *tp, struct outcome *o)
{
	struct name name = { { to.word[0], to.word[1] } }, now = {};
	__u8 state = ((struct sock_common *)skc)->skc_state;
	struct inet_connection_sock___move *icsk = (void *)&tp->inet_conn;

	/* What a listener accepts has the default, unless the listener has chosen. */
	if (replacing && state == TCP_LISTEN && !read_bits(icsk, icsk_ca_setsockopt)) {
		o->state = NEVER;
		return;
	}

	if (needs_ecn && state != TCP_LISTEN && state != TCP_CLOSE && !(tp->ecn_flags & TCP_ECN_OK)) {
		o->state = NO_ECN;
		return;
	}
	bpf_getsockopt(skc, SOL_TCP, TCP_CONGESTION, &now, sizeof(now));
	if (same(&now, &name)) { /* another map may have the name by now */
		set(skc, tp, &name, o);
		return;
	}
	struct former *f = bpf_sk_storage_get(&former, skc, NULL, CREATE);
	if (!f) {
		o->state = FAILED;
		o->error = -12; /* ENOMEM */
		return;
	}
	struct former was = *f;
	if (!same(&f->ours, &now)) /* new, or somebody has moved it since */
		f->before = now;
	f->ours = name;
	if (set(skc, tp, &name, o)) {
		if (was.ours.word[0])
			*f = was;
		else
			bpf_sk_storage_delete(&former, skc);
		return;
	}
	bpf_getsockopt(skc, SOL_TCP, TCP_CONGESTION, &now, sizeof(now));
	if (!same(&now, &name)) {
		o->state = FELL_BACK;
		f->ours = now;
	}
	if (same(&f->before, &f->ours))
		bpf_sk_storage_delete(&former, skc);
}

static __always_inline void restore_one(void *skc, struct tcp_sock *tp, struct outcome *o)
{
	struct former *f = bpf_sk_storage_get(&former, skc, NULL, 0);
	if (!f) {
		o->state = NEVER;
		return;
	}
	struct name before = f->before, now = {};
	bpf_getsockopt(skc, SOL_TCP, TCP_CONGESTION, &now, sizeof(now));
	if (!same(&now, &f->ours))
		o->state = LEFT;
	else if (set(skc, tp, &before, o))
		return;
	bpf_sk_storage_delete(&former, skc);
}

static __always_inline void note(void *skc)
{
	if (bpf_sk_storage_get(&former, skc, NULL, 0))
		remembered++;
}

/* Requests and TIME-WAIT are no tcp_sock. */
SEC("iter/tcp")
int move(__u64 *ctx)
{
	void *skc = (void *)ctx[1];
	struct tcp_sock *tp = skc ? bpf_skc_to_tcp_sock(skc) : NULL;
	if (!tp)
		return 0;
	struct outcome *o = meant(skc);
	if (o)
		move_one(skc, tp, o);
	note(skc);
	return 0;
}

SEC("iter/tcp")
int restore(__u64 *ctx)
{
	void *skc = (void *)ctx[1];
	struct tcp_sock *tp = skc ? bpf_skc_to_tcp_sock(skc) : NULL;
	if (!tp)
		return 0;
	struct outcome *o = meant(skc);
	if (o)
		restore_one(skc, tp, o);
	note(skc);
	return 0;
}

/*
 * All sockets, whatever namespace they are in. Some kernels refuse it.
 * ctx[3] is what the socket ctx[2] remembers; at the end of the walk there is none.
 */
SEC("iter/bpf_sk_storage_map")
int count(__u64 *ctx)
{
	if (ctx[3])
		remembered++;
	return 0;
}
