// SPDX-License-Identifier: Apache-2.0

// Package vm runs this program inside a guest kernel under QEMU, in virtual
// time: the guest's clock counts its instructions and jumps over the time in
// which it waits, so what a run measures does not depend on how busy the host is
// (QEMU's -icount with the TCG accelerator).
//
// The guest is made of a kernel image, the modules that it needs and one static
// binary, which is its init. On the host, Run boots it; in the guest, the
// binary's main asks Inside and, if so, calls Init. What the guest writes comes
// back over a virtio port in frames with a checksum, the kernel's log over the
// serial console.
package vm

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// qemu is the program, of the package qemu-system-x86.
const qemu = "qemu-system-x86_64"

// Guest is what to run and where. The zero value of what is optional is the
// default.
type Guest struct {
	Kernel   *Kernel
	Binary   string            // path of the static binary that is the guest's init
	Args     []string          // what it is told to do, as its os.Args[1:]
	Files    map[string][]byte // further files of the guest, by absolute path
	Modules  []string          // kernel modules to load, with what they depend on
	Optional []string          // likewise, of those that the kernel has
	Late     []string          // likewise, when the others are there: what differs from run to run
	Memory   int64             // bytes that it needs; it gets that, rounded up, and at least LeastMemory

	// Seed is where the guest's randomness comes from.
	Seed uint32
	// RealTime lets the guest's clock be the host's, and KVM run it where that
	// works. Nothing is repeatable then.
	RealTime bool
	// Limit is how much of its own time the guest may take; default an hour.
	Limit time.Duration
	// Patience is how much of the host's time may pass without a sign of life;
	// default two minutes.
	Patience time.Duration

	results *received // of a run; see Experiment
}

// ErrNoQEMU says that QEMU is not installed.
var ErrNoQEMU = errors.New("no " + qemu + ": install the package qemu-system-x86")

var errHangs = errors.New("it hangs: no sign of life")

// Available says whether guests can be run here: nil or ErrNoQEMU.
func Available() error {
	if _, err := exec.LookPath(qemu); err != nil {
		return ErrNoQEMU
	}
	return nil
}

// CrashError says that the guest ended without having said that it was done.
type CrashError struct {
	Why string // what the kernel's log says, or that it just ended
	Log string // the lines of the kernel's log that tell, or the last
}

func (e *CrashError) Error() string {
	if e.Log == "" {
		return "guest: " + e.Why
	}
	return "guest: " + e.Why + "; from its log:\n" + e.Log
}

// Run boots the guest, passes on what it writes and returns the exit status of
// what it was told to do. The guest ends with the context, and with this
// process, however that ends; nothing of it is kept on disk. console gets the
// kernel's log; it may be nil.
func (g *Guest) Run(ctx context.Context, stdout, stderr, console io.Writer) (status int, err error) {
	if err := Available(); err != nil {
		return 0, err
	}
	kvm := false
	if g.RealTime {
		if kvm, err = g.Kernel.kvmWorks(ctx, g.Binary); err != nil {
			return 0, err
		}
	}
	if g.results != nil && !g.RealTime {
		status, err := g.resume(ctx, stdout, stderr, console)
		if !errors.Is(err, errSnapshot) {
			return status, err
		}
	}
	return g.run(ctx, kvm, stdout, stderr, console)
}

func (g *Guest) run(ctx context.Context, kvm bool, stdout, stderr, console io.Writer) (status int, err error) {
	m, err := newMachine(g.options(kvm))
	if err != nil {
		return 0, err
	}
	defer m.close()
	files, err := g.system()
	if err != nil {
		return 0, err
	}
	job, err := g.job()
	if err != nil {
		return 0, err
	}
	maps.Copy(files, job)
	if err := g.boot(m, files); err != nil {
		return 0, err
	}
	return g.runs(ctx, m, stdout, stderr, console)
}

// machine is a QEMU to be started.
type machine struct {
	options   []string
	files     []*os.File // what it is given, from descriptor 3 on
	own       []*os.File // of these, what goes with it
	port, log *os.File   // what the guest writes

	begin func() error // what is said to its monitor
	there *os.File     // QEMU's end of that
}

