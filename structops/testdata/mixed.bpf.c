//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* One that can be used, among others each of which has a fault of its own. */
#include "ccload.bpf.h"

struct tcp_congestion_ops___mixed {
	__u32 (*ssthresh)(struct sock *sk);
	void (*cong_avoid)(struct sock *sk, __u32 ack, __u32 acked);
	__u32 (*undo_cwnd)(struct sock *sk);
	void (*init)(struct sock *sk);
	void (*so_unknown)(struct sock *sk);
	__u64 so_extra;
	__u32 so_bits : 3;
	__u32 *flags;
	void *owner;
	char name[16];
};

__u32 so_variable = 1;
extern void so_nowhere(void) __weak;

STRUCT_OPS(__u32, so_cwnd, struct sock *, sk) { return tcp_sk(sk)->snd_cwnd; }
STRUCT_OPS(void, so_avoid, struct sock *, sk, __u32, ack, __u32, acked) {}
STRUCT_OPS(void, so_begin, struct sock *, sk) {}

/* As the oldest samples have it, as a helper is written, and as one of another type. */
SEC("cong_avoid") void so_bare(__u64 *ctx) {}
__noinline void so_text(__u64 *ctx) {}
SEC("xdp") int so_xdp(void *ctx) { return 2; }

#define TABLE(section, map, more)                                        \
	SEC(section) struct tcp_congestion_ops___mixed map = {          \
		.ssthresh = (void *)so_cwnd,                            \
		.undo_cwnd = (void *)so_cwnd,                           \
		.name = #map,                                           \
		more                                                    \
	}
#define AVOID(program) .cong_avoid = (void *)program
#define AND ,

TABLE(".struct_ops.link", so_bits, AVOID(so_avoid) AND .so_bits = 1);
TABLE(".struct_ops.link", so_good, AVOID(so_avoid));
TABLE(".struct_ops.link", so_lacks, .init = (void *)so_begin);
TABLE(".struct_ops.link", so_owner, AVOID(so_avoid) AND .owner = (void *)1);
TABLE(".struct_ops.link", so_number, AVOID(so_avoid) AND .init = (void *)7);
TABLE(".struct_ops.link", so_pointer, AVOID(so_avoid) AND .init = (void *)&so_variable);
TABLE(".struct_ops.link", so_undefined, AVOID(so_avoid) AND .init = (void *)so_nowhere);
TABLE(".struct_ops.link", so_field, AVOID(so_avoid) AND .so_extra = 5);
TABLE(".struct_ops.link", so_flags, AVOID(so_avoid) AND .flags = &so_variable);
TABLE(".struct_ops.link", so_renamed, AVOID(so_bare));
TABLE(".struct_ops.link", so_texted, AVOID(so_text));
TABLE(".struct_ops.link", so_typed, AVOID(so_xdp));
/* This one a kernel refuses, for it lacks the member. */
TABLE(".struct_ops.link", so_member, AVOID(so_avoid) AND .so_unknown = (void *)so_begin);

/* The program names an ops table, which no program can have the address of. */
SEC("struct_ops/so_refers") void so_refers(__u64 *ctx)
{
	asm volatile("" : : "r"(&so_good));
}
TABLE(".struct_ops.link", so_reference, AVOID(so_avoid) AND .init = (void *)so_refers);

/* The same in a section that has others, and in a function that is called. */
SEC("struct_ops") void so_refers_too(__u64 *ctx)
{
	asm volatile("" : : "r"(&so_good));
}
static __noinline void so_called(void)
{
	asm volatile("" : : "r"(&so_good));
}
SEC("struct_ops") void so_calls(__u64 *ctx) { so_called(); }
static __noinline void so_helps(void) { asm volatile(""); }
SEC("struct_ops") void so_beside(__u64 *ctx) { so_helps(); }
TABLE(".struct_ops.link", so_section, AVOID(so_avoid) AND .init = (void *)so_refers_too);
TABLE(".struct_ops.link", so_caller, AVOID(so_avoid) AND .init = (void *)so_calls);
TABLE(".struct_ops.link", so_neighbour, AVOID(so_avoid) AND .init = (void *)so_beside);

/* These need another name. */
#define NAMED(map, given)                                                \
	SEC(".struct_ops.link") struct tcp_congestion_ops___mixed map = { \
		.ssthresh = (void *)so_cwnd,                            \
		.undo_cwnd = (void *)so_cwnd,                           \
		AVOID(so_avoid),                                        \
		given                                                   \
	}
NAMED(so_nameless, );
NAMED(so_odd, .name = "so-odd name");
NAMED(so_long, .name = "so_long_16_bytes");
