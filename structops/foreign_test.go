// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"strings"
	"testing"
)

// What is no object is said to be what it looks like, with what to do.
func TestForeign(t *testing.T) {
	object := fixture(t, "basic")
	header := func(at int, value ...byte) []byte {
		b := bytes.Clone(object)
		copy(b[at:], value)
		return b
	}
	machine := func(m elf.Machine) []byte { return header(18, binary.LittleEndian.AppendUint16(nil, uint16(m))...) }
	source, err := os.ReadFile("testdata/basic.bpf.c")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		file []byte
		want string
	}{
		{nil, "it is empty; "},
		{source, "it looks like C source; compile it: clang "},
		{[]byte("#include <linux/bpf.h>\n"), "it looks like C source; "},
		{[]byte("static int x;\nSEC(\"a\")"), "it looks like C source; "},
		{[]byte("\t.text\n\t.file\t\"a.c\"\n"), "it looks like assembly; "},
		{[]byte("; ModuleID = 'a.c'\n"), "it looks like LLVM's assembly; "},
		{[]byte("#!/bin/sh\n"), "it looks like a script; "},
		{[]byte("something\n"), "it looks like text; "},
		{[]byte(strings.Repeat("é", 5000)), "it looks like text; "}, // the 4096th byte is within a letter
		{[]byte("\x1f\x8b\x08\x00"), "it looks like a gzip file; unpack it first"},
		{[]byte("\x28\xb5\x2f\xfd\x04"), "it looks like a zstd file; "},
		{[]byte("\xfd7zXZ\x00\x00"), "it looks like an xz file; "},
		{[]byte("!<arch>\nx.o/"), "it looks like an archive of object files (ar); "},
		{[]byte("BC\xc0\xde5\x14"), "it looks like LLVM bitcode; "},
		{append(make([]byte, 257), "ustar\x0000"...), "it looks like a tar archive; "},
		{[]byte("\x9f\xeb\x01\x00"), "it looks like BTF alone"},
		{[]byte{1, 2, 3, 0xff, 0}, "it is of another sort; "},
		{[]byte("\x7fELF"), "it is an ELF file, but damaged or cut: "},
		{object[:40], "it is an ELF file, but damaged or cut: "},
		{machine(elf.EM_X86_64), "it is 64-bit machine code for X86_64; compile it: "},
		{machine(elf.EM_AARCH64), "it is 64-bit machine code for AARCH64; "},
		{header(16, byte(elf.ET_EXEC)), "it is linked (ET_EXEC); "},
	} {
		_, err := Parse(c.file)
		if !errors.Is(err, ErrObject) || !strings.Contains(err.Error(), "object: not a BPF object file: "+c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%.20q: %v, want %s", c.file, err, c.want)
		}
	}
}
