//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* A program that no table refers to, but a map of programs does: its section names the member.
 * It alone uses a map that is pinned by name, and another that is in a map. */
#include "ccload.bpf.h"

#define COUNTER                                      \
	int (*type)[2]; /* BPF_MAP_TYPE_ARRAY */     \
	int (*key_size)[4];                          \
	int (*value_size)[8];                        \
	int (*max_entries)[1]

struct {
	COUNTER;
	int (*pinning)[1]; /* LIBBPF_PIN_BY_NAME */
} so_seen SEC(".maps"), so_inner SEC(".maps");

struct counter { COUNTER; };

struct {
	int (*type)[12]; /* BPF_MAP_TYPE_ARRAY_OF_MAPS */
	int (*key_size)[4];
	int (*max_entries)[1];
	struct counter *values[];
} so_outer SEC(".maps") = { .values = { (void *)&so_inner } };

static void *(*const bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;

static __always_inline void so_count(void *map)
{
	__u32 key = 0;
	__u64 *n = bpf_map_lookup_elem(map, &key);

	if (n)
		__sync_fetch_and_add(n, 1);
}

SEC("struct_ops/cong_avoid") void so_tail(__u64 *ctx)
{
	__u32 key = 0;
	void *inner = bpf_map_lookup_elem(&so_outer, &key);

	so_count(&so_seen);
	if (inner)
		so_count(inner);
}

struct {
	int (*type)[3]; /* BPF_MAP_TYPE_PROG_ARRAY */
	int (*key_size)[4];
	int (*max_entries)[1];
	void (*values[])(__u64 *ctx);
} so_jumps __attribute__((section(".maps"), used)) = { .values = { so_tail } };

STRUCT_OPS(__u32, so_cwnd, struct sock *, sk) { return 10; }
SEC("struct_ops") void so_cong_avoid(__u64 *ctx) { bpf_tail_call(ctx, &so_jumps, 0); }

SEC(".struct_ops.link") struct tcp_congestion_ops so_tailing = {
	.ssthresh = (void *)so_cwnd,
	.cong_avoid = (void *)so_cong_avoid,
	.undo_cwnd = (void *)so_cwnd,
	.name = "so_tailing",
};
