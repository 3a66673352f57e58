// SPDX-License-Identifier: Apache-2.0

// Package bpfload loads the BPF programs that ccload brings with it. Kernels differ in
// which kinds of program they take, also of one release: each of ours may be refused,
// and whoever loads one has another way, goes without, or says what was refused.
package bpfload

import (
	"errors"
	"fmt"
	"strings"

	"ccload/internal/fault"
	"ccload/internal/kernelbtf"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// RefusedError says that the kernel does not take a program.
type RefusedError struct {
	Program string
	Kind    string // its section: "iter/tcp"
	Err     error
}

func (e *RefusedError) Error() string {
	return fmt.Sprintf("the kernel refuses the %s program %q: %v", e.Kind, e.Program, e.Err)
}

func (e *RefusedError) Unwrap() error { return e.Err }

// Load loads a collection, which should have no program that can be done without: if
// one is refused, the error is a *RefusedError and nothing is loaded.
func Load(spec *ebpf.CollectionSpec, replacements map[string]*ebpf.Map) (*ebpf.Collection, error) {
	for name, p := range spec.Programs {
		if err := fault.At("load program " + name); err != nil {
			return nil, &RefusedError{name, p.SectionName, err}
		}
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: replacements, Cache: kernelbtf.Types()})
	if err == nil {
		return coll, nil
	}
	for name, p := range spec.Programs {
		if strings.HasPrefix(err.Error(), "program "+name+":") {
			return nil, &RefusedError{name, p.SectionName, Plain(errors.Unwrap(err))}
		}
	}
	return nil, Plain(err)
}

// Plain takes away what the library adds to each EPERM: that RLIMIT_MEMLOCK may be too
// low, which was true until Linux 5.11.
func Plain(err error) error {
	if errors.Is(err, unix.EPERM) {
		return unix.EPERM
	}
	return err
}
