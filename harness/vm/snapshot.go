// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A boot is the same each time, and longer than many an experiment, so it is done
// once for all experiments: the guest stops itself at an instruction of its own
// (hold), QEMU writes down its whole state, and each experiment begins from a
// copy of that. Which experiment, the guest finds in memory that it shares with
// the host.
//
// The state is written by savevm, which wants an image of a disk to write to, since
// recording and migration do not go together (QEMU 7.2). The guest does not see that
// disk.

// The state's name in its image.
const snapshotTag = "held"

// errSnapshot says that QEMU or the kernel cannot do it; then a guest boots.
var errSnapshot = errors.New("no snapshot")

// snapshots is the directory of the states: guests beside the pulled kernels.
func snapshots() string { return filepath.Join(filepath.Dir(CacheDir()), "guests") }

// mostSnapshots are kept, those that were used last. Each takes some 120 MB.
const mostSnapshots = 6

// image is a guest's state: a disk with it, and the kernel's log until then.
type image struct {
	disk *os.File // in memory, and the caller's own
	log  []byte
}

// snapshot returns the state of a guest that has booted, from the cache or a boot.
func (g *Guest) snapshot(ctx context.Context, console io.Writer) (*image, error) {
	held := &Guest{
		Kernel: g.Kernel, Binary: g.Binary, Modules: g.Modules, Optional: g.Optional,
		Memory: g.Memory, Patience: g.Patience, Seed: 1,
	}
	key, err := held.key()
	if err != nil {
		return nil, err
	}
	dir := snapshots()
	path := filepath.Join(dir, key)
	if i, err := readImage(path); err == nil {
		return i, nil
	}
	// Without a place to keep it, it is for this guest only.
	kept := os.MkdirAll(dir, 0o700) == nil
	if kept {
		unlock, err := lock(ctx, filepath.Join(dir, ".lock"), func() {})
		switch {
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case err != nil:
			kept = false
		default:
			defer unlock()
			if i, err := readImage(path); err == nil {
				return i, nil
			}
		}
	}
	i, err := held.hold(ctx, console)
	if err == nil && kept {
		i.keep(path)
	}
	return i, err
}

// key names the state: whatever it depends on gives another.
func (g *Guest) key() (string, error) {
	h := sha256.New()
	program, err := exec.LookPath(qemu)
	if err != nil {
		return "", ErrNoQEMU
	}
	st, err := os.Stat(program)
	if err != nil {
		return "", err
	}
	fmt.Fprintln(h, 1, program, st.Size(), st.ModTime().UnixNano(), g.options(false), kernelLine, holdDevices(0), g.Modules, g.Optional)
	for _, path := range []string{g.Binary, g.Kernel.Image} {
		f, err := os.Open(path)
		if err != nil {
			return "", fmt.Errorf("guest: %w", err)
		}
		n, err := io.Copy(h, f)
		f.Close()
		if err != nil {
			return "", fmt.Errorf("guest: %w", err)
		}
		fmt.Fprintln(h, n)
	}
	if g.Kernel.Modules != "" {
		err := filepath.WalkDir(filepath.Join(g.Kernel.Modules, "kernel"), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			st, err := d.Info()
			if err == nil {
				fmt.Fprintln(h, path, st.Size(), st.ModTime().UnixNano())
			}
			return err
		})
		if err != nil {
			return "", fmt.Errorf("kernel %q: modules: %w", g.Kernel.Release, err)
		}
	}
	return hex.EncodeToString(h.Sum(nil)[:16]), nil
}

// holdDevices are what the guest tells with that it holds (pvpanic), and where it
// finds what to do then (ivshmem); file is the latter's descriptor.
func holdDevices(file int) []string {
	return []string{
		"-device", "pvpanic-pci", "-action", "panic=pause",
		"-object", fmt.Sprintf("memory-backend-file,id=job,mem-path=/dev/fd/%d,share=on,size=%d", file, jobSize),
		"-device", "ivshmem-plain,memdev=job,master=on",
	}
}