// newMachine is one with a port and a console. These are files, not pipes: a full
// pipe would answer the guest at a moment that depends on how busy the host is.
func newMachine(options []string) (_ *machine, err error) {
	m := &machine{options: options}
	for _, f := range []struct {
		name string
		file **os.File
	}{{"port", &m.port}, {"console", &m.log}} {
		if *f.file, err = memory(f.name, strings.NewReader("")); err != nil {
			m.close()
			return nil, fmt.Errorf("guest: %w", err)
		}
		m.own = append(m.own, *f.file)
	}
	m.options = append(m.options,
		"-chardev", fmt.Sprintf("file,id=log,path=/dev/fd/%d", m.pass(m.log)), "-serial", "chardev:log",
		// The port is served by the virtual processor's own thread: another would answer
		// at a moment that depends on the host.
		"-device", "virtio-serial-pci,ioeventfd=off",
		"-chardev", fmt.Sprintf("file,id=port,path=/dev/fd/%d", m.pass(m.port)), "-device", "virtserialport,chardev=port,name="+portName)
	return m, nil
}

// pass gives QEMU a file and says by which descriptor.
func (m *machine) pass(f *os.File) int {
	m.files = append(m.files, f)
	return 2 + len(m.files)
}

func (m *machine) close() {
	for _, f := range m.own {
		f.Close()
	}
}

// boot lets a machine boot the guest's kernel with these files.
func (g *Guest) boot(m *machine, files map[string][]byte) error {
	initrd, err := memory("initramfs", strings.NewReader(""))
	if err != nil {
		return fmt.Errorf("guest: memory for its files: %w", err)
	}
	m.own = append(m.own, initrd)
	if err := initramfs(initrd, files); err != nil {
		return fmt.Errorf("guest: initramfs: %w", err)
	}
	image := g.Kernel.Image
	vmlinux, err := g.Kernel.boots()
	if err != nil {
		return err
	}
	if vmlinux != nil {
		image = fmt.Sprintf("/dev/fd/%d", m.pass(vmlinux))
	}
	m.options = append(m.options, "-kernel", image, "-initrd", fmt.Sprintf("/dev/fd/%d", m.pass(initrd)), "-append", kernelLine)
	return nil
}

// runs starts QEMU and waits until it ends, for Run.
func (g *Guest) runs(ctx context.Context, m *machine, stdout, stderr, console io.Writer) (status int, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	patience := g.Patience
	if patience == 0 {
		patience = 2 * time.Minute
	}
	watchdog := time.AfterFunc(patience, func() { cancel(errHangs) })
	defer watchdog.Stop()

	cmd := exec.CommandContext(ctx, qemu, m.options...)
	cmd.ExtraFiles = m.files
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = time.Second
	var complaints bytes.Buffer
	cmd.Stderr = &complaints

	// The signal is sent when the thread that started QEMU ends, so that thread has to stay.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("start %s: %w", qemu, err)
	}
	over := make(chan struct{})
	var waitErr error
	go func() {
		waitErr = cmd.Wait()
		close(over)
	}()
	if !g.RealTime {
		go together(cmd.Process.Pid, over)
	}
	var tail tail
	var readers sync.WaitGroup
	if m.begin != nil {
		m.there.Close() // or its end would not be seen
		readers.Go(func() {
			if err := m.begin(); err != nil && err != errGone {
				cancel(err)
			}
		})
	}
	readers.Go(func() {
		var w io.Writer = &tail
		if console != nil {
			w = io.MultiWriter(&tail, console)
		}
		io.Copy(w, &follower{file: m.log, over: over})
	})
	status, done, failure := g.demux(&follower{file: m.port, over: over}, stdout, stderr, func() { watchdog.Reset(patience) })
	if failure != nil {
		cancel(failure)
	}
	<-over
	readers.Wait()
	switch cause := context.Cause(ctx); {
	case done:
		return status, nil
	case failure != nil:
		return 0, fmt.Errorf("guest: %w", failure)
	case cause == errHangs:
		return 0, &CrashError{fmt.Sprintf("%v for %v", errHangs, patience), tail.lines("")}
	case cause != nil:
		return 0, cause
	case waitErr != nil && complaints.Len() > 0:
		return 0, fmt.Errorf("%s: %s", qemu, bytes.TrimSpace(complaints.Bytes()))
	}
	return 0, tail.crash(waitErr)
}

