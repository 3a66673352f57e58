// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
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
	path string // of its file
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
	if err := trusted(path); err != nil {
		return nil, err
	}
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
	config, err := g.Kernel.config()
	if err != nil {
		return "", err
	}
	fmt.Fprintf(h, "%x\n", sha256.Sum256(config))
	fmt.Fprintln(h, 2, program, st.Size(), st.ModTime().UnixNano(), g.options(false), kernelLine, holdDevices(0), g.Modules, g.Optional)
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

// holdDevices are what stops the guest (a watchdog), and where it finds what to do
// then (ivshmem); file is the latter's descriptor.
//
// A watchdog, because QEMU obeys its timer between two instructions of a processor
// that waits: at an instant of the guest's time that does not depend on the host. What
// the processor itself asks for, as by pvpanic, is done when QEMU's other thread gets
// to it, and by then the clock may have jumped to the next timer (seen with 7.2: the
// same boot gave one of two states, by how busy the host was).
func holdDevices(file int) []string {
	return []string{
		"-device", "i6300esb", "-action", "watchdog=pause",
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
		"-chardev", fmt.Sprintf("socket,id=mon,fd=%d", m.pass(there)), "-mon", "chardev=mon,mode=readline")
	return job, &monitor{conn: conn}, nil
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
		for status := ""; !strings.Contains(status, "(watchdog)"); {
			var err error
			time.Sleep(glance)
			if status, err = mon.ask("info status"); err != nil {
				return err
			}
		}
		if err := mon.do("savevm " + snapshotTag); err != nil {
			return err
		}
		held = true
		return mon.do("quit")
	}
	var log bytes.Buffer
	_, err = g.runs(ctx, m, io.Discard, io.Discard, &log)
	i.log = log.Bytes()
	_, crashed := errors.AsType[*CrashError](err)
	switch {
	case held:
		return i, nil
	case ctx.Err() != nil:
	case crashed && !bytes.Contains(i.log, []byte(cannotHold)):
		console.Write(i.log)
	default:
		err = fmt.Errorf("%w: %w", errSnapshot, err)
	}
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
		return 0, errSnapshot
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
	going := false
	m.begin = func() error {
		defer mon.conn.Close()
		i.disk.Close() // QEMU has it
		if err := mon.do("loadvm " + snapshotTag); err != nil {
			return err
		}
		// The shared memory is part of the state, so not before.
		if _, err := shared.WriteAt(job.Bytes(), 0); err != nil {
			return err
		}
		if err := mon.do("drive_del held"); err != nil { // its memory
			return err
		}
		going = true
		return mon.do("cont")
	}
	console.Write(i.log)
	status, err = g.runs(ctx, m, stdout, stderr, console)
	if err != nil && !going && ctx.Err() == nil {
		os.Remove(i.path)
		err = fmt.Errorf("%w: %w", errSnapshot, err)
	}
	return status, err
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
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if n := uint64(st.Size()); head.Log > n || head.Disk > n || n != uint64(binary.Size(head))+head.Log+head.Disk {
		return nil, errors.New("truncated")
	}
	i := &image{log: make([]byte, head.Log), path: path}
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

// monitor is QEMU's for humans: the one for machines has a thread of its own, which
// each timer of the guest would wake.
type monitor struct {
	conn net.Conn
	in   *bufio.Reader
}

// errGone says that QEMU has ended, which tells more.
var errGone = errors.New("the monitor is gone")

const prompt = "(qemu) "

// answer reads until the prompt.
func (m *monitor) answer() (string, error) {
	var b []byte
	for !bytes.HasSuffix(b, []byte(prompt)) {
		c, err := m.in.ReadByte()
		if err != nil {
			return "", errGone
		}
		b = append(b, c)
	}
	_, answer, _ := strings.Cut(string(b), "\r\n") // behind the echo
	return strings.TrimSpace(strings.TrimSuffix(answer, prompt)), nil
}

// ask has QEMU tell something.
func (m *monitor) ask(command string) (string, error) {
	if m.in == nil {
		m.in = bufio.NewReader(m.conn)
		if _, err := m.answer(); err != nil { // its greeting
			return "", err
		}
	}
	if _, err := fmt.Fprintln(m.conn, command); err != nil {
		return "", errGone
	}
	return m.answer()
}

// do has QEMU do something; what it tells then is a fault.
func (m *monitor) do(commands ...string) error {
	for _, c := range commands {
		if fault, err := m.ask(c); err != nil {
			return err
		} else if fault != "" {
			return fmt.Errorf("%w: %s: %s", errSnapshot, c, fault)
		}
	}
	return nil
}
