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

	"ccload/internal/netns"

	"golang.org/x/sys/unix"
)

// The sysctls of tcp(7). The default is per network namespace; the names are the
// kernel's, in every namespace; the allowed ones can be changed in the initial
// one only.
const (
	sysctlDefault   = "proc/sys/net/ipv4/tcp_congestion_control"
	sysctlAvailable = "proc/sys/net/ipv4/tcp_available_congestion_control"
	sysctlAllowed   = "proc/sys/net/ipv4/tcp_allowed_congestion_control"
)

// nonRestricted is TCP_CONG_NON_RESTRICTED (include/net/tcp.h): those whose
// flags have it are the allowed ones.
const nonRestricted = 1

// Default is the default congestion control of a network namespace; nil means
// the one that the caller is in.
func Default(ns *netns.NS) (name string, err error) {
	err = in(ns, func() error { name, err = readDefault("/"); return err })
	return name, err
}

// Change says what SetDefault changed.
type Change struct {
	Before  string `json:"before"`
	After   string `json:"after"`
	Allowed bool   `json:"allowed,omitempty"` // it was added to the list of allowed ones
}

// SetDefault makes a congestion control the default for new sockets in a
// network namespace; nil means the one that the caller is in. A kernel module
// that has it is loaded if need be. The initial namespace makes whatever is its
// default an allowed one; any other takes only allowed ones, so there a name that
// is not gives a *RestrictedError, or with allow is added to the list.
//
// Restore takes all of it back. It needs CAP_NET_ADMIN and CAP_BPF, and for another
// namespace CAP_SYS_ADMIN.
func SetDefault(ns *netns.NS, name string, allow bool) (*Change, error) {
	fail := func(err error) (*Change, error) { return nil, fmt.Errorf("default %q: %w", name, err) }
	if err := need("/", "CAP_NET_ADMIN", "CAP_BPF"); err != nil {
		return fail(err)
	}
	unlock, err := lock()
	if err != nil {
		return fail(err)
	}
	defer unlock()
	c := &Change{After: name}
	err = in(ns, func() (err error) {
		if c.Before, err = readDefault("/"); err != nil {
			return err
		}
		err = checkDefault("/", name)
		if _, restricted := errors.AsType[*RestrictedError](err); restricted && allow {
			c.Allowed, err = true, nil
		}
		if err != nil {
			return err
		}
		j, err := openJournal(true)
		if err != nil {
			return err
		}
		defer j.close()
		k, err := keyOf(keyDefault, nil)
		if err != nil {
			return err
		}
		changed, err := j.remember(k, c.Before, name)
		if err != nil {
			return err
		}
		if err = j.allow(name); err == nil {
			err = setDefault("/", name)
		}
		changed(err)
		return err
	})
	if err != nil {
		return fail(err)
	}
	return c, nil
}

// Require says whether the kernel has a congestion control; the kernel module
// that has it is loaded if need be. A name that it does not have gives a
// *NotFoundError.
func Require(name string) error {
	if err := autoload("/", name); err != nil {
		return fmt.Errorf("congestion control %q: %w", name, err)
	}
	return nil
}

// checkDefault says whether the namespace that the thread is in would take a
// default. It has to be asked before setDefault: where Linux (seen on 6.18)
// refuses a restricted one, it keeps a reference to it until the next boot.
func checkDefault(root, name string) error {
	if err := autoload(root, name); err != nil {
		return err
	}
	if initial(root) {
		return nil // it takes anything
	}
	allowed, err := Allowed()
	if err != nil {
		return err
	}
	if !slices.Contains(allowed, name) {
		return &RestrictedError{name}
	}
	return nil
}

// autoload makes sure that the kernel has a congestion control. Asking for it
// on a socket loads the module that has it, and changes nothing else.
func autoload(root, name string) error {
	names, err := available(root)
	if err != nil || slices.Contains(names, name) {
		return err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, name)
	unix.Close(fd)
	// The list has the answer: the socket may be refused what is there, and takes
	// the first 15 bytes of a longer name.
	if names, err = available(root); err == nil && !slices.Contains(names, name) {
		err = &NotFoundError{name, Nearest(name, names)}
	}
	return err
}

