// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"strings"

	"golang.org/x/sys/unix"
)

// Stale says whether a pin holds a congestion control that is not registered: a
// link that was detached, or a map that was unregistered or never registered. What
// cannot be opened and what is something else is not.
func Stale(path string) bool {
	fd, err := openPin(path)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	kind, err := fdKind(fd)
	if err != nil {
		return false
	}
	if strings.HasSuffix(kind, "link") {
		var info linkInfo
		err := objInfo(fd, &info)
		return err == nil && info.Type == structOpsLink && info.Map == 0
	}
	layout, err := kernelLayout()
	if err != nil || kind != "bpf-map" {
		return false
	}
	i, err := readMap(fd, layout)
	return err == nil && i != nil && i.State != StateInUse
}
