// SPDX-License-Identifier: Apache-2.0

package structops

import "github.com/cilium/ebpf"

// MapMemory estimates what the kernel takes for the object's maps when it is loaded,
// in bytes.
func (s *Spec) MapMemory() (bytes int64) {
	const overhead = 64 // of a hash map's element
	for _, m := range s.coll.Maps {
		if m.Type == ebpf.RingBuf {
			bytes += int64(m.MaxEntries)
		} else {
			bytes += int64(m.MaxEntries) * (int64(m.KeySize) + int64(m.ValueSize) + overhead)
		}
	}
	return bytes
}
