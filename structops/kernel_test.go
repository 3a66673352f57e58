// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"os"
	"runtime"
	"testing"

	"ccload/internal/kernelbtf"

	"github.com/cilium/ebpf/btf"
)

func churn() {
	for range 100 {
		_ = make([]byte, 1<<20)
	}
	runtime.GC()
}

func checkLayout(t *testing.T, l *layout) {
	t.Helper()
	spec, err := kernelbtf.Types().Kernel()
	if err != nil {
		t.Fatal(err)
	}
	var value *btf.Struct
	if err := spec.TypeByName("bpf_struct_ops_tcp_congestion_ops", &value); err != nil {
		t.Fatal(err)
	}
	if id, err := spec.TypeID(value); err != nil || uint32(id) != l.typeID || value.Size != l.size {
		t.Errorf("type %d of %d bytes, want %d of %d", l.typeID, l.size, id, value.Size)
	}
	for _, m := range value.Members {
		ops, ok := btf.As[*btf.Struct](m.Type)
		if !ok || ops.Name != opsType {
			continue
		}
		if len(ops.Members) != len(l.members) {
			t.Errorf("%d members, want %d", len(l.members), len(ops.Members))
		}
		for _, want := range ops.Members {
			got := l.member(want.Name)
			ptr, isPtr := btf.As[*btf.Pointer](want.Type)
			if got == nil || got.off != m.Offset.Bytes()+want.Offset.Bytes() || got.function != (isPtr && isFunction(ptr.Target)) {
				t.Errorf("member %s: %+v", want.Name, got)
			}
		}
		return
	}
	t.Error("the library does not find the structure")
}

func FuzzLayout(f *testing.F) {
	f.Add([]byte{})
	for _, name := range []string{"basic", "flavour"} {
		f.Add(fixture(f, name))
	}
	// BTF of this package's own fixtures stands for the kernel's, which is large.
	o, err := openObject(fixture(f, "basic"))
	if err != nil {
		f.Fatal(err)
	}
	b, err := o.data(o.Section(".BTF"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, raw []byte) {
		if l, err := parseLayout(raw); err == nil {
			for _, m := range l.members {
				if m.off+m.size > l.size {
					t.Errorf("member %+v of %d bytes", m, l.size)
				}
			}
		}
	})
}

// What every ccload list pays before it looks at the first map.
func BenchmarkReadLayout(b *testing.B) {
	if _, err := os.Stat(kernelBTF); err != nil {
		b.Skip(err)
	}
	for b.Loop() {
		if _, err := readLayout(kernelBTF); err != nil {
			b.Fatal(err)
		}
	}
}
