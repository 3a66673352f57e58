// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// What is loaded remembers what it was made of, so that it can be made again with
// other parameters: a map is bound to one of its programs (BPF_PROG_BIND_MAP), and
// lives as long as that. Its one element is text, and after it the object's file:
//
//	ccload object
//	"MAP"
//	-"PARAMETER"     or + if it was set, and has not the value of the file
//
// with a line for each parameter and an empty one at the end.
const (
	recordName  = "ccload_object"
	recordBegin = "ccload object"
)

func isRecord(m *mapInfo) bool {
	return m.Type == uint32(ebpf.Array) && m.Entries == 1 && cString(m.Name[:]) == recordName
}

// keep records it. Nothing depends on that: without, its file has to be given again.
func (m *opsMap) keep(s *Spec, coll *ebpf.Collection) {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s\n%q\n", recordBegin, m.Map)
	for _, p := range s.Params() {
		fmt.Fprintf(&b, "%s%q\n", map[bool]string{false: "-", true: "+"}[s.set[p.Name]], p.Name)
	}
	fmt.Fprintf(&b, "\n%s", s.raw)
	attr := struct {
		typ, keySize, valueSize, entries, flags, inner, numa uint32
		name                                                 [16]byte
	}{typ: uint32(ebpf.Array), keySize: 4, valueSize: uint32(b.Len()), entries: 1}
	copy(attr.name[:], recordName)
	fd, err := bpf(unix.BPF_MAP_CREATE, &attr)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if element(unix.BPF_MAP_UPDATE_ELEM, fd, b.Bytes()) != nil {
		return
	}
	member := slices.Min(slices.Collect(maps.Keys(m.Programs)))
	p := coll.Programs[key(m.Programs[member], member)]
	bpf(unix.BPF_PROG_BIND_MAP, &struct{ prog, mapFD, flags uint32 }{uint32(p.FD()), uint32(fd), 0})
	runtime.KeepAlive(p)
}

// record is one that is read.
type record struct {
	text   []byte
	mapVar string
	at     map[string]int // parameter → where its mark is in the text
	object []byte
}

func parseRecord(text []byte) (*record, error) {
	bad := errors.New("what it was made of cannot be read")
	head, object, found := bytes.Cut(text, []byte("\n\n"))
	lines := strings.Split(string(head), "\n")
	if !found || len(lines) < 2 || lines[0] != recordBegin {
		return nil, bad
	}
	r := &record{text: text, at: map[string]int{}, object: object}
	var err error
	if r.mapVar, err = strconv.Unquote(lines[1]); err != nil {
		return nil, bad
	}
	at := len(lines[0]) + len(lines[1]) + 2
	for _, l := range lines[2:] {
		name, err := strconv.Unquote(strings.TrimLeft(l, "+-"))
		if err != nil {
			return nil, bad
		}
		r.at[name] = at
		at += len(l) + 1
	}
	return r, nil
}

// open reads the record; ErrNotFound if there is none.
func (i *Info) open() (fd int, r *record, err error) {
	if i.record == 0 {
		return -1, nil, fmt.Errorf("what it was made of: %w", ErrNotFound)
	}
	if fd, err = openID(unix.BPF_MAP_GET_FD_BY_ID, i.record); err != nil {
		return -1, nil, permission("", err, looking...)
	}
	var info mapInfo
	if err = objInfo(fd, &info); err == nil {
		text := make([]byte, info.ValueSize)
		if err = element(unix.BPF_MAP_LOOKUP_ELEM, fd, text); err == nil {
			r, err = parseRecord(text)
		}
	}
	if err != nil {
		unix.Close(fd)
		return -1, nil, err
	}
	return fd, r, nil
}

// Object gives the object that it was made of, with the values of its file, and its
// map there. ErrNotFound says that it was not loaded by this package.
func (i *Info) Object() (*Spec, *Ops, error) {
	fd, r, err := i.open()
	if err != nil {
		return nil, nil, err
	}
	unix.Close(fd)
	s, err := Parse(r.object)
	if err != nil {
		return nil, nil, err
	}
	o, err := s.Select(r.mapVar)
	return s, o, err
}

// SetParams are the parameters that were set, when it was loaded or since. The error is
// that of Object.
func (i *Info) SetParams() ([]Param, error) {
	fd, r, err := i.open()
	if err != nil {
		return nil, err
	}
	unix.Close(fd)
	var set []Param
	for _, p := range i.Params {
		if at, ok := r.at[p.Name]; ok && r.text[at] == '+' {
			set = append(set, p)
		}
	}
	return set, nil
}

// keepSet records that parameters were set, where there is a record.
func (i *Info) keepSet(names []string) error {
	fd, r, err := i.open()
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for _, name := range names {
		if at, ok := r.at[name]; ok {
			r.text[at] = '+'
		}
	}
	return element(unix.BPF_MAP_UPDATE_ELEM, fd, r.text)
}
