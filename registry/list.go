// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"ccload/internal/inetdiag"
	"ccload/internal/netns"
	"ccload/internal/tcpca"
	"ccload/structops"
)

// Kind says where a congestion control comes from.
type Kind string

const (
	Builtin Kind = "builtin" // a part of the kernel's image
	Module  Kind = "module"  // a loaded kernel module
	BPF     Kind = "bpf"     // a BPF struct_ops map
)

// Entry is one congestion control that the kernel knows. What a kind does not
// have is zero, and absent from the JSON.
type Entry struct {
	Name     string         `json:"name"`
	Kind     Kind           `json:"kind,omitempty"` // absent where the caller may not know
	Default  bool           `json:"default"`        // of the network namespace that the caller is in
	Allowed  bool           `json:"allowed"`        // for unprivileged sockets and as default of other namespaces
	State    string         `json:"state,omitempty"`
	Refs     *int           `json:"refs,omitempty"`    // what holds it: sockets, namespaces, links
	Sockets  int            `json:"sockets"`           // in the namespaces that the caller can see
	Module   string         `json:"module,omitempty"`  // name of the kernel module
	MapID    uint32         `json:"map_id,omitempty"`  // BPF map
	LinkID   uint32         `json:"link_id,omitempty"` // BPF link; absent if it is registered without one
	Pin      string         `json:"pin,omitempty"`     // on bpffs; the first if there are more
	Programs []Program      `json:"programs,omitempty"`
	Params   map[string]any `json:"params,omitempty"`   // volatile variables, as they are in its programs
	Running  []string       `json:"running,omitempty"`  // those of them that may be set while it runs
	Set      []string       `json:"set,omitempty"`      // those of them that were set, when it was registered or since
	Selected []Selection    `json:"selected,omitempty"` // where new sockets get it, as far as the caller can see

	info  *structops.Info
	blind error // why Kind is not known
}

// Program is the BPF program in one member of a congestion control.
type Program struct {
	Member   string `json:"member"`
	Name     string `json:"name"`
	ID       uint32 `json:"id"`
	Verified uint32 `json:"verified,omitempty"` // instructions that the verifier went through
	Jited    uint32 `json:"jited,omitempty"`    // bytes of machine code
	Tag      string `json:"tag,omitempty"`      // hash of its instructions
}

// Details is one congestion control, whole.
type Details struct {
	Entry
	Map        string   `json:"map,omitempty"`         // name of the BPF map, cut to 15 bytes by the kernel
	Flags      []string `json:"flags,omitempty"`       // of the BPF map
	Maps       []Map    `json:"maps,omitempty"`        // that are pinned, of those that its programs use
	DefaultIn  []string `json:"default_in,omitempty"`  // network namespaces whose default it is: names, "pid N", or "this one"
	Functions  []Policy `json:"functions,omitempty"`   // that programs may take the place of
	SocketList []Socket `json:"socket_list,omitempty"` // in the namespaces that the caller can see
}

// Map is a BPF map that is pinned, so that others may share it.
type Map struct {
	Name string   `json:"name"`
	ID   uint32   `json:"id"`
	Type string   `json:"type"`
	Pins []string `json:"pins"`
}

// Socket is a TCP socket that runs a congestion control.
type Socket struct {
	Namespace string         `json:"namespace"` // name, "pid N", or "this one"
	State     string         `json:"state"`     // as ss(8) writes it
	Local     netip.AddrPort `json:"local"`
	Remote    netip.AddrPort `json:"remote"`
	Inode     uint32         `json:"inode,omitempty"`
}

// List describes every congestion control that the kernel knows, in the order of
// the kernel's own list. What the caller may not see is left out and said in the
// warnings; only that the names themselves cannot be read is an error.
func List() (entries []*Entry, warnings []string, err error) {
	entries, warnings, err = base()
	if err != nil {
		return nil, nil, err
	}
	seen, more := survey("")
	for _, e := range entries {
		e.Sockets, e.Selected = seen.count[e.Name], seen.selections[e.Name]
	}
	return entries, slices.Concat(warnings, more, seen.missing(entries)), nil
}

// Lookup describes one congestion control whole. A name that the kernel does
// not know gives a *NotFoundError.
func Lookup(name string) (_ *Details, warnings []string, err error) {
	e, err := find(name)
	if gone, ok := errors.AsType[*NotFoundError](err); ok {
		seen, _ := survey("")
		for _, sel := range seen.selections[name] {
			gone.Selected = append(gone.Selected, sel.Place())
		}
	}
	if err != nil {
		return nil, nil, fmt.Errorf("congestion control %q: %w", name, err)
	}
	if e.blind != nil {
		warnings = append(warnings, "whether it is BPF is not known: "+e.blind.Error())
	}
	seen, more := survey(name)
	e.Sockets, e.Selected = seen.count[name], seen.selections[name]
	d := &Details{Entry: *e, DefaultIn: labels(seen.defaults[name]), SocketList: seen.sockets}
	if e.info != nil {
		d.Map, d.Flags = e.info.Map, flagNames(e.info.Flags)
		set, _ := e.info.SetParams() // another tool's are not known
		for _, p := range set {
			d.Set = append(d.Set, p.Name)
		}
		pinned := pins()
		for _, m := range e.info.Maps {
			if in := pinned[m.ID]; len(in) > 0 {
				d.Maps = append(d.Maps, Map{m.Name, m.ID, m.Type, in})
			}
		}
		if d.Functions, err = policies(e.info); err != nil {
			more = append(more, "what can be extended is not known: "+err.Error())
		}
	}
	return d, append(warnings, more...), nil
}

