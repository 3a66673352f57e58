// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"bytes"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"unsafe"

	"ccload/internal/kernelbtf"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// loadRaw is loadAlone for one purpose: the log of a program that the kernel
// refuses with EFAULT, as 6.18 does one that branches too often. The library takes
// that for a bug of the verifier and returns no log. Functions of modules are not
// bound. A program that is accepted is nil, too: it is the error that counts.
func (s *Spec) loadRaw(p *ebpf.ProgramSpec, opt ebpf.ProgramOptions) (*ebpf.Program, error) {
	coll, err := s.alone(p)
	if err != nil {
		return nil, err
	}
	coll.Programs = nil
	loaded, err := ebpf.NewCollectionWithOptions(coll, ebpf.CollectionOptions{Cache: kernelbtf.Types()})
	if err != nil {
		return nil, permission("", err, loading...)
	}
	defer loaded.Close()
	kernel, err := kernelbtf.Types().Kernel()
	if err != nil {
		return nil, err
	}
	insns := slices.Clone(p.Instructions)
	var relos []*btf.CORERelocation
	var at []int
	for i := range insns {
		ins := &insns[i]
		if relo := btf.CORERelocationMetadata(ins); relo != nil {
			relos, at = append(relos, relo), append(at, i)
		}
		if m := loaded.Maps[ins.Reference()]; m != nil && ins.IsLoadFromMap() {
			if err := ins.AssociateMap(m); err != nil {
				return nil, err
			}
		}
		var fn *btf.Func
		if ins.IsKfuncCall() && kernel.TypeByName(ins.Reference(), &fn) == nil {
			id, err := kernel.TypeID(fn)
			if err != nil {
				return nil, err
			}
			ins.Constant = int64(id)
		}
	}
	var types btf.Builder
	fixups, err := btf.CORERelocate(relos, []*btf.Spec{kernel}, coll.ByteOrder, types.Add)
	if err != nil {
		return nil, err
	}
	for i, f := range fixups {
		if err := f.Apply(&insns[at[i]]); err != nil {
			return nil, err
		}
	}
	functions, lines, err := btf.MarshalExtInfos(insns, &types)
	if err != nil {
		return nil, err
	}
	handle, err := btf.NewHandle(&types)
	if err != nil {
		return nil, err
	}
	defer handle.Close()
	var code bytes.Buffer
	if err := insns.Marshal(&code, coll.ByteOrder); err != nil {
		return nil, err
	}
	ops, member, _ := strings.Cut(p.AttachTo, ":")
	var st *btf.Struct
	if err := kernel.TypeByName(ops, &st); err != nil {
		return nil, err
	}
	id, err := kernel.TypeID(st)
	if err != nil {
		return nil, err
	}
	log := make([]byte, opt.LogSizeStart)
	err = loadProgram(p, code.Bytes(), handle.FD(), functions, lines, uint32(id),
		uint32(slices.IndexFunc(st.Members, func(m btf.Member) bool { return m.Name == member })), uint32(opt.LogLevel), log)
	runtime.KeepAlive(loaded)
	if err == nil {
		return nil, errors.New("it loads now")
	}
	text, _, _ := bytes.Cut(log, []byte{0})
	return nil, &ebpf.VerifierError{Cause: fmt.Errorf("load program: %w", err), Log: strings.Split(strings.TrimSpace(string(text)), "\n")}
}

// loadProgram loads a program and closes it.
func loadProgram(p *ebpf.ProgramSpec, code []byte, types int, functions, lines []byte, target, member, level uint32, log []byte) error {
	license := append([]byte(p.License), 0)
	attr := struct {
		typ, insns                                  uint32
		code, license                               unsafe.Pointer
		logLevel, logSize                           uint32
		log                                         unsafe.Pointer
		kernel, flags                               uint32
		name                                        [16]byte
		ifindex, member, types, functionSize        uint32
		functions                                   unsafe.Pointer
		numFunctions, lineSize                      uint32
		lines                                       unsafe.Pointer
		numLines, target, targetBTF, numRelocations uint32
	}{
		typ: uint32(p.Type), insns: uint32(len(code) / 8), code: pointerTo(code), license: pointerTo(license),
		logLevel: level, logSize: uint32(len(log)), log: pointerTo(log), flags: p.Flags,
		member: member, types: uint32(types), target: target,
		functionSize: btf.FuncInfoSize, functions: pointerTo(functions), numFunctions: uint32(len(functions)) / btf.FuncInfoSize,
		lineSize: btf.LineInfoSize, lines: pointerTo(lines), numLines: uint32(len(lines)) / btf.LineInfoSize,
	}
	copy(attr.name[:15], p.Name)
	fd, err := bpf(unix.BPF_PROG_LOAD, &attr)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

func pointerTo(b []byte) unsafe.Pointer {
	if len(b) == 0 {
		return nil
	}
	return unsafe.Pointer(&b[0])
}
