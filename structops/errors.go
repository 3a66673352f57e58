// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// What Parse may find wrong with an object; also Load where it checks again.
var (
	ErrObject   = errors.New("not a BPF object file")
	ErrNoBTF    = errors.New("no BTF in the object: compile with -g")
	ErrNoOps    = errors.New("no tcp_congestion_ops in the object")
	ErrLicense  = errors.New("licence is not GPL-compatible")
	ErrName     = errors.New("not a name for a congestion control")
	ErrRequired = errors.New("required member is not set")
	ErrMember   = errors.New("member may not be set")
	ErrProgram  = errors.New("not a struct_ops program")
)

var (
	ErrNotFound  = errors.New("not found")
	ErrNoLinks   = errors.New("this kernel has no BPF links for struct_ops (before 6.4)")
	ErrKernelBTF = errors.New("this kernel has no BTF")
	ErrKernel    = errors.New("this kernel lacks it")
	ErrExists    = errors.New("name already taken")
)

// PermissionError says why the kernel refused with EPERM or EACCES. It is
// os.ErrPermission, and the errno shows through.
type PermissionError struct {
	Missing  []string // capabilities that the process lacks
	Lockdown string   // lockdown mode, where it can be read: "integrity" or "confidentiality"
	Others   []string // what else may forbid it, as far as that can be told
	Errno    error
}

func (e *PermissionError) Error() string {
	switch {
	case len(e.Missing) > 0:
		return fmt.Sprintf("%v: needs %s", e.Errno, strings.Join(e.Missing, ", "))
	case e.Lockdown != "":
		return fmt.Sprintf("%v: BPF is locked down (lockdown=%s)", e.Errno, e.Lockdown)
	}
	others := "a lockdown, a security module, a seccomp filter or a user namespace"
	if n := len(e.Others); n > 1 {
		others = strings.Join(e.Others[:n-1], ", ") + " or " + e.Others[n-1]
	}
	return fmt.Sprintf("%v: the process has all required capabilities; blocked by %s", e.Errno, others)
}

func (e *PermissionError) Unwrap() error        { return e.Errno }
func (e *PermissionError) Is(target error) bool { return target == os.ErrPermission }

// permission makes a PermissionError of an EPERM, and leaves other errors alone;
// needs are the capabilities that the call takes. The library takes every EPERM
// for a small RLIMIT_MEMLOCK, which was true until Linux 5.11.
func permission(root string, err error, needs ...string) error {
	if !errors.Is(err, unix.EPERM) {
		return err
	}
	e := &PermissionError{Errno: unix.EPERM}
	if status, err := os.ReadFile(root + "/proc/self/status"); err == nil {
		e.Missing = missingCaps(string(status), needs)
		e.Others = []string{"a lockdown", "a security module"}
		if strings.Contains(string(status), "\nSeccomp:\t2") {
			e.Others = append(e.Others, "the seccomp filter that is in force for this process")
		}
		// In the initial user namespace each id stands for itself.
		if m, err := os.ReadFile(root + "/proc/self/uid_map"); err == nil && strings.Join(strings.Fields(string(m)), " ") != "0 0 4294967295" {
			e.Others = append(e.Others, "the user namespace that it is in")
		}
	}
	if mode, err := os.ReadFile(root + "/sys/kernel/security/lockdown"); err == nil {
		e.Lockdown = lockdown(string(mode))
	}
	return e
}

// loading is what it takes to load and register a congestion control, and
// looking what it takes to see the maps of others.
var (
	loading = []string{"CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN"}
	looking = []string{"CAP_SYS_ADMIN"}
)

// missingCaps reads the effective capabilities of a /proc/PID/status file and
// tells which are not there (capabilities(7)). For BPF, CAP_SYS_ADMIN includes all
// the others.
func missingCaps(status string, needs []string) []string {
	const sysAdmin = 21
	bits := map[string]int{"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": sysAdmin, "CAP_PERFMON": 38, "CAP_BPF": 39}
	_, rest, ok := strings.Cut(status, "CapEff:")
	var have uint64
	if _, err := fmt.Sscanf(rest, "%x", &have); !ok || err != nil {
		return nil
	}
	var missing []string
	for _, c := range needs {
		if have>>bits[c]&1 == 0 && have>>sysAdmin&1 == 0 {
			missing = append(missing, c)
		}
	}
	return missing
}

// lockdown is the chosen mode of a line like "none [integrity] confidentiality";
// "" for none.
func lockdown(line string) string {
	_, rest, _ := strings.Cut(line, "[")
	mode, _, _ := strings.Cut(rest, "]")
	if mode == "none" {
		return ""
	}
	return mode
}

// VerifierError says that the kernel's verifier refused a program, and why. Its
// text is the reason in one line, as Verify has it; with %+v it is the verifier's
// whole log. errors.As finds the *ebpf.VerifierError in it, and the errno.
type VerifierError struct {
	Reason
	Err error
}

func (e *VerifierError) Error() string { return e.Reason.String() }
func (e *VerifierError) Unwrap() error { return e.Err }

// Format writes the whole log for %+v.
func (e *VerifierError) Format(f fmt.State, verb rune) {
	fmt.Fprint(f, e.Error())
	if verb == 'v' && f.Flag('+') {
		for _, line := range e.Log {
			fmt.Fprintf(f, "\n\t%s", line)
		}
	}
}
