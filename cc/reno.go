// SPDX-License-Identifier: Apache-2.0

package cc

var reno = &Algorithm{
	Name:      "bpf_reno",
	Reference: "RFC 5681",
	Doc:       "slow start and congestion avoidance; the example to copy",
	stem:      "reno",
}
