// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/parquet-go/parquet-go"
)

// rewrite writes a file of a result anew: with other columns, which are the fields
// of a struct, or other values. Names in it are those of the columns.
func rewrite[T any](t *testing.T, path string, columns func([]reflect.StructField) []reflect.StructField, values func(row int, v map[string]reflect.Value)) {
	t.Helper()
	rows, err := readRows(path, func([]T) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	name := func(f reflect.StructField) string {
		n, _, _ := strings.Cut(f.Tag.Get("parquet"), ",")
		return n
	}
	was := reflect.VisibleFields(reflect.TypeFor[T]())
	is := slices.Clone(was)
	for i := range is {
		is[i].Index, is[i].Offset = nil, 0
	}
	if columns != nil {
		is = columns(is)
	}
	typ := reflect.StructOf(is)
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := parquet.NewWriter(f, parquet.SchemaOf(reflect.New(typ).Interface()))
	for i := range rows {
		from, to := map[string]reflect.Value{}, reflect.New(typ).Elem()
		for _, c := range was {
			from[name(c)] = reflect.ValueOf(&rows[i]).Elem().FieldByIndex(c.Index)
		}
		if values != nil {
			values(i, from)
		}
		for k, c := range is {
			v := from[name(c)]
			switch to := to.Field(k); {
			case !v.IsValid(): // a null
			case c.Type.Kind() == reflect.Pointer:
				to.Set(reflect.New(c.Type.Elem()))
				to.Elem().Set(v.Convert(c.Type.Elem()))
			case c.Type.Kind() == reflect.Slice:
				to.Set(reflect.Append(to, v.Convert(c.Type.Elem())))
			default:
				to.Set(v.Convert(c.Type))
			}
		}
		if err := w.Write(to.Addr().Interface()); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

// copyOf is a result directory that may be damaged.
func copyOf(t *testing.T, dir string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "r")
	if err := os.CopyFS(to, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	return to
}

func allColumns[T any]() (names []string) {
	for _, f := range parquet.SchemaOf(new(T)).Fields() {
		names = append(names, f.Name())
	}
	return names
}

func column(fields []reflect.StructField, name string) int {
	return slices.IndexFunc(fields, func(f reflect.StructField) bool {
		return strings.HasPrefix(f.Tag.Get("parquet")+",", name+",")
	})
}

// damages are done to each column of a file, whatever is in it.
func damages[T any](t *testing.T, file string) {
	whole := t.TempDir()
	write(t, whole, 100)
	for _, name := range allColumns[T]() {
		retype := func(typ reflect.Type) func([]reflect.StructField) []reflect.StructField {
			return func(fields []reflect.StructField) []reflect.StructField {
				i := column(fields, name)
				fields[i].Type, fields[i].Tag = typ, reflect.StructTag(`parquet:"`+name+`"`)
				return fields
			}
		}
		was := func(fields []reflect.StructField) reflect.Type { return fields[column(fields, name)].Type }
		for _, c := range []struct {
			damage  string
			columns func([]reflect.StructField) []reflect.StructField
			values  func(int, map[string]reflect.Value)
			want    string // "": nothing is wrong
		}{
			{"missing", func(f []reflect.StructField) []reflect.StructField {
				return slices.Delete(f, column(f, name), column(f, name)+1)
			},
				nil, "there is none"},
			{"of another type", func(f []reflect.StructField) []reflect.StructField {
				return retype(reflect.TypeFor[float32]())(f)
			}, func(_ int, v map[string]reflect.Value) {
				if v[name].Kind() == reflect.String {
					v[name] = reflect.ValueOf(1)
				}
			}, "it is of type FLOAT"},
			{"a list", func(f []reflect.StructField) []reflect.StructField { return retype(reflect.SliceOf(was(f)))(f) }, nil, "it is of type "},
			{"optional", func(f []reflect.StructField) []reflect.StructField {
				return retype(reflect.PointerTo(was(f)))(f)
			}, nil, ""},
			{"with a null", func(f []reflect.StructField) []reflect.StructField {
				return retype(reflect.PointerTo(was(f)))(f)
			}, func(row int, v map[string]reflect.Value) {
				if row == 7 {
					v[name] = reflect.Value{}
				}
			}, "1 of the rows from 1 to 100 have no value"},
		} {
			dir := copyOf(t, whole)
			rewrite[T](t, filepath.Join(dir, file), c.columns, c.values)
			_, err := Open(dir)
			if c.want == "" {
				if err != nil {
					t.Errorf("%s: %s: %v", name, c.damage, err)
				}
				continue
			}
			if want := file + `: column "` + name + `": ` + c.want; err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %s: got %v, want …%s", name, c.damage, err, want)
			}
		}
	}
}

func TestDamagedColumns(t *testing.T) {
	damages[Sample](t, samplesFile)
	damages[LinkSample](t, linkFile)
}

// Values that no run can have measured are refused by name and row.
func TestImpossibleValues(t *testing.T) {
	whole := t.TempDir()
	write(t, whole, 100)
	float := func(v float64) func(reflect.Value) { return func(r reflect.Value) { r.SetFloat(v) } }
	zero := func(r reflect.Value) { r.SetZero() }
	negative := func(r reflect.Value) { r.SetInt(-1) }
	for _, c := range []struct {
		file, column string
		set          func(reflect.Value)
		want         string
	}{
		{samplesFile, "time", float(math.NaN()), "row 61: NaN s is not within the run of 100 s"},
		{samplesFile, "time", float(math.Inf(1)), "row 61: +Inf s is not within"},
		{samplesFile, "time", float(-1), "row 61: -1 s is not within"},
		{samplesFile, "time", float(60e9), "row 61: 6e+10 s is not within"}, // ns
		{samplesFile, "time", float(60e3), "row 61: 60000 s is not within"}, // ms
		{samplesFile, "time", float(3), "row 61: 3 s comes after 59 s"},
		{samplesFile, "flow", func(r reflect.Value) { r.SetInt(9) }, "row 61: 9 is no flow of the experiment"},
		{samplesFile, "source", func(r reflect.Value) { r.SetString("guess") }, `row 61: "guess" is unknown`},
		{samplesFile, "srtt", float(math.NaN()), "row 61: NaN is not possible"},
		{samplesFile, "srtt", float(-0.1), "row 61: -0.1 is not possible"},
		{samplesFile, "min_rtt", float(math.Inf(1)), "row 61: +Inf is not possible"},
		{samplesFile, "pacing_rate", float(-9), "row 61: -9 is not possible"},
		{samplesFile, "pacing_rate", float(math.Inf(1)), "row 61: +Inf is not possible"},
		{samplesFile, "bytes_acked", zero, "row 61: 0 comes after 1099511627776"},
		{samplesFile, "delivered", zero, "row 61: 0 comes after 5"},
		{samplesFile, "delivered_ce", zero, "row 61: 0 comes after 6"},
		{samplesFile, "retrans", zero, "row 61: 0 comes after 7"},
		{samplesFile, "ca_state", func(r reflect.Value) { r.SetUint(77) }, "row 61: 77 is unknown"},
		{linkFile, "time", float(math.NaN()), "row 61: NaN s is not within"},
		{linkFile, "time", float(60e9), "row 61: 6e+10 s is not within"},
		{linkFile, "time", float(3), "row 61: 3 s comes after 59 s"},
		{linkFile, "queue", negative, "row 61: -1 is not possible"},
		{linkFile, "queue_bytes", negative, "row 61: -1 is not possible"},
		{linkFile, "enqueued", zero, "row 61: 0 comes after 3"},
		{linkFile, "delivered", zero, "row 61: 0 comes after 4"},
		{linkFile, "drops", zero, "row 61: 0 comes after 5"},
		{linkFile, "losses", zero, "row 61: 0 comes after 6"},
		{linkFile, "marks", zero, "row 61: 0 comes after 7"},
	} {
		dir := copyOf(t, whole)
		set := func(row int, v map[string]reflect.Value) {
			if row == 60 {
				c.set(v[c.column])
			}
		}
		if c.file == samplesFile {
			rewrite[Sample](t, filepath.Join(dir, c.file), nil, set)
		} else {
			rewrite[LinkSample](t, filepath.Join(dir, c.file), nil, set)
		}
		_, err := Open(dir)
		if want := c.file + `: column "` + c.column + `": ` + c.want; err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want …%s", c.column, err, want)
		}
	}
}

// Fields of run.json likewise. A path is of keys and indexes.
func TestImpossibleRun(t *testing.T) {
	whole := t.TempDir()
	write(t, whole, 100)
	for _, c := range []struct {
		path  string
		value any // nil: there is no such field
		want  string
	}{
		{"experiment.duration", -5, `field "experiment.duration": -5 is not between`},
		{"experiment.duration", 1e300, `field "experiment.duration": 1e+300 is not between`},
		{"experiment.duration", "5s", `field "experiment.duration": string is not of type float64`},
		{"experiment.duration", nil, `field "experiment.duration": 0 is not between`},
		{"experiment", nil, `field "experiment.duration": 0 is not between`},
		{"experiment.interval", -1, `field "experiment.interval"`},
		{"experiment.jitter", -1, `field "experiment.jitter"`},
		{"experiment.flows", []any{}, `field "experiment.flows": there are none`},
		{"experiment.flows", "all", `field "experiment.flows": string is not of type []trace.Flow`},
		{"experiment.flows.1.id", 0, `field "experiment.flows[1].id": 0 is not an ID of its own`},
		{"experiment.flows.1.cc", "", `field "experiment.flows[1].cc": no congestion control`},
		{"experiment.flows.2.start", -1, `field "experiment.flows[2].start": -1`},
		{"experiment.flows.2.duration", -1, `field "experiment.flows[2].duration": -1`},
		{"experiment.link.rate", 0, `field "experiment.link.rate": 0`},
		{"link", nil, `field "link.rate": 0`},
		{"link.rate", -1e6, `field "link.rate": -1e+06`},
		{"link.rate", 1e30, `field "link.rate": 1e+30`},
		{"link.rtt", -1, `field "link.rtt": -1`},
		{"link.rtt", 1e9, `field "link.rtt": 1e+09`},
		{"link.buffer", 0, `field "link.buffer": 0`},
		{"link.buffer", 0.5, `field "link.buffer": number 0.5 is not of type int`},
		{"link.buffer", 1e15, `field "link.buffer": 1e+15`},
		{"link.mtu", 0, `field "link.mtu": 0`},
		{"link.ecn", -3, `field "link.ecn": -3`},
		{"link.loss.probability", 7, `field "link.loss.probability": 7`},
		{"link.measured.rate", -1, `field "link.measured.rate": -1`},
		{"link.measured.rtt", -1, `field "link.measured.rtt": -1`},
		{"flows.0.id", 77, `field "flows[0].id": 77 is no flow of the experiment`},
		{"flows.0.duration", -2, `field "flows[0].duration": -2`},
		{"flows.0.throughput", -2, `field "flows[0].throughput": -2`},
		{"disturbances", []any{map[string]any{"second": -1}}, `field "disturbances[0].second": -1`},
		{"bottleneck", map[string]any{"queue_mean": -2}, `field "bottleneck.queue_mean": -2`},
		{"bottleneck", map[string]any{"utilisation": -2}, `field "bottleneck.utilisation": -2`},
		{"jain", 2, `field "jain": 2`},
	} {
		dir := copyOf(t, whole)
		b, err := os.ReadFile(filepath.Join(dir, runFile))
		if err != nil {
			t.Fatal(err)
		}
		var run any
		if err := json.Unmarshal(b, &run); err != nil {
			t.Fatal(err)
		}
		keys := strings.Split(c.path, ".")
		at := run
		for _, k := range keys[:len(keys)-1] {
			if list, ok := at.([]any); ok {
				at = list[int(k[0]-'0')]
			} else {
				at = at.(map[string]any)[k]
			}
		}
		of, last := at.(map[string]any), keys[len(keys)-1]
		if of[last] = c.value; c.value == nil {
			delete(of, last)
		}
		if b, err = json.Marshal(run); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, runFile), b, 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(dir); err == nil || !strings.Contains(err.Error(), runFile+": "+c.want) {
			t.Errorf("%s %v: got %v, want …%s", c.path, c.value, err, c.want)
		}
	}
}

