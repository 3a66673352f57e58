// SPDX-License-Identifier: Apache-2.0

package sampler

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ccload/harness/trace"
	"ccload/internal/inetdiag"
	"ccload/internal/netns"
)

// Diag samples at an interval.
type Diag struct {
	conn *inetdiag.Conn
	stop chan struct{}
	done chan struct{} // nil until Start
	once sync.Once
	err  error

	rounds int
}

// OpenDiag opens a sock_diag socket in a namespace.
func OpenDiag(ns *netns.NS) (*Diag, error) {
	d := &Diag{stop: make(chan struct{})}
	err := ns.Do(func() (err error) {
		d.conn, err = inetdiag.Dial()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("sample at an interval: %w", err)
	}
	return d, nil
}

// Start begins to give samples to the target, of all its flows that are
// connected from addr to the addresses of peers, which are given by the sender's
// port. now is the clock of the target's Start.
func (d *Diag) Start(t Target, addr netip.Addr, peers map[uint16]netip.AddrPort, every time.Duration, now func() int64) {
	d.done = make(chan struct{})
	go func() {
		defer close(d.done)
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			select {
			case <-d.stop:
				return
			case <-tick.C:
			}
			d.rounds++
			for port, flow := range t.Flows {
				if d.err = d.sample(t, flow, netip.AddrPortFrom(addr, port), peers[port], now); d.err != nil {
					return
				}
			}
		}
	}()
}

func (d *Diag) sample(t Target, flow int32, from, to netip.AddrPort, now func() int64) error {
	var s inetdiag.Socket
	err := d.conn.Lookup(&s, from, to)
	if errors.Is(err, unix.ENOENT) {
		return nil // not begun, or over
	}
	if err != nil {
		return err
	}
	// ESTABLISHED and both FIN-WAITs (include/net/tcp_states.h): before, there is no
	// window to speak of; after, no tcp_info. Nor has it what is left of a closed socket
	// in FIN-WAIT-2, which the kernel keeps as it does one in TIME-WAIT; a window is
	// never 0.
	const sends = 1<<1 | 1<<4 | 1<<5
	if i := &s.Info; sends&(1<<s.State) != 0 && i.Snd_cwnd > 0 {
		t.Sink(trace.Sample{
			Time: float64(now()-t.Start) / 1e9, Flow: flow, Source: trace.Diag,
			Cwnd: i.Snd_cwnd, Ssthresh: i.Snd_ssthresh,
			SRTT: float64(i.Rtt) / 1e6, MinRTT: rtt(i.Min_rtt),
			Inflight:   i.Unacked - i.Sacked - i.Lost + i.Retrans,
			BytesAcked: i.Bytes_acked, Delivered: i.Delivered, DeliveredCE: i.Delivered_ce,
			Retrans: i.Total_retrans, Lost: i.Lost,
			PacingRate: pacing(i.Pacing_rate), CAState: trace.CAState(i.Ca_state),
		})
	}
	return nil
}

// Rounds is how often all flows were looked at, once it is closed.
func (d *Diag) Rounds() int { return d.rounds }

// Close ends the sampling. It may be called again.
func (d *Diag) Close() error {
	d.once.Do(func() {
		close(d.stop)
		if d.done != nil {
			<-d.done
		}
		d.err = errors.Join(d.err, d.conn.Close())
	})
	return d.err
}

// rtt is a round-trip time of the kernel, in µs, in seconds; it has all ones
// before the first.
func rtt(us uint32) float64 {
	if us == ^uint32(0) {
		return 0
	}
	return float64(us) / 1e6
}

// pacing is a rate of the kernel, in bytes a second, in bit/s; all ones are no limit.
func pacing(rate uint64) float64 {
	if rate == ^uint64(0) {
		return 0
	}
	return float64(rate) * 8
}
