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

	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// ErrFixed says that a parameter cannot be set while it runs.
var ErrFixed = errors.New("it can only be set when it is loaded")

// Set gives parameters of a live congestion control other values, at once for all
// of its connections. Values are as those of Spec.Set. Each is one store: programs
// see the old value or the new one. If one cannot be set, because there is none of
// that name (ErrNotFound), it is constant (ErrFixed) or the value does not fit, none
// is.
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
	for n := range i.Params {
		p := &i.Params[n]
		b, ok := stored[p.Name]
		if !ok {
			continue
		}
		if err := i.places[p.Name].store(b); err != nil {
			return fmt.Errorf("parameter %q: %w", p.Name, permission("", err, loading...))
		}
		p.Value = decode(i.places[p.Name].typ, b)
	}
	i.keepSet(slices.Collect(maps.Keys(values)))
	return nil
}

// place is where a parameter of a live congestion control is.
type place struct {
	mapID  uint32
	offset uint32
	typ    btf.Type
}

// store writes a value into a section's map, through memory: an update of the map
// would write all of the section, and undo what programs count there meanwhile.
func (p place) store(b []byte) error {
	fd, err := openID(unix.BPF_MAP_GET_FD_BY_ID, p.mapID)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	page := uint32(unix.Getpagesize())
	at := p.offset % page
	mem, err := unix.Mmap(fd, int64(p.offset-at), int(page), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map %d: it cannot be mapped into memory: %w", p.mapID, err)
	}
	defer unix.Munmap(mem)
	to := unsafe.Pointer(&mem[at])
	switch {
	case len(b) == 8 && at%8 == 0:
		atomic.StoreUint64((*uint64)(to), binary.NativeEndian.Uint64(b))
	case len(b) == 4 && at%4 == 0:
		atomic.StoreUint32((*uint32)(to), binary.NativeEndian.Uint32(b))
	case len(b) == 2 && at%2 == 0:
		*(*uint16)(to) = binary.NativeEndian.Uint16(b)
	case len(b) == 1:
		mem[at] = b[0]
	default:
		return fmt.Errorf("%d bytes: %w", len(b), errors.ErrUnsupported)
	}
	return nil
}
