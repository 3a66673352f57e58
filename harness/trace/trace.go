// Package trace is the data that an experiment leaves behind: samples of its
// flows, the state of its link over time, and a description of the run that is
// whole enough to do it again. It is data only: it measures nothing, draws
// nothing and touches no kernel.
//
// A result directory holds three files (see Create and Open):
//
//	run.json         Run: the experiment with its defaults filled in, where it
//	                 ran, and the summary
//	samples.parquet  one Sample a row, in order of time
//	link.parquet     one LinkSample a row, in order of time
//
// What one command measures is a set of such directories, or one, with a set.json
// that tells its state (see Set).
//
// Units are base units throughout: seconds, bytes, bit/s for rates. Windows and
// queues are counted in segments and packets, as the kernel counts them.
package trace

// Format is the version of the files that this package writes. A reader
// refuses a newer one: silently ignoring what a newer writer thought
// important would give wrong pictures.
const Format = 1

// Source says how a Sample was taken.
type Source string

const (
	// Diag samples come from sock_diag(7) (INET_DIAG_INFO) at a fixed interval.
	Diag Source = "diag"
	// Ack samples come from the tracepoint tcp:tcp_probe, one for each segment
	// that reaches the sender in an established connection, before it is
	// processed: the window is the one that held until then.
	Ack Source = "ack"
	// Event samples are taken when the state of the congestion machine is set, which
	// happens between ACKs, too (tracepoint tcp:tcp_cong_state_set): CAState is the new
	// one. Each timeout gives one that sets CALoss, also when that is the state already.
	Event Source = "event"
)

// InfiniteSsthresh is what the kernel keeps in snd_ssthresh before the first
// congestion event (RFC 5681 §3.1: "arbitrarily high").
const InfiniteSsthresh = 0x7fffffff

// CAState is the state of Linux's congestion machine (enum tcp_ca_state in
// include/uapi/linux/tcp.h).
type CAState uint8

const (
	CAOpen CAState = iota
	CADisorder
	CACWR
	CARecovery
	CALoss
)

// Sample is one observation of the sender of one flow.
type Sample struct {
	Time        float64 `parquet:"time"`         // s since the start of the run
	Flow        int32   `parquet:"flow"`         // FlowResult.ID
	Source      Source  `parquet:"source,dict"`  // how it was taken
	Cwnd        uint32  `parquet:"cwnd"`         // segments
	Ssthresh    uint32  `parquet:"ssthresh"`     // segments; InfiniteSsthresh before the first congestion event
	SRTT        float64 `parquet:"srtt"`         // s, RFC 6298
	MinRTT      float64 `parquet:"min_rtt"`      // s; 0 where the source does not tell
	Inflight    uint32  `parquet:"inflight"`     // segments: packets out - sacked - lost + retransmitted
	BytesAcked  uint64  `parquet:"bytes_acked"`  // cumulative
	Delivered   uint32  `parquet:"delivered"`    // segments delivered, cumulative
	DeliveredCE uint32  `parquet:"delivered_ce"` // of these, delivered with an ECN echo
	Retrans     uint32  `parquet:"retrans"`      // segments retransmitted, cumulative
	Lost        uint32  `parquet:"lost"`         // segments now presumed lost
	PacingRate  float64 `parquet:"pacing_rate"`  // bit/s; 0 when not paced, which Diag cannot tell: it has the rate that TCP worked out
	CAState     CAState `parquet:"ca_state"`
}

// LinkSample is the state of the bottleneck at one moment. The counters run
// from the start of the run. There is a row at a fixed interval and one for
// each drop and mark.
type LinkSample struct {
	Time       float64 `parquet:"time"`        // s since the start of the run
	Queue      int32   `parquet:"queue"`       // packets waiting, the one in transmission included
	QueueBytes int64   `parquet:"queue_bytes"` // bytes of these
	Enqueued   uint64  `parquet:"enqueued"`    // packets accepted
	Delivered  uint64  `parquet:"delivered"`   // bytes that have left the bottleneck
	Drops      uint64  `parquet:"drops"`       // packets dropped because the buffer was full
	Losses     uint64  `parquet:"losses"`      // packets dropped on purpose (Link.Loss)
	Marks      uint64  `parquet:"marks"`       // packets marked CE
}

// Experiment is what is to be done. Everything that influences the result is
// in it, so that a run can be repeated from its run.json.
type Experiment struct {
	Name     string  `json:"name"`
	Link     Link    `json:"link"`
	Flows    []Flow  `json:"flows"`
	Duration float64 `json:"duration"` // s, from the start of the first flow to the end of the run
	Seed     uint64  `json:"seed"`
	Interval float64 `json:"interval"` // s between inet_diag samples
	PerAck   bool    `json:"per_ack"`  // sample on every ACK too

	// Jitter bounds by how much the start of each flow is put off, in s: a share of it
	// that comes from the seed. 0: none.
	Jitter float64 `json:"jitter"`
	// Silent says that flows which get nothing through are no failure.
	Silent bool `json:"silent,omitempty"`
	// Rounded tells what is not as it was asked for, with both values, a line each.
	Rounded []string `json:"rounded,omitempty"`
}

