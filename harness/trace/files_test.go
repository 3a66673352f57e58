// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"bytes"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"ccload/internal/kerneltest"
)

// experiment is of three flows, with the IDs from 0 on.
func experiment(duration float64) Experiment {
	return Experiment{
		Duration: duration, Interval: 0.01, Link: Link{Kind: "netem", Rate: 1e6, RTT: 0.1, Buffer: 8, MTU: 1500},
		Flows: []Flow{{CC: "cubic", Duration: duration}, {ID: 1, CC: "cubic"}, {ID: 2, CC: "reno"}},
	}
}

// write makes a result with n samples, each pair of which comes in the wrong
// order, and n states of the link.
func write(t *testing.T, dir string, n int) *Run {
	t.Helper()
	w, err := Create(dir)
	if err != nil {
		t.Fatal(err)
	}
	var both sync.WaitGroup
	both.Go(func() {
		for i := range n {
			at := i ^ 1
			if err := w.Sample(Sample{
				Time: float64(at), Flow: int32(at % 3), Source: []Source{Diag, Ack}[at%2], Cwnd: uint32(at), Ssthresh: InfiniteSsthresh,
				SRTT: 0.1, MinRTT: 0.2, Inflight: 3, BytesAcked: 1 << 40, Delivered: 5, DeliveredCE: 6, Retrans: 7, Lost: 8,
				PacingRate: 9e9, CAState: CALoss,
			}); err != nil {
				t.Error(err)
			}
		}
	})
	both.Go(func() {
		for i := range n {
			if err := w.Link(LinkSample{Time: float64(i), Queue: 1, QueueBytes: 2, Enqueued: 3, Delivered: 4, Drops: 5, Losses: 6, Marks: 7}); err != nil {
				t.Error(err)
			}
		}
	})
	both.Wait()
	run := &Run{
		Format: Format, Dir: dir, Kernel: "6.18.0", Seed: 3, Experiment: experiment(float64(n)),
		Link: LinkResult{Link: experiment(1).Link}, Flows: []FlowResult{{ID: 1, CC: "cubic", Throughput: new(1e6)}},
		Checks: []Check{{Name: "rate", Want: "1", Got: "2", Why: "so"}}, Warnings: []string{"w"}, Sysctls: map[string]string{"a": "b"},
	}
	if err := w.Finish(run); err != nil {
		t.Fatal(err)
	}
	return run
}

func TestRoundTrip(t *testing.T) {
	const n = 3 * rowsBuffered // several row groups
	dir := filepath.Join(t.TempDir(), "a", "b")
	run := write(t, dir, n)
	r, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(r.Run, run) {
		t.Errorf("run: got %+v, want %+v", r.Run, run)
	}
	if len(r.Samples) != n || len(r.Links) != n {
		t.Fatalf("%d samples, %d states", len(r.Samples), len(r.Links))
	}
	for i, s := range r.Samples {
		if want := (Sample{
			Time: float64(i), Flow: int32(i % 3), Source: []Source{Diag, Ack}[i%2], Cwnd: uint32(i), Ssthresh: InfiniteSsthresh,
			SRTT: 0.1, MinRTT: 0.2, Inflight: 3, BytesAcked: 1 << 40, Delivered: 5, DeliveredCE: 6, Retrans: 7, Lost: 8,
			PacingRate: 9e9, CAState: CALoss,
		}); s != want {
			t.Fatalf("sample %d: %+v", i, s)
		}
	}
	if want := (LinkSample{Time: n - 1, Queue: 1, QueueBytes: 2, Enqueued: 3, Delivered: 4, Drops: 5, Losses: 6, Marks: 7}); r.Links[n-1] != want {
		t.Errorf("last state: %+v", r.Links[n-1])
	}
	run.Theory = []Curve{{Name: "a", Quantity: "cwnd", Pieces: [][][2]float64{{{0, 1}, {1, 2.5}}, {{2, 1}}}}}
	if err := Rewrite(dir, run); err != nil {
		t.Fatal(err)
	}
	if r, err = Open(dir); err != nil || !reflect.DeepEqual(r.Run, run) {
		t.Errorf("rewritten: got %+v, want %+v, %v", r.Run, run, err)
	}
	if _, err := Create(dir); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a second result in one directory: %v", err)
	}
}

