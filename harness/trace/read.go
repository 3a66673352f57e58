// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/parquet-go/parquet-go"
)

// Result is a result directory, read.
type Result struct {
	Dir     string // that was opened; the run may have been written to another
	Run     *Run
	Samples []Sample     // in order of time
	Links   []LinkSample // in order of time
}

// Open reads a result directory. One that a newer ccload wrote is refused, as is
// one whose run did not end, and one in which a column is missing, is of another
// type or holds what no run can have measured: to take that for zeros would draw a
// picture of nothing. The error names the file, the column or field, and the row.
func Open(dir string) (*Result, error) {
	r, err := open(dir)
	if err != nil {
		return nil, fmt.Errorf("results %q: %w", dir, err)
	}
	return r, nil
}

// ErrUnfinished says that a run has not ended, or was killed: nothing can be read of it.
var ErrUnfinished = errors.New("the run did not end: there is no " + runFile)

func open(dir string) (*Result, error) {
	b, err := os.ReadFile(filepath.Join(dir, runFile))
	if errors.Is(err, fs.ErrNotExist) {
		if _, serr := os.Stat(filepath.Join(dir, samplesFile)); serr == nil {
			return nil, ErrUnfinished
		}
	}
	if err != nil {
		return nil, err
	}
	r := &Result{Dir: dir}
	if r.Run, err = parseRun(b); err != nil {
		return nil, fmt.Errorf("%s: %w", runFile, err)
	}
	if r.Samples, err = readRows(filepath.Join(dir, samplesFile), r.Run.checkSamples); err != nil {
		return nil, err
	}
	if r.Links, err = readRows(filepath.Join(dir, linkFile), r.Run.checkLinks); err != nil {
		return nil, err
	}
	return r, nil
}

func parseRun(b []byte) (*Run, error) {
	// The format first: nothing else of a newer file can be relied upon.
	var head struct {
		Format int `json:"format"`
	}
	if err := parseJSON(b, &head); err != nil {
		return nil, err
	}
	if head.Format > Format {
		return nil, fmt.Errorf("format %d is newer than this ccload's %d", head.Format, Format)
	}
	if head.Format < 1 {
		return nil, errors.New("it has no format: not a result of ccload")
	}
	r := &Run{}
	if err := parseJSON(b, r); err != nil {
		return nil, err
	}
	return r, r.check()
}

func parseJSON(b []byte, to any) error {
	err := json.Unmarshal(b, to)
	if t, ok := errors.AsType[*json.UnmarshalTypeError](err); ok && t.Field != "" {
		field := strings.ReplaceAll(t.Field, "Link.", "") // of LinkResult, which has Link's fields
		return fmt.Errorf("field %q: %s is not of type %v", field, t.Value, t.Type)
	}
	return err
}

// What no experiment goes beyond.
const (
	longest  = 1e7     // s
	fastest  = 1e13    // bit/s
	farthest = 1e4     // s of RTT
	deepest  = 1 << 30 // packets of buffer
)

// check refuses what no run can have been: a file that was edited or damaged.
func (r *Run) check() error {
	e := &r.Experiment
	if err := cmp.Or(
		within("experiment.duration", e.Duration, 1e-6, longest),
		within("experiment.interval", e.Interval, 0, longest),
		within("experiment.jitter", e.Jitter, 0, longest),
		e.Link.check("experiment.link"),
		r.Link.check("link"),
		ifKnown("link.measured.rate", r.Link.Measured.Rate, 0, fastest),
		ifKnown("link.measured.rtt", r.Link.Measured.RTT, 0, longest),
		ifKnown("jain", r.Jain, 0, 1+1e-9),
	); err != nil {
		return err
	}
	if b := r.Bottleneck; b != nil {
		if err := cmp.Or(
			ifKnown("bottleneck.queue_mean", b.QueueMean, 0, deepest),
			ifKnown("bottleneck.utilisation", b.Utilisation, 0, 100),
		); err != nil {
			return err
		}
	}
	for i, d := range r.Disturbances {
		if err := within(fmt.Sprintf("disturbances[%d].second", i), float64(d.Second), 0, r.until()); err != nil {
			return err
		}
	}
	if len(e.Flows) == 0 {
		return errors.New(`field "experiment.flows": there are none`)
	}
	ids := map[int]bool{}
	for i, f := range e.Flows {
		field := fmt.Sprintf("experiment.flows[%d]", i)
		if f.CC == "" {
			return fmt.Errorf("field %q: no congestion control", field+".cc")
		}
		if ids[f.ID] || f.ID < 0 || f.ID > math.MaxInt32 {
			return fmt.Errorf("field %q: %d is not an ID of its own", field+".id", f.ID)
		}
		ids[f.ID] = true
		if err := cmp.Or(
			within(field+".start", f.Start, 0, longest),
			within(field+".duration", f.Duration, 0, longest),
		); err != nil {
			return err
		}
	}
	for i, f := range r.Flows {
		field := fmt.Sprintf("flows[%d]", i)
		if !ids[f.ID] {
			return fmt.Errorf("field %q: %d is no flow of the experiment", field+".id", f.ID)
		}
		if err := cmp.Or(
			within(field+".start", f.Start, 0, longest),
			within(field+".duration", f.Duration, 0, longest),
			ifKnown(field+".throughput", f.Throughput, 0, fastest),
		); err != nil {
			return err
		}
	}
	return nil
}

