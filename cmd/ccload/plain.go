// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// plainWriter writes text as it may go to a terminal. Names of files, control groups,
// objects and results come from others, and what is printed of them must not move the
// cursor, or worse: all but what can be seen, newlines and tabs is written as an escape
// of JSON, which leaves documents of that as exact as they were.
type plainWriter struct {
	w    io.Writer
	mu   sync.Mutex
	rest []byte // of a rune whose end is still to come
}

func (p *plainWriter) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	text := append(p.rest, b...)
	n := len(text)
	for i := 1; i <= min(utf8.UTFMax-1, len(text)); i++ {
		if last := text[len(text)-i:]; utf8.RuneStart(last[0]) {
			if !utf8.FullRune(last) {
				n -= i
			}
			break
		}
	}
	p.rest = append([]byte(nil), text[n:]...)
	_, err := io.WriteString(p.w, plain(string(text[:n]), "\n\t"))
	return len(b), err
}

// oneLine is plain text without newlines and tabs, as it stands in a sentence or a cell.
func oneLine(s string) string { return plain(s, "") }

// plain escapes what cannot be seen, but for the spaces that are allowed.
func plain(s, spaces string) string {
	seen := func(r rune) bool { return unicode.IsPrint(r) || strings.ContainsRune(spaces, r) }
	if utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return !seen(r) }) {
		return s
	}
	var out strings.Builder
	for len(s) > 0 {
		r, n := utf8.DecodeRuneInString(s)
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&out, `\x%02x`, s[0])
		case seen(r):
			out.WriteString(s[:n])
		default:
			for _, unit := range utf16.AppendRune(nil, r) {
				fmt.Fprintf(&out, `\u%04x`, unit)
			}
		}
		s = s[n:]
	}
	return out.String()
}

// lines is text of several lines, which printf leaves so.
type lines string

// What is longer is cut where people are told of it, with these many runes of its
// beginning and its end left.
const (
	wordMost, wordEnds = 300, 60
	lineMost, lineEnds = 4000, 1000
)

// abridged cuts words and lines that nobody can want to read whole, such as a value
// of a hundred thousand digits.
func abridged(s string) string {
	return pieces(pieces(s, unicode.IsSpace, wordMost, wordEnds), func(r rune) bool { return r == '\n' }, lineMost, lineEnds)
}

// pieces cuts what stands between separators.
func pieces(s string, separates func(rune) bool, most, ends int) string {
	if len(s) <= most {
		return s
	}
	var out strings.Builder
	for len(s) > 0 {
		end := strings.IndexFunc(s, separates)
		if end < 0 {
			end = len(s)
		}
		if runes := []rune(s[:end]); len(runes) > most {
			fmt.Fprintf(&out, "%s…(%d more)…%s", string(runes[:ends]), len(runes)-2*ends, string(runes[len(runes)-ends:]))
		} else {
			out.WriteString(s[:end])
		}
		if _, n := utf8.DecodeRuneInString(s[end:]); end < len(s) {
			out.WriteString(s[end : end+n])
			end += n
		}
		s = s[end:]
	}
	return out.String()
}
