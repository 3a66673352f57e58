// SPDX-License-Identifier: Apache-2.0

// Package bpf holds the congestion controls that come with ccload: the C
// sources, one algorithm a file, and the objects compiled from them.
//
// The objects are in the repository and embedded here, so neither building nor
// running needs a compiler. "make generate" compiles them again.
package bpf

import "embed"

//go:embed *.bpf.o
var objects embed.FS

// Object is the compiled ELF object of one algorithm, named by the stem of its
// C file ("cubic" for cubic.bpf.c). It panics if there is none of that name:
// the stems are known when ccload is built.
func Object(stem string) []byte {
	b, err := objects.ReadFile(stem + ".bpf.o")
	if err != nil {
		panic(err)
	}
	return b
}
