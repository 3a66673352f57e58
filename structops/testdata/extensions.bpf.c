//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Extensions of extensible.bpf.c: for "scale" good ones, for the others some that do not fit. */
#include "ccload.bpf.h"

const volatile __u32 so_factor = 7;

SEC("freplace/scale") __u32 so_scaled(__u32 cwnd) { return cwnd * so_factor; }
SEC("struct_ops/init") void scale_slot(__u64 *ctx) { tcp_sk((void *)ctx[0])->snd_ssthresh = 500 + so_factor; }

SEC("freplace/wide") __u64 so_wide(__u32 a) { return a; }      /* another type */
SEC("struct_ops/undo_cwnd") __u32 only_slot(__u64 *ctx) { return 2; } /* another member */
SEC("freplace/absent") __u32 so_absent(__u32 a) { return a; }
SEC("xdp") int so_xdp(void *ctx) { return 0; }                 /* no extension at all */
