//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* bpf_cubic registered without a link, the one way that old bpftool can load. */
#define CONGESTION_OPS SEC(".struct_ops")
#include "../../../bpf/cubic.bpf.c"
