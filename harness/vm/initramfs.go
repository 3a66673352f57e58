// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/cavaliergopher/cpio"
)

// The places of what a guest is made of.
const (
	guestInit    = "/init"
	guestArgs    = "/etc/ccload/args"    // NUL-separated
	guestLimit   = "/etc/ccload/limit"   // of the guest's time, in ns
	guestModules = "/etc/ccload/modules" // one path a line, in the order of loading
	guestHold    = "/etc/ccload/hold"    // if it is there, hold
	guestLate    = "/etc/ccload/late"    // as guestModules, those that come last
	guestSeed    = "/etc/ccload/seed"    // where what is random comes from
)

// initramfs writes a cpio archive (Documentation/driver-api/early-userspace/
// buffer-format.rst) with the files and the directories above them. The same
// files give the same bytes.
func initramfs(w io.Writer, files map[string][]byte) error {
	a := cpio.NewWriter(w)
	made := map[string]bool{"/": true}
	var mkdir func(dir string) error
	mkdir = func(dir string) error {
		if made[dir] {
			return nil
		}
		made[dir] = true
		if err := mkdir(path.Dir(dir)); err != nil {
			return err
		}
		return a.WriteHeader(&cpio.Header{Name: dir[1:], Mode: cpio.TypeDir | 0o755, Links: 2})
	}
	for _, dir := range []string{"/dev", "/proc", "/sys", "/tmp", "/run"} {
		if err := mkdir(dir); err != nil {
			return err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if !strings.HasPrefix(name, "/") || path.Clean(name) != name {
			return fmt.Errorf("file %q: not a clean absolute path", name)
		}
		if err := mkdir(path.Dir(name)); err != nil {
			return err
		}
		h := &cpio.Header{Name: name[1:], Mode: cpio.TypeReg | 0o755, Links: 1, Size: int64(len(files[name]))}
		if err := a.WriteHeader(h); err != nil {
			return err
		}
		if _, err := a.Write(files[name]); err != nil {
			return err
		}
	}
	return a.Close()
}