func (l *Link) check(field string) error {
	return cmp.Or(
		within(field+".rate", l.Rate, 1, fastest),
		within(field+".rtt", l.RTT, 0, farthest),
		within(field+".buffer", float64(l.Buffer), 1, deepest),
		within(field+".mtu", float64(l.MTU), 68, 1<<16),
		within(field+".ecn", float64(l.ECN), 0, deepest),
		within(field+".loss.every", float64(l.Loss.Every), 0, math.MaxInt32),
		within(field+".loss.probability", l.Loss.Probability, 0, 1),
	)
}

func within(field string, v, least, most float64) error {
	if v >= least && v <= most {
		return nil
	}
	return fmt.Errorf("field %q: %g is not between %g and %g", field, v, least, most)
}

func ifKnown(field string, v *float64, least, most float64) error {
	if v == nil {
		return nil
	}
	return within(field, *v, least, most)
}

// until is a time that no sample is of, in s: well after the end of the run, which
// may have been held up. A clock of another unit is beyond it.
func (r *Run) until() float64 {
	end := r.Experiment.Duration
	for _, f := range r.Flows {
		end = max(end, f.Start+f.Duration)
	}
	return 2*end + 10
}

// columnError says what is wrong in a column; rows count from 1.
func columnError(name string, row int, format string, args ...any) error {
	return fmt.Errorf("column %q: row %d: %s", name, row+1, fmt.Sprintf(format, args...))
}

// checkTime says whether times are of this run and in order.
func (r *Run) checkTime(row int, before, at float64) error {
	switch {
	case math.IsNaN(at) || at < 0 || at > r.until():
		return columnError("time", row, "%g s is not within the run of %g s", at, r.Experiment.Duration)
	case at < before:
		return columnError("time", row, "%g s comes after %g s", at, before)
	}
	return nil
}

// counter is a column that never falls.
type counter struct {
	name        string
	before, now uint64
}

func rising(row int, counters ...counter) error {
	for _, c := range counters {
		if c.now < c.before {
			return columnError(c.name, row, "%d comes after %d, and it counts", c.now, c.before)
		}
	}
	return nil
}

func (r *Run) checkSamples(rows []Sample) error {
	type series struct {
		flow   int32
		source Source
	}
	flows := map[int32]bool{}
	for _, f := range r.Experiment.Flows {
		flows[int32(f.ID)] = true
	}
	last := map[series]*Sample{}
	before := 0.
	for i := range rows {
		s := &rows[i]
		if err := r.checkTime(i, before, s.Time); err != nil {
			return err
		}
		before = s.Time
		if !flows[s.Flow] {
			return columnError("flow", i, "%d is no flow of the experiment", s.Flow)
		}
		if s.Source != Diag && s.Source != Ack && s.Source != Event {
			return columnError("source", i, "%q is unknown", s.Source)
		}
		if s.CAState > CALoss {
			return columnError("ca_state", i, "%d is unknown", s.CAState)
		}
		for _, f := range []struct {
			name    string
			v, most float64
		}{{"srtt", s.SRTT, longest}, {"min_rtt", s.MinRTT, longest}, {"pacing_rate", s.PacingRate, math.MaxFloat64}} {
			if !(f.v >= 0 && f.v <= f.most) {
				return columnError(f.name, i, "%g is not possible", f.v)
			}
		}
		key := series{s.Flow, s.Source}
		if l := last[key]; l != nil {
			if err := rising(i, counter{"bytes_acked", l.BytesAcked, s.BytesAcked},
				counter{"delivered", uint64(l.Delivered), uint64(s.Delivered)},
				counter{"delivered_ce", uint64(l.DeliveredCE), uint64(s.DeliveredCE)},
				counter{"retrans", uint64(l.Retrans), uint64(s.Retrans)}); err != nil {
				return err
			}
		}
		last[key] = s
	}
	return nil
}

