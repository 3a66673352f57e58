// SPDX-License-Identifier: Apache-2.0

// Package registry manages the kernel's table of TCP congestion controls by
// name: it puts BPF ones there and takes them out again, lists all of them
// whoever registered them, and selects one for traffic: as the default of a network
// namespace, on a route, for a control group, for sockets that are open.
//
// It keeps no state of its own. What is registered lives in the kernel, held by
// a pin on bpffs:
//
//	/sys/fs/bpf/ccload/name/NAME  the BPF link (before Linux 6.4: the map)
//	/sys/fs/bpf/ccload/extend     what Extend put in the place of functions
//	/sys/fs/bpf/ccload/use        control groups' selections, and what Restore puts back
//	/sys/fs/bpf/ccload/replace    a replacement under way
//	/sys/fs/bpf/ccload/map        maps that objects pin by name
//
// so a registration outlives the process that made it and ends with Unregister,
// with the removal of the pin, or with the machine. Sockets that run a
// congestion control when it is unregistered go on with it until they close.
//
// The steps from C to a name are those of package structops: Parse, here
// Register (Load, Attach and Pin), and in the end Unregister. The table of names
// is one for the whole kernel; the default is per network namespace.
package registry

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"ccload/internal/tcpca"
	"ccload/structops"
)

// Options of Register. The zero value registers the only congestion control of
// the object under the name that it bears.
type Options struct {
	Map   string // which tcp_congestion_ops of the object; "": the only one
	Name  string // the name to register; "": the one in the object
	Allow bool   // let unprivileged sockets and other network namespaces choose it (TCP_CONG_NON_RESTRICTED)

	// MapPins is the directory of maps that are pinned by name (LIBBPF_PIN_BY_NAME),
	// which stay there; "": one of ccload's, where each goes with the last congestion
	// control that uses it.
	MapPins string
}

// Registration says what Register did.
type Registration struct {
	Name     string   `json:"name"`
	MapID    uint32   `json:"map_id"`
	LinkID   uint32   `json:"link_id,omitempty"` // 0 where the kernel has no links (before 6.4)
	Pin      string   `json:"pin"`
	Map      string   `json:"map"`                // which of the object's it was made from
	MapPins  []string `json:"map_pins,omitempty"` // of maps that are pinned by name
	Warnings []string `json:"warnings,omitempty"`
}

// Register loads the object, puts its congestion control into the kernel's
// table and pins it, so that it stays when the process ends. When any step
// fails, what was done before it is undone. A pin that an earlier registration
// of the same name left behind is replaced.
//
// A name that is registered already gives a *TakenError; the other errors are
// those of package structops.
func Register(spec *structops.Spec, o Options) (done *Registration, err error) {
	spec = spec.Copy() // the name and the flags are the caller's
	ops, err := spec.Select(o.Map)
	if err != nil {
		return nil, fmt.Errorf("register: %w", err)
	}
	if o.Name != "" {
		ops.Name = o.Name
	}
	if o.Allow {
		ops.Flags |= nonRestricted
	}
	fail := func(err error) (*Registration, error) {
		return nil, fmt.Errorf("register %q: %w", ops.Name, err)
	}
	if err := free(ops.Name); err != nil {
		return fail(err)
	}
	shares := len(spec.PinsMaps()) > 0
	var obj *structops.Object
	if !shares { // others need not wait for the verifier
		if obj, err = spec.Load(ops.Map); err != nil {
			return fail(err)
		}
		defer obj.Close()
	}
	warnings, err := mountBPFFS()
	if err != nil {
		return fail(err)
	}
	unlock, err := lock()
	if err != nil {
		return fail(err)
	}
	defer unlock()
	defer func() {
		if _, serr := sweepMaps(); serr != nil && done != nil {
			done.Warnings = append(done.Warnings, serr.Error())
		}
	}()
	if shares {
		spec.MapPins = mapPins(o.MapPins)
		if obj, err = spec.Load(ops.Map); err != nil {
			return fail(err)
		}
		defer obj.Close()
		defer func() {
			if done == nil {
				err = errors.Join(err, obj.UnpinMaps())
			}
		}()
	}
	if err := free(ops.Name); err != nil { // somebody was faster
		return fail(err)
	}
	if err := pinCalls(obj); err != nil {
		return fail(err)
	}
	var path string
	var stale bool
	link, err := obj.AttachPinned(ops.Map, func(l *structops.Link) (err error) {
		path, stale, err = pin(l, ops.Name)
		return err
	})
	if err != nil {
		sweepPins()
		if errors.Is(err, structops.ErrExists) { // another tool was
			err = cmp.Or(free(ops.Name), err)
		}
		return fail(err)
	}
	defer link.Close() // the pin holds it from then on
	if stale {
		warnings = append(warnings, "replaced "+path+", which a registration that is gone had left")
	}
	return &Registration{
		Name: ops.Name, MapID: link.MapID(), LinkID: link.LinkID(), Pin: path, Map: ops.Map, MapPins: mapPins(o.MapPins).paths(obj),
		Warnings: slices.Concat(warnings, apart(link.LinkID() != 0), spec.Warnings),
	}, nil
}

