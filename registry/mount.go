// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	"ccload/internal/tcpca"
	"ccload/structops"

	"golang.org/x/sys/unix"
)

// The kernel's table of names is one for all, but what is pinned belongs to one mount of
// bpffs. A container or a service may have its own: what is selected there is not in the
// journal here, and its names go with it.

// Apart says whether the bpffs here is another one than that of process 1, so that what
// is registered and remembered here goes with this mount namespace, and nobody elsewhere
// knows of it.
func Apart() bool {
	var here unix.Stat_t
	if unix.Stat(bpffs, &here) != nil {
		return false
	}
	f, err := os.Open("/proc/1/mountinfo")
	if err != nil {
		return otherFile("/proc/self/ns/mnt", "/proc/1/ns/mnt")
	}
	defer f.Close()
	return bpffsDevice(f) != fmt.Sprintf("%d:%d", unix.Major(here.Dev), unix.Minor(here.Dev))
}

// bpffsDevice is the device of the bpffs that a mountinfo file (proc_pid_mountinfo(5)) has
// in its usual place; "" if there is none.
func bpffsDevice(mountinfo io.Reader) (device string) {
	for lines := bufio.NewScanner(mountinfo); lines.Scan(); {
		if point, ok := structops.MountPoint(lines.Text(), "bpf"); ok && point == bpffs {
			device = strings.Fields(lines.Text())[2] // a later one is mounted over it
		}
	}
	return device
}

// apart is the warning about a name that is registered here.
func apart(link bool) []string {
	if !Apart() {
		return nil
	}
	goes := "the name goes when this mount namespace does"
	if !link {
		goes = "the pin goes when this mount namespace does, and the name stays without it"
	}
	return []string{fmt.Sprintf("the bpffs on %s is not that of process 1: %s, and a ccload elsewhere does not know what was selected here", bpffs, goes)}
}

// readJournal reads what the journal here knows.
func readJournal() (entries map[key]value, err error) {
	m, err := openMap(undoPath)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer m.Close()
	return (&journal{m}).entries()
}

// whose says who has made a selection in a network namespace.
func (s *seen) whose(inode uint64, sel *Selection) string {
	if s.blind {
		return byUnknown
	}
	now := sel.Name
	if sel.Lock {
		now = selection(now, true)
	}
	for k, v := range s.journal {
		same := k.Kind == keyDefault && sel.Kind == byDefault || k.Kind == keyRoute && sel.Kind == byRoute && targetOf(k).prefix.String() == sel.Target
		if same && v.Inode == inode && now == v.Ours[1].String() {
			return byCcload
		}
	}
	return ""
}

// foreign are the selections that nobody here has made, of names that are in BPF or not
// registered (any more), as people read them.
func (s *seen) foreign() (notices []string) {
	for name, in := range s.selections {
		if !slices.ContainsFunc(in, func(sel Selection) bool { return sel.By == "" }) {
			continue
		}
		e, err := find(name)
		if err == nil && e.Kind != BPF {
			continue
		}
		for _, sel := range in {
			if sel.By == "" {
				notices = append(notices, sel.notice(err != nil))
			}
		}
	}
	slices.Sort(notices)
	return notices
}

// missing are the selections of names that the kernel does not have.
func (s *seen) missing(have []*Entry) (notices []string) {
	for name, in := range s.selections {
		if slices.ContainsFunc(have, func(e *Entry) bool { return e.Name == name }) {
			continue
		}
		if there, _, err := tcpca.Ask(name); err != nil || there { // the list may end early
			continue
		}
		for _, sel := range in {
			notices = append(notices, sel.notice(true))
		}
	}
	slices.Sort(notices)
	return notices
}

func (s *Selection) notice(missing bool) string {
	text := fmt.Sprintf("%s: %s is selected", s.Place(), s.Name)
	if missing {
		text += ", which is not registered"
	}
	if s.By == "" {
		text += "; not by a ccload that shares the bpffs here"
	}
	return text
}