func (r *Run) checkLinks(rows []LinkSample) error {
	var l LinkSample
	for i, s := range rows {
		if err := r.checkTime(i, l.Time, s.Time); err != nil {
			return err
		}
		if s.Queue < 0 || s.Queue > deepest {
			return columnError("queue", i, "%d is not possible", s.Queue)
		}
		if s.QueueBytes < 0 {
			return columnError("queue_bytes", i, "%d is not possible", s.QueueBytes)
		}
		if err := rising(i, counter{"enqueued", l.Enqueued, s.Enqueued}, counter{"delivered", l.Delivered, s.Delivered},
			counter{"drops", l.Drops, s.Drops}, counter{"losses", l.Losses, s.Losses}, counter{"marks", l.Marks, s.Marks}); err != nil {
			return err
		}
		l = s
	}
	return nil
}

func readRows[T any](path string, check func([]T) error) ([]T, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	rows, err := parseRows[T](b)
	if err == nil {
		err = check(rows)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Base(path), err)
	}
	return rows, nil
}

func parseRows[T any](b []byte) (rows []T, err error) {
	// The library panics on some files that are damaged.
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("damaged: %v", p)
		}
	}()
	// The library makes room for a footer of whatever size the file claims. The
	// last eight bytes are that size and the magic number.
	if n := len(b) - 8; n < 4 || uint64(binary.LittleEndian.Uint32(b[n:])) > uint64(n-4) {
		return nil, errors.New("damaged: cut short, or not a Parquet file")
	}
	f, err := parquet.OpenFile(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		return nil, fmt.Errorf("damaged: %w", err)
	}
	if err := sameColumns(f, parquet.SchemaOf(new(T))); err != nil {
		return nil, err
	}
	// Not as many as the file claims at once: that is a number in it like any other.
	r := parquet.NewGenericReader[T](f)
	defer r.Close()
	chunk := int(min(f.NumRows()+1, rowsBuffered))
	for {
		rows = slices.Grow(rows, chunk)
		n, err := r.Read(rows[len(rows) : len(rows)+chunk])
		rows = rows[:len(rows)+n]
		if err == io.EOF || err == nil && n == 0 {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("damaged: %w", err)
		}
	}
	if int64(len(rows)) != f.NumRows() {
		return nil, fmt.Errorf("damaged: %d of %d rows", len(rows), f.NumRows())
	}
	return rows, nil
}

// sameColumns says whether a file has the columns that are wanted, of the wanted
// types, with a value in each row. Others may be there too.
func sameColumns(f *parquet.File, want *parquet.Schema) error {
	for _, w := range want.Fields() {
		c := f.Root().Column(w.Name())
		switch {
		case c == nil && w.Optional():
			continue
		case c == nil:
			return fmt.Errorf("column %q: there is none", w.Name())
		case !c.Leaf() || c.Repeated() || kindOf(c.Type()) != kindOf(w.Type()):
			return fmt.Errorf("column %q: it is of type %s, not %s", w.Name(), typeOf(c), w.Type())
		case !c.Optional() || w.Optional():
			continue
		}
		// A writer that knows no required columns has optional ones, with all values.
		row := 0
		pages := c.Pages()
		defer pages.Close()
		for {
			p, err := pages.ReadPage()
			if err == io.EOF {
				break
			}
			if err != nil {
				return fmt.Errorf("column %q: damaged: %w", w.Name(), err)
			}
			n, rows := p.NumNulls(), p.NumRows()
			parquet.Release(p)
			if n > 0 {
				return fmt.Errorf("column %q: %d of the rows from %d to %d have no value", w.Name(), n, row+1, row+int(rows))
			}
			row += int(rows)
		}
	}
	return nil
}

func typeOf(c *parquet.Column) string {
	if !c.Leaf() {
		return "group"
	}
	if c.Repeated() {
		return "list of " + c.Type().String()
	}
	return c.Type().String()
}

// kindOf is what two types must have in common to mean the same: how values are
// stored, whether they have a sign, and what else their type says of them (that they
// are a date, say).
func kindOf(t parquet.Type) string {
	s := t.String()
	if l := t.LogicalType(); l == nil {
		switch t.Kind() { // pyarrow writes integers with a sign so
		case parquet.Int32:
			return "INT(32,true)"
		case parquet.Int64:
			return "INT(64,true)"
		}
	}
	return s
}
