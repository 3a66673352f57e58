// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"ccload/structops"

	"golang.org/x/sys/unix"
)

// ErrInitialOnly says that the list of allowed congestion controls cannot be
// changed: it is one for the kernel and belongs to the initial network namespace,
// which this process cannot reach.
var ErrInitialOnly = errors.New("the list of allowed congestion controls can be changed in the initial network namespace only")

// NotFoundError says that the kernel has no congestion control of that name.
type NotFoundError struct {
	Name     string
	Nearest  string   // what may have been meant; "" if nothing is near
	Selected []string // places where it is selected all the same; only Lookup looks for them
}

func (e *NotFoundError) Error() string {
	if len(e.Selected) > 0 {
		return "the kernel has no congestion control of that name, but it is selected for " + strings.Join(e.Selected, ", ")
	}
	if e.Nearest != "" {
		return fmt.Sprintf("the kernel has no congestion control of that name; did you mean %q?", e.Nearest)
	}
	return "the kernel has no congestion control of that name"
}

// TakenError says that a name is registered already.
type TakenError struct{ Entry }

func (e *TakenError) Error() string { return "the name is taken: " + e.what() }

// KindError says that something can be done to BPF congestion controls only.
type KindError struct{ Entry }

func (e *KindError) Error() string {
	return "not a BPF congestion control: " + e.what()
}

func (e *Entry) what() string {
	switch e.Kind {
	case BPF:
		return fmt.Sprintf("BPF map %d", e.MapID)
	case Module:
		return "kernel module " + e.Module
	case Builtin:
		return "built into the kernel"
	}
	return "registered"
}

// InUseError says where a congestion control is selected.
type InUseError struct {
	Namespaces []string // whose default it is: names, "pid N", or "this one"
	Places     []string // routes and control groups
	Foreign    []string // those of all these that nobody has selected who shares the bpffs here
}

func (e *InUseError) Error() string {
	var in []string
	if len(e.Namespaces) > 0 {
		in = append(in, "network namespaces have it as their default: "+strings.Join(e.Namespaces, ", "))
	}
	if len(e.Places) > 0 {
		in = append(in, "it is selected for "+strings.Join(e.Places, ", "))
	}
	if len(e.Foreign) > 0 {
		in = append(in, "of these not by a ccload that shares the bpffs here: "+strings.Join(e.Foreign, ", "))
	}
	return strings.Join(in, "; ")
}

// RestrictedError says that a network namespace other than the initial one may
// not have this default, because its name is not in the list of allowed ones.
type RestrictedError struct{ Name string }

func (e *RestrictedError) Error() string {
	return fmt.Sprintf("%s is not in the list of allowed congestion controls, which a default outside the initial network namespace must be", e.Name)
}

// capBits are the capabilities that ccload asks for (linux/capability.h).
var capBits = map[string]int{"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21, "CAP_PERFMON": 38, "CAP_BPF": 39}

// Missing tells which of the named capabilities this process has not. What
// CAP_SYS_ADMIN includes counts as there with it. root is where proc/ is.
func Missing(root string, caps ...string) ([]string, error) {
	b, err := os.ReadFile(filepath.Join(root, "proc/self/status"))
	if err != nil {
		return nil, fmt.Errorf("capabilities: %w", err)
	}
	have, err := parseCaps(b)
	if err != nil {
		return nil, fmt.Errorf("capabilities: %w", err)
	}
	var missing []string
	for _, c := range caps {
		admin := have>>capBits["CAP_SYS_ADMIN"]&1 == 1 && c != "CAP_NET_ADMIN"
		if have>>capBits[c]&1 == 0 && !admin {
			missing = append(missing, c)
		}
	}
	return missing, nil
}

// need gives a *structops.PermissionError unless all the capabilities are there.
func need(root string, caps ...string) error {
	missing, err := Missing(root, caps...)
	if err == nil && len(missing) > 0 {
		err = &structops.PermissionError{Missing: missing, Errno: unix.EPERM}
	}
	return err
}

// parseCaps reads the effective capabilities of a /proc/PID/status file.
func parseCaps(status []byte) (uint64, error) {
	for line := range bytes.Lines(status) {
		if v, ok := bytes.CutPrefix(line, []byte("CapEff:")); ok {
			return strconv.ParseUint(string(bytes.TrimSpace(v)), 16, 64)
		}
	}
	return 0, errors.New("no CapEff line")
}

// Nearest is the candidate that a mistyped name most likely meant; "" if none
// is near.
func Nearest(name string, candidates []string) string {
	best, at := "", max(1, len(name)/3)+1
	for _, c := range candidates {
		d := distance(name, c)
		if name != "" && (strings.HasPrefix(c, name) || strings.HasSuffix(c, "_"+name)) {
			d = min(d, 1)
		}
		if d < at {
			best, at = c, d
		}
	}
	return best
}

// distance is the number of letters to insert, delete or exchange to make a
// into b (Levenshtein).
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			d := diagonal
			if a[i] != b[j] {
				d++
			}
			diagonal = row[j+1]
			row[j+1] = min(d, diagonal+1, row[j]+1)
		}
	}
	return row[len(b)]
}
