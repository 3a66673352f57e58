//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* A struct_ops of another type. */
#include "ccload.bpf.h"

struct sched_ext_ops { void (*enqueue)(void *p, __u64 flags); };

STRUCT_OPS(void, so_enqueue, void *, p, __u64, flags) {}

SEC(".struct_ops.link") struct sched_ext_ops so_other = { .enqueue = (void *)so_enqueue };
