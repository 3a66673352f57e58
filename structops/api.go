package structops

import "errors"

// Skeleton of the public surface; the owner of this room fills it in and may split it over files.

var (
	ErrNotFound = errors.New("not found")
	ErrNoLinks  = errors.New("this kernel has no BPF links for struct_ops (before 6.4)")
	errNotYet   = errors.New("not yet")
)

// Spec is an object file, parsed: what can be known without a kernel.
type Spec struct {
	Ops      []*Ops // one for each tcp_congestion_ops variable, in the order of the file
	License  string
	Warnings []string // programs that nothing refers to, and the like
}

// Ops is one tcp_congestion_ops variable of an object.
type Ops struct {
	Map      string            // the variable's name, which becomes the map's
	Name     string            // the congestion control's name; may be changed before Load
	Link     bool              // from a .struct_ops.link section
	Optional bool              // from a ?.struct_ops[.link] section
	Flags    uint32            // TCP_CONG_*; may be changed before Load (bit 0 = NON_RESTRICTED)
	Programs map[string]string // member → program
}

// Param is a const volatile variable of the object (or of a live one).
type Param struct {
	Name  string
	Type  string // C type, e.g. "__u32"
	Value any    // int64, uint64, bool, float64 or []byte
}

func Parse(obj []byte) (*Spec, error)                { return nil, errNotYet }
func (s *Spec) Select(mapName string) (*Ops, error)  { return nil, errNotYet } // "" = the only non-optional one
func (s *Spec) Params() []Param                      { return nil }
func (s *Spec) Set(name string, value any) error     { return errNotYet }      // any integer type, bool or its decimal text; bounds of the C type checked
func (s *Spec) Load(maps ...string) (*Object, error) { return nil, errNotYet } // none named: every non-optional one

// Object is a loaded object: its programs are verified and its maps exist; nothing is registered yet.
type Object struct{}

func (o *Object) Attach(mapName string) (*Link, error) { return nil, errNotYet }
func (o *Object) Close() error                         { return nil }

// Link is a registration that this process holds.
type Link struct{}

func (l *Link) MapID() uint32                          { return 0 }
func (l *Link) LinkID() uint32                         { return 0 } // 0 where the kernel has no links
func (l *Link) Update(o *Object, mapName string) error { return errNotYet }
func (l *Link) Pin(path string) error                  { return errNotYet } // the registration then outlives Close and the process
func (l *Link) Close() error                           { return nil }       // idempotent; unregisters unless pinned

func OpenPinned(path string) (*Link, error) { return nil, errNotYet }

// Info is a live struct_ops map of type tcp_congestion_ops, whoever made it.
type Info struct {
	Name    string // the congestion control's
	Map     string
	MapID   uint32
	LinkID  uint32 // 0: none seen
	State   State
	Refs    int
	Flags   uint32
	Members []Member
	Params  []Param // of its programs' .rodata, by BTF
}

type Member struct {
	Member   string
	Program  string
	ID       uint32
	Verified uint32 // instructions the verifier processed; 0 where the kernel does not tell
	Jited    uint32 // bytes
	Tag      string
}

// State of a struct_ops map (enum bpf_struct_ops_state).
type State uint32

const (
	StateInit State = iota
	StateInUse
	StateToBeFree
	StateReady
)

func Live() ([]*Info, error)              { return nil, errNotYet }
func Inspect(mapID uint32) (*Info, error) { return nil, errNotYet }
func Unregister(info *Info) error         { return errNotYet } // delete (no link) or detach the link (≥ 6.11); what holds it otherwise is said in the error
