// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"ccload/internal/fault"
	"ccload/structops"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// mapPins is the directory of the maps that objects pin by name; "" is ccload's own.
// There a map goes with the last congestion control that uses it. Elsewhere it stays,
// as libbpf leaves it, for whoever shares it.
type mapPins string

// Open opens the map of that name.
func (p mapPins) Open(name string) (m *ebpf.Map, err error) {
	d, err := p.open(openDir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	if err := d.pinned(name); err != nil {
		return nil, err
	}
	err = d.do(name, func(path string) error { m, err = ebpf.LoadPinnedMap(path, nil); return err })
	return m, err
}

// Pin pins a map there, for root alone.
func (p mapPins) Pin(name string, m *ebpf.Map) error {
	if p == "" {
		return newPin(filepath.Join(mapDir, name), m.Pin)
	}
	d, err := p.open(openDir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := fault.At("pin " + filepath.Join(d.path, name)); err != nil {
		return err
	}
	return d.do(name, m.Pin)
}

// Unpin removes the pin of a map there.
func (p mapPins) Unpin(name string) error {
	if p == "" {
		return unpin(filepath.Join(mapDir, name))
	}
	d, err := p.open(openDir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.pinned(name); err != nil {
		return err
	}
	return d.remove(name, 0)
}

// open opens the directory. One that is not ccload's must be root's all the same.
func (p mapPins) open(own func(string) (*dir, error)) (*dir, error) {
	if p == "" {
		return own(mapDir)
	}
	path := string(p)
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) {
		return nil, &RefusedError{path, "it is not a directory", "name one on bpffs"}
	}
	if errors.Is(err, unix.ENOENT) {
		return nil, &RefusedError{path, "there is no such directory", "make it: mkdir -m 700 " + path}
	}
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	d := &dir{os.NewFile(uintptr(fd), path), path}
	var in unix.Statfs_t
	var st unix.Stat_t
	err = errors.Join(unix.Fstatfs(fd, &in), unix.Fstat(fd, &st))
	switch {
	case err != nil:
	case in.Type != unix.BPF_FS_MAGIC:
		err = &RefusedError{path, "it is not on bpffs", "name one below " + bpffs}
	case st.Uid != 0:
		err = &RefusedError{path, fmt.Sprintf("it is owned by uid %d, not by root", st.Uid), "name another"}
	case st.Mode&0o022 != 0:
		err = &RefusedError{path, fmt.Sprintf("others may write to it: its mode is %04o", st.Mode&0o7777), "chmod 700 " + path}
	}
	if err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

// paths are where the maps of an object are pinned.
func (p mapPins) paths(obj *structops.Object) (paths []string) {
	in := mapDir
	if p != "" {
		in = string(p)
	}
	for _, name := range obj.PinnedMaps() {
		paths = append(paths, filepath.Join(in, name))
	}
	return paths
}

// pinCalls pins the maps through which the programs of an object call others, so that
// they still do when the process has ended.
func pinCalls(obj *structops.Object) error {
	for name, m := range obj.Calls() {
		info, err := m.Info()
		if err != nil {
			return fmt.Errorf("map %q: %w", name, err)
		}
		id, _ := info.ID()
		if err := newPin(filepath.Join(mapDir, fmt.Sprintf("%s-%d", name, id)), m.Pin); err != nil {
			return fmt.Errorf("map %q: %w", name, err)
		}
	}
	return nil
}

// sweepMaps removes the pins of ccload's own maps that no congestion control uses, of
// those that are registered, and says which. Sockets may still call through a map that
// one used which is not.
func sweepMaps() (removed []string, err error) {
	names, _ := pinsIn(mapDir)
	if len(names) == 0 {
		tidyUp(mapDir)
		return nil, nil
	}
	live, err := structops.Live()
	if err != nil {
		return nil, fmt.Errorf("maps that nothing uses any more: %w", err)
	}
	used := map[uint32]bool{}
	for _, i := range live {
		for _, m := range i.Maps {
			calls := m.Type == ebpf.ProgramArray.String() && i.State == structops.StateToBeFree
			used[m.ID] = used[m.ID] || i.Registered() || calls
		}
	}
	for _, name := range names {
		path := filepath.Join(mapDir, name)
		if id := ownMap(path); id == 0 || used[id] {
			continue
		}
		if rerr := unpin(path); rerr != nil {
			err = errors.Join(err, fmt.Errorf("a map that nothing uses any more: %w", rerr))
			continue
		}
		removed = append(removed, path)
	}
	return removed, err
}

// sharedElsewhere are the pins of a congestion control's maps that are not ccload's.
func sharedElsewhere(i *structops.Info) (paths []string) {
	if len(i.Maps) == 0 {
		return nil
	}
	pinned := pins()
	for _, m := range i.Maps {
		for _, path := range pinned[m.ID] {
			if !strings.HasPrefix(path, rootDir+"/") {
				paths = append(paths, path)
			}
		}
	}
	return paths
}

// pinnedIn is where elsewhere maps that an object pins by name are pinned now; "" if
// that is nowhere, or they are in ccload's own directory, too.
func pinnedIn(now *structops.Info, spec *structops.Spec) string {
	names := spec.PinsMaps()
	if len(names) == 0 {
		return ""
	}
	for _, m := range now.Maps {
		if slices.ContainsFunc(names, func(name string) bool { return ownMap(filepath.Join(mapDir, name)) == m.ID }) {
			return ""
		}
	}
	for _, path := range sharedElsewhere(now) {
		if slices.Contains(names, filepath.Base(path)) {
			return filepath.Dir(path)
		}
	}
	return ""
}
