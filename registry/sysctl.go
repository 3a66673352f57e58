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
	"ccload/internal/netns"
	"ccload/internal/tcpca"
	"ccload/structops"
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
	Undo    bool   `json:"undo,omitempty"`    // Restore puts back what was there before this or an earlier selection
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
		p, err := j.remember(k, c.Before, name)
		if err != nil {
			return err
		}
		c.Undo = !p.empty
		if err = j.allow(name); err == nil {
			err = setDefault("/", name)
		}
		return p.settled(err)
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
	if _, err := autoload(name); err != nil {
		return fmt.Errorf("congestion control %q: %w", name, err)
	}
	return nil
}

// checkDefault says whether the namespace that the thread is in would take a
// default. It has to be asked before setDefault: where Linux (seen on 6.18)
// refuses a restricted one, it keeps a reference to it until the next boot.
func checkDefault(root, name string) error {
	allowed, err := autoload(name)
	if err != nil || allowed || initial(root) { // the initial one takes anything
		return err
	}
	return &RestrictedError{name}
}

// autoload makes sure that the kernel has a congestion control, and says whether it is
// an allowed one. Asking for it on a socket loads the module that has it, and changes
// nothing else.
func autoload(name string) (allowed bool, err error) {
	there, allowed, err := tcpca.Load(name)
	if err == nil && !there {
		err = notFound(name)
	}
	return allowed, err
}

// notFound is the error that the kernel has no congestion control of a name.
func notFound(name string) error {
	names, _ := available()
	return &NotFoundError{Name: name, Nearest: Nearest(name, names)}
}

func setDefault(root, name string) error { return write(root, sysctlDefault, name) }

// Allowed lists the congestion controls that unprivileged sockets may choose and
// other namespaces may have as their default.
func Allowed() ([]string, error) {
	registered, err := structops.Names()
	return allowed(registered, err != nil)
}

// allowed is Allowed for who knows the names that are registered in BPF, or is blind.
func allowed(registered []string, blind bool) (names []string, err error) {
	if !blind && !fits(registered) {
		for _, n := range slices.Concat(ownNames("/", registered), registered) {
			if _, open, err := tcpca.Ask(n); err != nil {
				return nil, err
			} else if open {
				names = append(names, n)
			}
		}
		return names, nil
	}
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
		names, err := Allowed()
		if err != nil {
			return err
		}
		after := change(slices.Clone(names))
		if slices.Equal(names, after) {
			return nil
		}
		list := strings.Join(after, " ")
		if len(list) >= listRoom { // the kernel would cut it, and restrict those that are left out
			return fmt.Errorf("the list of allowed congestion controls can be changed while it has less than %d bytes: it would have %d; register one as an allowed one instead", listRoom, len(list))
		}
		return write("/", sysctlAllowed, list)
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

// listRoom is what a list of names in the kernel can have (TCP_CA_BUF_MAX). A longer one
// is cut, be it read or written, and the kernel warns of it in its log.
const listRoom = 2048

// available lists the names that the kernel knows now. Modules that could be
// loaded are not among them.
func available() ([]string, error) {
	registered, err := structops.Names()
	names, _, err := availableWith("/", registered, err != nil)
	return names, err
}

// availableWith is available for who knows the names that are registered in BPF, or is
// blind for them. cut says that the kernel's list was all there was to look at, and
// that it had no room for all of them.
func availableWith(root string, registered []string, blind bool) (names []string, cut bool, err error) {
	if !blind && !fits(registered) {
		return slices.Concat(ownNames(root, registered), registered), false, nil
	}
	if names, err = readNames(root, sysctlAvailable); err != nil {
		return nil, false, err
	}
	if len(strings.Join(names, " ")) < listRoom-1 {
		return names, false, nil
	}
	if there, _, err := tcpca.Ask(names[len(names)-1]); err != nil || !there {
		names = names[:len(names)-1] // a part of a name
	}
	return names, true, nil
}

// fits says whether the kernel's list has room for the names that are registered in BPF
// and for its own.
func fits(registered []string) bool {
	const own = 512 // twice those that Linux 6.18 has
	return len(strings.Join(registered, " ")) < listRoom-own
}

// ownNames are the congestion controls that are not in BPF, in the kernel's order as
// far as that can be told: asked for one by one, those of Linux, those whose modules
// are loaded, and the default.
func ownNames(root string, registered []string) (names []string) {
	candidates := strings.Fields("reno cubic bbr bic cdg dctcp dctcp-reno highspeed htcp hybla illinois lp nv scalable vegas veno westwood yeah")
	modules, _ := filepath.Glob(filepath.Join(root, "sys/module/tcp_*"))
	for _, m := range modules {
		candidates = append(candidates, strings.TrimPrefix(filepath.Base(m), "tcp_"))
	}
	if def, err := readDefault(root); err == nil {
		candidates = append(candidates, def)
	}
	for i, n := range candidates {
		if slices.Contains(candidates[:i], n) || slices.Contains(registered, n) {
			continue
		}
		if there, _, err := tcpca.Ask(n); err == nil && there {
			names = append(names, n)
		}
	}
	return names
}

func readNames(root, sysctl string) ([]string, error) {
	b, err := os.ReadFile(filepath.Join(root, sysctl))
	if err != nil {
		return nil, fmt.Errorf("sysctl: %w", err)
	}
	return strings.Fields(string(b)), nil
}

func write(root, sysctl, value string) error {
	if err := fault.At("write " + sysctl); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(root, sysctl), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close() // the kernel took or refused the value at the write
	_, err = f.WriteString(value)
	return err
}
