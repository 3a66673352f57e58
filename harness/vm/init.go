// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"github.com/cavaliergopher/cpio"
	"golang.org/x/sys/unix"
)

// Inside tells whether this process is the init of a guest that Run booted.
func Inside() bool {
	if os.Getpid() != 1 {
		return false
	}
	_, err := os.Stat(guestModules)
	return err == nil
}

// Init makes the guest ready (file systems, modules), runs main with the
// arguments that the host gave, tells the host its exit status and switches the
// guest off. It does not return. prepare, where it is not nil, comes before main and
// may do what takes long and is the same for all experiments: most begin after it.
func Init(prepare func(), main func(args []string, stdout, stderr io.Writer) int) {
	if err := initialise(prepare, main); err != nil {
		fmt.Fprintln(os.Stderr, "init:", err) // to the console
	}
	unix.Sync()
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func initialise(prepare func(), main func(args []string, stdout, stderr io.Writer) int) error {
	for _, m := range [][2]string{
		{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/tmp"}, {"tmpfs", "/run"},
		{"bpf", "/sys/fs/bpf"}, {"tracefs", "/sys/kernel/tracing"}, {"cgroup2", "/sys/fs/cgroup"},
	} {
		err := unix.Mount(m[0], m[1], m[0], 0, "")
		if err != nil && !errors.Is(err, unix.EBUSY) { // the kernel may have mounted /dev
			return fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	if err := tcpMemory(); err != nil {
		return err
	}
	if err := loadModules(guestModules); err != nil {
		return err
	}
	var err error
	if port, err = openPort(); err != nil {
		return err
	}
	defer port.Close()
	if prepare != nil {
		prepare()
	}
	if _, err := os.Stat(guestHold); err == nil {
		if err := hold(); err != nil {
			return fmt.Errorf("%s%w", cannotHold, err)
		}
	}
	if err := seed(); err != nil {
		return err
	}
	if err := loadModules(guestLate); err != nil {
		return err
	}
	go alive()
	args, err := os.ReadFile(guestArgs)
	if err != nil {
		return err
	}
	os.Setenv("PATH", "/")
	os.Setenv("HOME", "/tmp")
	limit, err := os.ReadFile(guestLimit)
	if err != nil {
		return err
	}
	n, err := strconv.ParseInt(string(limit), 10, 64)
	if err != nil {
		return err
	}
	over := make(chan int, 1)
	go func() {
		if string(args) == probeArg {
			over <- 0
			return
		}
		over <- main(strings.Split(string(args), "\x00"), frameWriter{port, frameStdout}, frameWriter{port, frameStderr})
	}()
	select {
	case status := <-over:
		_, err = frameWriter{port, frameExit}.Write([]byte{byte(status)})
		return err
	case <-time.After(time.Duration(n)):
		return fmt.Errorf("not done after %v of the guest's time", time.Duration(n))
	}
}

// probeArg asks only whether a guest gets as far as this.
const probeArg = "\x00probe"

// tcpMemory lets TCP have most of the memory (tcp_mem in tcp(7), in pages): nothing
// else needs it here, and a kernel that runs short of what it grants holds flows back.
func tcpMemory() error {
	var i unix.Sysinfo_t
	if err := unix.Sysinfo(&i); err != nil {
		return err
	}
	pages := i.Totalram * uint64(i.Unit) / uint64(os.Getpagesize())
	return os.WriteFile("/proc/sys/net/ipv4/tcp_mem", fmt.Append(nil, pages/4, pages/2, pages/4*3), 0)
}

// port is the way to the host.
var port *os.File

// alive tells the host, once in a second of the guest's time, that the guest is not
// stuck.
func alive() {
	for range time.Tick(time.Second) {
		if _, err := (frameWriter{port, frameAlive}).Write([]byte{0}); err != nil {
			return
		}
	}
}

func loadModules(which string) error {
	list, err := os.ReadFile(which)
	if err != nil {
		return err
	}
	for _, path := range strings.Fields(string(list)) {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) { // a late one may depend on an early one
			return fmt.Errorf("module %q: %w", path, err)
		}
	}
	return nil
}

// openPort finds the port by its name, since its number depends on the kernel.
func openPort() (*os.File, error) {
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return nil, err
	}
	for _, n := range names {
		b, err := os.ReadFile(n)
		if err == nil && strings.TrimSpace(string(b)) == portName {
			return os.OpenFile(filepath.Join("/dev", filepath.Base(filepath.Dir(n))), os.O_WRONLY, 0)
		}
	}
	return nil, errors.New("no virtio port: the kernel lacks virtio_console")
}

// cannotHold begins what the console says then.
const cannotHold = "cannot hold: "

// hold has the guest stopped, by a watchdog, while it sleeps. It goes on with what it
// is to do in the memory that it shares with the host.
func hold() error {
	job, err := bar("0x1af4", "0x1110", "resource2", jobSize, unix.PROT_READ) // ivshmem
	if err != nil {
		return err
	}
	defer unix.Munmap(job)
	// A sleep ends with a tick of the kernel. From there on the watchdog takes half a
	// tick, by which time nothing runs any more.
	time.Sleep(settle)
	if err := watchdog(); err != nil {
		return err
	}
	time.Sleep(settle)
	for r := cpio.NewReader(bytes.NewReader(job)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		path := "/" + h.Name
		if h.Mode.IsDir() {
			err = os.MkdirAll(path, 0o755)
		} else {
			var content []byte
			if content, err = io.ReadAll(r); err == nil {
				err = os.WriteFile(path, content, 0o755)
			}
		}
		if err != nil {
			return err
		}
	}
}

// settle is time for everything to be at rest: some ticks.
const settle = 40 * time.Millisecond

// watchdog starts the 6300ESB's: it will fire in 2 ms (Intel 6300ESB I/O Controller
// Hub Datasheet, 15: WDT configuration 0x60, lock 0x68; preload values 0x0 and 0x4 and
// reload 0xc in memory, each after 0x80 and 0x86 were written to the latter).
func watchdog() error {
	const vendor, device = "0x8086", "0x25ab"
	regs, err := bar(vendor, device, "resource0", os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE)
	if err != nil {
		return err
	}
	defer unix.Munmap(regs)
	dir, err := pci(vendor, device)
	if err != nil {
		return err
	}
	config, err := os.OpenFile(filepath.Join(dir, "config"), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer config.Close()
	const (
		megahertz = 1 << 2 // of the configuration: counts 1.03 µs, not milliseconds
		noIRQ     = 3
		enable    = 1 << 1 // of the lock
		each      = 1000   // of two counters, one after the other
	)
	if _, err := config.WriteAt(le.AppendUint16(nil, megahertz|noIRQ), 0x60); err != nil {
		return err
	}
	for _, counter := range []int{0x0, 0x4} {
		poke16(&regs[0xc], 0x80)
		poke16(&regs[0xc], 0x86)
		*(*uint32)(unsafe.Pointer(&regs[counter])) = each
	}
	_, err = config.WriteAt([]byte{enable}, 0x68)
	return err
}

// poke16 writes to a device: each store counts, so the compiler must not see two that
// follow one another.
//
//go:noinline
func poke16(reg *byte, v uint16) { *(*uint16)(unsafe.Pointer(reg)) = v }

// jobSize is how much of memory guest and host share.
const jobSize = 16 << 20

// pci finds the directory of a PCI device.
func pci(vendor, device string) (dir string, err error) {
	ids, err := filepath.Glob("/sys/bus/pci/devices/*/vendor")
	if err != nil {
		return "", err
	}
	is := func(file, want string) bool {
		b, err := os.ReadFile(file)
		return err == nil && strings.TrimSpace(string(b)) == want
	}
	for _, id := range ids {
		if dir := filepath.Dir(id); is(id, vendor) && is(filepath.Join(dir, "device"), device) {
			return dir, nil
		}
	}
	return "", fmt.Errorf("no PCI device %s:%s", vendor, device)
}

// bar maps a range of a PCI device's memory.
func bar(vendor, device, resource string, size, protection int) ([]byte, error) {
	dir, err := pci(vendor, device)
	if err != nil {
		return nil, err
	}
	// A driver that the kernel has for it keeps it from us.
	os.WriteFile(filepath.Join(dir, "driver", "unbind"), []byte(filepath.Base(dir)), 0)
	if err := os.WriteFile(filepath.Join(dir, "enable"), []byte("1"), 0); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, resource), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	m, err := unix.Mmap(int(f.Fd()), 0, size, protection, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	return m, nil
}

// seed makes what is random from here on a matter of the seed.
func seed() error {
	b, err := os.ReadFile(guestSeed)
	if err != nil {
		return err
	}
	f, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		return err
	}
	return unix.IoctlSetInt(int(f.Fd()), unix.RNDRESEEDCRNG, 0)
}
