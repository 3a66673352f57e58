//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Two that share what is pinned by name; one whose map no kernel makes; a program that is left out, with the like. */
#include "ccload.bpf.h"

#define ARRAY(map, entries, ...)                        \
	struct {                                        \
		int (*type)[2]; /* BPF_MAP_TYPE_ARRAY */ \
		int (*key_size)[4];                     \
		int (*value_size)[8];                   \
		int (*max_entries)[entries];            \
		__VA_ARGS__                             \
	} map SEC(".maps")

ARRAY(so_shared, 2, int (*pinning)[1];); /* LIBBPF_PIN_BY_NAME */
ARRAY(so_own, 1);

struct {
	int (*type)[27]; /* BPF_MAP_TYPE_RINGBUF */
	int (*max_entries)[3];
} so_ring SEC(".maps"), so_left_ring SEC(".maps");

static void *(*const bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*const bpf_ringbuf_output)(void *ring, void *data, __u64 size, __u64 flags) = (void *)130;

static __always_inline void so_count(void *map)
{
	__u32 key = 0;
	__u64 *n = bpf_map_lookup_elem(map, &key);

	if (n)
		__sync_fetch_and_add(n, 1);
}

STRUCT_OPS(__u32, so_cwnd, struct sock *, sk) { return tcp_sk(sk)->snd_cwnd; }
STRUCT_OPS(void, so_avoid, struct sock *, sk, __u32, ack, __u32, acked) {}

STRUCT_OPS(void, so_counts, struct sock *, sk)
{
	so_count(&so_shared);
	so_count(&so_own);
}

STRUCT_OPS(void, so_tells, struct sock *, sk)
{
	__u32 x = 1;

	bpf_ringbuf_output(&so_ring, &x, sizeof(x), 0);
}

STRUCT_OPS(__u32, so_tells_too, struct sock *, sk)
{
	__u32 x = 2;

	bpf_ringbuf_output(&so_ring, &x, sizeof(x), 0);
	return 2;
}

STRUCT_OPS(void, so_left_out, struct sock *, sk)
{
	__u32 x = 3;

	bpf_ringbuf_output(&so_left_ring, &x, sizeof(x), 0);
}

#define TABLE(map, first, threshold)                           \
	SEC(".struct_ops.link") struct tcp_congestion_ops map = { \
		.ssthresh = (void *)threshold,                 \
		.undo_cwnd = (void *)so_cwnd,                  \
		.cong_avoid = (void *)so_avoid,                \
		.init = (void *)first,                         \
		.flags = TCP_CONG_NON_RESTRICTED,              \
		.name = #map,                                  \
	}
TABLE(so_sharer, so_counts, so_cwnd);
TABLE(so_second, so_counts, so_cwnd);
TABLE(so_teller, so_tells, so_tells_too);
