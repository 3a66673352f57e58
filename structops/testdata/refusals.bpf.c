//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * What verifiers refuse: one congestion control for each of their sentences, for the corpus of their logs in
 * refusals/. so_NAME has the program so_NAME_p.
 */
#include "ccload.bpf.h"

struct tcp_congestion_ops___all {
	__u32 (*ssthresh)(struct sock *sk);
	void (*cong_avoid)(struct sock *sk, __u32 ack, __u32 acked);
	void (*set_state)(struct sock *sk, __u8 new_state);
	__u32 (*undo_cwnd)(struct sock *sk);
	void (*init)(struct sock *sk);
	void (*release)(struct sock *sk);
	__u32 (*min_tso_segs)(struct sock *sk);
	char name[16];
};

#define __uint(name, value) int (*name)[value]
#define __type(name, value) typeof(value) *name

struct bpf_spin_lock { __u32 val; };
struct bpf_timer { __u64 opaque[2]; };
struct bpf_dynptr { __u64 opaque[2]; };

struct entry { __u64 values[4]; };
struct locked { struct bpf_spin_lock lock; __u32 n; };
struct timed { struct bpf_timer timer; };

struct { __uint(type, 1); __uint(max_entries, 8); __type(key, __u64); __type(value, struct entry); } so_flows SEC(".maps");
struct { __uint(type, 2); __uint(max_entries, 1); __type(key, __u32); __type(value, struct locked); } so_locks SEC(".maps");
struct { __uint(type, 27); __uint(max_entries, 4096); } so_ring SEC(".maps");
struct { __uint(type, 4); __uint(max_entries, 1); __uint(key_size, 4); __uint(value_size, 4); } so_perf SEC(".maps");

static void *(*const bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*const bpf_map_update_elem)(void *map, const void *key, const void *value, __u64 flags) = (void *)2;
static __u64 (*const bpf_ktime_get_ns)(void) = (void *)5;
static long (*const bpf_perf_event_output)(void *ctx, void *map, __u64 flags, void *data, __u64 size) = (void *)25;
static long (*const bpf_spin_lock)(struct bpf_spin_lock *lock) = (void *)93;
static long (*const bpf_spin_unlock)(struct bpf_spin_lock *lock) = (void *)94;
static void *(*const bpf_ringbuf_reserve)(void *ring, __u64 size, __u64 flags) = (void *)131;
static void (*const bpf_ringbuf_submit)(void *data, __u64 flags) = (void *)132;
static long (*const bpf_copy_from_user)(void *dst, __u32 size, const void *user) = (void *)148;
static long (*const bpf_loop)(__u32 n, void *fn, void *ctx, __u64 flags) = (void *)181;

STRUCT_OPS(__u32, so_cwnd, struct sock *, sk) { return 10; }
STRUCT_OPS(void, so_avoid, struct sock *, sk, __u32, ack, __u32, acked) {}

#define TABLE(n, member, program)                                       \
	SEC(".struct_ops.link") struct tcp_congestion_ops___all n = {  \
		.ssthresh = (void *)so_cwnd,                            \
		.cong_avoid = (void *)so_avoid,                         \
		.undo_cwnd = (void *)so_cwnd,                           \
		.member = (void *)program,                              \
		.name = #n,                                             \
	}

/* One in init, which is only given the socket. */
#define IN_INIT(n) void n##_p(__u64 *ctx); TABLE(n, init, n##_p); STRUCT_OPS(void, n##_p, struct sock *, sk)

