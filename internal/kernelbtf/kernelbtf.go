// SPDX-License-Identifier: Apache-2.0

// Package kernelbtf has the running kernel's types.
package kernelbtf

import (
	"sync"

	"github.com/cilium/ebpf/btf"
)

// Types is shared by all that load BPF programs, for the library takes tens of
// milliseconds to read them anew.
var Types = sync.OnceValue(btf.NewCache)
