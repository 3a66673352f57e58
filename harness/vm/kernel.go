// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// Kernel is a kernel that a guest can boot.
type Kernel struct {
	Image   string // path of the bzImage ("vmlinuz")
	Release string // as uname -r will tell, read from the image
	Modules string // its lib/modules/RELEASE directory; "" if there is none

	sums    *sums // of its files; nil if it was not pulled
	vmlinux unpacked
}

// OpenKernel examines a kernel image for x86-64: that it is one and is whole, and,
// where its configuration stands beside it (config-RELEASE), that it has what a
// guest needs. Its modules are looked for where distributions unpack them: beside
// the image's directory, in ../lib/modules/RELEASE, and in /lib/modules/RELEASE.
func OpenKernel(image string) (*Kernel, error) {
	f, err := os.Open(image)
	if err != nil {
		return nil, fmt.Errorf("kernel: %w", err)
	}
	defer f.Close()
	release, err := parseRelease(f)
	if err != nil {
		return nil, fmt.Errorf("kernel %q: %w", image, err)
	}
	k := &Kernel{Image: image, Release: release}
	for _, dir := range []string{filepath.Join(filepath.Dir(image), "..", "lib/modules"), "/lib/modules"} {
		dir = filepath.Join(dir, release)
		if st, err := os.Stat(dir); err == nil && st.IsDir() {
			k.Modules = dir
			break
		}
	}
	config, err := k.config()
	if err == nil && config != nil {
		err = checkConfig(string(config), k.Modules != "")
	}
	if err != nil {
		return nil, fmt.Errorf("kernel %q: %w", image, err)
	}
	return k, nil
}

// config reads the configuration that stands beside the image; nil if there is none.
func (k *Kernel) config() ([]byte, error) {
	path := filepath.Join(filepath.Dir(k.Image), "config-"+k.Release)
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) && k.sums == nil {
		return nil, nil
	}
	return k.sums.read(path)
}

// CongestionControls returns the names of the TCP congestion controls that the kernel
// has built in or as modules; nil if its modules are not at hand to tell.
func (k *Kernel) CongestionControls() ([]string, error) {
	if k.Modules == "" {
		return nil, nil
	}
	files, err := k.moduleFiles()
	if err != nil {
		return nil, err
	}
	builtin, err := k.builtin()
	if err != nil {
		return nil, err
	}
	names := []string{"reno"} // always there
	for _, module := range append(slices.Sorted(maps.Keys(files)), builtin...) {
		if name, ok := strings.CutPrefix(module, "tcp_"); ok && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names, nil
}

// needed is what a kernel has to be built with, and what for.
var needed = []struct{ option, what string }{
	{"BPF_SYSCALL", "BPF"},
	{"BPF_JIT", "BPF's JIT compiler"},
	{"DEBUG_INFO_BTF", "BTF"},
	{"BLK_DEV_INITRD", "an initramfs"},
	{"VIRTIO_PCI", "virtio over PCI"},
	{"VIRTIO_CONSOLE", "the virtio console"},
	{"SERIAL_8250_CONSOLE", "a console on a serial port"},
}

// checkConfig reads a kernel's configuration.
func checkConfig(config string, modules bool) error {
	set := map[string]string{}
	for line := range strings.Lines(config) {
		if option, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			set[strings.TrimPrefix(option, "CONFIG_")] = value
		}
	}
	for _, n := range needed {
		switch set[n.option] {
		case "y":
		case "m":
			if !modules {
				return fmt.Errorf("%s is a module (CONFIG_%s=m), and its modules are not beside it", n.what, n.option)
			}
		default:
			return fmt.Errorf("built without %s (CONFIG_%s)", n.what, n.option)
		}
	}
	return nil
}

// isRelease says whether it may be what uname -r tells.
var isRelease = regexp.MustCompile(`^[0-9][0-9A-Za-z._+~:-]*$`).MatchString

// parseRelease reads the release out of the boot protocol's header
// (Documentation/arch/x86/boot.rst: setup_sects at 0x1f1, syssize at 0x1f4, "HdrS"
// at 0x202, kernel_version at 0x20e, xloadflags at 0x236).
func parseRelease(r io.ReaderAt) (string, error) {
	head := make([]byte, 0x264)
	if _, err := r.ReadAt(head, 0); err != nil {
		return "", errors.New("not a kernel image: too short")
	}
	if bytes.HasPrefix(head, []byte(elf.ELFMAG)) {
		return "", errors.New("an ELF vmlinux: the compressed vmlinuz is needed")
	}
	if string(head[0x38:0x3c]) == "ARM\x64" {
		return "", errors.New("a kernel for arm64: one for x86-64 is needed")
	}
	if string(head[0x202:0x206]) != "HdrS" || binary.LittleEndian.Uint16(head[0x206:]) < 0x20c {
		return "", errors.New("not a Linux kernel image for x86-64")
	}
	if head[0x236]&1 == 0 { // XLF_KERNEL_64
		return "", errors.New("a 32-bit kernel: one for x86-64 is needed")
	}
	size := (int64(head[0x1f1])+1)*512 + int64(binary.LittleEndian.Uint32(head[0x1f4:]))*16
	if n, err := r.ReadAt(make([]byte, 1), size-1); n == 0 {
		return "", fmt.Errorf("truncated: it should have %d bytes (%w)", size, err)
	}
	version := make([]byte, 128)
	n, err := r.ReadAt(version, int64(binary.LittleEndian.Uint16(head[0x20e:]))+0x200)
	if err != nil && err != io.EOF {
		return "", fmt.Errorf("read the release: %w", err)
	}
	release, _, ok := strings.Cut(string(version[:n]), " ")
	if !ok || release == "" || strings.ContainsRune(release, 0) {
		return "", errors.New("the image does not tell its release")
	}
	if !isRelease(release) { // it will name directories
		return "", fmt.Errorf("its release %q is not one", release)
	}
	return release, nil
}