/* Arguments of helpers. */
IN_INIT(so_key) { bpf_map_lookup_elem(&so_flows, (void *)(long)tcp_sk(sk)->snd_una); }
IN_INIT(so_sock_key) { bpf_map_lookup_elem(&so_flows, sk); }
IN_INIT(so_no_map) { __u64 k = 1; bpf_map_lookup_elem(&k, &k); }
IN_INIT(so_short_key) { __u32 k = 1; bpf_map_lookup_elem(&so_flows, &k); }
IN_INIT(so_flags_arg) { __u64 k = 1; bpf_map_update_elem(&so_flows, &k, (void *)8, 0); }
IN_INIT(so_size) { char b[8] = {}; bpf_setsockopt(sk, 6, 13, b, tcp_sk(sk)->snd_una); }
IN_INIT(so_size_below) { char b[8] = {}; bpf_setsockopt(sk, 6, 13, b, -1); }
IN_INIT(so_size_past) { char b[8] = {}; bpf_setsockopt(sk, 6, 13, b, 64); }
IN_INIT(so_reserve) { void *p = bpf_ringbuf_reserve(&so_ring, tcp_sk(sk)->snd_una, 0); if (p) bpf_ringbuf_submit(p, 0); }
IN_INIT(so_ring_lookup) { __u64 k = 1; bpf_map_lookup_elem(&so_ring, &k); }
IN_INIT(so_perf_event) { __u64 x = 1; bpf_perf_event_output(sk, &so_perf, 0, &x, 8); }
IN_INIT(so_ack_of) { __u64 x = 1; bpf_tcp_send_ack(&x, 0); }
IN_INIT(so_tail) { bpf_tail_call(sk, &so_flows, 0); }
IN_INIT(so_user) { char b[8]; bpf_copy_from_user(b, 8, sk); }
IN_INIT(so_unknown) { ((long (*)(void *))20000)(sk); }

/* Memory. */
static __always_inline struct entry *lookup(__u64 k) { return bpf_map_lookup_elem(&so_flows, &k); }

IN_INIT(so_null) { tcp_sk(sk)->snd_cwnd = lookup(1)->values[0]; }
IN_INIT(so_null_late) { struct entry *e = lookup(1); __u64 *v = &e->values[2]; if (v) *v = 1; }
static __always_inline __u64 *at(struct entry *e, long i) { asm volatile("" : "+r"(i)); return &e->values[i]; }
IN_INIT(so_index) { struct entry *e = lookup(1); __u32 i = tcp_sk(sk)->snd_una; if (e) tcp_sk(sk)->snd_cwnd = e->values[i]; }
IN_INIT(so_negative) { struct entry *e = lookup(1); int i = tcp_sk(sk)->snd_una; if (e && i < 4) tcp_sk(sk)->snd_cwnd = *at(e, i); }
IN_INIT(so_below) { struct entry *e = lookup(1); int i = tcp_sk(sk)->snd_una; if (e && i > -5 && i < 4) tcp_sk(sk)->snd_cwnd = *at(e, i); }
IN_INIT(so_past) { struct entry *e = lookup(1); if (e) tcp_sk(sk)->snd_cwnd = e->values[4]; }
IN_INIT(so_past_by) { struct entry *e = lookup(1); __u32 i = tcp_sk(sk)->snd_una; if (e && i < 5) tcp_sk(sk)->snd_cwnd = e->values[i]; }
IN_INIT(so_stack_past) { volatile char b[8] = {}; asm volatile("*(u64 *)(r10 - 520) = %0" :: "r"(1L) : "memory"); tcp_sk(sk)->snd_cwnd = b[0]; }
IN_INIT(so_stack_big) { volatile char b[64] = {}; tcp_sk(sk)->snd_cwnd = b[tcp_sk(sk)->snd_una & 511]; }
IN_INIT(so_unset) { __u64 x; asm volatile("%0 = r8" : "=r"(x)); tcp_sk(sk)->snd_cwnd = x; }
IN_INIT(so_number) { tcp_sk(sk)->snd_cwnd = *(__u32 *)(long)tcp_sk(sk)->snd_una; }
IN_INIT(so_zero) { tcp_sk(sk)->snd_cwnd = *(volatile __u32 *)0; }
IN_INIT(so_past_sock) { tcp_sk(sk)->snd_cwnd = *(volatile __u32 *)((char *)sk + 100000); }
IN_INIT(so_before_sock) { tcp_sk(sk)->snd_cwnd = *(volatile __u32 *)((char *)sk - 8); }
IN_INIT(so_sock_index) { tcp_sk(sk)->snd_cwnd = *(volatile __u32 *)((char *)sk + (tcp_sk(sk)->snd_una & 255)); }
IN_INIT(so_misaligned) { struct entry *e = lookup(1); if (e) __sync_fetch_and_add((__u64 *)((char *)e + 3), 1); }
IN_INIT(so_stack_skew) { char b[16] = {}; asm volatile("*(u64 *)(r10 - 13) = r10" ::: "memory"); bpf_setsockopt(sk, 6, 13, b, 4); }
IN_INIT(so_read_only) { static const volatile __u32 fixed = 3; *(volatile __u32 *)&fixed = tcp_sk(sk)->snd_una; }
IN_INIT(so_wide) { *(__u64 *)&tcp_sk(sk)->snd_ssthresh = 1; }
IN_INIT(so_write_nxt) { tcp_sk(sk)->snd_nxt = 1; }
IN_INIT(so_write_common) { sk->__sk_common.skc_state = 1; }

