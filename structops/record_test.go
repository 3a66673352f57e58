// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"ccload/internal/kerneltest"
)

// Of all the variables those are parameters that somebody may set, in the file as in
// the kernel.
func TestTunables(t *testing.T) {
	kerneltest.Privileged(t)
	s := mustParse(t, "tuned")
	const want = "[{so_floor __u32 4 true} {so_gain __u32 3 false} {so_narrow short -2 true} {so_off bool false true}]"
	if got := fmt.Sprint(s.Params()); got != want {
		t.Errorf("in the file\n%s\nwant\n%s", got, want)
	}
	l := mustAttach(t, mustLoad(t, s), "")
	i := mustInspect(t, l.MapID())
	if got := fmt.Sprint(i.Params); got != want {
		t.Errorf("in the kernel\n%s\nwant\n%s", got, want)
	}
	if err := i.Set(map[string]any{"so_narrow": "-300", "so_off": true, "so_floor": 70000}); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(mustInspect(t, l.MapID()).Params); got != "[{so_floor __u32 70000 true} {so_gain __u32 3 false} {so_narrow short -300 true} {so_off bool true true}]" {
		t.Errorf("set: %s", got)
	}
	for _, name := range []string{"so_hidden", "so_rounds", "so_table", "calls", "so_folded"} {
		if err := i.Set(map[string]any{name: 1}); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := i.Set(map[string]any{"so_gain": 1}); !errors.Is(err, ErrFixed) {
		t.Errorf("so_gain: %v", err)
	}
}

// What is loaded knows what it was made of, and which parameters were set.
func TestRecord(t *testing.T) {
	kerneltest.Privileged(t)
	s := mustParse(t, "tuned")
	if err := s.Set("so_gain", 7); err != nil {
		t.Fatal(err)
	}
	l := mustAttach(t, mustLoad(t, s), "")
	i := mustInspect(t, l.MapID())
	if err := i.Set(map[string]any{"so_off": true}); err != nil {
		t.Fatal(err)
	}
	i = mustInspect(t, l.MapID())
	if set, err := i.SetParams(); err != nil || fmt.Sprint(set) != "[{so_gain __u32 7 false} {so_off bool true true}]" {
		t.Errorf("set: %v, %v", set, err)
	}
	spec, ops, err := i.Object()
	if err != nil || ops.Map != "so_tuned" || !bytes.Equal(spec.raw, fixture(t, "tuned")) || fmt.Sprint(spec.Params()) != fmt.Sprint(mustParse(t, "tuned").Params()) {
		t.Errorf("%+v, %v", ops, err)
	}
	i.record = 0
	if _, _, err := i.Object(); !errors.Is(err, ErrNotFound) {
		t.Errorf("without a record: %v", err)
	}
}

func TestParseRecord(t *testing.T) {
	const text = "ccload object\n\"m\\n\"\n-\"a\"\n+\"b\"\n\nELF\n\nrest"
	r, err := parseRecord([]byte(text))
	if err != nil || r.mapVar != "m\n" || string(r.object) != "ELF\n\nrest" || text[r.at["a"]] != '-' || text[r.at["b"]] != '+' {
		t.Errorf("%+v, %v", r, err)
	}
	for _, bad := range []string{"", "\n\n", "ccload object\n\n", "ccload object\nm\n\n", "ccload object\n\"m\"\n-a\n\n", "else\n\"m\"\n\n", "ccload object\n\"m\"\n-\"a\"\n"} {
		if r, err := parseRecord([]byte(bad)); err == nil {
			t.Errorf("%q: %+v", bad, r)
		}
	}
}
