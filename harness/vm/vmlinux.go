// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"golang.org/x/sys/unix"
)

// maxVmlinux bounds what an image may unpack to, in bytes.
const maxVmlinux = 512 << 20

// unpacked is an image's vmlinux, which all guests of a process share. A guest
// would take two seconds to unpack the image itself.
type unpacked struct {
	once sync.Once
	file *os.File // nil: boot the image as it is
	err  error
}

// boots returns the file that QEMU is to boot: the ELF kernel in the image, in
// memory, where it can be entered directly (PVH, since Linux 5.0 with
// CONFIG_PVH), or nil where the image has to be booted as it is.
func (k *Kernel) boots() (*os.File, error) {
	u := &k.vmlinux
	u.once.Do(func() {
		b, err := k.sums.read(k.Image)
		if err != nil {
			u.err = fmt.Errorf("kernel: %w", err)
			return
		}
		v, err := vmlinux(b)
		if errors.Is(err, errCompression) || err == nil && !entersPVH(v) {
			return
		}
		if err == nil {
			u.file, err = memory("vmlinux", bytes.NewReader(v))
		}
		if err != nil {
			u.err = fmt.Errorf("kernel %q: corrupt: %w", k.Image, err)
		}
	})
	return u.file, u.err
}

// errCompression is no fault of an image: the guest unpacks it itself.
var errCompression = errors.New("unknown compression")

// memory is a file that has a descriptor but no name.
func memory(name string, content io.Reader) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := io.Copy(f, content); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// vmlinux unpacks the ELF kernel in an image (Documentation/arch/x86/boot.rst:
// setup_sects at 0x1f1, payload_offset at 0x248, payload_length at 0x24c; after
// the payload's compressed bytes stands its size).
func vmlinux(image []byte) ([]byte, error) {
	if len(image) < 0x250 {
		return nil, errors.New("too short")
	}
	setup := uint64(image[0x1f1])
	if setup == 0 {
		setup = 4
	}
	start := (setup+1)*512 + uint64(binary.LittleEndian.Uint32(image[0x248:]))
	length := uint64(binary.LittleEndian.Uint32(image[0x24c:]))
	if length < 4 || start+length > uint64(len(image)) {
		return nil, errors.New("its payload does not fit")
	}
	payload := image[start : start+length]
	size := uint64(binary.LittleEndian.Uint32(payload[length-4:]))
	if size > maxVmlinux {
		return nil, fmt.Errorf("unpacks to %d MiB", size>>20)
	}
	compressed := bytes.NewReader(payload[:length-4])
	var r io.Reader
	switch {
	case bytes.HasPrefix(payload, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		d, err := zstd.NewReader(compressed)
		if err != nil {
			return nil, err
		}
		defer d.Close()
		r = d
	case bytes.HasPrefix(payload, []byte{0x02, 0x21, 0x4c, 0x18}):
		r = lz4.NewReader(compressed)
	case bytes.HasPrefix(payload, []byte{0x1f, 0x8b}):
		g, err := gzip.NewReader(compressed)
		if err != nil {
			return nil, err
		}
		r = g
	default: // of the rest, xz would take longer here than in the guest
		return nil, errCompression
	}
	v := make([]byte, size)
	if _, err := io.ReadFull(r, v); err != nil {
		return nil, err
	}
	// Only its end tells whether what was read has the right checksum.
	if n, err := r.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		return nil, cmp.Or(err, errors.New("longer than it says"))
	}
	return v, nil
}

// phys32Entry is XEN_ELFNOTE_PHYS32_ENTRY.
const phys32Entry = 18

// entersPVH says whether a kernel has the entry that QEMU needs to boot it as ELF:
// a note with its address.
func entersPVH(vmlinux []byte) bool {
	f, err := elf.NewFile(bytes.NewReader(vmlinux))
	if err != nil {
		return false
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_NOTE {
			continue
		}
		b, err := io.ReadAll(p.Open())
		if err != nil {
			return false
		}
		for len(b) >= 12 {
			name, desc := uint64(binary.LittleEndian.Uint32(b)+3)&^3, uint64(binary.LittleEndian.Uint32(b[4:])+3)&^3
			if 12+name+desc > uint64(len(b)) {
				break
			}
			if binary.LittleEndian.Uint32(b[8:]) == phys32Entry && bytes.HasPrefix(b[12:], []byte("Xen\x00")) {
				return true
			}
			b = b[12+name+desc:]
		}
	}
	return false
}