// Object gives the object that a BPF congestion control was made of, with the values of
// its file, and its map there. structops.ErrNotFound says that it is not known, for
// another tool has registered it.
func (d *Details) Object() (*structops.Spec, *structops.Ops, error) {
	if d.info == nil {
		return nil, nil, fmt.Errorf("object: %w", structops.ErrNotFound)
	}
	return d.info.Object()
}

// find is Lookup without what costs a look into every namespace, and into every BPF
// map where the name's pin leads to its own.
func find(name string) (*Entry, error) {
	there, allowed, err := tcpca.Ask(name)
	if err != nil {
		return nil, err
	}
	if !there {
		return nil, notFound(name)
	}
	entries, err := read("/", []string{name})
	if err != nil {
		return nil, err
	}
	var live []*structops.Info
	if id := ownMap(pinPath(name)); id != 0 {
		if i, err := structops.Inspect(id); err == nil && i.Name == name && i.Registered() {
			live = append(live, i)
		}
	}
	if live == nil {
		live, err = structops.Live()
	}
	entries[0].Allowed = allowed
	describe(entries, live, err)
	return entries[0], nil
}

// findBPF is find for one in BPF: any other kind is a *KindError.
func findBPF(name string) (*Entry, error) {
	e, err := find(name)
	switch {
	case err != nil:
		return nil, err
	case e.Kind == "":
		return nil, e.blind
	case e.Kind != BPF:
		return nil, &KindError{*e}
	}
	return e, nil
}

// base is List without the sockets.
func base() (entries []*Entry, warnings []string, err error) {
	live, blind := structops.Live()
	var registered []string
	for _, i := range live {
		if i.Registered() {
			registered = append(registered, i.Name)
		}
	}
	names, cut, err := availableWith("/", registered, blind != nil)
	if err != nil {
		return nil, nil, err
	}
	if cut {
		warnings = append(warnings, "the kernel's list has no room for more names: there are others, which only root can see")
	}
	if blind == nil && !fits(registered) {
		warnings = append(warnings, "the kernel's list has no room for more names: of those that are not in BPF, only well-known ones are shown")
	}
	if entries, err = read("/", names); err != nil {
		return nil, nil, err
	}
	if allowed, err := allowed(registered, blind != nil); err != nil {
		warnings = append(warnings, "allowed is not known: "+err.Error())
	} else {
		for _, e := range entries {
			e.Allowed = slices.Contains(allowed, e.Name)
		}
	}
	return entries, append(warnings, describe(entries, live, blind)...), nil
}

// describe says which are in BPF, of those that are, or why that is not known.
func describe(entries []*Entry, live []*structops.Info, err error) (warnings []string) {
	if err != nil {
		if missing := need("/", "CAP_SYS_ADMIN"); missing != nil {
			err = missing
		}
		for _, e := range entries {
			e.blind = err
		}
		return []string{"which are BPF is not known: " + err.Error()}
	}
	var pinned map[uint32][]string
	for _, e := range entries {
		i := slices.IndexFunc(live, func(i *structops.Info) bool { return i.Name == e.Name && i.Registered() })
		if i < 0 {
			e.Kind = cmp.Or(e.Kind, Builtin)
			continue
		}
		if pinned == nil {
			pinned = pins()
		}
		e.fill(live[i], pinned[live[i].MapID])
	}
	return nil
}

func (e *Entry) fill(i *structops.Info, pins []string) {
	e.Kind, e.info, e.MapID, e.LinkID = BPF, i, i.MapID, i.LinkID
	e.State, e.Refs = "registered", &i.Refs
	if len(pins) > 0 {
		e.Pin = pins[0]
	}
	for _, m := range i.Members {
		e.Programs = append(e.Programs, Program{m.Member, m.Program, m.ID, m.Verified, m.Jited, m.Tag})
	}
	if len(i.Params) > 0 {
		e.Params = map[string]any{}
		for _, p := range i.Params {
			e.Params[p.Name] = p.Value
			if p.Running {
				e.Running = append(e.Running, p.Name)
			}
		}
	}
}

// flagNames names TCP_CONG_* (include/net/tcp.h, Linux 6.18).
func flagNames(flags uint32) []string {
	var names []string
	for i, n := range []string{"non_restricted", "needs_ecn", "needs_accecn", "ect_1", "fallback"} {
		if flags>>i&1 == 1 {
			names = append(names, n)
		}
	}
	return names
}

// read gathers what /proc and /sys under root say of names: which is the default of
// the namespace that the thread is in, and which are modules.
func read(root string, names []string) ([]*Entry, error) {
	def, err := readDefault(root)
	if err != nil {
		return nil, err
	}
	entries := make([]*Entry, len(names))
	for i, n := range names {
		e := &Entry{Name: n, Default: n == def}
		if err := e.readModule(root); err != nil {
			return nil, err
		}
		entries[i] = e
	}
	return entries, nil
}

