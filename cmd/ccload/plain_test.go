// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

func TestPlain(t *testing.T) {
	for in, want := range map[string]string{
		"":                        "",
		"bpf_cubic → gentle 5 µs": "bpf_cubic → gentle 5 µs",
		"a\x1b[2Jb":               `a\u001b[2Jb`,
		"a\u009b2Jb":              `a\u009b2Jb`,
		"a\rb\x07\x7f":            `a\u000db\u0007\u007f`,
		"a\nb\tc":                 "a\nb\tc",
		"a\u202eb":                `a\u202eb`,
		"a\xffb\xc3":              `a\xffb\xc3`,
		"a\U000e0001b":            `a\udb40\udc01b`,
	} {
		if got := plain(in, "\n\t"); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
	if got, want := oneLine("a\nb\tc"), `a\u000ab\u0009c`; got != want {
		t.Errorf("in one line: %q, want %q", got, want)
	}
}

func TestAbridged(t *testing.T) {
	digits := strings.Repeat("9", 100000)
	got := abridged("ccload: --rate: rate \"" + digits + "\": not a number")
	if want := `ccload: --rate: rate "` + digits[:59] + "…(99883 more)…" + digits[:58] + `": not a number`; got != want {
		t.Errorf("%.300q, want %.300q", got, want)
	}
	if got := abridged(strings.Repeat("9 ", 100000)); len(got) > 3000 {
		t.Errorf("a long line: %d bytes are left", len(got))
	}
	log := strings.Repeat("12: (bf) r1 = r2 ; R1_w=scalar()\n", 10000)
	if got := abridged(log); got != log {
		t.Error("a log of many lines is cut")
	}
}

// However it is cut into writes, only what can be seen comes out, and a document of
// JSON says the same as before.
func FuzzPlainWriter(f *testing.F) {
	f.Add("a\x1b[2J", 1)
	f.Add("€\u009b\xff\xe2\x82", 2)
	f.Add("\U000e0001\U0010ffff", 3)
	f.Fuzz(func(t *testing.T, s string, size int) {
		write := func(b []byte) string {
			var out bytes.Buffer
			p := &plainWriter{w: &out}
			for len(b) > 0 {
				n := min(len(b), max(1, size&7))
				if m, err := p.Write(b[:n]); m != n || err != nil {
					t.Fatal(m, err)
				}
				b = b[n:]
			}
			return out.String()
		}
		text := write([]byte(s))
		if !utf8.ValidString(text) || strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) && r != '\n' && r != '\t' }) {
			t.Errorf("%q: %q", s, text)
		}
		doc, err := json.Marshal(map[string]string{s: s})
		if err != nil {
			t.Fatal(err)
		}
		var want, got any
		if err := json.Unmarshal(doc, &want); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal([]byte(write(doc)), &got); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %v, %v, want %v", doc, got, err, want)
		}
		abridged(s)
	})
}