// The same rows give the same bytes: a run in virtual time can be compared so.
func TestDeterministic(t *testing.T) {
	a, b := t.TempDir(), t.TempDir()
	write(t, a, 1000)
	write(t, b, 1000)
	for _, name := range []string{samplesFile, linkFile} {
		x, _ := os.ReadFile(filepath.Join(a, name))
		y, _ := os.ReadFile(filepath.Join(b, name))
		if len(x) == 0 || !bytes.Equal(x, y) {
			t.Errorf("%s: %d and %d bytes that differ", name, len(x), len(y))
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	open := func(spoil func(dir string)) error {
		dir := t.TempDir()
		write(t, dir, 1000)
		spoil(dir)
		_, err := Open(dir)
		return err
	}
	set := func(name string, content []byte) func(string) {
		return func(dir string) { os.WriteFile(filepath.Join(dir, name), content, 0o644) }
	}
	cut := func(name string, to int64) func(string) {
		return func(dir string) { os.Truncate(filepath.Join(dir, name), to) }
	}
	for _, c := range []struct {
		name  string
		spoil func(string)
		want  string
	}{
		{"newer", set(runFile, []byte(`{"format": 2, "flows": "of another kind"}`)), "format 2 is newer than this ccload's 1"},
		{"foreign", set(runFile, []byte(`{}`)), "not a result of ccload"},
		{"not JSON", set(runFile, []byte("{")), "run.json"},
		{"unfinished", func(dir string) { os.Remove(filepath.Join(dir, runFile)) }, "the run did not end"},
		{"empty directory", func(dir string) {
			for _, f := range []string{runFile, samplesFile, linkFile} {
				os.Remove(filepath.Join(dir, f))
			}
		}, "no such file"},
		{"cut samples", cut(samplesFile, 500), samplesFile},
		{"empty samples", cut(samplesFile, 0), samplesFile},
		{"other samples", set(samplesFile, bytes.Repeat([]byte("PAR1"), 100)), samplesFile},
		{"no link", func(dir string) { os.Remove(filepath.Join(dir, linkFile)) }, linkFile},
	} {
		if err := open(c.spoil); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// A writer that is closed without Finish keeps the rows.
func TestUnfinishedKeepsRows(t *testing.T) {
	dir := t.TempDir()
	w, err := Create(dir)
	if err != nil {
		t.Fatal(err)
	}
	w.Sample(Sample{Time: 1})
	if err := errors.Join(w.Close(), w.Close()); err != nil {
		t.Fatal(err)
	}
	rows, err := readRows(filepath.Join(dir, samplesFile), func([]Sample) error { return nil })
	if err != nil || len(rows) != 1 || rows[0].Time != 1 {
		t.Errorf("%v, %v", rows, err)
	}
}

// Whatever the files hold, Open answers with an error and not with a panic.
func FuzzOpen(f *testing.F) {
	dir := f.TempDir()
	w, err := Create(dir)
	if err != nil {
		f.Fatal(err)
	}
	for i := range 10 {
		w.Sample(Sample{Time: float64(i), Source: Ack})
		w.Link(LinkSample{Time: float64(i)})
	}
	if err := w.Finish(&Run{Format: Format, Experiment: experiment(10)}); err != nil {
		f.Fatal(err)
	}
	run, _ := os.ReadFile(filepath.Join(dir, runFile))
	samples, _ := os.ReadFile(filepath.Join(dir, samplesFile))
	f.Add(run, samples)
	f.Add([]byte(`{"format":1}`), []byte("PAR1\x00\x00\x00\x00PAR1"))
	links, _ := os.ReadFile(filepath.Join(dir, linkFile))
	f.Add(run, links)
	f.Fuzz(func(t *testing.T, run, rows []byte) {
		r, err := parseRun(run)
		if err != nil {
			r = &Run{Experiment: experiment(10)}
		}
		if samples, err := parseRows[Sample](rows); err == nil {
			r.checkSamples(samples)
		}
		if links, err := parseRows[LinkSample](rows); err == nil {
			r.checkLinks(links)
		}
	})
}

// On a full disk what there is is kept, and can be read.
func TestFullDisk(t *testing.T) {
	kerneltest.Privileged(t)
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=24m"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(disk, 0)
	dir := filepath.Join(disk, "result")
	w, err := Create(dir)
	if err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(1, 1)) // what cannot be compressed
	n := 0
	for ; err == nil && n < 10_000_000; n++ {
		err = w.Sample(Sample{Time: float64(n), Source: Ack, BytesAcked: uint64(n)<<32 + rnd.Uint64()>>32, SRTT: rnd.Float64(), MinRTT: rnd.Float64(), PacingRate: rnd.Float64()})
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("after %d rows: %v", n, err)
	}
	if err := w.Finish(&Run{
		Format: Format, Incomplete: true, Experiment: experiment(float64(n)), Link: LinkResult{Link: experiment(1).Link},
	}); err != nil {
		t.Fatal(err)
	}
	r, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if !r.Run.Incomplete || len(r.Samples) != n-1 {
		t.Errorf("%d of %d samples were kept; incomplete: %v", len(r.Samples), n-1, r.Run.Incomplete)
	}
	for i, s := range r.Samples {
		if s.Time != float64(i) {
			t.Fatalf("sample %d is of %g s", i, s.Time)
		}
	}
	if _, err := Create(filepath.Join(disk, "another")); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("another result on a full disk: %v", err)
	}
}

// Whoever else may write to the directories cannot choose what is overwritten, nor
// where files are made.
func TestCreateLinks(t *testing.T) {
	victims := t.TempDir()
	theirs := filepath.Join(victims, "theirs")
	if err := os.WriteFile(theirs, []byte("theirs"), 0o600); err != nil {
		t.Fatal(err)
	}
	link := func(dir, name, to string) {
		t.Helper()
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(to, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	untouched := func() {
		t.Helper()
		if b, err := os.ReadFile(theirs); err != nil || string(b) != "theirs" {
			t.Errorf("what the link points to: %q, %v", b, err)
		}
		if all, err := os.ReadDir(victims); err != nil || len(all) != 1 {
			t.Errorf("the directory that the link points to: %v, %v", all, err)
		}
	}
	for _, name := range []string{runFile, samplesFile, linkFile} {
		for _, to := range []string{theirs, filepath.Join(victims, "new")} {
			dir := filepath.Join(t.TempDir(), "a")
			link(dir, name, to)
			if _, err := Create(dir); !errors.Is(err, fs.ErrExist) {
				t.Errorf("with a link named %s: %v", name, err)
			}
			untouched()
		}
	}
	// The name that run.json had until it was whole, and that of a further file.
	dir := filepath.Join(t.TempDir(), "a")
	link(dir, "."+runFile, theirs)
	run := write(t, dir, 10)
	more := filepath.Join(t.TempDir(), "a")
	link(more, "console.log", theirs)
	w, err := Create(more)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := w.File("console.log"); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a further file, whose name is taken: %v", err)
	}
	if _, err := Open(dir); err != nil {
		t.Error(err)
	}
	if err := os.Remove(filepath.Join(dir, runFile)); err != nil {
		t.Fatal(err)
	}
	link(dir, runFile, theirs)
	if err := Rewrite(dir, run); err != nil {
		t.Error(err)
	}
	if st, err := os.Lstat(filepath.Join(dir, runFile)); err != nil || !st.Mode().IsRegular() {
		t.Errorf("%s is not a file: %v, %v", runFile, st, err)
	}
	untouched()
	// The directory itself.
	dir = t.TempDir()
	link(dir, "a", victims)
	for _, err := range []error{second(Create(filepath.Join(dir, "a"))), Rewrite(filepath.Join(dir, "a"), run)} {
		if err == nil || !strings.Contains(err.Error(), "refusing a symbolic link") {
			t.Errorf("the directory is a link: %v", err)
		}
	}
	untouched()
}

func second(_ *Writer, err error) error { return err }