/* Arithmetic. */
IN_INIT(so_multiply) { __u64 *p = (__u64 *)((__u64)sk * 2); tcp_sk(sk)->snd_cwnd = *p; }
IN_INIT(so_difference) { long d; asm volatile("%0 = %1; %0 *= %0" : "=r"(d) : "r"(sk)); tcp_sk(sk)->snd_cwnd = d; }
IN_INIT(so_divide) { __u32 x = 5; asm volatile("%0 /= 0" : "+r"(x)); tcp_sk(sk)->snd_cwnd = x; }
IN_INIT(so_shift) { __u64 x = 5; asm volatile("%0 <<= 64" : "+r"(x)); tcp_sk(sk)->snd_cwnd = x; }
IN_INIT(so_null_plus) { struct entry *e = lookup(1); char *p = (char *)e; asm volatile("%0 += 8" : "+r"(p)); if (p) tcp_sk(sk)->snd_cwnd = *p; }

/* Control. */
IN_INIT(so_forever) { for (;;) asm volatile(""); }
IN_INIT(so_while) { __u32 lim = tcp_sk(sk)->snd_una, i = 0; volatile __u32 n = 0; while (i < lim * lim) { i++; n += i; } tcp_sk(sk)->snd_cwnd = n; }
IN_INIT(so_million) { volatile __u32 n = 0; for (__u32 i = 0; i < 3000000; i++) n++; }
IN_INIT(so_branches) /* EFAULT on 6.18 */
{
	volatile __u32 *p = &tcp_sk(sk)->snd_una;
	__u32 n = 0;

	for (int i = 0; i < 9000; i++)
		if (*p > (__u32)i)
			n += 3;
	tcp_sk(sk)->snd_cwnd = n;
}
IN_INIT(so_dead) { asm volatile("goto +1; r0 = 5; r0 = 6"); asm volatile("exit; r0 = 0; exit"); }
IN_INIT(so_beyond) { asm volatile("goto +32000"); }
IN_INIT(so_into_wide) { asm volatile("goto +1; r1 = 0x1122334455667788 ll" ::: "r1"); }
#define DEEP(n, next) static __noinline __u32 so_deep##n(__u32 a) { volatile __u32 x = a; return next(x) + x; }
static __noinline __u32 so_deep0(__u32 a) { volatile __u32 x = a; return x; }
DEEP(1, so_deep0) DEEP(2, so_deep1) DEEP(3, so_deep2) DEEP(4, so_deep3) DEEP(5, so_deep4) DEEP(6, so_deep5) DEEP(7, so_deep6) DEEP(8, so_deep7)
IN_INIT(so_calls) { tcp_sk(sk)->snd_cwnd = so_deep8(tcp_sk(sk)->snd_una); }
static __noinline __u32 so_fat0(__u32 a) { volatile char b[300] = {}; return b[a & 255]; }
static __noinline __u32 so_fat1(__u32 a) { volatile char b[300] = {}; return b[a & 255] + so_fat0(a); }
IN_INIT(so_stacks) { tcp_sk(sk)->snd_cwnd = so_fat1(tcp_sk(sk)->snd_una); }
static long so_body(__u64 i, void *ctx) { return 7; }
IN_INIT(so_callback) { bpf_loop(5, so_body, NULL, 0); }
IN_INIT(so_loop_flags) { bpf_loop(5, so_body, NULL, 9); }

