// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"

	"ccload/harness"
	"ccload/harness/trace"
)

// Results is where a run in a guest leaves what it sees: the host gets it as it
// comes. It is for the inside of a guest, of which there is one in a process.
type Results struct {
	mu             sync.Mutex
	samples, links []byte
}

var _ harness.Sink = (*Results)(nil)

// batch is how many bytes of rows are sent together: a frame costs the guest
// some tens of thousands of instructions.
const batch = 64 << 10

// Sample sends a sample.
func (r *Results) Sample(s trace.Sample) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.samples = appendSample(r.samples, &s)
	if len(r.samples) < batch {
		return nil
	}
	return r.flush()
}

// Link sends a state of the link.
func (r *Results) Link(s trace.LinkSample) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.links = appendLink(r.links, &s)
	if len(r.links) < batch {
		return nil
	}
	return r.flush()
}

// Progress sends what there is, and how far the run is.
func (r *Results) Progress(elapsed, total time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	// An error of the port meets the rows that come next.
	r.flush()
	frameWriter{port, frameProgress}.Write(binary.LittleEndian.AppendUint64(
		binary.LittleEndian.AppendUint64(nil, uint64(elapsed)), uint64(total)))
}

// Finish sends the run itself.
func (r *Results) Finish(run *trace.Run) error {
	if err := r.Close(); err != nil {
		return err
	}
	b, err := json.Marshal(run)
	if err != nil {
		return err
	}
	if len(b) > maxFrame {
		return fmt.Errorf("a run described in %d bytes: at most %d", len(b), maxFrame)
	}
	_, err = frameWriter{port, frameRun}.Write(b)
	return err
}

// Close sends what is left.
func (r *Results) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.flush()
}

func (r *Results) flush() error {
	for _, of := range []struct {
		rows *[]byte
		kind kind
	}{{&r.samples, frameSamples}, {&r.links, frameLinks}} {
		if len(*of.rows) > 0 {
			if _, err := (frameWriter{port, of.kind}).Write(*of.rows); err != nil {
				return fmt.Errorf("results: %w", err)
			}
			*of.rows = (*of.rows)[:0]
		}
	}
	return nil
}

// sources are sent as their index.
var sources = []trace.Source{trace.Diag, trace.Ack, trace.Event}

// Rows are sent in little endian, their fields in order.
const (
	sampleSize = 8 + 4 + 1 + 1 + 4 + 4 + 8 + 8 + 4 + 8 + 4 + 4 + 4 + 4 + 8
	linkSize   = 8 + 4 + 8 + 8 + 8 + 8 + 8 + 8
)

var le = binary.LittleEndian

func appendFloat(b []byte, v float64) []byte { return le.AppendUint64(b, math.Float64bits(v)) }

func appendSample(b []byte, s *trace.Sample) []byte {
	b = appendFloat(b, s.Time)
	b = le.AppendUint32(b, uint32(s.Flow))
	b = append(b, byte(slices.Index(sources, s.Source)), byte(s.CAState))
	b = le.AppendUint32(b, s.Cwnd)
	b = le.AppendUint32(b, s.Ssthresh)
	b = appendFloat(b, s.SRTT)
	b = appendFloat(b, s.MinRTT)
	b = le.AppendUint32(b, s.Inflight)
	b = le.AppendUint64(b, s.BytesAcked)
	b = le.AppendUint32(b, s.Delivered)
	b = le.AppendUint32(b, s.DeliveredCE)
	b = le.AppendUint32(b, s.Retrans)
	b = le.AppendUint32(b, s.Lost)
	return appendFloat(b, s.PacingRate)
}

func appendLink(b []byte, s *trace.LinkSample) []byte {
	b = appendFloat(b, s.Time)
	b = le.AppendUint32(b, uint32(s.Queue))
	b = le.AppendUint64(b, uint64(s.QueueBytes))
	b = le.AppendUint64(b, s.Enqueued)
	b = le.AppendUint64(b, s.Delivered)
	b = le.AppendUint64(b, s.Drops)
	b = le.AppendUint64(b, s.Losses)
	return le.AppendUint64(b, s.Marks)
}

// fields takes a row apart again.
type fields struct{ b []byte }

func (f *fields) u8() (v byte)       { v, f.b = f.b[0], f.b[1:]; return }
func (f *fields) u32() (v uint32)    { v, f.b = le.Uint32(f.b), f.b[4:]; return }
func (f *fields) u64() (v uint64)    { v, f.b = le.Uint64(f.b), f.b[8:]; return }
func (f *fields) float() (v float64) { return math.Float64frombits(f.u64()) }

var errRows = errors.New("frame with part of a row")

func readSamples(b []byte, sink func(trace.Sample) error) error {
	if len(b)%sampleSize != 0 {
		return errRows
	}
	for f := (&fields{b}); len(f.b) > 0; {
		s := trace.Sample{Time: f.float(), Flow: int32(f.u32())}
		source := f.u8()
		if int(source) >= len(sources) {
			return fmt.Errorf("sample of source %d", source)
		}
		s.Source = sources[source]
		s.CAState = trace.CAState(f.u8())
		s.Cwnd, s.Ssthresh, s.SRTT, s.MinRTT = f.u32(), f.u32(), f.float(), f.float()
		s.Inflight, s.BytesAcked = f.u32(), f.u64()
		s.Delivered, s.DeliveredCE, s.Retrans, s.Lost = f.u32(), f.u32(), f.u32(), f.u32()
		s.PacingRate = f.float()
		if err := sink(s); err != nil {
			return err
		}
	}
	return nil
}

func readLinks(b []byte, sink func(trace.LinkSample) error) error {
	if len(b)%linkSize != 0 {
		return errRows
	}
	for f := (&fields{b}); len(f.b) > 0; {
		if err := sink(trace.LinkSample{
			Time: f.float(), Queue: int32(f.u32()), QueueBytes: int64(f.u64()), Enqueued: f.u64(),
			Delivered: f.u64(), Drops: f.u64(), Losses: f.u64(), Marks: f.u64(),
		}); err != nil {
			return err
		}
	}
	return nil
}