// Link is the path between sender and receiver: one bottleneck in the
// direction of the data, a pure delay back.
type Link struct {
	Kind      string  `json:"kind"`       // "userspace", "netem", or, of an experiment only, "auto"
	Rate      float64 `json:"rate"`       // bit/s at the bottleneck, IP headers included
	RTT       float64 `json:"rtt"`        // s, two-way propagation delay, half each way
	Buffer    int     `json:"buffer"`     // packets of one MTU
	BufferBDP float64 `json:"buffer_bdp"` // the same in bandwidth-delay products
	// BufferBytes is the buffer as it was asked for, in bytes; 0: it was not in bytes.
	BufferBytes float64 `json:"buffer_bytes,omitempty"`
	MTU         int     `json:"mtu"` // bytes
	Loss        Loss    `json:"loss"`
	ECN         int     `json:"ecn,omitempty"`   // mark CE when more than this many packets wait; 0: do not mark
	Burst       int     `json:"burst,omitempty"` // segments that TCP hands to the sender's device at once, at most; 0: as many as it likes
}

// Loss is loss on purpose, before the buffer. At most one of the two is set.
type Loss struct {
	Every       int     `json:"every,omitempty"`       // drop exactly each Nth packet
	Probability float64 `json:"probability,omitempty"` // drop each packet with this probability, seeded
}

// Flow is one TCP connection.
type Flow struct {
	ID       int     `json:"id"`
	CC       string  `json:"cc"`              // the congestion control's name in the kernel
	Start    float64 `json:"start"`           // s since the start of the run
	Duration float64 `json:"duration"`        // s
	Bytes    int64   `json:"bytes,omitempty"` // stop after that many; 0: no limit
	Rate     float64 `json:"rate,omitempty"`  // bit/s of payload that the application has to send; 0: as much as TCP takes
}

// Run describes one run, done. It is what run.json holds and what "ccload run
// --json" prints of each; the field names are that command's contract. What is
// a pointer and nil, absent in JSON, is not known; 0 is a value.
type Run struct {
	Format      int          `json:"format"`
	Dir         string       `json:"dir"`
	Kernel      string       `json:"kernel"` // uname -r of the kernel that ran it
	Seed        uint64       `json:"seed"`
	VirtualTime bool         `json:"virtual_time"`
	Started     string       `json:"started"`              // RFC 3339
	Incomplete  bool         `json:"incomplete,omitempty"` // ended early: what there is was kept
	Link        LinkResult   `json:"link"`
	Flows       []FlowResult `json:"flows"`
	Bottleneck  *Bottleneck  `json:"bottleneck,omitempty"`
	Jain        *float64     `json:"jain,omitempty"` // Jain's fairness index of the flows' throughputs, 1/n to 1; none if nobody got anything
	Checks      []Check      `json:"checks"`
	Theory      []Curve      `json:"theory,omitempty"`
	Warnings    []string     `json:"warnings"`

	Experiment Experiment `json:"experiment"`
	Sampling   Sampling   `json:"sampling"`
	Machine    *Machine   `json:"machine,omitempty"`
	// Disturbances are the seconds in which the machine spoiled the run, in order.
	// Those that it did not spoil are left out.
	Disturbances []Disturbance     `json:"disturbances,omitempty"`
	Sysctls      map[string]string `json:"sysctls"`           // as they were in the sender's namespace
	Offloads     map[string]bool   `json:"offloads"`          // of the link's devices
	Objects      map[string]string `json:"objects,omitempty"` // congestion control → tag of its BPF programs, where it is BPF
	Versions     map[string]string `json:"versions"`          // of ccload and of what it was built with
}

// LinkResult is the link as configured and as measured before the flows began.
type LinkResult struct {
	Link
	Why      string   `json:"why,omitempty"` // what made a link of kind "auto" one of this kind
	Measured Measured `json:"measured"`
	// Lateness is nil where the link does not tell: netem's.
	Lateness *Lateness `json:"lateness,omitempty"`
}

// Measured is what a probe of the empty link found.
type Measured struct {
	Rate *float64 `json:"rate,omitempty"` // bit/s; nil: the link is too slow to find out in seconds
	RTT  *float64 `json:"rtt,omitempty"`  // s, median
}

