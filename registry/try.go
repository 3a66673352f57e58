// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"fmt"
	"maps"
	"os"

	"ccload/internal/bpfload"
	"ccload/structops"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Try says whether the kernel takes what this package does not find everywhere:
// "move" and "count", which walk through sockets, "choose", which selects for control
// groups, and "pidfd_getfd", by which sockets of other processes are reached. They are
// loaded, and but for "choose" attached, as they are to be used, but nothing is changed.
func Try(what string) error {
	object := moveObject
	switch what {
	case "pidfd_getfd":
		return tryDuplicate()
	case "choose":
		object = groupObject
	}
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(object))
	if err != nil {
		return err
	}
	if spec.Programs[what] == nil {
		return fmt.Errorf("program %q: %w", what, structops.ErrNotFound)
	}
	maps.DeleteFunc(spec.Programs, func(name string, _ *ebpf.ProgramSpec) bool { return name != what })
	coll, err := bpfload.Load(spec, nil)
	if err != nil {
		return err
	}
	defer coll.Close()
	switch what {
	case "move":
		it, err := attachIter(coll, what, nil)
		if err != nil {
			return err
		}
		return it.Close()
	case "count":
		it, err := attachIter(coll, what, coll.Maps["former"])
		if err != nil {
			return err
		}
		return it.Close()
	}
	return nil
}

func tryDuplicate() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	again, err := duplicate(os.Getpid(), fd)
	if err != nil {
		return err
	}
	return unix.Close(again)
}