func setDefault(root, name string) error { return write(root, sysctlDefault, name) }

// Allowed lists the congestion controls that unprivileged sockets may choose and
// other namespaces may have as their default.
func Allowed() (names []string, err error) {
	names, err = readNames("/", sysctlAllowed)
	if errors.Is(err, fs.ErrNotExist) { // older kernels show it in the initial namespace only
		err = inInitial(func() error { names, err = readNames("/", sysctlAllowed); return err })
	}
	return names, err
}

// Allow adds a congestion control to the allowed ones. It needs CAP_NET_ADMIN.
func Allow(name string) error { return locked(func() error { return changeAllowed(adding(name)) }) }

// Disallow takes a congestion control from the allowed ones. It needs
// CAP_NET_ADMIN.
func Disallow(name string) error {
	return locked(func() error { return changeAllowed(removing(name)) })
}

func removing(name string) func([]string) []string {
	return func(names []string) []string {
		return slices.DeleteFunc(names, func(n string) bool { return n == name })
	}
}

func adding(name string) func([]string) []string {
	return func(names []string) []string {
		if slices.Contains(names, name) {
			return names
		}
		return append(names, name)
	}
}

// changeAllowed is for whoever has the lock: the kernel sets the list as a whole,
// and two that change it at the same time could undo each other's change.
func changeAllowed(change func([]string) []string) error {
	return inInitial(func() error {
		if err := need("/", "CAP_NET_ADMIN"); err != nil {
			return err
		}
		names, err := readNames("/", sysctlAllowed)
		if err != nil {
			return err
		}
		after := change(slices.Clone(names))
		if slices.Equal(names, after) {
			return nil
		}
		return write("/", sysctlAllowed, strings.Join(after, " "))
	})
}

// inInitial runs fn in the initial network namespace, or gives ErrInitialOnly
// if that cannot be reached.
func inInitial(fn func() error) error {
	if initial("/") {
		return fn()
	}
	visible, err := netns.List("/")
	if err != nil {
		return err
	}
	for _, v := range visible { // the one with process 1 first, but in a container that is not it
		var ran bool
		err := namespace{Visible: v}.do(func() error {
			if ran = initial("/"); ran {
				return fn()
			}
			return nil
		})
		if ran {
			return err
		}
	}
	return ErrInitialOnly
}

// initial says whether the thread is in the initial network namespace. In others
// the list of allowed congestion controls is read-only, or not there in older
// kernels.
func initial(root string) bool {
	st, err := os.Stat(filepath.Join(root, sysctlAllowed))
	return err == nil && st.Mode()&0o200 != 0
}

// in runs fn in a namespace, or where the caller is if it is nil.
func in(ns *netns.NS, fn func() error) error {
	if ns == nil {
		return fn()
	}
	return ns.Do(fn)
}

func readDefault(root string) (string, error) {
	names, err := readNames(root, sysctlDefault)
	if err != nil {
		return "", err
	}
	if len(names) != 1 {
		return "", fmt.Errorf("sysctl %q: not one name: %q", "/"+sysctlDefault, names)
	}
	return names[0], nil
}

// available lists the names that the kernel knows now. Modules that could be
// loaded are not among them.
func available(root string) ([]string, error) { return readNames(root, sysctlAvailable) }

func readNames(root, sysctl string) ([]string, error) {
	b, err := os.ReadFile(filepath.Join(root, sysctl))
	if err != nil {
		return nil, fmt.Errorf("sysctl: %w", err)
	}
	return strings.Fields(string(b)), nil
}

func write(root, sysctl, value string) error {
	f, err := os.OpenFile(filepath.Join(root, sysctl), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close() // the kernel took or refused the value at the write
	_, err = f.WriteString(value)
	return err
}
