// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Link is a registration that this process holds. It is not safe for use by
// several goroutines.
//
// It holds plain descriptors without a finalizer: a Link that is forgotten stays
// registered until the process ends.
type Link struct {
	name  string
	mapFD int
	fd    int // of the BPF link; -1 if it is registered without
	mapID uint32
	id    uint32

	pinned, closed bool
}

// Attach registers a congestion control: from then on its name is in
// /proc/sys/net/ipv4/tcp_available_congestion_control. "" is the only one that is
// loaded. The Object may be closed afterwards.
//
// ErrExists says that the name is taken, be it by a part of the kernel.
func (o *Object) Attach(mapName string) (*Link, error) {
	return o.AttachPinned(mapName, func(*Link) error { return nil })
}

// AttachPinned is Attach with a function that pins, called as soon as the process
// could be killed and leave the registration without a pin. Without a BPF link,
// which would end with the process, that is before it is registered: if this then
// fails, a pin of what is not registered is left. If the function fails nothing
// is registered.
func (o *Object) AttachPinned(mapName string, pin func(*Link) error) (*Link, error) {
	m, err := o.find(mapName)
	if err != nil {
		return nil, fmt.Errorf("attach: %w", err)
	}
	l := &Link{name: m.Name, mapFD: m.fd, fd: -1, mapID: m.id}
	if !m.link {
		if err := pin(l); err != nil {
			return nil, err
		}
	}
	if err := m.put(); err != nil {
		return nil, attachError(m.Name, err)
	}
	if m.link {
		if l.fd, err = createLink(m.fd); err != nil {
			return nil, attachError(m.Name, err)
		}
		if l.id, err = linkID(l.fd); err != nil {
			unix.Close(l.fd)
			return nil, attachError(m.Name, err)
		}
		if err := pin(l); err != nil {
			unix.Close(l.fd)
			return nil, err
		}
	}
	m.fd = -1 // it is the Link's now
	return l, nil
}

func attachError(name string, err error) error {
	if errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("congestion control %q: %w: %w", name, ErrExists, err)
	}
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("congestion control %q: attach: %w: the kernel's log may say more", name, err)
	}
	return fmt.Errorf("congestion control %q: attach: %w", name, permission("", err, loading...))
}

func linkID(fd int) (uint32, error) {
	var info linkInfo
	err := objInfo(fd, &info)
	return info.ID, err
}

// MapID is the kernel's number of the map.
func (l *Link) MapID() uint32 { return l.mapID }

// LinkID is the kernel's number of the BPF link; 0 if it is registered without.
func (l *Link) LinkID() uint32 { return l.id }

// Update puts another congestion control of the same name in the place of this
// one, at once: there is no moment without. Sockets that are open keep the old
// one, and so do the sockets of a network namespace that has the name as its
// default, until that is set again. "" is the only map that is loaded.
//
// It is ErrNoLinks where there is no link to update (before Linux 6.4, or a
// .struct_ops section), and EPERM if somebody else has updated it meanwhile.
func (l *Link) Update(o *Object, mapName string) error {
	fail := func(err error) error {
		return fmt.Errorf("congestion control %q: update: %w", l.name, err)
	}
	m, err := o.find(mapName)
	if err != nil {
		return fail(err)
	}
	switch {
	case l.closed:
		return fail(os.ErrClosed)
	case l.fd < 0:
		layout, err := kernelLayout()
		if err == nil && layout.links {
			return fail(fmt.Errorf("%w: it was registered without a link", ErrNoLinks))
		}
		return fail(ErrNoLinks)
	case !m.link:
		return fail(fmt.Errorf("map %q: it is not from a .struct_ops.link section", m.Map))
	case m.Name != l.name:
		return fail(fmt.Errorf("map %q: its name is %q: %w", m.Map, m.Name, unix.EINVAL))
	}
	if err := m.put(); err != nil {
		return fail(err)
	}
	if err := updateLink(l.fd, m.fd, l.mapFD); err != nil {
		return fail(err)
	}
	unix.Close(l.mapFD)
	l.mapFD, l.mapID, m.fd = m.fd, m.id, -1
	return nil
}

// Pin keeps the registration on a bpffs, at a path that does not exist yet: it
// then outlives Close and the process, until the file is removed (or, without a
// link, until Unregister). Only the owner may open the file. Dots are not allowed
// in names there.
func (l *Link) Pin(path string) error {
	if l.closed {
		return fmt.Errorf("pin %q: %w", path, os.ErrClosed)
	}
	fd := l.fd
	if fd < 0 {
		fd = l.mapFD
	}
	if err := pin(fd, path); err != nil {
		return fmt.Errorf("pin %q: %w", path, permission("", err, loading...))
	}
	// A umask can only take bits away, so that the mode is at most this already;
	// a default ACL cannot be on a bpffs. But the owner must be able to open it.
	if err := os.Chmod(path, 0o600); err != nil {
		os.Remove(path)
		return fmt.Errorf("pin: %w", err)
	}
	l.pinned = true
	return nil
}

// Close unregisters, unless it is pinned. The name may be in the kernel's list
// for some milliseconds more. It may be called again.
func (l *Link) Close() error {
	if l.closed {
		return nil
	}
	l.closed = true
	defer unix.Close(l.mapFD)
	if l.fd >= 0 {
		unix.Close(l.fd)
		return nil
	}
	if l.pinned {
		return nil
	}
	if err := deleteElement(l.mapFD); err != nil {
		return fmt.Errorf("congestion control %q: unregister: %w", l.name, err)
	}
	return nil
}