// free says whether a name can be registered: an error if it is taken.
func free(name string) error {
	if there, _, err := tcpca.Ask(name); err != nil || !there {
		return err
	}
	e, err := find(name)
	if _, gone := errors.AsType[*NotFoundError](err); gone {
		return nil // by now
	}
	if err != nil {
		return err
	}
	return &TakenError{*e}
}

// UnregisterOptions of Unregister. The zero value refuses while the name is
// selected anywhere.
type UnregisterOptions struct {
	Reset string // what such namespaces, routes and control groups get instead
}

// Unregistration says what Unregister did.
type Unregistration struct {
	Name     string   `json:"name"`
	Sockets  int      `json:"sockets"`         // that were running it, and go on until they close
	Reset    []string `json:"reset,omitempty"` // network namespaces whose default was changed
	Moved    []string `json:"moved,omitempty"` // routes and control groups that were changed
	Pins     []string `json:"pins,omitempty"`  // removed, also of maps that nothing else uses
	Left     []string `json:"left,omitempty"`  // pins of maps that it used, elsewhere than in ccload's directory
	Warnings []string `json:"warnings,omitempty"`
}

// Unregister takes a BPF congestion control out of the kernel's table, whoever
// put it there, and removes its pins. It returns when the name is gone.
//
// A name that is not there gives a *NotFoundError, one that is not BPF a
// *KindError. While a namespace that the caller can see has it as its default, where
// the kernel would go on handing it out, or a route or a control group selects it,
// it gives an *InUseError; with Reset all of these get the other one first, or keep
// theirs if anything fails.
func Unregister(name string, o UnregisterOptions) (*Unregistration, error) {
	fail := func(err error) (*Unregistration, error) {
		return nil, fmt.Errorf("unregister %q: %w", name, err)
	}
	unlock, err := lock()
	if err != nil {
		return fail(err)
	}
	defer unlock()
	e, err := findBPF(name)
	if err != nil {
		return fail(err)
	}
	if err := need("/", "CAP_SYS_ADMIN", "CAP_NET_ADMIN"); err != nil {
		return fail(err)
	}
	seen, warnings := survey("")
	u := &Unregistration{Name: name, Sockets: seen.count[name], Warnings: warnings}
	inUse := seen.inUse(name)
	if inUse != nil && o.Reset == "" {
		return fail(inUse)
	}
	var moved *displacement
	if inUse != nil {
		if o.Reset == name {
			return fail(fmt.Errorf("reset to %q: that is the name to be unregistered", o.Reset))
		}
		if moved, err = seen.reset(name, o.Reset); err != nil {
			return fail(err)
		}
		u.Reset, u.Moved = inUse.Namespaces, inUse.Places
	}
	held := pinsOf(e.MapID)
	defer held.Close()
	u.Pins, u.Left = held.paths(), sharedElsewhere(e.info)
	if err := structops.Unregister(e.info); err != nil {
		if uerr := moved.undo(); uerr != nil {
			err = fmt.Errorf("%w; and not all is selected as it was: %w", err, uerr)
		}
		return fail(err)
	}
	if err := moved.done(); err != nil {
		u.Warnings = append(u.Warnings, err.Error())
	}
	if err := dropExtensions(name); err != nil {
		u.Warnings = append(u.Warnings, "its extensions: "+err.Error())
	}
	if err := held.remove(""); err != nil {
		u.Warnings = append(u.Warnings, "a pin that holds nothing more: "+err.Error())
	}
	swept, err := sweepMaps()
	if u.Pins = append(u.Pins, swept...); err != nil {
		u.Warnings = append(u.Warnings, err.Error())
	}
	return u, nil
}