// Lateness is how long after its exact time a packet was handed on, in
// seconds: the error that the machine adds to the delay.
type Lateness struct {
	P50 float64 `json:"p50"`
	P99 float64 `json:"p99"`
	Max float64 `json:"max"`
}

// FlowResult is the summary of one flow. It lasts from Start to Start + Duration,
// whether anything is acknowledged until its end or not, and what is weighted by
// time is so until then.
type FlowResult struct {
	ID           int      `json:"id"`
	CC           string   `json:"cc"`
	Start        float64  `json:"start"`                 // s: of the handshake, the jitter included
	Duration     float64  `json:"duration"`              // s
	Unconnected  bool     `json:"unconnected,omitempty"` // its handshake never ended
	Bytes        uint64   `json:"bytes"`                 // acknowledged payload
	Throughput   *float64 `json:"throughput,omitempty"`  // bit/s of payload over Duration (goodput)
	CwndMean     *float64 `json:"cwnd_mean,omitempty"`   // segments, weighted by time
	CwndMax      *float64 `json:"cwnd_max,omitempty"`    // segments
	SRTTp50      *float64 `json:"srtt_p50,omitempty"`    // s
	SRTTp95      *float64 `json:"srtt_p95,omitempty"`    // s
	Retransmits  uint64   `json:"retransmits"`
	LossEpisodes int      `json:"loss_episodes"` // times the sender entered Recovery or Loss
	Timeouts     int      `json:"timeouts"`      // times the retransmission timer ran out
}

// Bottleneck is what the link's queue did.
type Bottleneck struct {
	Drops       uint64   `json:"drops"`  // buffer full
	Losses      uint64   `json:"losses"` // on purpose
	Marks       uint64   `json:"marks"`
	QueueMean   *float64 `json:"queue_mean,omitempty"`  // packets, weighted by time
	QueueMax    int      `json:"queue_max"`             // packets
	Utilisation *float64 `json:"utilisation,omitempty"` // share of the rate that was used, 0 to 1
}

// Machine is how much of the processors the run had, and what was taken from it.
// Shares are of the time of all processors together.
type Machine struct {
	Processors int      `json:"processors"`
	Busy       float64  `json:"busy"`               // share, by whomever, over the run
	BusyMax    *float64 `json:"busy_max,omitempty"` // the most in any second; none if there was no whole one
	Steal      float64  `json:"steal"`              // share that a hypervisor gave to others
}

// Disturbance is one second of the run and how the machine spoiled it: packets
// that waited for it rather than for the link. A link of netem tells neither how
// late its packets are nor how long it waited; not every kernel counts waiting.
type Disturbance struct {
	Second int `json:"second"` // s since the start of the run
	// Why says in a few words each what was beyond what a run may have, with the value.
	Why []string `json:"why"`
	// LatenessMax is how late the latest packet was that was under way in this second, in s.
	LatenessMax *float64 `json:"lateness_max,omitempty"`
	// LateShare is the share of the second in which a packet that was due had not been
	// handed on, of those that were late by more than a tenth of the RTT.
	LateShare *float64 `json:"late_share,omitempty"`
	// Gap is the longest time in s for which the process did not run though it wanted
	// to, and GapShare the share of the second that such times take.
	Gap      float64 `json:"gap"`
	GapShare float64 `json:"gap_share"`
	// Preempted counts the times that a thread of the link had to leave its processor
	// to others, Waited is how long such a thread waited for one, in s.
	Preempted   *uint64  `json:"preempted,omitempty"`
	Waited      *float64 `json:"waited,omitempty"`
	Busy        *float64 `json:"busy,omitempty"`  // share of the processors' time
	Steal       *float64 `json:"steal,omitempty"` // likewise
	Unseen      uint64   `json:"unseen"`          // packets lost outside the link
	SamplesLost uint64   `json:"samples_lost"`    // events that did not fit the ring buffer
}

// Check is one claim about a run and whether it held.
type Check struct {
	Name string `json:"name"`
	Want string `json:"want"`
	Got  string `json:"got"`
	OK   bool   `json:"ok"`
	Why  string `json:"why,omitempty"` // the reason for what is wanted
}

// Curve is what a theory expects of a quantity over time, to be seen beside what
// was measured.
type Curve struct {
	Name     string         `json:"name"`
	Quantity string         `json:"quantity"` // "cwnd" (segments) or "queue" (packets)
	Pieces   [][][2]float64 `json:"pieces"`   // lines through points of time (s) and value
}

// Sampling says what the sampling saw and what it missed.
type Sampling struct {
	Diag   uint64 `json:"diag"`   // samples taken by inet_diag
	Ack    uint64 `json:"ack"`    // samples taken on ACKs
	Events uint64 `json:"events"` // samples of events
	Lost   uint64 `json:"lost"`   // samples that did not fit the ring buffer
}
