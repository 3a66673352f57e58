// SPDX-License-Identifier: Apache-2.0

package cc

var cubic = &Algorithm{
	Name:      "bpf_cubic",
	Reference: "RFC 9438; HyStart: Ha and Rhee 2011",
	Doc:       "CUBIC, in the place of the kernel's cubic",
	stem:      "cubic",
	NewState:  func() any { return new(CubicState) },
	Tunables: []Tunable{
		{Name: "beta", Kind: Fraction, Default: 717, Min: 512, Max: 1023, Running: true,
			Doc: "share of cwnd kept after a loss (RFC 9438 §4.6)"},
		{Name: "c", Kind: Fraction, Unit: "segments/s³", Default: 410, Min: 4, Max: 8192,
			Doc: "steepness of the cubic (§4.1)"},
		{Name: "fast_convergence", Kind: Bool, Default: 1, Max: 1, Running: true,
			Doc: "give way to new flows (§4.7)"},
		{Name: "tcp_friendliness", Kind: Bool, Default: 1, Max: 1, Running: true,
			Doc: "never slower than Reno (§4.3)"},
		{Name: "initial_ssthresh", Unit: "segments", Max: 1 << 30, Running: true,
			Doc: "ssthresh of a new connection; 0: unlimited; only without HyStart"},
		{Name: "hystart", Kind: Bool, Default: 1, Max: 1, Running: true,
			Doc: "leave slow start before the first loss"},
		{Name: "hystart_detect", Default: 3, Min: 1, Max: 3, Running: true,
			Doc: "what HyStart heeds: 1 ACK train, 2 delay, 3 both"},
		{Name: "hystart_low_window", Unit: "segments", Default: 16, Min: 2, Max: 1 << 20, Running: true,
			Doc: "HyStart does nothing below this cwnd"},
		{Name: "hystart_ack_delta_us", Unit: "us", Default: 2000, Min: 1, Max: 1000000, Running: true,
			Doc: "ACKs closer than this are one train"},
		{Name: "hystart_delay_min_us", Unit: "us", Default: 4000, Min: 1, Max: 1000000, Running: true,
			Doc: "smallest rise of RTT that means congestion"},
		{Name: "hystart_delay_max_us", Unit: "us", Default: 16000, Min: 1, Max: 1000000, Running: true,
			Doc: "largest rise of RTT that is waited for"},
	},
}

// CubicState is the private state of a bpf_cubic socket (struct bpf_cubic).
type CubicState struct {
	Cnt        uint32 // ACKed segments for one segment of growth
	WMax       uint32 // segments: window before the last reduction
	LastCwnd   uint32 // segments: window that Cnt was worked out for,
	LastTime   uint32 // jiffies: and when
	Origin     uint32 // segments: plateau of the cubic
	K          uint32 // 1/1024 s from the start of the epoch to the plateau
	DelayMin   uint32 // us: smallest RTT; 0: none yet
	EpochStart uint32 // jiffies; 0: no epoch
	AckCnt     uint32 // ACKed segments that WEst has not used yet
	WEst       uint32 // segments: what Reno would have
	RoundStart uint32 // us: start of this round trip
	LastAck    uint32 // us: last ACK of the train
	EndSeq     uint32 // the round is over when this is ACKed
	CurrRTT    uint32 // us: smallest RTT of this round's first samples
	SampleCnt  uint8  // how many samples
	Found      uint8  // 1: HyStart has left slow start
	_          [2]byte
}
