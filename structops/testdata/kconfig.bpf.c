//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* What of the kernel's configuration a program may ask for. */
#include "ccload.bpf.h"

enum libbpf_tristate { TRI_NO, TRI_YES, TRI_MODULE };

extern int LINUX_KERNEL_VERSION __kconfig;
extern bool CONFIG_SO_YES __kconfig __weak;
extern enum libbpf_tristate CONFIG_SO_MODULE __kconfig __weak;
extern char CONFIG_SO_CHAR __kconfig __weak;
extern char CONFIG_SO_TEXT[8] __kconfig __weak;
extern int CONFIG_SO_NUMBER __kconfig __weak;
extern int CONFIG_SO_UNSET __kconfig __weak;

STRUCT_OPS(__u32, so_cwnd, struct sock *, sk)
{
	return CONFIG_HZ + LINUX_KERNEL_VERSION + CONFIG_SO_YES + CONFIG_SO_MODULE + CONFIG_SO_CHAR +
	       CONFIG_SO_TEXT[1] + CONFIG_SO_NUMBER + CONFIG_SO_UNSET;
}
STRUCT_OPS(void, so_cong_avoid, struct sock *, sk, __u32, ack, __u32, acked) {}

SEC(".struct_ops.link") struct tcp_congestion_ops so_kconfig = {
	.ssthresh = (void *)so_cwnd,
	.cong_avoid = (void *)so_cong_avoid,
	.undo_cwnd = (void *)so_cwnd,
	.name = "so_kconfig",
};
