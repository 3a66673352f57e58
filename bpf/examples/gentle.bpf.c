//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * An extension: it takes the place of the policy "backoff" of a congestion
 * control that runs, and keeps 85 % of the window after a loss.
 *
 *	ccload extend bpf_cubic backoff gentle.bpf.o
 *	ccload extend bpf_cubic --remove backoff
 *
 * An object may have two forms of an extension; ccload takes the first where the
 * kernel allows it:
 *
 *  - in SEC("freplace/FUNCTION") a function, with any name, that is declared as the
 *    policy is. It may call no helper of the kernel, and not write to the socket;
 *  - in SEC("struct_ops/MEMBER") a program with the name FUNCTION_slot. It does what
 *    is left of the callback for MEMBER, with its arguments and its result, and may
 *    do all that the callback may.
 */
#include "ccload.bpf.h"

static __always_inline __u32 gentle(__u32 cwnd)
{
	return (__u64)cwnd * 85 / 100;
}

SEC("freplace/backoff") __u32 gentle_backoff(__u32 cwnd)
{
	return gentle(cwnd);
}

SEC("struct_ops/ssthresh") __u32 backoff_slot(__u64 *ctx)
{
	struct sock *sk = (void *)ctx[0];

	return max(gentle(tcp_sk(sk)->snd_cwnd), 2);
}
