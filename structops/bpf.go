// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"cmp"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"time"
	"unsafe"

	"ccload/internal/fault"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// The commands of bpf(2) that the library has not, or has only in a costlier
// form. Their arguments are beginnings of union bpf_attr (linux/bpf.h), which
// the kernel fills up with zeros. Pointers are 64 bits wide there, as on every
// machine that has struct_ops.

const (
	structOpsMap    = 26 // BPF_MAP_TYPE_STRUCT_OPS
	structOpsLink   = 9  // BPF_LINK_TYPE_STRUCT_OPS
	tracingLink     = 2  // BPF_LINK_TYPE_TRACING
	structOpsAttach = 44 // BPF_STRUCT_OPS
)

func bpf[T any](cmd uintptr, attr *T) (int, error) {
	for {
		n, _, errno := unix.Syscall(unix.SYS_BPF, cmd, uintptr(unsafe.Pointer(attr)), unsafe.Sizeof(*attr))
		runtime.KeepAlive(attr)
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return -1, errno
		}
	}
}

// createMap makes a struct_ops map; valueType is the id of its value's type in
// the kernel's BTF. The kernel wants to see some BTF of ours too, and does not
// look into it.
func createMap(name string, btf int, valueType, valueSize, flags uint32) (int, error) {
	attr := struct {
		typ, keySize, valueSize, entries, flags, inner, numa uint32
		name                                                 [16]byte
		ifindex, btf, keyType, localType, valueType          uint32
	}{typ: structOpsMap, keySize: 4, valueSize: valueSize, entries: 1, flags: flags, btf: uint32(btf), valueType: valueType}
	copy(attr.name[:15], name)
	if err := fault.At("create BPF map " + name); err != nil {
		return -1, err
	}
	return bpf(unix.BPF_MAP_CREATE, &attr)
}

// element is the one element of a struct_ops map or of a data section.
func element(cmd uintptr, fd int, value []byte) error {
	if step := map[uintptr]string{unix.BPF_MAP_UPDATE_ELEM: "update BPF map", unix.BPF_MAP_DELETE_ELEM: "delete from BPF map"}[cmd]; step != "" {
		if err := fault.At(step); err != nil {
			return err
		}
	}
	var key uint32
	attr := struct {
		fd, _      uint32
		key, value unsafe.Pointer
		flags      uint64
	}{fd: uint32(fd), key: unsafe.Pointer(&key)}
	if len(value) > 0 {
		attr.value = unsafe.Pointer(&value[0])
	}
	_, err := bpf(cmd, &attr)
	return err
}

func pin(fd int, path string) error {
	if err := fault.At("pin " + filepath.Base(path)); err != nil { // it may lead through a descriptor
		return err
	}
	p, err := unix.BytePtrFromString(path)
	if err != nil {
		return err
	}
	_, err = bpf(unix.BPF_OBJ_PIN, &struct {
		path      unsafe.Pointer
		fd, flags uint32
	}{unsafe.Pointer(p), uint32(fd), 0})
	return err
}

func removePin(path string) error {
	if err := fault.At("remove " + filepath.Base(path)); err != nil {
		return err
	}
	return os.Remove(path)
}

func openPin(path string) (int, error) {
	p, err := unix.BytePtrFromString(path)
	if err != nil {
		return -1, err
	}
	return bpf(unix.BPF_OBJ_GET, &struct {
		path      unsafe.Pointer
		fd, flags uint32
	}{path: unsafe.Pointer(p)})
}

func createLink(mapFD int) (int, error) {
	if err := fault.At("attach BPF link"); err != nil {
		return -1, err
	}
	return bpf(unix.BPF_LINK_CREATE, &struct{ mapFD, target, attachType, flags uint32 }{
		uint32(mapFD), 0, structOpsAttach, 0})
}

// createFreplace puts an extension program in the place of a function of
// another program; function is its id in that program's BTF.
func createFreplace(extension, program int, function uint32) (int, error) {
	if err := fault.At("replace function"); err != nil {
		return -1, err
	}
	return bpf(unix.BPF_LINK_CREATE, &struct{ prog, target, attachType, flags, function uint32 }{
		uint32(extension), uint32(program), 0, 0, function})
}

func updateLink(fd, newMap, oldMap int) error {
	if err := fault.At("update BPF link"); err != nil {
		return err
	}
	_, err := bpf(unix.BPF_LINK_UPDATE, &struct{ fd, newMap, flags, oldMap uint32 }{
		uint32(fd), uint32(newMap), unix.BPF_F_REPLACE, uint32(oldMap)})
	return err
}

func detachLink(fd int) error {
	if err := fault.At("detach BPF link"); err != nil {
		return err
	}
	_, err := bpf(unix.BPF_LINK_DETACH, &struct{ fd uint32 }{uint32(fd)})
	return err
}

