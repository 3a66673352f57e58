// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/cilium/ebpf"
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
	Errno    error
}

func (e *PermissionError) Error() string {
	switch {
	case len(e.Missing) > 0:
		return fmt.Sprintf("%v: needs %s", e.Errno, strings.Join(e.Missing, ", "))
	case e.Lockdown != "":
		return fmt.Sprintf("%v: BPF is locked down (lockdown=%s)", e.Errno, e.Lockdown)
	}
	return fmt.Sprintf("%v: no capability is missing; a lockdown, a security module, a seccomp filter or a user namespace forbids it", e.Errno)
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

// VerifierError says that the kernel's verifier refused a program. Its text is
// one line; with %+v it is the verifier's whole log. errors.As finds the
// *ebpf.VerifierError in it.
type VerifierError struct {
	Program string
	Member  string
	Policy  string // in the place of Member: it is an extension
	Err     *ebpf.VerifierError
}

func (e *VerifierError) Error() string {
	what := fmt.Sprintf("program %q for member %q", e.Program, e.Member)
	if e.Policy != "" {
		what = fmt.Sprintf("program %q for function %q", e.Program, e.Policy)
	}
	reason, source := decisive(e.Err.Log)
	if reason == "" {
		return fmt.Sprintf("%s: refused by the kernel: %v", what, e.Err.Cause)
	}
	if source != "" {
		source = " (at " + source + ")"
	}
	return fmt.Sprintf("%s: refused by the verifier: %s%s: %v", what, reason, source, e.Err.Cause)
}

func (e *VerifierError) Unwrap() error { return e.Err }

// Format writes the whole log for %+v.
func (e *VerifierError) Format(f fmt.State, verb rune) {
	fmt.Fprint(f, e.Error())
	if verb == 'v' && f.Flag('+') {
		for _, line := range e.Err.Log {
			fmt.Fprintf(f, "\n\t%s", line)
		}
	}
}

// decisive finds in a verifier log the line that says why, and the line of C
// that it was at. The reason is the last line that is neither an instruction,
// nor a register state, nor statistics.
func decisive(log []string) (reason, source string) {
	for _, line := range log {
		if rest, ok := strings.CutPrefix(line, "; "); ok {
			// "; text @ file:line" since Linux 6.8
			if text, at, ok := strings.Cut(rest, " @ "); ok {
				rest = at + ": " + strings.TrimSpace(text)
			}
			source = rest
			continue
		}
		if line == "" || isNoise(line) {
			continue
		}
		reason = line
	}
	return reason, source
}

func isNoise(line string) bool {
	for _, p := range []string{"processed ", "verification time", "stack depth", "mark_precise", "from ", "func#", "frame", "Validating ", "arg#", "last_idx", "regs=", "parent ", "old insn", "new insn", "safe", "propagating ", "cur state:", "old state:"} {
		if strings.HasPrefix(line, p) {
			return true
		}
	}
	number, rest, ok := strings.Cut(line, ":")
	if ok && number != "" && strings.Trim(number, "0123456789") == "" {
		return true // "12: (85) call ..." or "12: R0=..."
	}
	return strings.HasPrefix(line, "R") && (strings.Contains(number, "=") || strings.HasPrefix(rest, " R"))
}
