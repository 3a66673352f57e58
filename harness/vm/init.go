// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Inside tells whether this process is the init of a guest that Run booted.
func Inside() bool {
	if os.Getpid() != 1 {
		return false
	}
	_, err := os.Stat(guestArgs)
	return err == nil
}

// Init makes the guest ready (file systems, modules), runs main with the
// arguments that the host gave, tells the host its exit status and switches the
// guest off. It does not return.
func Init(main func(args []string, stdout, stderr io.Writer) int) {
	if err := initialise(main); err != nil {
		fmt.Fprintln(os.Stderr, "init:", err) // to the console
	}
	unix.Sync()
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func initialise(main func(args []string, stdout, stderr io.Writer) int) error {
	for _, m := range [][2]string{
		{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/tmp"}, {"tmpfs", "/run"},
		{"bpf", "/sys/fs/bpf"}, {"tracefs", "/sys/kernel/tracing"}, {"cgroup2", "/sys/fs/cgroup"},
	} {
		err := unix.Mount(m[0], m[1], m[0], 0, "")
		if err != nil && !errors.Is(err, unix.EBUSY) { // the kernel may have mounted /dev
			return fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	if err := loadModules(); err != nil {
		return err
	}
	var err error
	if port, err = openPort(); err != nil {
		return err
	}
	defer port.Close()
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

func loadModules() error {
	list, err := os.ReadFile(guestModules)
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
		if err != nil {
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