// LeastMemory is what every guest gets, in bytes.
const LeastMemory = 512 << 20

// mebibytes are the guest's memory: in steps, since each size has a saved state of
// its own.
func (g *Guest) mebibytes() int64 {
	return max(1, (g.Memory+LeastMemory-1)/LeastMemory) * (LeastMemory >> 20)
}

// options are QEMU's, but for those with a file.
func (g *Guest) options(kvm bool) []string {
	o := []string{"-nodefaults", "-display", "none", "-no-reboot", "-smp", "1", "-m", fmt.Sprint(g.mebibytes())}
	switch {
	case kvm:
		return append(o, "-accel", "kvm", "-cpu", "host")
	case g.RealTime:
		return append(o, "-accel", "tcg", "-cpu", "max")
	}
	// One nanosecond an instruction; time in which the guest waits takes none. What
	// is random comes from the seed: with none the kernel would wait a second for it.
	// Without the fast string instructions, which are emulated byte by byte, memory is
	// copied eight bytes at a time. Recording, to nowhere, makes QEMU's two threads take
	// turns: without it, on a busy host, the clock may jump before the instructions up
	// to a halt are counted (seen with 7.2).
	return append(o, "-accel", "tcg", "-cpu", "max,-erms,-fsrm", "-seed", fmt.Sprint(g.Seed),
		"-icount", "shift=0,sleep=off,rr=record,rrfile=/dev/null", "-rtc", "clock=vm,base=2026-01-01")
}

// kernelLine is the kernel's command line.
const kernelLine = "console=ttyS0 quiet panic=-1 oops=panic " + bootFaster

// bootFaster spares an emulated machine what takes long and is of no use to it.
// Without it a boot takes three times as long. In this order: measuring the speed
// of the local APIC's timer (the HPET is used instead) and that the timer works at
// all; tests of ciphers; and in the list a source of entropy, certificates of
// modules, and a file of probes in tracefs. Nor need memory be cleared that is about
// to be filled.
const bootFaster = "nohz=off noapictimer no_timer_check cryptomgr.notests tsc=reliable init_on_alloc=0 " +
	"initcall_blacklist=jent_mod_init,load_system_certificate_list,init_acpi_pm_clocksource,init_kprobe_trace"

// kvm is what a probe found out, once in a process.
var kvm struct {
	sync.Once
	works bool
}

// kvmPatience is how long a guest may take to boot under KVM: without an answer
// QEMU has stopped it for what it cannot emulate.
const kvmPatience = 20 * time.Second

// kvmWorks boots the kernel under KVM to find out whether that works: that there
// is a /dev/kvm does not tell, where the host is a guest itself.
func (k *Kernel) kvmWorks(ctx context.Context, binary string) (bool, error) {
	kvm.Do(func() {
		f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
		if err != nil {
			return
		}
		f.Close()
		probe := &Guest{Kernel: k, Binary: binary, Args: []string{probeArg}, Patience: kvmPatience, RealTime: true}
		status, err := probe.run(ctx, true, io.Discard, io.Discard, nil)
		kvm.works = err == nil && status == 0
	})
	return kvm.works, ctx.Err()
}

// system are the files of a guest that has nothing to do yet: its program, and the
// modules to load first.
func (g *Guest) system() (map[string][]byte, error) {
	program, err := os.ReadFile(g.Binary)
	if err != nil {
		return nil, fmt.Errorf("guest: %w", err)
	}
	if err := static(program); err != nil {
		return nil, fmt.Errorf("guest: program %q: %w", g.Binary, err)
	}
	files := map[string][]byte{guestInit: program}
	config, err := g.Kernel.config()
	if err != nil {
		return nil, err
	}
	if config != nil {
		files["/boot/config-"+g.Kernel.Release] = config
	}
	// The port's driver is a module in some kernels.
	return files, g.modules(files, guestModules, append([]string{"virtio_pci", "virtio_console"}, g.Modules...), g.Optional)
}

