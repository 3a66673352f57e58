// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// Info is a live struct_ops map of type tcp_congestion_ops, whoever made it.
type Info struct {
	Name    string // the congestion control's
	Map     string // the map's, at most 15 bytes
	MapID   uint32
	LinkID  uint32 // 0: none
	State   State
	Refs    int    // sockets, network namespaces that have it as default, and the link; an estimate of the kernel's
	Flags   uint32 // TCP_CONG_*
	Members []Member
	Params  []Param // of its programs, as far as they have BTF

	Maps []Map // that its programs use, in the order of the programs; also those reached through another map

	byLink bool   // made for a link
	record uint32 // map with what it was made of; 0: none

	places map[string]place // of the parameters that may be set
}

// Map is a BPF map that programs use.
type Map struct {
	Name string // at most 15 bytes
	ID   uint32
	Type string
}

// Member is a member of a live map that a program is in.
type Member struct {
	Member   string
	Program  string // whole where it has BTF, else at most 15 bytes
	ID       uint32
	Verified uint32 // instructions the verifier processed; 0 where the kernel does not tell (before 5.16)
	Jited    uint32 // bytes
	Tag      string // hash of its instructions, in hex
}

// State of a struct_ops map (enum bpf_struct_ops_state).
type State uint32

const (
	StateInit     State = iota // empty
	StateInUse                 // registered, without a link
	StateToBeFree              // unregistered; sockets still use it
	StateReady                 // made for a link: registered if it has one
)

func (s State) String() string {
	if names := [...]string{"init", "in use", "to be freed", "ready"}; int(s) < len(names) {
		return names[s]
	}
	return fmt.Sprintf("state %d", uint32(s))
}

// Registered says whether the map is behind its name in the kernel's table.
func (i *Info) Registered() bool {
	return i.State == StateInUse || i.State == StateReady && i.LinkID != 0
}

