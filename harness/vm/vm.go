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
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
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
	Kernel  *Kernel
	Binary  string            // path of the static binary that is the guest's init
	Args    []string          // what it is told to do, as its os.Args[1:]
	Files   map[string][]byte // further files of the guest, by absolute path
	Modules []string          // kernel modules to load, with what they depend on
	Memory  int               // MiB; default 512
}

// ErrNoQEMU says that QEMU is not installed.
var ErrNoQEMU = errors.New("no " + qemu + ": install the package qemu-system-x86")

// CrashError says that the guest ended without having said that it was done.
type CrashError struct {
	Why string // what the kernel's log says, or that it just ended
	Log string // the last lines of the kernel's log
}

func (e *CrashError) Error() string {
	if e.Log == "" {
		return "guest: " + e.Why
	}
	return "guest: " + e.Why + "\n" + e.Log
}

// Run boots the guest, passes on what it writes and returns the exit status of
// what it was told to do. The guest ends with the context, and with this
// process, however that ends; nothing of it is kept on disk. console gets the
// kernel's log; it may be nil.
func (g *Guest) Run(ctx context.Context, stdout, stderr, console io.Writer) (status int, err error) {
	path, err := exec.LookPath(qemu)
	if err != nil {
		return 0, ErrNoQEMU
	}
	initrd, err := g.initrd()
	if err != nil {
		return 0, err
	}
	defer initrd.Close()
	port, portGuest, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer port.Close()
	log, logGuest, err := os.Pipe()
	if err != nil {
		return 0, errors.Join(err, portGuest.Close())
	}
	defer log.Close()

	memory := g.Memory
	if memory == 0 {
		memory = 512
	}
	cmd := exec.CommandContext(ctx, path,
		"-nodefaults", "-display", "none", "-no-reboot",
		"-accel", "tcg", "-cpu", "max,-rdrand,-rdseed", "-smp", "1", "-m", fmt.Sprint(memory),
		"-icount", "shift=0,sleep=off", "-rtc", "clock=vm,base=2026-01-01",
		"-kernel", g.Kernel.Image, "-initrd", "/dev/fd/3",
		"-append", "console=ttyS0 quiet panic=-1 oops=panic",
		"-chardev", "file,id=log,path=/dev/fd/5", "-serial", "chardev:log",
		"-device", "virtio-serial-pci",
		"-chardev", "file,id=port,path=/dev/fd/4", "-device", "virtserialport,chardev=port,name="+portName)
	cmd.ExtraFiles = []*os.File{initrd, portGuest, logGuest}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = time.Second
	var complaints bytes.Buffer
	cmd.Stderr = &complaints

	// The signal is sent when the thread that started QEMU ends, so that thread has to stay.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err = cmd.Start()
	portGuest.Close()
	logGuest.Close()
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", qemu, err)
	}

	var tail tail
	var readers sync.WaitGroup
	readers.Go(func() {
		var w io.Writer = &tail
		if console != nil {
			w = io.MultiWriter(&tail, console)
		}
		io.Copy(w, log)
	})
	status, done, frameErr := demux(port, stdout, stderr)
	if frameErr != nil {
		cmd.Process.Kill()
	}
	io.Copy(io.Discard, port)
	waitErr := cmd.Wait()
	readers.Wait()
	switch {
	case ctx.Err() != nil:
		return 0, ctx.Err()
	case frameErr != nil:
		return 0, fmt.Errorf("guest: %w", frameErr)
	case done:
		return status, nil
	case waitErr != nil && complaints.Len() > 0:
		return 0, fmt.Errorf("%s: %s", qemu, bytes.TrimSpace(complaints.Bytes()))
	}
	return 0, tail.crash(waitErr)
}

// initrd writes the guest's files into memory that has a descriptor but no name.
func (g *Guest) initrd() (*os.File, error) {
	binary, err := os.ReadFile(g.Binary)
	if err != nil {
		return nil, fmt.Errorf("guest: %w", err)
	}
	files := map[string][]byte{guestInit: binary, guestArgs: []byte(strings.Join(g.Args, "\x00"))}
	for name, data := range g.Files {
		files[name] = data
	}
	// The port's driver is a module in some kernels.
	mods, err := g.Kernel.load(append([]string{"virtio_pci", "virtio_console"}, g.Modules...))
	if err != nil {
		return nil, err
	}
	var order strings.Builder
	for _, m := range mods {
		name := "/modules/" + m.name + ".ko"
		files[name] = m.elf
		fmt.Fprintln(&order, name)
	}
	files[guestModules] = []byte(order.String())

	fd, err := unix.MemfdCreate("initramfs", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("guest: memory for its files: %w", err)
	}
	f := os.NewFile(uintptr(fd), "initramfs")
	if err := initramfs(f, files); err != nil {
		f.Close()
		return nil, fmt.Errorf("guest: initramfs: %w", err)
	}
	return f, nil
}

// tail keeps the end of the kernel's log.
type tail struct{ b []byte }

const tailSize = 4096

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if n := len(t.b) - tailSize; n > 0 {
		t.b = t.b[n:]
	}
	return len(p), nil
}

// crash says why a guest ended that was not done.
func (t *tail) crash(wait error) error {
	log := strings.TrimSpace(strings.ReplaceAll(string(t.b), "\r", ""))
	why := "it ended before it was done"
	for _, sign := range []struct{ in, means string }{
		{"Out of memory", "out of memory"},
		{"out of memory", "out of memory"},
		{"BUG:", "the kernel met a bug"},
		{"Oops", "the kernel oopsed"},
		{"Kernel panic", "the kernel panicked"},
	} {
		if strings.Contains(log, sign.in) {
			why = sign.means
			break
		}
	}
	if wait != nil {
		why += " (" + wait.Error() + ")"
	}
	return &CrashError{why, log}
}