// module is a kernel module as a guest loads it: plain ELF.
type module struct {
	name string // with "_" for "-", as the kernel lists it
	elf  []byte
}

// MissingModuleError says that a kernel neither has a module built in nor
// comes with it.
type MissingModuleError struct{ Kernel, Module string }

func (e *MissingModuleError) Error() string {
	return fmt.Sprintf("kernel %q: module %q: neither built in nor there", e.Kernel, e.Module)
}

// load reads the named modules and what they depend on, each after its
// dependencies. Those that are built in are left out, and optional ones that
// the kernel does not have. It does not need modules.dep, which packages leave
// to depmod(8): a module tells its dependencies itself.
func (k *Kernel) load(names, optional []string) ([]module, error) {
	if k.Modules == "" {
		return nil, nil // then all that it has is built in
	}
	builtin, err := k.builtin()
	if err != nil {
		return nil, err
	}
	files, err := k.moduleFiles()
	if err != nil {
		return nil, err
	}
	var out []module
	done := map[string]bool{}
	var add func(name string) error
	add = func(name string) error {
		name = canonical(name)
		if done[name] || slices.Contains(builtin, name) {
			return nil
		}
		done[name] = true
		path, ok := files[name]
		if !ok {
			return &MissingModuleError{k.Release, name}
		}
		m, err := k.readModule(path)
		if err != nil {
			return fmt.Errorf("module %q: %w", path, err)
		}
		needs, err := depends(m)
		if err != nil {
			return fmt.Errorf("module %q: %w", path, err)
		}
		for _, n := range needs {
			if err := add(n); err != nil {
				return err
			}
		}
		out = append(out, module{name, m})
		return nil
	}
	for _, n := range names {
		if err := add(n); err != nil {
			return nil, err
		}
	}
	for _, n := range optional {
		if _, there := files[canonical(n)]; there {
			if err := add(n); err != nil {
				return nil, err
			}
		}
	}
	return out, nil
}

// moduleFiles are the paths of the modules, by their names.
func (k *Kernel) moduleFiles() (map[string]string, error) {
	files := map[string]string{}
	err := filepath.WalkDir(filepath.Join(k.Modules, "kernel"), func(path string, d fs.DirEntry, err error) error {
		if name, _, ok := strings.Cut(filepath.Base(path), ".ko"); ok {
			files[canonical(name)] = path
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("kernel %q: modules: %w", k.Release, err)
	}
	return files, nil
}

func (k *Kernel) builtin() ([]string, error) {
	b, err := k.sums.read(filepath.Join(k.Modules, "modules.builtin"))
	if err != nil {
		return nil, fmt.Errorf("kernel %q: %w", k.Release, err)
	}
	var names []string
	for line := range strings.Lines(string(b)) {
		names = append(names, canonical(strings.TrimSuffix(filepath.Base(strings.TrimSpace(line)), ".ko")))
	}
	return names, nil
}

// canonical is how the kernel writes a module's name.
func canonical(name string) string { return strings.ReplaceAll(name, "-", "_") }

// maxModule bounds what a compressed module may unpack to, in bytes.
const maxModule = 64 << 20

// readModule reads a module, plain or compressed.
func (k *Kernel) readModule(path string) ([]byte, error) {
	b, err := k.sums.read(path)
	if err != nil {
		return nil, err
	}
	var r io.Reader = bytes.NewReader(b)
	switch filepath.Ext(path) {
	case ".ko":
	case ".xz":
		if r, err = xz.NewReader(r); err != nil {
			return nil, err
		}
	case ".zst":
		d, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, err
		}
		defer d.Close()
		r = d
	default:
		return nil, fmt.Errorf("unknown compression %q", filepath.Ext(path))
	}
	b, err = io.ReadAll(io.LimitReader(r, maxModule+1))
	if err == nil && len(b) > maxModule {
		err = fmt.Errorf("larger than %d MiB", maxModule>>20)
	}
	return b, err
}

// depends reads the "depends=" line of a module's .modinfo section.
func depends(mod []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(mod))
	if err != nil {
		return nil, err
	}
	s := f.Section(".modinfo")
	if s == nil {
		return nil, errors.New("no .modinfo: not a kernel module")
	}
	info, err := s.Data()
	if err != nil {
		return nil, err
	}
	for field := range bytes.SplitSeq(info, []byte{0}) {
		if v, ok := bytes.CutPrefix(field, []byte("depends=")); ok && len(v) > 0 {
			return strings.Split(string(v), ","), nil
		}
	}
	return nil, nil
}