// holds gives a machine what holding and going on need.
func (m *machine) holds(disk *os.File) (job *os.File, mon *monitor, err error) {
	if job, err = memory("job", bytes.NewReader(nil)); err != nil {
		return nil, nil, err
	}
	m.own = append(m.own, job)
	if err := job.Truncate(jobSize); err != nil {
		return nil, nil, err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	here, there := os.NewFile(uintptr(pair[0]), "monitor"), os.NewFile(uintptr(pair[1]), "monitor")
	m.own, m.there = append(m.own, there), there
	conn, err := net.FileConn(here)
	here.Close()
	if err != nil {
		return nil, nil, err
	}
	m.options = append(m.options, holdDevices(m.pass(job))...)
	m.options = append(m.options,
		"-drive", fmt.Sprintf("file=/dev/fd/%d,format=qcow2,if=none,id=held", m.pass(disk)),
		"-chardev", fmt.Sprintf("socket,id=mon,fd=%d", m.pass(there)), "-mon", "chardev=mon,mode=control")
	return job, &monitor{conn: conn, in: json.NewDecoder(conn)}, nil
}

// hold boots the guest until it holds and takes down its state.
func (g *Guest) hold(ctx context.Context, console io.Writer) (_ *image, err error) {
	m, err := newMachine(g.options(false))
	if err != nil {
		return nil, err
	}
	defer m.close()
	files, err := g.system()
	if err != nil {
		return nil, err
	}
	files[guestHold] = nil
	if err := g.boot(m, files); err != nil {
		return nil, err
	}
	i := &image{}
	if i.disk, err = memory("state", bytes.NewReader(emptyDisk())); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			i.disk.Close()
		}
	}()
	_, mon, err := m.holds(i.disk)
	if err != nil {
		return nil, err
	}
	held := false
	m.begin = func() error {
		defer mon.conn.Close()
		for _, step := range []func() error{
			mon.greet,
			func() error { return mon.wait("GUEST_PANICKED") },
			func() error { return mon.human("savevm " + snapshotTag) },
			func() error { held = true; return mon.do("quit", nil, nil) },
		} {
			if err := step(); err != nil {
				return err
			}
		}
		return nil
	}
	var log bytes.Buffer
	_, err = g.runs(ctx, m, io.Discard, io.Discard, &log)
	i.log = log.Bytes()
	switch {
	case held:
		return i, nil
	case bytes.Contains(i.log, []byte(cannotHold)):
		return nil, fmt.Errorf("%w: %w", errSnapshot, err)
	}
	console.Write(i.log)
	return nil, err
}

// resume runs the guest from its state.
func (g *Guest) resume(ctx context.Context, stdout, stderr, console io.Writer) (status int, err error) {
	todo, err := g.job()
	if err != nil {
		return 0, err
	}
	job := &bytes.Buffer{}
	if err := initramfs(job, todo); err != nil {
		return 0, fmt.Errorf("guest: %w", err)
	}
	if job.Len() > jobSize {
		return 0, fmt.Errorf("guest: its experiment takes %d bytes: at most %d", job.Len(), jobSize)
	}
	i, err := g.snapshot(ctx, console)
	if err != nil {
		return 0, err
	}
	defer i.disk.Close()
	m, err := newMachine(g.options(false))
	if err != nil {
		return 0, err
	}
	defer m.close()
	m.options = append(m.options, "-S")
	shared, mon, err := m.holds(i.disk)
	if err != nil {
		return 0, err
	}
	m.begin = func() error {
		defer mon.conn.Close()
		for _, step := range []func() error{
			mon.greet,
			func() error { return mon.human("loadvm " + snapshotTag) },
			// The shared memory is part of the state, so not before.
			func() error { _, err := shared.WriteAt(job.Bytes(), 0); return err },
			func() error { return mon.human("drive_del held") }, // its memory
			func() error { return mon.do("cont", nil, nil) },
		} {
			if err := step(); err != nil {
				return err
			}
		}
		return nil
	}
	console.Write(i.log)
	return g.runs(ctx, m, stdout, stderr, console)
}

// A state's file: the lengths of the log and of the disk, their CRC-32C, and both.
type imageHead struct {
	Log, Disk uint64
	CRC       uint32
}

func readImage(path string) (_ *image, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var head imageHead
	if err := binary.Read(f, le, &head); err != nil {
		return nil, err
	}
	if st, err := f.Stat(); err != nil || uint64(st.Size()) != uint64(binary.Size(head))+head.Log+head.Disk {
		return nil, errors.New("truncated")
	}
	i := &image{log: make([]byte, head.Log)}
	sum := crc32.New(castagnoli)
	r := io.TeeReader(f, sum)
	if _, err := io.ReadFull(r, i.log); err != nil {
		return nil, err
	}
	if i.disk, err = memory("state", r); err != nil {
		return nil, err
	}
	if sum.Sum32() != head.CRC {
		i.disk.Close()
		return nil, errors.New("wrong checksum")
	}
	now := time.Now()
	os.Chtimes(path, now, now) // used last
	return i, nil
}