/* Global functions. */
__noinline void so_note(__u64 v) { asm volatile("" :: "r"(v)); }
IN_INIT(so_void) { so_note(tcp_sk(sk)->snd_una); }
__noinline __u32 so_of_sock(struct sock *sk) { return ((struct tcp_sock *)sk)->snd_una; }
IN_INIT(so_global_sock) { tcp_sk(sk)->snd_cwnd = so_of_sock(sk); }
__noinline __u32 so_of_mem(__u32 *p) { return *p; }
IN_INIT(so_global_null) { __u32 x = 3; tcp_sk(sk)->snd_cwnd = so_of_mem(&x); }
__noinline __u32 so_of_struct(struct entry *p) { return p ? p->values[0] : 0; }
IN_INIT(so_global_arg) { tcp_sk(sk)->snd_cwnd = so_of_struct((void *)sk); }
IN_INIT(so_global_num) { tcp_sk(sk)->snd_cwnd = so_of_struct((void *)(long)tcp_sk(sk)->snd_una); }
__noinline __u32 so_of_array(__u32 i) { volatile __u64 x[2] = {}; return x[i]; }
IN_INIT(so_global_bad) { tcp_sk(sk)->snd_cwnd = so_of_array(tcp_sk(sk)->snd_una); }

/* Kernel functions. */
extern __u32 tcp_reno_ssthresh(struct sock *sk) __ksym;
extern void bpf_rcu_read_lock(void) __ksym __weak;
extern void bpf_rcu_read_unlock(void) __ksym __weak;
IN_INIT(so_kfunc_number) { tcp_sk(sk)->snd_cwnd = tcp_reno_ssthresh((void *)(long)tcp_sk(sk)->snd_una); }
IN_INIT(so_kfunc_stack) { __u64 x[4] = {}; tcp_sk(sk)->snd_cwnd = tcp_reno_ssthresh((void *)x); }
IN_INIT(so_kfunc_type) { tcp_slow_start((void *)lookup(1), 1); }
IN_INIT(so_kfunc_value) { void *e = lookup(1); if (e) tcp_cong_avoid_ai(e, 1, 1); }
IN_INIT(so_kfunc_offset) { tcp_cong_avoid_ai((void *)((char *)sk + 8), 1, 1); }
IN_INIT(so_rcu) { bpf_rcu_read_lock(); }
IN_INIT(so_rcu_unlock) { bpf_rcu_read_unlock(); }

/* References and locks. */
IN_INIT(so_reference) { void *p = bpf_ringbuf_reserve(&so_ring, 8, 0); if (p) *(__u64 *)p = 1; }
IN_INIT(so_twice) { void *p = bpf_ringbuf_reserve(&so_ring, 8, 0); if (p) { bpf_ringbuf_submit(p, 0); bpf_ringbuf_submit(p, 0); } }
IN_INIT(so_submit) { __u64 x = 1; bpf_ringbuf_submit(&x, 0); }
IN_INIT(so_unchecked) { __u64 *p = bpf_ringbuf_reserve(&so_ring, 8, 0); *p = 1; bpf_ringbuf_submit(p, 0); }
static __always_inline struct locked *lock_of(void) { __u32 k = 0; return bpf_map_lookup_elem(&so_locks, &k); }
IN_INIT(so_lock_kept) { struct locked *l = lock_of(); if (l) bpf_spin_lock(&l->lock); }
IN_INIT(so_lock_twice) { struct locked *l = lock_of(); if (l) { bpf_spin_lock(&l->lock); bpf_spin_lock(&l->lock); bpf_spin_unlock(&l->lock); } }
IN_INIT(so_unlock) { struct locked *l = lock_of(); if (l) bpf_spin_unlock(&l->lock); }
IN_INIT(so_lock_call) { struct locked *l = lock_of(); if (l) { bpf_spin_lock(&l->lock); bpf_ktime_get_ns(); bpf_spin_unlock(&l->lock); } }
IN_INIT(so_lock_read) { struct locked *l = lock_of(); if (l) tcp_sk(sk)->snd_cwnd = *(volatile __u32 *)&l->lock; }
IN_INIT(so_lock_stack) { struct bpf_spin_lock l = {}; bpf_spin_lock(&l); bpf_spin_unlock(&l); }