// readModule looks for the module that has a congestion control. By the kernel's
// habit tcp_NAME.ko registers NAME, and variants of it as NAME-VARIANT (dctcp). A
// directory in /sys/module is there for built-in code with parameters too; only
// a loaded module has a reference count.
func (e *Entry) readModule(root string) error {
	stem, _, _ := strings.Cut(e.Name, "-")
	b, err := os.ReadFile(filepath.Join(root, "sys/module/tcp_"+stem, "refcnt"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("module of %q: %w", e.Name, err)
	}
	var refs int
	if _, err := fmt.Sscan(string(b), &refs); err != nil {
		return fmt.Errorf("module of %q: reference count: %w", e.Name, err)
	}
	e.Kind, e.Module, e.Refs = Module, "tcp_"+stem, &refs
	return nil
}

// namespace is a visible network namespace that can be entered.
type namespace struct {
	netns.Visible
	own bool // it is the one that the caller is in
}

func (n namespace) do(fn func() error) error {
	if n.own {
		return fn()
	}
	ns, err := netns.Open(n.Path)
	if err != nil {
		return err
	}
	defer ns.Close()
	return ns.Do(fn)
}

func (n namespace) label() string {
	if n.own {
		return thisOne
	}
	return n.Label()
}

func labels(in []namespace) []string {
	var out []string
	for _, n := range in {
		out = append(out, n.label())
	}
	return out
}

// seen is what the visible network namespaces do with congestion controls, by
// name.
type seen struct {
	defaults   map[string][]namespace
	routes     map[string][]namespace // where a route names it
	selections map[string][]Selection
	count      map[string]int
	sockets    []Socket // of the one name that they are wanted of: there may be very many
	journal    map[key]value
	blind      bool // the journal cannot be read
}

// survey goes through every network namespace that it can see. What it cannot
// look into is in the warnings. name is whose sockets to list, not only to count; "":
// nobody's.
func survey(name string) (*seen, []string) {
	s := &seen{
		defaults: map[string][]namespace{}, routes: map[string][]namespace{},
		selections: map[string][]Selection{}, count: map[string]int{},
	}
	var jerr error
	s.journal, jerr = readJournal()
	s.blind = jerr != nil
	visible, err := netns.List("/")
	if err != nil {
		return s, []string{err.Error()}
	}
	self := ownInode()
	var warnings []string
	for _, v := range visible {
		n := namespace{v, v.Inode == self}
		if err := n.do(func() error { return s.look(n, name) }); err != nil {
			warnings = append(warnings, fmt.Sprintf("network namespace %q: %v", n.label(), err))
		}
	}
	s.add(groupSelections()...)
	for _, in := range s.selections {
		slices.SortStableFunc(in, func(a, b Selection) int { return slices.Index(kinds, a.Kind) - slices.Index(kinds, b.Kind) })
	}
	return s, warnings
}

func ownInode() uint64 {
	ns, err := netns.Open("/proc/thread-self/ns/net")
	if err != nil {
		return 0
	}
	defer ns.Close()
	inode, _ := ns.Inode()
	return inode
}

func (s *seen) add(selections ...Selection) {
	for _, sel := range selections {
		s.selections[sel.Name] = append(s.selections[sel.Name], sel)
	}
}

// look adds the namespace that the thread is in.
func (s *seen) look(n namespace, name string) error {
	def, err := readDefault("/")
	if err != nil {
		return err
	}
	s.defaults[def] = append(s.defaults[def], n)
	routes, err := routeSelections(n.label())
	if err != nil {
		return err
	}
	for _, sel := range append([]Selection{{Kind: byDefault, Name: def, Namespace: n.label()}}, routes...) {
		sel.By = s.whose(n.Inode, &sel)
		s.add(sel)
	}
	for _, r := range routes {
		if in := s.routes[r.Name]; len(in) == 0 || in[len(in)-1].Inode != n.Inode {
			s.routes[r.Name] = append(in, n)
		}
	}
	conn, err := inetdiag.Dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	return conn.Dump(0, false, func(k *inetdiag.Socket) error {
		s.count[k.Cong]++
		if name != "" && name == k.Cong {
			s.sockets = append(s.sockets, Socket{
				Namespace: n.label(), State: stateName(k.State), Local: k.Src, Remote: k.Dst, Inode: k.Inode,
			})
		}
		return nil
	})
}

// stateName names a TCP state (include/net/tcp_states.h) as ss(8) does.
func stateName(s uint8) string {
	names := [...]string{"", "ESTAB", "SYN-SENT", "SYN-RECV", "FIN-WAIT-1", "FIN-WAIT-2", "TIME-WAIT",
		"CLOSE", "CLOSE-WAIT", "LAST-ACK", "LISTEN", "CLOSING", "NEW-SYN-RECV"}
	if int(s) < len(names) && s > 0 {
		return names[s]
	}
	return fmt.Sprintf("state %d", s)
}
