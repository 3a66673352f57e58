// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"

	"ccload/internal/netns"
	"ccload/internal/tcpca"
	"ccload/structops"
)

// ReplaceOptions of Replace.
type ReplaceOptions struct {
	Map     string // which tcp_congestion_ops of the object; "": the only one
	Migrate bool   // give open connections the new code, too
	Keep    bool   // parameters that were set keep their values, but for those that are set in the new object
	MapPins string // as in Options, but for "": where the old code's maps of these names are pinned
}

// Replacement says what Replace did.
type Replacement struct {
	Name       string    `json:"name"`
	Before     uint32    `json:"map_id_before"`
	MapID      uint32    `json:"map_id"`
	LinkID     uint32    `json:"link_id,omitempty"`    // absent: without a BPF link
	Namespaces []string  `json:"namespaces,omitempty"` // with it as their default: their new sockets get the new code
	Migrated   *Moved    `json:"migrated,omitempty"`   // with Migrate: the sockets of all visible namespaces, also those that listen and have chosen the name
	Kept       []Setting `json:"kept,omitempty"`       // parameters that were set, and have that value in the new code too
	Dropped    []Setting `json:"dropped,omitempty"`    // those that the new code does not have, or not for that value
	Warnings   []string  `json:"warnings,omitempty"`
}