/* What -mcpu=v4 compiles to, and newer: instructions that older kernels do not know. */
#define RAW(op, regs, off, imm) asm volatile(".byte " #op ", " #regs ", " #off ", 0; .4byte " #imm ::: "r0", "r1", "memory")
IN_INIT(so_v4_move) { asm volatile("r0 = 1" ::: "r0"); RAW(0xbf, 0x00, 8, 0); } /* r0 = (s8)r0 */
IN_INIT(so_v4_swap) { asm volatile("r0 = 1" ::: "r0"); RAW(0xd7, 0x00, 0, 16); }  /* r0 = bswap16 r0 */
IN_INIT(so_v4_divide) { asm volatile("r0 = 1" ::: "r0"); RAW(0x3f, 0x00, 1, 0); } /* r0 s/= r0 */
IN_INIT(so_v4_load) { asm volatile("*(u64 *)(r10 - 8) = %0" :: "r"(1L) : "memory"); asm volatile(".byte 0x91, 0xa0, 0xf8, 0xff; .4byte 0" ::: "r0"); } /* r0 = *(s8 *)(r10 - 8) */
IN_INIT(so_v4_jump) { RAW(0x06, 0x00, 0, 0); }                      /* gotol +0 */
IN_INIT(so_may_goto) { RAW(0xe5, 0x00, 0, 0); }                     /* may_goto +0 */
IN_INIT(so_acquire) { asm volatile("r1 = r10; r1 += -8; *(u64 *)(r10 - 8) = r1" ::: "r1", "memory"); RAW(0xdb, 0x10, 0, 0x100); } /* r0 = load_acquire(r1) */

/* Signatures, and what the kernel hands over. */
SEC("struct_ops/so_bare_p") void so_bare_p(struct sock *sk, __u8 state) { tcp_sk(sk)->snd_cwnd = state; }
TABLE(so_bare, set_state, so_bare_p);
SEC("struct_ops/so_bare_first_p") void so_bare_first_p(struct sock *sk) { tcp_sk(sk)->snd_cwnd = 3; }
TABLE(so_bare_first, init, so_bare_first_p);
SEC("struct_ops/so_context_p") void so_context_p(__u64 *ctx) { ctx[0] = 5; }
TABLE(so_context, init, so_context_p);
SEC("struct_ops/so_context_at_p") void so_context_at_p(__u64 *ctx) { tcp_sk((void *)ctx[0])->snd_cwnd = *(__u32 *)((char *)ctx + 4); }
TABLE(so_context_at, init, so_context_at_p);
SEC("struct_ops/so_third_p") void so_third_p(__u64 *ctx) { tcp_sk((void *)ctx[0])->snd_cwnd = ctx[3]; }
TABLE(so_third, set_state, so_third_p);
SEC("struct_ops/so_no_value_p") void so_no_value_p(__u64 *ctx) { asm volatile("exit"); }
TABLE(so_no_value, min_tso_segs, so_no_value_p);
SEC("struct_ops.s/so_sleeps_p") void so_sleeps_p(__u64 *ctx) { tcp_sk((void *)ctx[0])->snd_cwnd = 3; }
TABLE(so_sleeps, init, so_sleeps_p);

/* Private state: 104 bytes, and more than there are. */
struct state { __u64 fields[16]; };
IN_INIT(so_state) { struct state *s = inet_csk_ca(sk); s->fields[0] = 1; s->fields[13] = 1; s->fields[15] = 1; }
IN_INIT(so_state_across) { __u8 *s = inet_csk_ca(sk); *(__u64 *)(s + 100) = 1; }
IN_INIT(so_state_var) { __u8 *s = inet_csk_ca(sk); s[tcp_sk(sk)->snd_una & 127] = 1; }
