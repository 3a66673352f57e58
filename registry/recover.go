// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"ccload/structops"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// Recover finishes or takes back what a process that was killed has left half done, takes
// over what earlier versions left, and looks for what is not ours in our places on
// bpffs. The warnings say what it has changed, what it cannot change, and what it leaves
// alone because ccload has not made it. Whoever means to change something calls it
// before; without CAP_SYS_ADMIN and CAP_NET_ADMIN it does nothing.
func Recover() (warnings []string, err error) {
	if need("/", "CAP_SYS_ADMIN", "CAP_NET_ADMIN") != nil {
		return nil, nil
	}
	warnings, _ = mountBPFFS() // what fails, who needs it says
	if !anythingLeft() {
		return warnings, nil
	}
	unlock, err := lock()
	if err != nil {
		return warnings, err
	}
	defer unlock()
	for _, step := range []func() []error{takeOver, strangers, sweepPins, sweepReplacements, sweepExtensions, sweepUses, unusedMaps} {
		for _, err := range step() {
			if err != nil {
				warnings = append(warnings, err.Error())
			}
		}
	}
	return warnings, nil
}

// anythingLeft says whether there may be something to mend: names alone, all of them
// registered, are not.
func anythingLeft() bool {
	live := func(path string) bool { return isName(path) && !structops.Stale(path) }
	if len(look(rootDir, 1, nil))+len(look(pinDir, 0, live)) > 0 {
		return true
	}
	paths := []string{extendDir, useDir, replaceDir, mapDir}
	for _, f := range formerDirs {
		paths = append(paths, f.from)
	}
	for _, p := range paths {
		if _, err := os.Lstat(p); err == nil {
			return true
		}
	}
	return false
}

// strangers finds what is not of the kind that we put where it is.
func strangers() []error {
	return slices.Concat(
		look(rootDir, 1, nil), look(pinDir, 0, isName), look(extendDir, 2, isPlace), look(useDir, 0, isUse), look(mapDir, 0, isMap),
		look(replaceDir, 1, nil), look(shadowDir, 0, isName), look(replacedDir, 0, isName))
}

// look goes through a directory of ours, which has directories to a depth and pins there.
// A nil ours leaves the directories alone.
func look(path string, depth int, ours func(path string) bool) (refused []error) {
	d, err := openDir(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return []error{err}
	}
	defer d.Close()
	dirs, files, err := d.names()
	if err != nil {
		refused = append(refused, err)
	}
	for _, name := range dirs {
		switch {
		case depth == 0:
			refused = append(refused, d.refuse(name, "it is a directory"))
		case ours != nil:
			refused = append(refused, look(filepath.Join(path, name), depth-1, ours)...)
		}
	}
	for _, name := range files {
		err := d.pinned(name)
		if err == nil && (depth > 0 || !ours(d.at(name))) {
			err = d.refuse(name, "ccload did not pin it there")
		}
		if err != nil {
			refused = append(refused, err)
		}
	}
	return refused
}

// isName says whether a pin holds a congestion control, be it registered or not.
func isName(path string) bool {
	if structops.Stale(path) {
		return true
	}
	l, err := structops.OpenPinned(path)
	if err == nil {
		l.Close()
	}
	return err == nil
}

// isPlace says whether a pin is one of an extension.
func isPlace(path string) bool {
	_, err := structops.OpenPlace(path)
	return err == nil && strings.Contains(filepath.Base(path), "-")
}

// isMap says whether a pin holds a map.
func isMap(path string) bool { return pinnedMap(path) != 0 }

// unusedMaps is sweepMaps as a step of Recover.
func unusedMaps() []error { _, err := sweepMaps(); return []error{err} }

// isUse says whether a pin is one of a selection.
func isUse(path string) bool {
	if strings.HasPrefix(filepath.Base(path), groupPin) {
		l, err := link.LoadPinnedLink(path, nil)
		if err != nil {
			return false
		}
		defer l.Close()
		_, err = readGroup(l)
		return err == nil
	}
	m, err := ebpf.LoadPinnedMap(path, nil)
	if err != nil {
		return false
	}
	defer m.Close()
	switch path := filepath.Join(useDir, filepath.Base(path)); path {
	case undoPath:
		return m.Type() == ebpf.Hash
	case formerPath:
		return m.Type() == ebpf.SkStorage
	}
	return false
}