// keep writes the state to a file; if that fails there is none.
func (i *image) keep(path string) {
	st, err := i.disk.Stat()
	if err != nil {
		return
	}
	disk := io.NewSectionReader(i.disk, 0, st.Size())
	sum := crc32.New(castagnoli)
	sum.Write(i.log)
	if _, err := io.Copy(sum, disk); err != nil {
		return
	}
	disk.Seek(0, io.SeekStart)
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if binary.Write(f, le, imageHead{uint64(len(i.log)), uint64(st.Size()), sum.Sum32()}) != nil {
		return
	}
	if _, err := f.Write(i.log); err != nil {
		return
	}
	if _, err := io.Copy(f, disk); err != nil {
		return
	}
	os.Rename(f.Name(), path)
	tidy(filepath.Dir(path))
}

// tidy removes the states that were not used for longest, and what a killed process left.
// Nobody else writes to the directory meanwhile.
func tidy(dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	var states []fs.FileInfo
	for _, e := range entries {
		switch st, err := e.Info(); {
		case err != nil || e.Name() == ".lock":
		case e.Name()[0] == '.':
			os.Remove(filepath.Join(dir, e.Name()))
		default:
			states = append(states, st)
		}
	}
	slices.SortFunc(states, func(a, b fs.FileInfo) int { return -cmp.Compare(a.ModTime().UnixNano(), b.ModTime().UnixNano()) })
	for _, st := range states[min(len(states), mostSnapshots):] {
		os.Remove(filepath.Join(dir, st.Name()))
	}
}

// emptyDisk is the image of an empty disk of one cluster: a header, a table with
// one block of reference counts, which counts the four clusters that there are, and
// a table with nothing in it (QEMU's docs/interop/qcow2.txt).
func emptyDisk() []byte {
	const bits, cluster = 16, 1 << 16
	b := make([]byte, 4*cluster)
	be := binary.BigEndian
	copy(b, "QFI\xfb")
	be.PutUint32(b[4:], 2) // version
	be.PutUint32(b[20:], bits)
	be.PutUint64(b[24:], cluster)   // size of the disk
	be.PutUint32(b[36:], 1)         // entries of the L1 table
	be.PutUint64(b[40:], 3*cluster) // where it is
	be.PutUint64(b[48:], cluster)   // where the table of reference counts is
	be.PutUint32(b[56:], 1)         // clusters of it
	be.PutUint64(b[cluster:], 2*cluster)
	for i := range 4 {
		be.PutUint16(b[2*cluster+2*i:], 1)
	}
	return b
}

// monitor speaks QEMU's machine protocol (QMP) from its greeting on.
type monitor struct {
	conn   net.Conn
	in     *json.Decoder
	events []string // until now
}

// errGone says that QEMU has ended, which tells more.
var errGone = errors.New("the monitor is gone")

// message is what QEMU says: an answer or an event, or, with neither, its greeting.
type message struct {
	Event  string
	Return json.RawMessage
	Error  *struct{ Desc string }
}

func (m *monitor) next() (got message, err error) {
	if err := m.in.Decode(&got); err != nil {
		return got, errGone
	}
	if got.Event != "" {
		m.events = append(m.events, got.Event)
	}
	return got, nil
}

// greet makes the monitor take commands.
func (m *monitor) greet() error {
	if _, err := m.next(); err != nil {
		return err
	}
	return m.do("qmp_capabilities", nil, nil)
}

// wait waits for an event.
func (m *monitor) wait(event string) error {
	for !slices.Contains(m.events, event) {
		if _, err := m.next(); err != nil {
			return err
		}
	}
	return nil
}

// do has QEMU do something and, where answer is not nil, reads what it says.
func (m *monitor) do(command string, arguments map[string]string, answer any) error {
	b, err := json.Marshal(struct {
		Execute   string            `json:"execute"`
		Arguments map[string]string `json:"arguments,omitempty"`
	}{command, arguments})
	if err != nil {
		return err
	}
	if _, err := m.conn.Write(b); err != nil {
		return errGone
	}
	for {
		got, err := m.next()
		switch {
		case err != nil:
			return err
		case got.Error != nil:
			return fmt.Errorf("%w: %s: %s", errSnapshot, command, got.Error.Desc)
		case got.Return != nil && answer != nil:
			return json.Unmarshal(got.Return, answer)
		case got.Return != nil:
			return nil
		}
	}
}

// human has QEMU do what only its other language knows; what that answers is a fault.
func (m *monitor) human(command string) error {
	var fault string
	if err := m.do("human-monitor-command", map[string]string{"command-line": command}, &fault); err != nil {
		return err
	}
	if fault = strings.TrimSpace(fault); fault != "" {
		return fmt.Errorf("%w: %s: %s", errSnapshot, command, fault)
	}
	return nil
}