// Live lists the congestion controls in BPF that the kernel has, in the order in
// which they were made: registered ones, those that wait for their link, and
// those that sockets still use after they were unregistered or replaced. The
// kernel leaves the state of a map with a link as it was; here it is
// StateToBeFree when it has lost its link and something still refers to it.
//
// It needs CAP_SYS_ADMIN: otherwise a *PermissionError.
func Live() ([]*Info, error) {
	l, err := kernelLayout()
	if err != nil {
		return nil, err
	}
	var live []*Info
	w := walk{layout: l}
	err = eachID(unix.BPF_MAP_GET_NEXT_ID, unix.BPF_MAP_GET_FD_BY_ID, func(_ uint32, fd int) error {
		i, err := w.read(fd)
		if err == nil && i != nil {
			live = append(live, i)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("BPF maps: %w", permission("", err, looking...))
	}
	slices.Reverse(live)
	return live, nil
}

// Names are those of the congestion controls in BPF that are registered, in the order in
// which they were made. It needs CAP_SYS_ADMIN: otherwise a *PermissionError.
func Names() ([]string, error) {
	l, err := kernelLayout()
	if err != nil {
		return nil, err
	}
	var all []*Info
	byLink := false
	err = eachID(unix.BPF_MAP_GET_NEXT_ID, unix.BPF_MAP_GET_FD_BY_ID, func(_ uint32, fd int) error {
		i, err := readMap(fd, l)
		if err == nil && i != nil {
			all, byLink = append(all, i), byLink || i.byLink
		}
		return err
	})
	var links map[uint32]uint32
	if err == nil && byLink {
		links, err = structOpsLinks()
	}
	if err != nil {
		return nil, fmt.Errorf("BPF maps: %w", permission("", err, looking...))
	}
	var names []string
	for _, i := range slices.Backward(all) {
		if i.LinkID = links[i.MapID]; i.Registered() {
			names = append(names, i.Name)
		}
	}
	return names, nil
}

// Inspect is Live for one map. ErrNotFound says that there is none with that id,
// or that it is for something else.
func Inspect(mapID uint32) (*Info, error) {
	fail := func(err error) (*Info, error) {
		return nil, fmt.Errorf("BPF map %d: %w", mapID, err)
	}
	l, err := kernelLayout()
	if err != nil {
		return nil, err
	}
	fd, err := openID(unix.BPF_MAP_GET_FD_BY_ID, mapID)
	if errors.Is(err, unix.ENOENT) {
		return fail(fmt.Errorf("%w: %w", ErrNotFound, err))
	}
	if err != nil {
		return fail(permission("", err, looking...))
	}
	defer unix.Close(fd)
	w := walk{layout: l}
	i, err := w.read(fd)
	if err != nil {
		return fail(permission("", err, looking...))
	}
	if i == nil {
		return fail(fmt.Errorf("%w: it is %w", ErrNotFound, errForeign))
	}
	return i, nil
}

// Info describes a congestion control that is loaded as Live would, if it were
// registered: its map and its programs. "" is the only one that is loaded.
func (o *Object) Info(mapName string) (*Info, error) {
	m, err := o.find(mapName)
	if err != nil {
		return nil, err
	}
	i := &Info{Name: m.Name, Map: m.Map, MapID: m.id, Flags: m.Flags, byLink: m.link}
	seen := map[uint32]bool{}
	for _, member := range slices.Sorted(maps.Keys(m.Programs)) {
		info, err := o.coll.Programs[key(m.Programs[member], member)].Info()
		if err != nil {
			return nil, fmt.Errorf("program %q: %w", m.Programs[member], err)
		}
		id, _ := info.ID()
		one := Member{Member: member, ID: uint32(id)}
		if err := i.readProgram(&one, seen); err != nil {
			return nil, fmt.Errorf("program %q: %w", m.Programs[member], permission("", err, looking...))
		}
		i.Members = append(i.Members, one)
	}
	if err := i.readReached(seen); err != nil {
		return nil, fmt.Errorf("BPF maps: %w", permission("", err, looking...))
	}
	sortParams(i.Params)
	return i, nil
}

// walk keeps what several maps of one walk need.
type walk struct {
	layout *layout
	links  map[uint32]uint32 // map id → link id; filled when the first is asked for
}

// read describes a map; nil if it is another sort of map.
func (w *walk) read(fd int) (*Info, error) {
	i, err := readMap(fd, w.layout)
	if err != nil || i == nil {
		return nil, err
	}
	if i.byLink {
		if w.links == nil {
			if w.links, err = structOpsLinks(); err != nil {
				return nil, err
			}
		}
		i.LinkID = w.links[i.MapID]
	}
	if i.State == StateReady && i.LinkID == 0 && i.Refs > 0 {
		i.State = StateToBeFree
	}
	seen := map[uint32]bool{}
	for n := range i.Members {
		if err := i.readProgram(&i.Members[n], seen); err != nil {
			return nil, err
		}
	}
	if err := i.readReached(seen); err != nil {
		return nil, err
	}
	sortParams(i.Params)
	return i, nil
}

// readMap reads the value of a map; nil if it is another sort of map.
func readMap(fd int, l *layout) (*Info, error) {
	var info mapInfo
	if err := objInfo(fd, &info); err != nil {
		return nil, err
	}
	if info.Type != structOpsMap || info.KernelValueType != l.typeID || info.ValueSize != l.size {
		return nil, nil
	}
	value := make([]byte, l.size)
	if err := element(unix.BPF_MAP_LOOKUP_ELEM, fd, value); err != nil {
		return nil, err
	}
	i := &Info{
		Map: cString(info.Name[:]), MapID: info.ID, byLink: info.Flags&unix.BPF_F_LINK != 0,
		Refs:  int(int32(binary.NativeEndian.Uint32(value[l.refcnt:]))),
		State: State(binary.NativeEndian.Uint32(value[l.state:])),
	}
	for _, m := range l.members {
		switch b := value[m.off:][:m.size]; {
		case m.name == "name":
			i.Name = cString(b)
		case m.name == "flags" && m.size == 4:
			i.Flags = binary.NativeEndian.Uint32(b)
		case m.function:
			if id := binary.NativeEndian.Uint64(b); id != 0 {
				i.Members = append(i.Members, Member{Member: m.name, ID: uint32(id)})
			}
		}
	}
	return i, nil
}

// structOpsLinks walks the links: the kernel has no way from a map to its link.
func structOpsLinks() (map[uint32]uint32, error) {
	links := map[uint32]uint32{}
	err := eachID(unix.BPF_LINK_GET_NEXT_ID, unix.BPF_LINK_GET_FD_BY_ID, func(id uint32, fd int) error {
		var info linkInfo
		if err := objInfo(fd, &info); err != nil {
			return err
		}
		if info.Type == structOpsLink && info.Map != 0 {
			links[info.Map] = id
		}
		return nil
	})
	return links, err
}

// maxMaps is the most maps that a program can use (MAX_USED_MAPS).
const maxMaps = 64

// readProgram fills in a member, and the parameters of constant maps not seen
// before.
func (i *Info) readProgram(m *Member, seen map[uint32]bool) error {
	fd, err := openID(unix.BPF_PROG_GET_FD_BY_ID, m.ID)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var ids [maxMaps]uint32
	var fn struct{ offset, typ uint32 }
	info := progInfo{
		NumMaps: uint32(len(ids)), Maps: unsafe.Pointer(&ids),
		NumFuncInfo: 1, FuncInfoSize: uint32(unsafe.Sizeof(fn)), FuncInfo: unsafe.Pointer(&fn),
	}
	if err := objInfo(fd, &info); err != nil {
		return err
	}
	m.Program, m.Verified, m.Jited, m.Tag = cString(info.Name[:]), info.Verified, info.JitedLen, hex.EncodeToString(info.Tag[:])
	if len(m.Program) == len(info.Name)-1 && info.BTF != 0 && info.NumFuncInfo > 0 {
		if b, err := loadBTF(info.BTF); err == nil {
			if name := b.name(int(fn.typ)); len(name) > 0 {
				m.Program = string(name)
			}
		}
	}
	for _, id := range ids[:min(int(info.NumMaps), len(ids))] {
		if !seen[id] {
			seen[id] = true
			if err := i.readParams(id); err != nil {
				return err
			}
		}
	}
	return nil
}

// readReached adds the maps that are reached through others: those in them, and those of
// the programs in them. What goes while it is looked at is passed over.
func (i *Info) readReached(seen map[uint32]bool) error {
	for n := 0; n < len(i.Maps); n++ { // what is added is looked into, too
		ids, err := i.Maps[n].reached()
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
		for _, id := range ids {
			if seen[id] {
				continue
			}
			seen[id] = true
			m, err := openMap(id)
			if err == nil && m.Name != recordName {
				i.Maps = append(i.Maps, m)
			} else if err != nil && !errors.Is(err, unix.ENOENT) {
				return err
			}
		}
	}
	return nil
}

func openMap(id uint32) (Map, error) {
	fd, err := openID(unix.BPF_MAP_GET_FD_BY_ID, id)
	if err != nil {
		return Map{}, err
	}
	defer unix.Close(fd)
	var info mapInfo
	err = objInfo(fd, &info)
	return Map{cString(info.Name[:]), id, ebpf.MapType(info.Type).String()}, err
}

// reached are the maps that one leads to.
func (m *Map) reached() (ids []uint32, err error) {
	programs := m.Type == ebpf.ProgramArray.String()
	if !programs && m.Type != ebpf.ArrayOfMaps.String() && m.Type != ebpf.HashOfMaps.String() {
		return nil, nil
	}
	fd, err := openID(unix.BPF_MAP_GET_FD_BY_ID, m.ID)
	if err != nil {
		return nil, err
	}
	in, err := ebpf.NewMapFromFD(fd)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	key := make([]byte, in.KeySize())
	var id uint32
	all := in.Iterate()
	for all.Next(unsafe.Pointer(&key[0]), &id) {
		if !programs {
			ids = append(ids, id)
		} else if of, err := programMaps(id); err == nil {
			ids = append(ids, of...)
		} else if !errors.Is(err, unix.ENOENT) {
			return nil, err
		}
	}
	if err := all.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) { // others may write to it meanwhile
		return nil, err
	}
	return ids, nil
}

// programMaps are the maps that a program uses.
func programMaps(id uint32) ([]uint32, error) {
	fd, err := openID(unix.BPF_PROG_GET_FD_BY_ID, id)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var ids [maxMaps]uint32
	info := progInfo{NumMaps: uint32(len(ids)), Maps: unsafe.Pointer(&ids)}
	if err := objInfo(fd, &info); err != nil {
		return nil, err
	}
	return ids[:min(int(info.NumMaps), len(ids))], nil
}

// loadBTF reads BTF that is in the kernel.
func loadBTF(id uint32) (*rawBTF, error) {
	fd, err := openID(unix.BPF_BTF_GET_FD_BY_ID, id)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var info btfInfo
	if err := objInfo(fd, &info); err != nil || info.Size == 0 {
		return nil, errors.Join(err, errBTF)
	}
	raw := make([]byte, info.Size)
	if err := objInfo(fd, &btfInfo{BTF: unsafe.Pointer(&raw[0]), Size: info.Size}); err != nil {
		return nil, err
	}
	return parseBTF(raw)
}

// readParams adds the parameters in a map, if it is a section of variables with
// BTF.
func (i *Info) readParams(mapID uint32) error {
	fd, err := openID(unix.BPF_MAP_GET_FD_BY_ID, mapID)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var info mapInfo
	if err := objInfo(fd, &info); err != nil {
		return err
	}
	i.Maps = append(i.Maps, Map{cString(info.Name[:]), mapID, ebpf.MapType(info.Type).String()})
	if isRecord(&info) {
		i.record = mapID
		return nil
	}
	if info.Type != uint32(ebpf.Array) || info.Entries != 1 || info.BTF == 0 {
		return nil
	}
	value := make([]byte, info.ValueSize)
	if err := element(unix.BPF_MAP_LOOKUP_ELEM, fd, value); err != nil {
		return err
	}
	h, err := btf.NewHandleFromID(btf.ID(info.BTF))
	if err != nil {
		return err
	}
	defer h.Close()
	spec, err := h.Spec(nil)
	if err != nil {
		return fmt.Errorf("BTF of map %d: %w", mapID, err)
	}
	t, err := spec.TypeByID(btf.TypeID(info.ValueType))
	if err != nil {
		return fmt.Errorf("BTF of map %d: %w", mapID, err)
	}
	section, ok := t.(*btf.Datasec)
	if !ok {
		return nil
	}
	for _, vsi := range section.Vars {
		v, ok := vsi.Type.(*btf.Var)
		if ok && isTunable(section.Name, v, int(vsi.Size)) && uint64(vsi.Offset)+uint64(vsi.Size) <= uint64(len(value)) {
			running := runs(v.Type, info.Flags&unix.BPF_F_RDONLY_PROG != 0)
			i.Params = append(i.Params, Param{v.Name, typeName(v.Type), decode(v.Type, value[vsi.Offset:][:vsi.Size]), running})
			if running {
				if i.places == nil {
					i.places = map[string]place{}
				}
				i.places[v.Name] = place{mapID, vsi.Offset, v.Type}
			}
		}
	}
	return nil
}
