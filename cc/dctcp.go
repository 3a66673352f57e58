// SPDX-License-Identifier: Apache-2.0

package cc

var dctcp = &Algorithm{
	Name:      "bpf_dctcp",
	Reference: "RFC 8257",
	Doc:       "Data Center TCP; needs ECN, Reno without it",
	stem:      "dctcp",
	NewState:  func() any { return new(DCTCPState) },
	Tunables: []Tunable{
		{Name: "g", Kind: Fraction, Default: 64, Min: 1, Max: 1024, Running: true,
			Doc: "weight of a new sample of alpha (RFC 8257 §3.3)"},
		{Name: "alpha_on_init", Kind: Fraction, Default: 1024, Max: 1024, Running: true,
			Doc: "alpha of a new connection (§4.3)"},
	},
}

// DCTCPState is the private state of a bpf_dctcp socket (struct bpf_dctcp).
type DCTCPState struct {
	OldDelivered   uint32 // segments delivered,
	OldDeliveredCE uint32 // and with an echo, at the start of this window
	PriorRcvNxt    uint32 // sequence number up to which CEState held
	Alpha          uint32 // 1/1024
	NextSeq        uint32 // the window is over when this is ACKed
	CEState        uint32 // 1: the last data received bore CE
	LossCwnd       uint32 // segments: window before the last reduction
}
