// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"ccload/structops"
)

// Extensions are held by pins,
//
//	/sys/fs/bpf/ccload/extend/NAME/FUNCTION/MAP-MEMBER
//
// each of them the link that puts a program in the place of the function in one
// member's program, or the map that is the member's slot. MAP is the id of the
// congestion control's map: connections go on with replaced code, and with what
// extends it, while their pins go by and by (see sweepExtensions).

// Policy is a function of a BPF congestion control that a program may take the
// place of.
type Policy struct {
	structops.Policy
	Extended *Extension `json:"extended,omitempty"` // by what
}

// Extension is a program in the place of a function.
type Extension struct {
	How     structops.How `json:"how"`
	Program string        `json:"program"`
	Members []string      `json:"members"` // in whose programs
}

// Extended says what Extend did.
type Extended struct {
	Name     string `json:"name"`
	Function string `json:"function"`
	Extension
	Instead  string   `json:"instead,omitempty"` // why it is a tail call although the object could do the other
	Warnings []string `json:"warnings,omitempty"`
}

// PolicyError says that a congestion control has no function of that name.
type PolicyError struct {
	Function string
	Have     []string
}

func (e *PolicyError) Error() string {
	if len(e.Have) == 0 {
		return fmt.Sprintf("function %q: it has no functions that can be extended", e.Function)
	}
	s := fmt.Sprintf("function %q: it has none of that name, only %s", e.Function, strings.Join(e.Have, ", "))
	if n := Nearest(e.Function, e.Have); n != "" {
		s += fmt.Sprintf("; did you mean %q?", n)
	}
	return s
}

// ExtendedError says that a function is extended already.
type ExtendedError struct {
	Name, Function string
	Extension
}

func (e *ExtendedError) Error() string {
	return fmt.Sprintf("function %q: it is extended already, by %s (%s)", e.Function, e.Program, e.How)
}

// NotExtendedError says that a function is not extended.
type NotExtendedError struct {
	Function string
	Extended []string // that are
}

func (e *NotExtendedError) Error() string {
	if len(e.Extended) == 0 {
		return fmt.Sprintf("function %q: it is not extended, and no other is", e.Function)
	}
	return fmt.Sprintf("function %q: it is not extended; those that are: %s", e.Function, strings.Join(e.Extended, ", "))
}

// Extend puts the object's program in the place of a function of a registered
// congestion control, at once, for open connections too. With an empty how the way
// is chosen by what the object has and the kernel allows. If anything fails
// nothing is changed.
//
// Connections that still run code which was replaced get the extension as well,
// if it fits there; a warning says when it does not.
//
// It gives a *PolicyError for a function that is not there, an *ExtendedError for
// one that is extended; the other errors are those of structops.Extension.Load.
func Extend(name, function string, e *structops.Extension, how structops.How) (_ *Extended, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("extend %q: %w", name, err)
		}
	}()
	if err := need("/", "CAP_SYS_ADMIN", "CAP_NET_ADMIN"); err != nil {
		return nil, err
	}
	warnings, err := mountBPFFS()
	if err != nil {
		return nil, err
	}
	unlock, err := lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	entry, err := findBPF(name)
	if err != nil {
		return nil, err
	}
	info := entry.info
	all, err := policies(info)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(all, func(p Policy) bool { return p.Name == function })
	if i < 0 {
		none := &PolicyError{Function: function}
		for _, p := range all {
			none.Have = append(none.Have, p.Name)
		}
		return nil, none
	}
	if x := all[i].Extended; x != nil {
		return nil, &ExtendedError{name, function, *x}
	}
	r, instead, err := e.Load(info, function, how)
	if err != nil {
		return nil, err
	}
	defer func() { r.Close() }()
	err = attach(r, info, function)
	if how == "" && r.How == structops.Freplace && structops.Refused(err) { // what was loaded is not let in
		if slot, _, serr := e.Load(info, function, structops.TailCall); serr == nil {
			r.Close()
			r, instead = slot, err.Error()
			err = attach(r, info, function)
		}
	}
	if err != nil {
		return nil, err
	}
	done := &Extended{
		Name: name, Function: function, Extension: Extension{r.How, r.Program, r.Members()},
		Instead: instead, Warnings: append(warnings, e.Warnings...),
	}
	old, err := predecessors(info)
	if err != nil {
		return nil, errors.Join(err, drop(placesOf(name, function)))
	}
	for _, o := range old {
		r, _, err := e.Load(o, function, done.How)
		if err == nil {
			err = attach(r, o, function)
			r.Close()
		}
		if err != nil {
			done.Warnings = append(done.Warnings, fmt.Sprintf("connections that still run the code of BPF map %d, which was replaced, go on as they were: %v", o.MapID, err))
		}
	}
	return done, nil
}

