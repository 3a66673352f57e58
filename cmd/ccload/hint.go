// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"unicode"

	"ccload/cc"
	"ccload/harness/trace"
	"ccload/harness/vm"
	"ccload/internal/bpfload"
	"ccload/registry"
	"ccload/structops"

	"golang.org/x/sys/unix"
)

// hint is the advice that goes with an error; "" if there is none.
func hint(err error) string {
	if h, ok := errors.AsType[hinted](err); ok {
		return h.hint
	}
	if e, ok := errors.AsType[*structops.PermissionError](err); ok && len(e.Missing) > 0 {
		if os.Geteuid() == 0 {
			return "this is root, but without that: a container, or a service's settings, took it away"
		}
		return "run it as root"
	}
	if e, ok := errors.AsType[*registry.NotFoundError](err); ok && cc.Lookup(e.Name) != nil {
		return "ccload register " + e.Name
	}
	if e, ok := errors.AsType[*registry.TakenError](err); ok {
		if e.Kind == registry.BPF {
			return fmt.Sprintf("ccload unregister %s, or register it --as another name", e.Name)
		}
		return "register it --as another name"
	}
	if e, ok := errors.AsType[*trace.OccupiedError](err); ok {
		if e.Remove != "" {
			return fmt.Sprintf("rm -r %s makes room for others, or -o names another directory", shellWord(e.Remove))
		}
		return "-o names another directory"
	}
	if errors.Is(err, structops.ErrName) {
		return "--as NAME gives it another name"
	}
	if e, ok := errors.AsType[*registry.ExtendedError](err); ok {
		return fmt.Sprintf("ccload extend %s --remove %s", e.Name, e.Function)
	}
	if e, ok := errors.AsType[*registry.KindError](err); ok && e.Kind == registry.Module {
		return "rmmod " + e.Module
	}
	if e, ok := errors.AsType[*vm.NotPulledError](err); ok {
		return "ccload kernels pull " + e.Name
	}
	if e, ok := errors.AsType[*vm.DamagedKernelError](err); ok {
		return "ccload kernels pull " + e.Name + " fetches it again"
	}
	if _, ok := errors.AsType[*vm.UntrustedError](err); ok {
		return "remove it, or set XDG_CACHE_HOME to a directory of your own"
	}
	if e, ok := errors.AsType[*vm.UnknownKernelError](err); ok {
		return didYouMean(registry.Nearest(e.Name, vm.Names()), "the path of any vmlinuz will do, too")
	}
	if _, ok := errors.AsType[*registry.InUseError](err); ok {
		return "--reset TO selects another in its place first"
	}
	if _, ok := errors.AsType[*registry.RestrictedError](err); ok {
		return "--allow adds it to the list, and thereby lets unprivileged sockets choose it"
	}
	if e, ok := errors.AsType[*cc.UnknownTunableError](err); ok {
		var names []string
		for _, t := range e.Algorithm.Tunables {
			names = append(names, t.Name)
		}
		return didYouMean(registry.Nearest(e.Name, names), "")
	}
	if e, ok := errors.AsType[*structops.VerifierError](err); ok {
		return refusedHint(e, "--log prints the whole log of the verifier")
	}
	if _, ok := errors.AsType[*registry.RefusedError](err); ok {
		return "" // it says itself what to do
	}
	_, refused := errors.AsType[*bpfload.RefusedError](err)
	if refused || errors.Is(err, structops.ErrKernelBTF) || errors.Is(err, unix.EPERM) {
		return "ccload doctor says what this machine allows"
	}
	return ""
}

// shellWord is a path as a shell takes it.
func shellWord(path string) string {
	if strings.HasPrefix(path, "-") {
		path = "./" + path
	}
	if strings.ContainsFunc(path, func(r rune) bool { return !strings.ContainsRune("/._-+:,", r) && !unicode.In(r, unicode.L, unicode.N) }) {
		path = "'" + strings.ReplaceAll(path, "'", `'\''`) + "'"
	}
	return path
}

// refusedHint is what a refusal means, and how to see the log.
func refusedHint(e *structops.VerifierError, log string) string {
	switch {
	case len(e.Log) == 0:
		return e.Means
	case e.Means == "":
		return log
	}
	return e.Means + "; " + log
}

// didYouMean asks whether the nearest was meant, or else gives other advice.
func didYouMean(nearest, otherwise string) string {
	if nearest == "" {
		return otherwise
	}
	return fmt.Sprintf("did you mean %s?", nearest)
}
