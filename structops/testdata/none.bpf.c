//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* No struct_ops at all. */
#include "ccload.bpf.h"

SEC("xdp") int so_xdp(void *ctx) { return 2; }
