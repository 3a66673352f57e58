//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Extensions of extensible.bpf.c that the verifier refuses. */
#include "ccload.bpf.h"

SEC("freplace/scale") __u32 so_calls(__u32 cwnd) { return cwnd + bpf_jiffies64(); } /* a helper */
SEC("struct_ops/init") void scale_slot(__u64 *ctx) { tcp_sk((void *)ctx[0])->snd_nxt = 0; }