func openID(cmd uintptr, id uint32) (int, error) {
	fd, err := bpf(cmd, &struct{ id, next, flags uint32 }{id: id})
	if err == nil && cmd == unix.BPF_MAP_GET_FD_BY_ID {
		slots.linger(id, fd)
	}
	return fd, err
}

// lingering holds the slots, maps of programs, that are the newest a while longer than
// who looked at them. When the last process closes such a map that is not pinned,
// the kernel (seen on 6.18) takes a reference to it and empties it in the background;
// if that happens again before it got there, the second reference is never given back,
// and the map stays until the machine is restarted.
type lingering struct {
	sync.Mutex
	held  []lingerer // by id, which is by age
	timer *time.Timer
}

type lingerer struct {
	id uint32
	fd int
}

var slots lingering

const (
	slotLingers = time.Second // far longer than the kernel takes to get to a map
	mostSlots   = 16          // more would make the table of descriptors grow, which takes milliseconds
)

func (l *lingering) linger(id uint32, fd int) {
	l.Lock()
	defer l.Unlock()
	full := len(l.held) == mostSlots
	if full && id < l.held[0].id || slices.ContainsFunc(l.held, func(h lingerer) bool { return h.id == id }) {
		return
	}
	var info mapInfo
	if objInfo(fd, &info) != nil || info.Type != uint32(ebpf.ProgramArray) {
		return
	}
	if full {
		unix.Close(l.held[0].fd)
		l.held = slices.Delete(l.held, 0, 1)
	}
	same, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return
	}
	l.held = append(l.held, lingerer{id, same})
	slices.SortFunc(l.held, func(a, b lingerer) int { return cmp.Compare(a.id, b.id) })
	if l.timer == nil {
		l.timer = time.AfterFunc(slotLingers, l.drop)
	} else {
		l.timer.Reset(slotLingers)
	}
}

func (l *lingering) drop() {
	l.Lock()
	defer l.Unlock()
	for _, h := range l.held {
		unix.Close(h.fd)
	}
	l.held = nil
}

// eachID opens every object of a kind, the newest first, and hands it to fn. What
// has gone meanwhile is passed over, for objects come and go while others walk.
func eachID(next, open uintptr, fn func(id uint32, fd int) error) error {
	var ids []uint32
	for attr := (struct{ id, next, flags uint32 }{}); ; attr.id = attr.next {
		if _, err := bpf(next, &attr); errors.Is(err, unix.ENOENT) {
			break
		} else if err != nil {
			return err
		}
		ids = append(ids, attr.next)
	}
	for _, id := range slices.Backward(ids) {
		fd, err := openID(open, id)
		if err == nil {
			err = fn(id, fd)
			unix.Close(fd)
		}
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	return nil
}

func objInfo[T any](fd int, info *T) error {
	_, err := bpf(unix.BPF_OBJ_GET_INFO_BY_FD, &struct {
		fd, size uint32
		info     unsafe.Pointer
	}{uint32(fd), uint32(unsafe.Sizeof(*info)), unsafe.Pointer(info)})
	return err
}

// mapInfo is the beginning of struct bpf_map_info.
type mapInfo struct {
	Type, ID, KeySize, ValueSize, Entries, Flags uint32
	Name                                         [16]byte
	Ifindex, KernelValueType                     uint32
	NetnsDev, NetnsIno                           uint64
	BTF, KeyType, ValueType, KernelBTF           uint32
}

// linkInfo is the beginning of struct bpf_link_info, of a struct_ops link.
type linkInfo struct {
	Type, ID, Prog, _ uint32
	Map               uint32
	_                 uint32
}

// progInfo is the beginning of struct bpf_prog_info.
type progInfo struct {
	Type, ID                         uint32
	Tag                              [8]byte
	JitedLen, XlatedLen              uint32
	Jited, Xlated                    unsafe.Pointer
	LoadTime                         uint64
	UID, NumMaps                     uint32
	Maps                             unsafe.Pointer
	Name                             [16]byte
	Ifindex, GPL                     uint32
	NetnsDev, NetnsIno               uint64
	NumKsyms, NumFuncLens            uint32
	Ksyms, FuncLens                  unsafe.Pointer
	BTF, FuncInfoSize                uint32
	FuncInfo                         unsafe.Pointer
	NumFuncInfo, NumLineInfo         uint32
	LineInfo, JitedLineInfo          unsafe.Pointer
	NumJitedLineInfo, LineInfoSize   uint32
	JitedLineInfoSize, NumTags       uint32
	Tags                             unsafe.Pointer
	RunTime, Runs, Missed            uint64
	Verified, AttachBTFObj, AttachID uint32
	_                                uint32
}

// btfInfo is the beginning of struct bpf_btf_info.
type btfInfo struct {
	BTF      unsafe.Pointer
	Size, ID uint32
}

func cString(b []byte) string { return unix.ByteSliceToString(b) }