// job are the files with what it is to do, and with what.
func (g *Guest) job() (map[string][]byte, error) {
	limit := g.Limit
	if limit == 0 {
		limit = time.Hour
	}
	files := map[string][]byte{
		guestArgs:  []byte(strings.Join(g.Args, "\x00")),
		guestLimit: fmt.Append(nil, int64(limit)),
		guestSeed:  binary.LittleEndian.AppendUint32(nil, g.Seed),
	}
	maps.Copy(files, g.Files)
	return files, g.modules(files, guestLate, nil, g.Late)
}

// modules adds modules and a list of them to files.
func (g *Guest) modules(files map[string][]byte, list string, names, optional []string) error {
	mods, err := g.Kernel.load(names, optional)
	if err != nil {
		return err
	}
	var order strings.Builder
	for _, m := range mods {
		name := "/modules/" + m.name + ".ko"
		files[name] = m.elf
		fmt.Fprintln(&order, name)
	}
	files[list] = []byte(order.String())
	return nil
}

// static says whether a program can run where there is nothing but itself.
func static(program []byte) error {
	f, err := elf.NewFile(bytes.NewReader(program))
	if err != nil {
		return err
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return errors.New("not static: it has to be built with CGO_ENABLED=0")
		}
	}
	return nil
}

// tail keeps the end of the kernel's log.
type tail struct{ b []byte }

const (
	tailSize  = 64 << 10
	tailLines = 20
)

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if n := len(t.b) - tailSize; n > 0 {
		t.b = t.b[n:]
	}
	return len(p), nil
}

// lines are the log's from where a sign stands on, or its last.
func (t *tail) lines(sign string) string {
	s := strings.TrimSpace(strings.ReplaceAll(string(t.b), "\r", ""))
	lines := strings.Split(s, "\n")
	from := max(0, len(lines)-tailLines)
	if i := slices.IndexFunc(lines, func(l string) bool { return strings.Contains(l, sign) }); sign != "" {
		from = min(from, max(0, i-1)) // the line before it often tells, too
	}
	return strings.Join(lines[from:min(len(lines), from+tailLines)], "\n")
}

// crash says why a guest ended that was not done.
func (t *tail) crash(wait error) error {
	why, at := "it ended before it was done", ""
	for _, sign := range []struct{ in, means string }{
		{"init: not done", "it took too long"},
		{"Out of memory", "out of memory"},
		{"out of memory", "out of memory"},
		{"deadlocked on memory", "out of memory"},
		{"BUG:", "the kernel met a bug"},
		{"Oops", "the kernel oopsed"},
		{"Kernel panic", "the kernel panicked"},
	} {
		if bytes.Contains(t.b, []byte(sign.in)) {
			why, at = sign.means, sign.in
			break
		}
	}
	if wait != nil {
		why += " (" + wait.Error() + ")"
	}
	return &CrashError{why, t.lines(at)}
}

// follower reads a file that grows until its writer is over. What it has read it
// gives back.
type follower struct {
	file   *os.File // in memory
	over   <-chan struct{}
	at     int64
	behind int64 // given back up to here
}

// glance is how often a follower looks.
const glance = 5 * time.Millisecond

func (f *follower) Read(p []byte) (int, error) {
	for last := false; ; {
		n, err := f.file.ReadAt(p, f.at)
		f.at += int64(n)
		if f.at-f.behind > 1<<20 {
			unix.Fallocate(int(f.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, f.behind, f.at-f.behind)
			f.behind = f.at
		}
		if n > 0 {
			return n, nil
		}
		if err != io.EOF || last {
			return 0, err
		}
		select {
		case <-f.over:
			last = true
		case <-time.After(glance):
		}
	}
}
