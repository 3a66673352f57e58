// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"reflect"
	"strings"
	"testing"

	"ccload/harness/trace"
)

// fill gives every field of a row a value of its own.
func fill[T any]() (row T) {
	v := reflect.ValueOf(&row).Elem()
	for i := range v.NumField() {
		switch f := v.Field(i); f.Kind() {
		case reflect.Float64:
			f.SetFloat(float64(i) + 0.25)
		case reflect.Int32, reflect.Int64:
			f.SetInt(int64(i) * -3)
		case reflect.Uint8, reflect.Uint32, reflect.Uint64:
			f.SetUint(uint64(i) + 5)
		case reflect.String:
			f.SetString(string(trace.Ack))
		}
	}
	return row
}

// No field of a row is forgotten on the way.
func TestRows(t *testing.T) {
	sample, other := fill[trace.Sample](), trace.Sample{Source: trace.Diag, Time: 1}
	var samples []trace.Sample
	b := appendSample(appendSample(nil, &sample), &other)
	if err := readSamples(b, func(s trace.Sample) error { samples = append(samples, s); return nil }); err != nil {
		t.Fatal(err)
	}
	if len(b) != 2*sampleSize || len(samples) != 2 || samples[0] != sample || samples[1] != other {
		t.Errorf("%d bytes: %+v", len(b), samples)
	}
	link := fill[trace.LinkSample]()
	var links []trace.LinkSample
	b = appendLink(nil, &link)
	if err := readLinks(b, func(s trace.LinkSample) error { links = append(links, s); return nil }); err != nil {
		t.Fatal(err)
	}
	if len(b) != linkSize || len(links) != 1 || links[0] != link {
		t.Errorf("%d bytes: %+v", len(b), links)
	}
	failure := errors.New("full")
	if err := readLinks(b, func(trace.LinkSample) error { return failure }); err != failure {
		t.Errorf("got %v", err)
	}
}

func frames(parts ...any) []byte {
	var b bytes.Buffer
	for i := 0; i < len(parts); i += 2 {
		frameWriter{&b, parts[i].(kind)}.Write([]byte(parts[i+1].(string)))
	}
	return b.Bytes()
}

func TestDemux(t *testing.T) {
	good := frames(frameAlive, "\x00", frameStdout, "out", frameStderr, "err", frameStdout, "put", frameExit, "\x03")
	var out, errs bytes.Buffer
	alive := 0
	status, done, err := (&Guest{}).demux(bytes.NewReader(good), &out, &errs, func() { alive++ })
	if status != 3 || !done || err != nil || out.String() != "output" || errs.String() != "err" || alive != 5 {
		t.Errorf("%d, %v, %v, %q, %q, %d frames", status, done, err, out.String(), errs.String(), alive)
	}
	flipped := bytes.Clone(good)
	flipped[headerSize+1+headerSize+1] ^= 4
	for _, c := range []struct {
		name  string
		bytes []byte
		want  string // "": it just ended
	}{
		{"nothing", nil, ""},
		{"cut between frames", good[:headerSize+1], ""},
		{"cut within a header", good[:headerSize-2], "truncated frame"},
		{"cut within a payload", good[:len(good)-1], "truncated frame"},
		{"a flipped bit", flipped, "wrong checksum"},
		{"too long", []byte{'o', 0, 0, 0, 0x7f, 0, 0, 0, 0}, "not what a guest sends"},
		{"unknown", frames(kind('?'), "x"), "unknown kind"},
		{"no status", frames(frameExit, "ab"), "without a status"},
		{"results unasked", frames(frameSamples, "x"), "nobody asked"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, done, err := (&Guest{}).demux(bytes.NewReader(c.bytes), io.Discard, io.Discard, func() {})
			if done || c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("done %v, %v", done, err)
			}
		})
	}
}

// The description of a day's run fits, also if the machine spoiled every second of it.
func TestLongRun(t *testing.T) {
	run := trace.Run{Disturbances: make([]trace.Disturbance, 86400)}
	for i := range run.Disturbances {
		v := float64(i) / 7
		run.Disturbances[i] = trace.Disturbance{
			Second: i, Why: []string{"packets up to 123 ms late", "packets late 25 % of the time", "ccload did not run for 123 ms", "ccload did not run 25 % of the time"},
			LatenessMax: &v, LateShare: &v, Waited: &v, Busy: &v, Steal: &v, Preempted: new(uint64(i)), Gap: v, GapShare: v,
		}
	}
	b, err := json.Marshal(run)
	if err != nil {
		t.Fatal(err)
	}
	g := &Guest{results: &received{sink: nowhere{}}}
	_, done, err := g.demux(bytes.NewReader(frames(frameRun, string(b), frameExit, "\x00")), io.Discard, io.Discard, func() {})
	if !done || err != nil || g.results.run == nil || len(g.results.run.Disturbances) != 86400 {
		t.Errorf("%d bytes: done %v, %v", len(b), done, err)
	}
}

func FuzzDemux(f *testing.F) {
	f.Add(frames(frameStdout, "x", frameSamples, string(appendSample(nil, &trace.Sample{})), frameProgress, "0123456789abcdef", frameRun, "{}", frameExit, "\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		g := &Guest{results: &received{sink: nowhere{}}}
		g.demux(bytes.NewReader(b), io.Discard, io.Discard, func() {})
		// Most bytes are no frame with a right checksum: what is in one, too.
		readSamples(b, nowhere{}.Sample)
		readLinks(b, nowhere{}.Link)
		g.results.take(frameRun, b)
		g.results.take(frameProgress, b)
	})
}

type nowhere struct{}

func (nowhere) Sample(trace.Sample) error   { return nil }
func (nowhere) Link(trace.LinkSample) error { return nil }
func (nowhere) Finish(*trace.Run) error     { return nil }
func (nowhere) Close() error                { return nil }
