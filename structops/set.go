// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"unsafe"

	"ccload/internal/fault"

	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// ErrFixed says that a parameter cannot be set while it runs.
var ErrFixed = errors.New("it can only be set when it is loaded")

// Set gives parameters of a live congestion control other values, at once for all
// of its connections. Values are as those of Spec.Set. Each is one store: programs
// see the old value or the new one. If one cannot be set, because there is none of
// that name (ErrNotFound), it is constant (ErrFixed) or the value does not fit, none
// is; all are if the error is an *UnrecordedError.
//
// It needs CAP_SYS_ADMIN.
func (i *Info) Set(values map[string]any) error {
	stored := map[string][]byte{}
	for name, v := range values {
		n := slices.IndexFunc(i.Params, func(p Param) bool { return p.Name == name })
		if n < 0 {
			can := "none can be set while it runs"
			if len(i.places) > 0 {
				can = "those that can be set while it runs are " + strings.Join(slices.Sorted(maps.Keys(i.places)), ", ")
			}
			return fmt.Errorf("parameter %q: %w: %s", name, ErrNotFound, can)
		}
		if !i.Params[n].Running {
			return fmt.Errorf("parameter %q: %w", name, ErrFixed)
		}
		size, err := btf.Sizeof(i.places[name].typ)
		if err != nil {
			return fmt.Errorf("parameter %q: %w", name, err)
		}
		if stored[name], err = encode(i.places[name].typ, size, v); err != nil {
			return fmt.Errorf("parameter %q: %v: %w", name, v, err)
		}
	}
	opened := map[string][]byte{}
	defer func() {
		for _, mem := range opened {
			unix.Munmap(mem)
		}
	}()
	for name := range stored {
		mem, err := i.places[name].open()
		if err != nil {
			return fmt.Errorf("parameter %q: %w", name, permission("", err, loading...))
		}
		opened[name] = mem
	}
	for n := range i.Params { // from here on nothing can fail
		p := &i.Params[n]
		if b, ok := stored[p.Name]; ok {
			i.places[p.Name].store(opened[p.Name], b)
			p.Value = decode(i.places[p.Name].typ, b)
		}
	}
	if err := i.keepSet(slices.Collect(maps.Keys(values))); err != nil {
		return &UnrecordedError{err}
	}
	return nil
}

// UnrecordedError says that parameters are set, but not recorded as such: what is loaded
// in their place will not keep them.
type UnrecordedError struct{ Err error }

func (e *UnrecordedError) Error() string {
	return fmt.Sprintf("the parameters are set, but cannot be recorded as set: %v", e.Err)
}

func (e *UnrecordedError) Unwrap() error { return e.Err }

// place is where a parameter of a live congestion control is.
type place struct {
	mapID  uint32
	offset uint32
	typ    btf.Type
}

// open maps the page into memory that the parameter is in: an update of the map would
// write all of the section, and undo what programs count there meanwhile.
func (p place) open() ([]byte, error) {
	size, err := btf.Sizeof(p.typ)
	if err != nil {
		return nil, err
	}
	if size != 1 && (size != 2 && size != 4 && size != 8 || p.offset%uint32(size) != 0) {
		return nil, fmt.Errorf("%d bytes: %w", size, errors.ErrUnsupported)
	}
	fd, err := openID(unix.BPF_MAP_GET_FD_BY_ID, p.mapID)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	if err := fault.At("map parameter into memory"); err != nil {
		return nil, err
	}
	page := unix.Getpagesize()
	mem, err := unix.Mmap(fd, int64(p.offset)/int64(page)*int64(page), page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %d: it cannot be mapped into memory: %w", p.mapID, err)
	}
	return mem, nil
}

// store writes a value to where the parameter is in its page, whole.
func (p place) store(page, b []byte) {
	to := unsafe.Pointer(&page[int(p.offset)%len(page)])
	switch len(b) {
	case 8:
		atomic.StoreUint64((*uint64)(to), binary.NativeEndian.Uint64(b))
	case 4:
		atomic.StoreUint32((*uint32)(to), binary.NativeEndian.Uint32(b))
	case 2:
		*(*uint16)(to) = binary.NativeEndian.Uint16(b)
	case 1:
		*(*byte)(to) = b[0]
	}
}