// deleteElement unregisters what has no link. That it is unregistered already is
// no error.
func deleteElement(mapFD int) error {
	err := element(unix.BPF_MAP_DELETE_ELEM, mapFD, nil)
	if errors.Is(err, unix.EINPROGRESS) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// OpenPinned opens what Pin has left, with a link or without. The Link counts as
// pinned: its Close does not unregister.
func OpenPinned(path string) (*Link, error) {
	l, err := openPinned(path)
	if err != nil {
		return nil, fmt.Errorf("pin %q: %w", path, permission("", err, looking...))
	}
	return l, nil
}

// Open opens what is registered, whoever did it, by its link or else its map. The
// Link counts as pinned: its Close does not unregister. ErrNotFound says that it is
// registered no more.
func Open(i *Info) (*Link, error) {
	l := &Link{name: i.Name, mapFD: -1, fd: -1, mapID: i.MapID, id: i.LinkID, pinned: true}
	fail := func(err error) (*Link, error) {
		l.Close()
		if errors.Is(err, unix.ENOENT) {
			err = fmt.Errorf("%w: %w", ErrNotFound, err)
		}
		return nil, fmt.Errorf("congestion control %q: %w", i.Name, permission("", err, looking...))
	}
	var err error
	if l.mapFD, err = openID(unix.BPF_MAP_GET_FD_BY_ID, i.MapID); err != nil {
		return fail(err)
	}
	if i.LinkID != 0 {
		if l.fd, err = openID(unix.BPF_LINK_GET_FD_BY_ID, i.LinkID); err != nil {
			return fail(err)
		}
	}
	return l, nil
}

// Copy registers what is registered under another name as well, with the same
// programs and thus the same parameters, and no link. The function pins, before it
// is registered, as AttachPinned does. ErrExists says that the name is taken.
func (i *Info) Copy(name string, pin func(*Link) error) (*Link, error) {
	fail := func(err error) (*Link, error) {
		return nil, fmt.Errorf("congestion control %q: copy as %q: %w", i.Name, name, permission("", err, loading...))
	}
	if err := CheckName(name); err != nil {
		return fail(err)
	}
	layout, err := kernelLayout()
	if err != nil {
		return fail(err)
	}
	value := make([]byte, layout.size)
	copy(value[layout.member("name").off:], name)
	binary.NativeEndian.PutUint32(value[layout.member("flags").off:], i.Flags)
	types := -1
	for _, m := range i.Members {
		fd, err := openID(unix.BPF_PROG_GET_FD_BY_ID, m.ID)
		if err != nil {
			return fail(err)
		}
		defer unix.Close(fd)
		binary.NativeEndian.PutUint64(value[layout.member(m.Member).off:], uint64(fd))
		if types < 0 {
			var info progInfo
			if err := objInfo(fd, &info); err != nil {
				return fail(err)
			}
			if info.BTF == 0 { // the object had no .BTF.ext
				b, err := anyBTF()
				if err != nil {
					return fail(err)
				}
				defer b.Close()
				types = b.FD()
				continue
			}
			if types, err = openID(unix.BPF_BTF_GET_FD_BY_ID, info.BTF); err != nil {
				return fail(err)
			}
			defer unix.Close(types)
		}
	}
	l := &Link{name: name, fd: -1}
	if l.mapFD, err = createMap(i.Map, types, layout.typeID, layout.size, 0); err != nil {
		return fail(err)
	}
	var info mapInfo
	err = objInfo(l.mapFD, &info)
	l.mapID = info.ID
	if err == nil {
		err = pin(l)
	}
	if err == nil {
		err = element(unix.BPF_MAP_UPDATE_ELEM, l.mapFD, value)
	}
	if err != nil {
		unix.Close(l.mapFD)
		if errors.Is(err, unix.EEXIST) {
			err = fmt.Errorf("%w: %w", ErrExists, err)
		}
		return fail(err)
	}
	return l, nil
}

var errForeign = errors.New("not a " + opsType)

func openPinned(path string) (*Link, error) {
	fd, err := openPin(path)
	if err != nil {
		return nil, err
	}
	l := &Link{mapFD: -1, fd: -1, pinned: true}
	fail := func(err error) (*Link, error) {
		unix.Close(fd)
		if l.mapFD >= 0 && l.mapFD != fd {
			unix.Close(l.mapFD)
		}
		return nil, err
	}
	kind, err := fdKind(fd)
	if err != nil {
		return fail(err)
	}
	switch kind {
	case "bpf_link", "bpf-link":
		var info linkInfo
		if err := objInfo(fd, &info); err != nil {
			return fail(err)
		}
		if info.Type != structOpsLink {
			return fail(errForeign)
		}
		l.fd, l.id = fd, info.ID
		if l.mapFD, err = openID(unix.BPF_MAP_GET_FD_BY_ID, info.Map); err != nil {
			return fail(err)
		}
	case "bpf-map":
		l.mapFD = fd
	default:
		return fail(errForeign)
	}
	layout, err := kernelLayout()
	if err != nil {
		return fail(err)
	}
	m, err := readMap(l.mapFD, layout)
	if err != nil {
		return fail(err)
	}
	if m == nil {
		return fail(errForeign)
	}
	l.name, l.mapID = m.Name, m.MapID
	return l, nil
}

// fdKind is what sort of BPF object a descriptor is: "bpf-map", "bpf_link" or
// "bpf-prog".
func fdKind(fd int) (string, error) {
	to, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	return strings.Trim(strings.TrimPrefix(to, "anon_inode:"), "[]"), err
}