// Replace puts the object's congestion control in the place of the one that is
// registered under a name, whoever did that. There is no moment without: sockets
// get the old code or the new. What extends the old one extends the new one, and
// it stays an allowed one. Open connections go on with the old code, unless Migrate
// moves them; sockets that listen, and have chosen the name, are moved in any case, so
// that what they accept gets the new. If anything fails the old one serves on.
//
// Without a BPF link (before Linux 6.4, or if it was registered without) the
// kernel cannot replace: the new code then is registered under a shadow name
// first, which is selected wherever the name is; for some milliseconds sockets
// that ask for the name get ENOENT, and those that get it by a selection show the
// shadow name from then on. A warning says so.
func Replace(name string, spec *structops.Spec, o ReplaceOptions) (*Replacement, error) {
	fail := func(err error) (*Replacement, error) { return nil, fmt.Errorf("replace %q: %w", name, err) }
	if err := need("/", moving...); err != nil && o.Migrate {
		return fail(err)
	}
	if err := need("/", "CAP_SYS_ADMIN", "CAP_NET_ADMIN"); err != nil {
		return fail(err)
	}
	spec = spec.Copy() // the name and the flags are the caller's
	ops, err := spec.Select(o.Map)
	if err != nil {
		return fail(err)
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
	if ops.Name = name; e.Allowed {
		ops.Flags |= nonRestricted
	}
	r := &Replacement{Name: name, Before: e.MapID, LinkID: e.LinkID, Warnings: slices.Clone(spec.Warnings)}
	if o.Keep {
		r.keep(e.info, spec)
	}
	spec.MapPins = mapPins(cmp.Or(o.MapPins, pinnedIn(e.info, spec)))
	defer func() {
		if _, err := sweepMaps(); err != nil {
			r.Warnings = append(r.Warnings, err.Error())
		}
	}()
	seen, warnings := survey("")
	r.Warnings = append(r.Warnings, warnings...)
	forget, err := pinReplaced(e.info)
	if err != nil {
		return fail(err)
	}
	defer func() {
		if err := forget(); err != nil {
			r.Warnings = append(r.Warnings, err.Error())
		}
	}()
	if e.LinkID != 0 {
		ops.Link = true
		err = r.update(e.info, spec, ops)
	} else {
		err = r.shadow(e, spec, ops, seen)
	}
	if err != nil {
		return fail(err)
	}
	r.reselect(seen.defaults[name])
	if o.Migrate {
		r.Migrated = r.migrate(listenState | unnamed)
	} else {
		r.migrateListeners()
	}
	return r, nil
}

// keep gives the new code the parameters that were set.
func (r *Replacement) keep(from *structops.Info, spec *structops.Spec) {
	set, err := from.SetParams()
	if err != nil && len(from.Params) > 0 {
		r.Warnings = append(r.Warnings, "which parameters were set is not known, and none is kept: "+err.Error())
	}
	for _, p := range set {
		if spec.IsSet(p.Name) {
			continue
		}
		was := Setting{Name: p.Name, Before: p.Value}
		for _, q := range spec.Params() {
			if q.Name == p.Name {
				was.After = q.Value // as the file has it
			}
		}
		err := spec.Set(p.Name, p.Value)
		if err == nil {
			r.Kept = append(r.Kept, Setting{p.Name, was.After, p.Value})
			continue
		}
		r.Dropped = append(r.Dropped, was)
		why := err.Error()
		if errors.Is(err, structops.ErrNotFound) {
			why = fmt.Sprintf("parameter %q: the new code has none of that name", p.Name)
		}
		r.Warnings = append(r.Warnings, fmt.Sprintf("%s; its value of %v is dropped", why, p.Value))
	}
}

// reselect gives the new sockets of network namespaces whose default is the name the
// code that it stands for now.
func (r *Replacement) reselect(in []namespace) {
	for _, n := range in {
		err := n.do(func() error {
			if err := checkDefault("/", r.Name); err != nil {
				return err
			}
			return setDefault("/", r.Name)
		})
		if err != nil {
			r.Warnings = append(r.Warnings, fmt.Sprintf("network namespace %q gives new sockets the old code: %v", n.label(), err))
			continue
		}
		r.Namespaces = append(r.Namespaces, n.label())
	}
}

// update replaces what has a link.
func (r *Replacement) update(from *structops.Info, spec *structops.Spec, ops *structops.Ops) (err error) {
	obj, err := spec.Load(ops.Map)
	if err != nil {
		return err
	}
	defer obj.Close()
	defer func() {
		if err != nil {
			err = errors.Join(err, obj.UnpinMaps())
		}
	}()
	if err := pinCalls(obj); err != nil {
		return err
	}
	to, err := obj.Info(ops.Map)
	if err != nil {
		return err
	}
	link, err := structops.Open(from)
	if err != nil {
		return err
	}
	defer link.Close()
	undo, err := carryExtensions(from, to)
	if err != nil {
		return err
	}
	if err := link.Update(obj, ops.Map); err != nil {
		return errors.Join(err, undo())
	}
	r.MapID = link.MapID()
	return nil
}

// migrateListeners migrates those that listen, if anything runs the code that was
// replaced. Connections may run code from before that, too, but no listener does.
func (r *Replacement) migrateListeners() {
	if old, err := structops.Inspect(r.Before); err != nil || old.Refs > 0 {
		m := r.migrate(listenState)
		for _, why := range slices.Sorted(maps.Keys(m.Reasons)) {
			r.Warnings = append(r.Warnings, fmt.Sprintf("%d listening sockets may hand out the old code: %s", m.Reasons[why], why))
		}
	}
}

// migrate gives the sockets of all visible namespaces that are in some states the code
// that the name stands for now.
func (r *Replacement) migrate(states stateSet) *Moved {
	total := &Moved{}
	f := &Filter{root: either{cong(r.Name), cong(shadowOf(r.Name))}}
	visible, err := netns.List("/")
	if err != nil {
		r.Warnings = append(r.Warnings, "sockets are not moved: "+err.Error())
		return total
	}
	self := ownInode()
	for _, v := range visible {
		n := namespace{v, v.Inode == self}
		var m *Moved
		if err := n.do(func() (err error) { m, err = moveSockets(nil, f, states, r.Name, true); return err }); err != nil {
			r.Warnings = append(r.Warnings, fmt.Sprintf("sockets in network namespace %q are not moved: %v", n.label(), err))
			continue
		}
		total.add(m)
	}
	total.forget()
	r.Warnings = append(r.Warnings, total.Warnings...)
	total.Warnings = nil
	return total
}

// Until all are handed over from the code that was replaced, a pin holds and remembers
// it, should the process be killed:
//
//	/sys/fs/bpf/ccload/replace/old/NAME
const replacedDir = replaceDir + "/old"

// pinReplaced pins the code that is to be replaced.
func pinReplaced(from *structops.Info) (forget func() error, err error) {
	code := *from
	code.LinkID = 0
	m, err := structops.Open(&code)
	if err != nil {
		return nil, err
	}
	defer m.Close()
	path := filepath.Join(replacedDir, pinName(from.Name))
	if err := newPin(path, m.Pin); err != nil {
		return nil, err
	}
	return func() error { return unpin(path) }, nil
}

// A replacement without a link passes through a shadow name, which a pin
//
//	/sys/fs/bpf/ccload/replace/new/NAME
//
// holds and remembers, should the process be killed.
const shadowDir = replaceDir + "/new"

// shadowOf is the shadow name of a name.
func shadowOf(name string) string {
	const suffix = ".new"
	return name[:min(len(name), 15-len(suffix))] + suffix
}

// shadow replaces what has no link.
func (r *Replacement) shadow(e *Entry, spec *structops.Spec, ops *structops.Ops, seen *seen) (err error) {
	ops.Name = shadowOf(r.Name)
	if err := free(ops.Name); err != nil {
		return fmt.Errorf("shadow name %q: %w", ops.Name, err)
	}
	obj, err := spec.Load(ops.Map)
	if err != nil {
		return err
	}
	defer obj.Close()
	serves := false
	defer func() {
		if err != nil && !serves {
			err = errors.Join(err, obj.UnpinMaps())
		}
	}()
	if err := pinCalls(obj); err != nil {
		return err
	}
	to, err := obj.Info(ops.Map)
	if err != nil {
		return err
	}
	undo, err := carryExtensions(e.info, to)
	if err != nil {
		return err
	}
	path := filepath.Join(shadowDir, pinName(r.Name))
	link, err := obj.AttachPinned(ops.Map, func(l *structops.Link) error { return newPin(path, l.Pin) })
	if err != nil {
		sweepReplacements()
		return errors.Join(err, undo())
	}
	link.Close()
	old := pinsOf(e.MapID)
	defer old.Close()
	moved, err := seen.reset(r.Name, ops.Name)
	if err == nil {
		if err = structops.Unregister(e.info); err == nil {
			moved.done() // an entry that stays goes with the name that it speaks of
		} else {
			err = errors.Join(err, moved.undo())
		}
	}
	if err != nil { // the old one is still there, and gets its places back
		_, ferr := finish(path)
		return errors.Join(err, ferr, undo())
	}
	serves = true
	if r.MapID, err = finish(path); err != nil {
		return fmt.Errorf("%q serves in its place: %w", ops.Name, err)
	}
	r.Warnings = append(r.Warnings, fmt.Sprintf(
		"there is no BPF link to replace it by: for a moment the name was not there, and sockets that were opened then run the new code as %s", ops.Name))
	return old.remove(filepath.Join(replacedDir, pinName(r.Name))) // finish has put another in the place of the name's
}

// finish gives the name whose shadow a pin holds its places back: to the old code
// if that is still registered, else to the shadow's. The shadow then goes.
func finish(path string) (mapID uint32, err error) {
	shadow, err := structops.Inspect(ownMap(path))
	if err != nil {
		return 0, err
	}
	name := unpinName(filepath.Base(path))
	there, _, err := tcpca.Ask(name)
	if err != nil {
		return 0, err
	}
	if !there {
		link, err := shadow.Copy(name, func(l *structops.Link) error {
			_, _, err := pin(l, name)
			return err
		})
		if err != nil {
			return 0, err
		}
		link.Close()
	}
	e, err := find(name)
	if err != nil {
		return 0, err
	}
	if sameCode := slices.EqualFunc(e.info.Members, shadow.Members, func(a, b structops.Member) bool { return a.ID == b.ID }); sameCode {
		if err := renameExtensions(shadow, e.info); err != nil {
			return 0, err
		}
	}
	seen, _ := survey("")
	moved, err := seen.reset(shadow.Name, name)
	if err != nil {
		return 0, err
	}
	moved.done()
	if err := structops.Unregister(shadow); err != nil { // the next sweep does it
		return 0, err
	}
	unpin(path) // which Unregister may have done
	return e.MapID, nil
}

// sweepReplacements finishes those that were killed, and says so. What cannot be finished
// now is left for the next time.
func sweepReplacements() (said []error) {
	names, _ := pinsIn(shadowDir)
	for _, name := range names {
		path := filepath.Join(shadowDir, name)
		if !holdsName(path) || unpinStale(path) == nil {
			continue
		}
		if _, err := finish(path); err != nil {
			said = append(said, fmt.Errorf("a replacement of %q was interrupted, and cannot be finished: %w", unpinName(name), err))
		} else {
			said = append(said, fmt.Errorf("finished a replacement of %q that was interrupted", unpinName(name)))
		}
	}
	tidyUp(shadowDir)
	names, _ = pinsIn(replacedDir)
	for _, name := range names {
		path := filepath.Join(replacedDir, name)
		old, err := structops.Inspect(ownMap(path))
		if err != nil {
			if !errors.Is(err, structops.ErrNotFound) {
				said = append(said, err)
			}
			continue
		}
		if !old.Registered() {
			seen, warnings := survey("")
			r := &Replacement{Name: old.Name, Before: old.MapID, Warnings: warnings}
			r.reselect(seen.defaults[r.Name])
			r.migrateListeners()
			said = append(said, fmt.Errorf("finished a replacement of %q that was interrupted", old.Name))
			for _, w := range r.Warnings {
				said = append(said, errors.New(w))
			}
		}
		if err := unpin(path); err != nil {
			said = append(said, err)
		}
	}
	tidyUp(replacedDir)
	return said
}