// predecessors are what connections still run that had the name before.
func predecessors(info *structops.Info) ([]*structops.Info, error) {
	live, err := structops.Live()
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(live, func(i *structops.Info) bool {
		return i.Name != info.Name || i.MapID == info.MapID || i.State != structops.StateToBeFree
	}), nil
}

// attach puts programs in their places and pins them.
func attach(r *structops.ExtensionObject, info *structops.Info, function string) (err error) {
	defer func() {
		if err != nil {
			tidy()
		}
	}()
	d, err := makeDir(placeDir(info.Name, function))
	if err != nil {
		return err
	}
	defer d.Close()
	return d.shown(r.Attach(func(member string) string { return d.at(placeName(info.MapID, member)) }))
}

// placeDir is the directory for the pins of an extension.
func placeDir(name, function string) string { return filepath.Join(extendDir, pinName(name), function) }

func placeName(mapID uint32, member string) string { return fmt.Sprintf("%d-%s", mapID, member) }

// Unextend gives a function of a registered congestion control back to itself, at
// once, for open connections too. A function that is not extended gives a
// *NotExtendedError.
func Unextend(name, function string) (_ *Extended, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("extend %q: %w", name, err)
		}
	}()
	if err := need("/", "CAP_SYS_ADMIN", "CAP_NET_ADMIN"); err != nil {
		return nil, err
	}
	unlock, err := lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	entry, err := findBPF(name)
	if err != nil {
		return nil, err
	}
	info := entry.info
	there := extensions(info)
	x := there[function]
	ps := placesOf(name, function)
	if len(ps) == 0 {
		none := &NotExtendedError{Function: function}
		for f := range there {
			none.Extended = append(none.Extended, f)
		}
		slices.Sort(none.Extended)
		return nil, none
	}
	if x == nil { // only what replaced code has
		x = &Extension{}
	}
	return &Extended{Name: name, Function: function, Extension: *x}, drop(ps)
}

// carryExtensions puts what extends one congestion control into another that is to
// take its place, and is loaded and not yet registered. It is called with the lock
// held; undo takes it back. What does not fit the new code is an error, for to drop
// it silently would change what connections do.
func carryExtensions(from, to *structops.Info) (undo func() error, err error) {
	var carried []string
	undo = func() error {
		var ps []place
		for _, f := range carried {
			ps = append(ps, slices.DeleteFunc(placesOf(to.Name, f), func(p place) bool { return p.mapID != to.MapID })...)
		}
		return drop(ps)
	}
	for function := range extensions(from) {
		r, err := reload(from, to, function)
		if err == nil {
			carried = append(carried, function)
			err = attach(r, to, function)
			r.Close()
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("its extension: %w", err), undo())
		}
	}
	return undo, nil
}

// reload loads what extends a function of one congestion control for another.
func reload(from, to *structops.Info, function string) (*structops.ExtensionObject, error) {
	d, err := openDir(placeDir(from.Name, function))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	pins := map[string]string{}
	for _, p := range placesOf(from.Name, function) {
		if p.mapID == from.MapID {
			pins[p.member] = d.at(filepath.Base(p.path))
		}
	}
	r, err := structops.Reload(pins, function, to)
	return r, d.shown(err)
}

// renameExtensions gives what extends one congestion control to another that has
// the same programs.
func renameExtensions(from, to *structops.Info) error {
	for _, p := range places() {
		if p.name != pinName(from.Name) || p.mapID != from.MapID {
			continue
		}
		if err := rename(p.path, filepath.Join(placeDir(to.Name, p.function), placeName(to.MapID, p.member))); err != nil {
			return err
		}
	}
	tidy()
	return nil
}

// dropExtensions takes away all that extends a name.
func dropExtensions(name string) error {
	return drop(slices.DeleteFunc(places(), func(p place) bool { return p.name != pinName(name) }))
}

