// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"ccload/internal/kerneltest"
	"ccload/structops"

	"golang.org/x/sys/unix"
)

// One has the lock, and the next gets it when it is let go.
func TestLock(t *testing.T) {
	kerneltest.Privileged(t)
	unlock, err := lock()
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan error)
	go func() {
		unlock, err := lock()
		if err == nil {
			unlock()
		}
		got <- err
	}()
	select {
	case err := <-got:
		t.Fatalf("two had the lock: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	unlock()
	if err := <-got; err != nil {
		t.Error(err)
	}
}

// Pins of what is not registered, as processes leave them that are killed in
// between, go with Recover; what is something else stays.
func TestSweep(t *testing.T) {
	kerneltest.Privileged(t)
	swept := func(what, path string) {
		t.Helper()
		if _, err := os.Stat(path); err != nil {
			t.Fatal(err)
		}
		foreign := filepath.Join(pinDir, "ccr_foreign")
		if err := os.Mkdir(foreign, 0o700); err != nil {
			t.Fatal(err)
		}
		warnings, err := Recover()
		if err != nil || len(warnings) != 1 || !strings.Contains(warnings[0], "refusing "+foreign+": it is a directory") {
			t.Fatal(warnings, err)
		}
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the pin of what %s: %v", what, err)
		}
		if err := os.Remove(foreign); err != nil {
			t.Error(err)
		}
		os.Remove(pinDir)
		os.Remove(rootDir)
	}
	const name = "ccr_swept"
	r := register(t, Options{Name: name})
	e, err := find(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := structops.Unregister(e.info); err != nil {
		t.Fatal(err)
	}
	swept("was unregistered", r.Pin)
	if r.LinkID != 0 {
		return // what a killed process has not pinned goes with it
	}

	obj, err := reno(t).Load("")
	if err != nil {
		t.Fatal(err)
	}
	defer obj.Close()
	killed := errors.New("killed")
	var path string
	_, err = obj.AttachPinned("", func(l *structops.Link) error {
		path, _, err = pin(l, name)
		return cmp.Or(err, killed)
	})
	if !errors.Is(err, killed) {
		t.Fatal(err)
	}
	swept("was to be registered", path)
}

// An ordinary user can not hold the lock, be bpffs mounted for all or not yet; who holds
// it is said.
func TestLockHeld(t *testing.T) {
	if _, err := exec.LookPath("flock"); err != nil {
		t.Skip("a guest has no programs: ", err)
	}
	privateBPFFS(t)
	unlock, err := lock()
	if err != nil {
		t.Fatal(err)
	}
	flock := func(path string, uid uint32) *exec.Cmd {
		cmd := exec.Command("flock", path, "sleep", "60")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}, Setpgid: true}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Kill(-cmd.Process.Pid, unix.SIGKILL); cmd.Wait() })
		return cmd
	}
	if err := flock(rootDir, nobodyID).Wait(); err == nil {
		t.Error("nobody has locked our directory")
	}
	unlock()
	flock(bpffs, nobodyID)
	time.Sleep(200 * time.Millisecond) // it has it by now; if not, the test is easier than it should be
	if unlock, err = lock(); err != nil {
		t.Fatal(err)
	}
	unlock()
	if _, err := os.Stat(rootDir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the lock leaves a trace: %v", err)
	}

	if err := os.Mkdir(rootDir, 0o700); err != nil {
		t.Fatal(err)
	}
	holder := flock(rootDir, 0)
	root, err := openDir(rootDir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	said := ""
	for deadline := time.Now().Add(10 * time.Second); !strings.Contains(said, "sleep") && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		said = root.lockedBy().Error()
	}
	if want := fmt.Sprintf("waiting for the lock on %s, held by process %d (flock %s sleep 60)", rootDir, holder.Process.Pid, rootDir); !strings.Contains(said, want) {
		t.Errorf("said %q, want %q", said, want)
	}
}

func TestFlockHolder(t *testing.T) {
	const locks = `1: POSIX  ADVISORY  WRITE 700 00:1f:42 0 EOF
2: FLOCK  ADVISORY  WRITE 701 00:1f:43 0 EOF
3: FLOCK  ADVISORY  WRITE 702 00:1f:42 0 EOF
3: -> FLOCK  ADVISORY  WRITE 703 00:1f:42 0 EOF
4: FLOCK  ADVISORY  WRITE -1 08:103:7 0 EOF
`
	for _, c := range []struct {
		dev, inode uint64
		want       int
	}{{unix.Mkdev(0, 0x1f), 42, 702}, {unix.Mkdev(0, 0x1f), 43, 701}, {unix.Mkdev(8, 0x103), 7, 0}, {unix.Mkdev(0, 0x1f), 44, 0}} {
		if got := flockHolder(strings.NewReader(locks), c.dev, c.inode); got != c.want {
			t.Errorf("%d: %d, want %d", c.inode, got, c.want)
		}
	}
}