// A byte that is another gives an error that names the file, or other rows that a run
// can have measured: never a panic, and nothing takes long.
func TestFlippedBytes(t *testing.T) {
	whole := t.TempDir()
	write(t, whole, 100)
	r, err := Open(whole)
	if err != nil {
		t.Fatal(err)
	}
	refused := 0
	for _, file := range []string{samplesFile, linkFile} {
		b, err := os.ReadFile(filepath.Join(whole, file))
		if err != nil {
			t.Fatal(err)
		}
		for i := range b {
			x := []byte{0x01, 0x80, 0xff}[i%3]
			b[i] ^= x
			if file == samplesFile {
				var rows []Sample
				if rows, err = parseRows[Sample](b); err == nil {
					err = r.Run.checkSamples(rows)
				}
			} else {
				var rows []LinkSample
				if rows, err = parseRows[LinkSample](b); err == nil {
					err = r.Run.checkLinks(rows)
				}
			}
			if b[i] ^= x; err != nil {
				refused++
			}
		}
	}
	if refused < 500 {
		t.Errorf("%d were refused", refused)
	}
}

// A file that is cut anywhere is refused.
func TestCut(t *testing.T) {
	whole := t.TempDir()
	write(t, whole, 100)
	for _, file := range []string{runFile, samplesFile, linkFile} {
		b, err := os.ReadFile(filepath.Join(whole, file))
		if err != nil {
			t.Fatal(err)
		}
		defer os.WriteFile(filepath.Join(whole, file), b, 0o644)
		for n := 0; n < len(b)-2; n += 1 + n/4 { // run.json can do without its last newline
			if err := os.WriteFile(filepath.Join(whole, file), b[:n], 0o644); err != nil {
				t.Fatal(err)
			}
			if _, err := Open(whole); err == nil || !strings.Contains(err.Error(), file) {
				t.Fatalf("%s cut to %d of %d bytes: %v", file, n, len(b), err)
			}
		}
		if err := os.WriteFile(filepath.Join(whole, file), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Open(whole); err != nil {
		t.Error(err)
	}
}