// policies are those of a congestion control, with what extends them.
func policies(info *structops.Info) ([]Policy, error) {
	found, err := structops.Policies(info)
	if err != nil {
		return nil, err
	}
	by := extensions(info)
	var all []Policy
	for _, p := range found {
		all = append(all, Policy{p, by[p.Name]})
	}
	return all, nil
}

// extensions are what extends a congestion control, by function.
func extensions(info *structops.Info) map[string]*Extension {
	found := map[string]*Extension{}
	for _, p := range places() {
		if p.name != pinName(info.Name) || p.mapID != info.MapID {
			continue
		}
		held, err := p.open()
		if err != nil || held.ProgramID == 0 {
			continue
		}
		if found[p.function] == nil {
			found[p.function] = &Extension{How: held.How, Program: held.Program}
		}
		found[p.function].Members = append(found[p.function].Members, p.member)
	}
	return found
}

// place is a pin of an extension, taken apart.
type place struct {
	name, function, member string // name as pinName has it
	mapID                  uint32
	path                   string
}

func (p *place) open() (held *structops.Place, err error) {
	err = withPin(p.path, func(path string) (err error) { held, err = structops.OpenPlace(path); return err })
	return held, err
}

// places are all the pins of extensions, in the order of their paths.
func places() (ps []place) {
	for _, name := range dirsIn(extendDir) {
		for _, function := range dirsIn(filepath.Join(extendDir, name)) {
			dir := filepath.Join(extendDir, name, function)
			pins, _ := pinsIn(dir)
			for _, pin := range pins {
				id, member, _ := strings.Cut(pin, "-")
				if n, err := strconv.ParseUint(id, 10, 32); err == nil {
					ps = append(ps, place{name, function, member, uint32(n), filepath.Join(dir, pin)})
				}
			}
		}
	}
	return ps
}

func placesOf(name, function string) []place {
	return slices.DeleteFunc(places(), func(p place) bool { return p.name != pinName(name) || p.function != function })
}

// drop takes programs out of their places, and the directories that are empty
// then.
func drop(ps []place) error {
	var errs []error
	for _, p := range ps {
		if err := withPin(p.path, structops.Detach); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	tidy()
	return errors.Join(errs...)
}

// tidy removes the directories that have no pins in them.
func tidy() {
	for _, name := range dirsIn(extendDir) {
		for _, function := range dirsIn(filepath.Join(extendDir, name)) {
			tidyUp(filepath.Join(extendDir, name, function))
		}
		tidyUp(filepath.Join(extendDir, name))
	}
	tidyUp(extendDir)
}

// sweepExtensions takes away pins that extend nothing any more, and extensions
// that a process left half done when it died: the name is gone, or no connection
// runs the code; the slot is empty, or not all copies of the function are replaced.
// What it cannot take away stays until the next time.
func sweepExtensions() (said []error) {
	ps := places()
	if len(ps) == 0 {
		tidy()
		return nil
	}
	live, err := structops.Live()
	if err != nil {
		return []error{err}
	}
	byID, registered := map[uint32]*structops.Info{}, map[string]bool{}
	for _, i := range live {
		byID[i.MapID] = i
		registered[i.Name] = registered[i.Name] || i.Registered()
	}
	type extension struct {
		function string
		mapID    uint32
	}
	var stale []place
	copies := map[extension][]place{}
	for _, p := range ps {
		i := byID[p.mapID]
		held, err := p.open()
		switch {
		case err != nil: // what is no extension is not ours
		case held.ProgramID == 0 || i == nil || pinName(i.Name) != p.name || !registered[i.Name]:
			stale = append(stale, p)
		case held.How == structops.Freplace:
			x := extension{p.function, p.mapID}
			copies[x] = append(copies[x], p)
		}
	}
	for x, ps := range copies {
		all, err := structops.Policies(byID[x.mapID])
		i := slices.IndexFunc(all, func(p structops.Policy) bool { return p.Name == x.function })
		if err == nil && (i < 0 || len(ps) < len(all[i].Copies)) {
			said = append(said, fmt.Errorf("took back an extension of %q that was interrupted: function %q", byID[x.mapID].Name, x.function))
			stale = append(stale, ps...)
		}
	}
	return append(said, drop(stale))
}
