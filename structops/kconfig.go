// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"bufio"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// An extern variable of section .kconfig is a part of the kernel's configuration
// that is known when the object is loaded. All of them make up one constant map.

const kconfigMap = ".kconfig"

func (s *Spec) readKconfig(f *object, types *btf.Spec) error {
	if err := types.TypeByName(kconfigMap, &s.kconfig); errors.Is(err, btf.ErrNotFound) {
		return nil
	} else if err != nil {
		return fmt.Errorf("section %q: %w", kconfigMap, err)
	}
	if s.kconfig.Size > maxSection {
		return fmt.Errorf("section %q: %w: it claims %d bytes", kconfigMap, ErrObject, s.kconfig.Size)
	}
	for _, sym := range f.symbols {
		if sym.Section == elf.SHN_UNDEF && elf.ST_BIND(sym.Info) == elf.STB_WEAK {
			s.weak[sym.Name] = true
		}
	}
	return nil
}

// kconfigFrom makes the map; root is where boot/ and proc/ are.
func (s *Spec) kconfigFrom(root string) (*ebpf.MapSpec, error) {
	value := make([]byte, s.kconfig.Size)
	var config map[string]string
	for _, vsi := range s.kconfig.Vars {
		v, ok := vsi.Type.(*btf.Var)
		if !ok || uint64(vsi.Offset)+uint64(vsi.Size) > uint64(len(value)) {
			return nil, fmt.Errorf("section %q: not valid BTF", kconfigMap)
		}
		text, err := builtinConfig(v.Name)
		if err == nil && text == "" {
			if config == nil {
				config, err = readConfig(root)
			}
			text = config[v.Name]
		}
		if err == nil && text == "" && !s.weak[v.Name] {
			err = fmt.Errorf("%w: its configuration does not set it", ErrKernel)
		}
		if err == nil && text != "" {
			err = putConfig(value[vsi.Offset:][:vsi.Size], v.Type, text)
		}
		if err != nil && !(s.weak[v.Name] && errors.Is(err, fs.ErrNotExist)) {
			return nil, fmt.Errorf("kernel configuration %q: %w", v.Name, err)
		}
	}
	return &ebpf.MapSpec{
		Name: kconfigMap, Type: ebpf.Array, KeySize: 4, ValueSize: s.kconfig.Size, MaxEntries: 1,
		Flags:    unix.BPF_F_RDONLY_PROG,
		Contents: []ebpf.MapKV{{Key: uint32(0), Value: value}},
	}, nil
}

// builtinConfig is what the running kernel tells without its configuration file,
// which may be missing, and takes milliseconds to unpack.
func builtinConfig(name string) (string, error) {
	switch name {
	case "CONFIG_HZ":
		// The coarse clocks tick with the jiffies (clock_getres(2)).
		var res unix.Timespec
		if err := unix.ClockGetres(unix.CLOCK_MONOTONIC_COARSE, &res); err != nil {
			return "", err
		}
		if ns := res.Nano(); ns > 0 {
			return strconv.FormatInt((1e9+ns/2)/ns, 10), nil
		}
	case "LINUX_KERNEL_VERSION": // KERNEL_VERSION(a, b, c)
		var u unix.Utsname
		if err := unix.Uname(&u); err != nil {
			return "", err
		}
		var a, b, c int
		if _, err := fmt.Sscanf(cString(u.Release[:]), "%d.%d.%d", &a, &b, &c); err != nil {
			return "", fmt.Errorf("kernel release: %w", err)
		}
		return strconv.Itoa(a<<16 | b<<8 | min(c, 255)), nil
	}
	return "", nil
}

func readConfig(root string) (map[string]string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, err
	}
	f, err := os.Open(root + "/boot/config-" + cString(u.Release[:]))
	if err == nil {
		defer f.Close()
		return parseConfig(f)
	}
	if f, err = os.Open(root + "/proc/config.gz"); err != nil {
		return nil, fmt.Errorf("neither /boot/config-%s nor /proc/config.gz: %w", cString(u.Release[:]), err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		return nil, err
	}
	return parseConfig(z)
}

func parseConfig(r io.Reader) (map[string]string, error) {
	config := map[string]string{}
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		if k, v, ok := strings.Cut(lines.Text(), "="); ok && strings.HasPrefix(k, "CONFIG_") {
			config[k] = v
		}
	}
	return config, lines.Err()
}

// putConfig writes a value of a configuration file: y, m or n, a number, or a
// string in quotes.
func putConfig(dst []byte, t btf.Type, text string) error {
	if s, err := strconv.Unquote(text); err == nil {
		if arr, ok := btf.As[*btf.Array](t); !ok || arr.Nelems != uint32(len(dst)) {
			return fmt.Errorf("it is a string, and the variable is not a char array")
		}
		copy(dst[:max(0, len(dst)-1)], s)
		return nil
	}
	i, isInt := btf.As[*btf.Int](t)
	_, isEnum := btf.As[*btf.Enum](t) // enum libbpf_tristate: 0 no, 1 yes, 2 module
	if n := map[string]byte{"n": 0, "y": 1, "m": 2}; strings.ContainsAny(text[:1], "nym") && len(text) == 1 {
		switch {
		case isInt && i.Encoding != btf.Bool && len(dst) == 1: // a char
			return putInteger(dst, false, uint64(text[0]))
		case isEnum || isInt && text != "m":
			return putInteger(dst, false, uint64(n[text]))
		}
		return fmt.Errorf("it is %s, which does not fit the variable", text)
	}
	if !isInt {
		return fmt.Errorf("it is %s, and the variable is not an integer", text)
	}
	if i.Encoding == btf.Signed {
		n, err := strconv.ParseInt(text, 0, 64)
		if err != nil {
			return err
		}
		return putInteger(dst, true, uint64(n))
	}
	n, err := strconv.ParseUint(text, 0, 64)
	if err != nil {
		return err
	}
	return putInteger(dst, false, n)
}

// putInteger writes an integer and says if it does not fit. n is its two's
// complement.
func putInteger(dst []byte, signed bool, n uint64) error {
	bits := 8 * len(dst)
	if !slices.Contains([]int{8, 16, 32, 64}, bits) {
		return fmt.Errorf("it has %d bits", bits)
	}
	fits := bits == 64 || !signed && n>>bits == 0 || signed && (int64(n)>>(bits-1) == 0 || int64(n)>>(bits-1) == -1)
	if !fits {
		return fmt.Errorf("it does not fit into %d bits", bits)
	}
	switch len(dst) {
	case 1:
		dst[0] = byte(n)
	case 2:
		binary.NativeEndian.PutUint16(dst, uint16(n))
	case 4:
		binary.NativeEndian.PutUint32(dst, uint32(n))
	case 8:
		binary.NativeEndian.PutUint64(dst, n)
	}
	return nil
}

// bindKconfig makes the loads of .kconfig addresses refer to the map.
func (s *Spec) bindKconfig(insns asm.Instructions) {
	offset := map[string]uint32{}
	for _, v := range s.kconfig.Vars {
		offset[v.Type.TypeName()] = v.Offset
	}
	for i := range insns {
		ins := &insns[i]
		if off, ok := offset[ins.Reference()]; ok && ins.OpCode.IsDWordLoad() && ins.Src == 0 {
			ins.Src = asm.PseudoMapValue
			ins.Constant = int64(uint64(off) << 32)
			*ins = ins.WithReference(kconfigMap)
		}
	}
}
