// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"errors"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"ccload/internal/kerneltest"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// nobodyID is a user without any rights.
const nobodyID = 65534

// privateBPFFS gives the test a mount namespace of its own, with a bpffs on which anybody
// may make things, as the kernel mounts it unless told otherwise. The test keeps its
// thread, which ends with it.
func privateBPFFS(t *testing.T) {
	t.Helper()
	kerneltest.Privileged(t)
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("bpf", bpffs, "bpf", 0, "mode=1777"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(bpffs, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// as runs a command as a user, in the mount namespace of the thread.
func as(t *testing.T, uid uint32, command ...string) {
	t.Helper()
	cmd := exec.Command(command[0], command[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%q: %v\n%s", command, err, out)
	}
}

// modes is what is below a directory: paths, with their modes and owners.
func modes(t *testing.T, dir string) map[string]string {
	t.Helper()
	found := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := d.Info()
		if err == nil {
			found[path] = st.Mode().String()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// What an earlier version left in its directories is where it belongs after the next
// change, also of names that are the directories' now.
func TestTakenOver(t *testing.T) {
	privateBPFFS(t)
	if err := os.Mkdir(rootDir, 0o700); err != nil {
		t.Fatal(err)
	}
	at := map[string]string{}
	for _, name := range []string{"ccr_old", "name", "use", "replace"} {
		r := register(t, Options{Name: name})
		at[name] = r.Pin
	}
	slot, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer slot.Close()
	// As an earlier version would have it.
	j, err := newJournal()
	if err != nil {
		t.Fatal(err)
	}
	if err := j.Put(key{Kind: keyDefault, NS: 1}, value{}); err != nil {
		t.Fatal(err)
	}
	j.Close()
	if err := os.Mkdir(bpffs+"/ccload-use", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(undoPath, bpffs+"/ccload-use/undo"); err != nil {
		t.Fatal(err)
	}
	tidyUp(useDir)
	for name, path := range at {
		if err := os.Rename(path, filepath.Join(bpffs, "ccr_"+name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(pinDir); err != nil {
		t.Fatal(err)
	}
	for name := range at {
		if err := os.Rename(filepath.Join(bpffs, "ccr_"+name), filepath.Join(rootDir, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range []string{"ccload-extend", "ccload-extend/ccr_old", "ccload-extend/ccr_old/backoff", "ccload-replace", "ccload-replaced"} {
		if err := os.Mkdir(filepath.Join(bpffs, path), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := slot.Pin(bpffs + "/ccload-extend/ccr_old/backoff/1-ssthresh"); err != nil {
		t.Fatal(err)
	}

	if problems := takeOver(); len(problems) > 0 {
		t.Errorf("%q", problems)
	}
	want := []string{bpffs, rootDir, extendDir, extendDir + "/ccr_old", extendDir + "/ccr_old/backoff", extendDir + "/ccr_old/backoff/1-ssthresh",
		pinDir, pinDir + "/ccr_old", pinDir + "/name", pinDir + "/replace", pinDir + "/use", useDir, undoPath}
	if got := slices.Sorted(maps.Keys(modes(t, bpffs))); !slices.Equal(slices.DeleteFunc(got, func(p string) bool { return strings.HasSuffix(p, ".debug") }), slices.Sorted(slices.Values(want))) {
		t.Errorf("there is %q\nwant %q", got, want)
	}
	for name, path := range at {
		if d, _, err := Lookup(name); err != nil || d.Pin != path {
			t.Errorf("%s: %+v, %v", name, d, err)
		}
	}
	if err := unpin(undoPath); err != nil {
		t.Error(err)
	}
}

// What others have made in place of the earlier directories is left alone, and said.
func TestNotTakenOver(t *testing.T) {
	privateBPFFS(t)
	victim := t.TempDir()
	if err := os.WriteFile(filepath.Join(victim, "ccr_file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	as(t, nobodyID, "ln", "-s", victim, bpffs+"/ccload-replaced")
	as(t, nobodyID, "mkdir", "-m", "700", bpffs+"/ccload-use")
	if err := os.Mkdir(bpffs+"/ccload-extend", 0o755); err != nil {
		t.Fatal(err)
	}
	before := modes(t, bpffs)
	var said []string
	for _, err := range takeOver() {
		var refused *RefusedError
		if !errors.As(err, &refused) {
			t.Error(err)
		}
		said = append(said, strings.TrimPrefix(refused.Path, bpffs+"/")+": "+refused.Why)
	}
	if want := []string{"ccload-use: it is owned by uid 65534, not by root", "ccload-extend: its mode is 0755, not 0700", "ccload-replaced: it is not a directory"}; !slices.Equal(said, want) {
		t.Errorf("said %q, want %q", said, want)
	}
	if after := modes(t, bpffs); !maps.Equal(before, after) {
		t.Errorf("there was %v, is %v", before, after)
	}
	if _, err := os.Stat(filepath.Join(victim, "ccr_file")); err != nil {
		t.Error(err)
	}
}
