// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"bytes"
	"debug/elf"
	"fmt"
	"strings"
	"unicode/utf8"
)

const (
	objectWanted = "what clang -O2 -g -target bpf -c makes is wanted"
	compileIt    = "compile it: clang -O2 -g -target bpf -c"
)

// magics are how files of other sorts begin.
var magics = []struct{ begins, is, then string }{
	{"\x1f\x8b", "a gzip file", "unpack it first"},
	{"\x28\xb5\x2f\xfd", "a zstd file", "unpack it first"},
	{"\xfd7zXZ\x00", "an xz file", "unpack it first"},
	{"BZh", "a bzip2 file", "unpack it first"},
	{"\x04\x22\x4d\x18", "an lz4 file", "unpack it first"},
	{"PK\x03\x04", "a zip archive", "unpack it first"},
	{"!<arch>\n", "an archive of object files (ar)", "unpack it first: ar x"},
	{"!<thin>\n", "an archive of object files (ar)", "it only names them: give one of them"},
	{"BC\xc0\xde", "LLVM bitcode", "compile it without -emit-llvm and -flto, or: llc -march=bpf -filetype=obj"},
	{"\xde\xc0\x17\x0b", "LLVM bitcode", "compile it without -emit-llvm and -flto, or: llc -march=bpf -filetype=obj"},
	{"\x9f\xeb", "BTF alone, without programs", objectWanted},
	{"\x00asm", "WebAssembly", objectWanted},
	{"MZ", "a program for Windows", objectWanted},
	{"\xcf\xfa\xed\xfe", "an object for macOS", compileIt},
	{"version https://git-lfs", "a pointer of Git LFS", "fetch the file: git lfs pull"},
	{"#!", "a script", objectWanted},
	{"; ModuleID", "LLVM's assembly", "llc -march=bpf -filetype=obj makes an object of it"},
	{"{", "JSON", objectWanted},
}

// foreign says what a file looks like that is no ELF file, and what to do.
func foreign(b []byte) string {
	if len(b) == 0 {
		return "it is empty; " + objectWanted
	}
	for _, m := range magics {
		if bytes.HasPrefix(b, []byte(m.begins)) {
			return fmt.Sprintf("it looks like %s; %s", m.is, m.then)
		}
	}
	if len(b) > 262 && string(b[257:262]) == "ustar" {
		return "it looks like a tar archive; unpack it first"
	}
	begin := b[:min(len(b), 4096)]
	for n := 1; n < utf8.UTFMax && len(begin) < len(b) && !utf8.Valid(begin); n++ { // cut within a letter
		begin = begin[:len(begin)-1]
	}
	if !utf8.Valid(begin) || bytes.IndexByte(begin, 0) >= 0 {
		return "it is of another sort; " + objectWanted
	}
	text := string(begin)
	for _, s := range []string{"#include", "#define", "#pragma", "SEC(", "/*", "//", "struct "} {
		if strings.Contains(text, s) {
			return "it looks like C source; " + compileIt
		}
	}
	if strings.Contains(text, "\t.text") || strings.Contains(text, "\t.section") || strings.Contains(text, "\t.file") {
		return "it looks like assembly; " + compileIt
	}
	return "it looks like text; " + objectWanted
}

// elsewhere says what an ELF file is for that is not for BPF.
func elsewhere(f *elf.File, err error) string {
	if err != nil {
		return fmt.Sprintf("it is an ELF file, but damaged or cut: %v", err)
	}
	bits := "64"
	if f.Class == elf.ELFCLASS32 {
		bits = "32"
	}
	machine := strings.TrimPrefix(f.Machine.String(), "EM_")
	switch {
	case f.Machine != elf.EM_BPF && f.Machine != elf.EM_NONE && f.Section(".modinfo") != nil:
		return fmt.Sprintf("it is a kernel module, for %s; insmod loads it", machine)
	case f.Machine != elf.EM_BPF && f.Machine != elf.EM_NONE:
		return fmt.Sprintf("it is %s-bit machine code for %s; %s", bits, machine, compileIt)
	case f.Class != elf.ELFCLASS64:
		return "it is a 32-bit ELF file; " + objectWanted
	case f.Type != elf.ET_REL:
		return fmt.Sprintf("it is linked (%v); %s", f.Type, objectWanted)
	}
	return ""
}
