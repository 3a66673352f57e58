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
	"ccload/structops"

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
	if _, err := exec.LookPath(command[0]); err != nil {
		t.Skip("a guest has no programs: ", err)
	}
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
	if want := []string{"ccload-use: it is owned by uid 65534, not by root", "ccload-extend: its mode is 0755, not 0700", "ccload-replaced: it is a symbolic link"}; !slices.Equal(said, want) {
		t.Errorf("said %q, want %q", said, want)
	}
	if after := modes(t, bpffs); !maps.Equal(before, after) {
		t.Errorf("there was %v, is %v", before, after)
	}
	if _, err := os.Stat(filepath.Join(victim, "ccr_file")); err != nil {
		t.Error(err)
	}
}

// forgery puts something in place of a path on bpffs.
type forgery struct {
	name string
	why  string // of the refusal
	make func(t *testing.T, path, victim string)
}

var forgeries = []forgery{
	{"symbolic link", "it is a symbolic link", func(t *testing.T, path, victim string) {
		if err := os.Symlink(victim, path); err != nil {
			t.Fatal(err)
		}
	}},
	{"owner", "it is owned by uid 65534, not by root", func(t *testing.T, path, victim string) {
		if err := errors.Join(os.Mkdir(path, 0o700), os.Chown(path, nobodyID, nobodyID)); err != nil {
			t.Fatal(err)
		}
	}},
	{"mode", "its mode is 0755, not 0700", func(t *testing.T, path, victim string) {
		if err := errors.Join(os.Mkdir(path, 0o755), os.Chmod(path, 0o755)); err != nil {
			t.Fatal(err)
		}
	}},
	{"file system", "it is not on bpffs", func(t *testing.T, path, victim string) {
		if err := errors.Join(os.Mkdir(path, 0o700), unix.Mount(victim, path, "", unix.MS_BIND, "")); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(path, unix.MNT_DETACH) })
	}},
}

// victims are files that an attacker would like to have read or removed, in directories
// like ours.
func victims(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, sub := range []string{"name", "use", "extend/ccr_x/backoff", "replace/old", "replace/new"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			t.Fatal(err)
		}
		for _, file := range []string{"undo", "sockets", "ccr_x", "1-ssthresh", "cgroup-1"} {
			if err := os.WriteFile(filepath.Join(dir, sub, file), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, file), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// A directory that is not ours, on whatever level, is refused by name; nothing in it is
// touched, nor where it leads to.
func TestForgedDirectories(t *testing.T) {
	for _, path := range []string{rootDir, pinDir, useDir, extendDir, extendDir + "/ccr_x", extendDir + "/ccr_x/backoff",
		replaceDir, shadowDir, replacedDir, mapDir, bpffs + "/ccload-use", bpffs + "/ccload-extend", bpffs + "/ccload-replace", bpffs + "/ccload-replaced"} {
		for _, f := range forgeries {
			t.Run(strings.TrimPrefix(path, bpffs+"/")+" "+f.name, func(t *testing.T) {
				privateBPFFS(t)
				victim := victims(t)
				for dir := rootDir; strings.HasPrefix(path, dir+"/"); {
					if err := os.Mkdir(dir, 0o700); err != nil {
						t.Fatal(err)
					}
					next, _, _ := strings.Cut(strings.TrimPrefix(path, dir+"/"), "/")
					dir = filepath.Join(dir, next)
				}
				f.make(t, path, victim)
				before, outside := modes(t, bpffs), modes(t, victim)
				warnings, err := Recover()
				if err != nil {
					warnings = append(warnings, err.Error())
				}
				if !slices.ContainsFunc(warnings, func(w string) bool { return strings.HasPrefix(w, "refusing "+path+": "+f.why+"; ") }) {
					t.Errorf("said %q", warnings)
				}
				if groups, names := liveGroups(), places(); len(groups)+len(names) > 0 {
					t.Errorf("believed: %v, %v", groups, names)
				}
				if !maps.Equal(before, modes(t, bpffs)) || !maps.Equal(outside, modes(t, victim)) {
					t.Errorf("there was %v and %v, is %v and %v", before, outside, modes(t, bpffs), modes(t, victim))
				}
			})
		}
	}
}

// pinMap pins a map of a shape.
func pinMap(t *testing.T, path string, spec *ebpf.MapSpec) *ebpf.Map {
	t.Helper()
	m, err := ebpf.NewMap(spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	if err := m.Pin(path); err != nil {
		t.Fatal(err)
	}
	return m
}

// A journal that another user has pinned is not believed, wherever he could pin it.
func TestForgedJournal(t *testing.T) {
	for what, forge := range map[string]func(t *testing.T){
		"his directory": func(t *testing.T) {
			if err := os.Chown(useDir, nobodyID, nobodyID); err != nil {
				t.Fatal(err)
			}
		},
		"his file": func(t *testing.T) {
			if err := os.Chown(undoPath, nobodyID, nobodyID); err != nil {
				t.Fatal(err)
			}
		},
		"a link to his file": func(t *testing.T) {
			if err := errors.Join(os.Rename(undoPath, bpffs+"/undo"), os.Chown(bpffs+"/undo", nobodyID, nobodyID), os.Symlink(bpffs+"/undo", undoPath)); err != nil {
				t.Fatal(err)
			}
		},
		"a link to his directory": func(t *testing.T) {
			if err := errors.Join(os.Rename(useDir, bpffs+"/his"), os.Symlink(bpffs+"/his", useDir)); err != nil {
				t.Fatal(err)
			}
		},
		"an earlier version's directory": func(t *testing.T) {
			if err := errors.Join(os.Rename(useDir, bpffs+"/ccload-use"), os.Remove(rootDir), os.Chown(bpffs+"/ccload-use", nobodyID, nobodyID)); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(what, func(t *testing.T) {
			privateBPFFS(t)
			before := state(t, nil)
			def, _, _ := strings.Cut(before, ":")
			k, err := keyOf(keyDefault, nil)
			if err != nil {
				t.Fatal(err)
			}
			m, err := newJournal()
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			if err := m.Put(k, value{Inode: ownInode(), Before: textOf("reno"), Ours: [2]text{textOf(def), textOf(def)}}); err != nil {
				t.Fatal(err)
			}
			forge(t)
			there := modes(t, bpffs)
			warnings, err := Recover()
			if err != nil || len(warnings) == 0 || !strings.Contains(strings.Join(warnings, "\n"), "refusing "+bpffs) {
				t.Errorf("said %q, %v", warnings, err)
			}
			r, err := Restore()
			if what == "an earlier version's directory" {
				if err != nil || len(r.Restored) > 0 {
					t.Errorf("restored: %+v, %v", r, err)
				}
			} else if refused := (*RefusedError)(nil); !errors.As(err, &refused) {
				t.Errorf("restored: %+v, %v", r, err)
			}
			if after := state(t, nil); after != before {
				t.Errorf("it was %q, is %q", before, after)
			}
			if after := modes(t, bpffs); !maps.Equal(there, after) {
				t.Errorf("there was %v, is %v", there, after)
			}
		})
	}
}

// What the sockets had before is not taken from a map that another user has pinned.
func TestForgedSockets(t *testing.T) {
	privateBPFFS(t)
	if err := errors.Join(os.Mkdir(rootDir, 0o700), os.Mkdir(useDir, 0o700)); err != nil {
		t.Fatal(err)
	}
	pinMap(t, formerPath, &ebpf.MapSpec{Type: ebpf.Hash, KeySize: 4, ValueSize: 16, MaxEntries: 1})
	warnings, err := Recover()
	if err != nil || len(warnings) != 1 || !strings.HasPrefix(warnings[0], "refusing "+formerPath+": ccload did not pin it there; ") {
		t.Errorf("of another kind: %q, %v", warnings, err)
	}
	if err := os.Chown(formerPath, nobodyID, nobodyID); err != nil {
		t.Fatal(err)
	}
	var refused *RefusedError
	// Where there is no socket at all, nothing is asked of it.
	m, err := RestoreSockets(nil, nil)
	if said := err == nil && len(m.Warnings) == 1 && strings.Contains(m.Warnings[0], "refusing "+formerPath); !said && (!errors.As(err, &refused) || refused.Path != formerPath) {
		t.Errorf("of another user: %+v, %v", m, err)
	}
	if _, err := os.Lstat(formerPath); err != nil {
		t.Error(err)
	}
}

// Only pins of the map or link that is unregistered are removed, wherever they are;
// whatever else is there stays, also under the name's own pin.
func TestForgedPins(t *testing.T) {
	privateBPFFS(t)
	const name = "ccr_pinned"
	r := register(t, Options{Name: name})
	array := &ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1}
	forged := filepath.Join(pinDir, "ccr_forged")
	pinMap(t, forged, array)
	var refused *RefusedError
	if _, err := Register(reno(t), Options{Name: "ccr_forged"}); !errors.As(err, &refused) || refused.Path != forged {
		t.Errorf("registered over it: %v", err)
	}
	other := filepath.Join(bpffs, "elsewhere")
	if err := os.Mkdir(other, 0o755); err != nil {
		t.Fatal(err)
	}
	info, err := findBPF(name)
	if err != nil {
		t.Fatal(err)
	}
	l, err := structops.Open(info.info)
	if err != nil {
		t.Fatal(err)
	}
	err = l.Pin(other + "/same")
	l.Close()
	if err != nil {
		t.Fatal(err)
	}
	pinMap(t, other+"/another", array)
	as(t, nobodyID, "ln", "-s", other+"/same", bpffs+"/same")
	as(t, nobodyID, "mkdir", bpffs+"/his")
	as(t, nobodyID, "ln", "-s", other, bpffs+"/his/elsewhere")

	// One that became something else after it was found stays.
	set := pinsOf(r.MapID)
	if got := set.paths(); !slices.Equal(got, []string{r.Pin, other + "/same"}) {
		t.Errorf("found: %q", got)
	}
	if err := errors.Join(os.Rename(r.Pin, bpffs+"/aside"), os.Rename(other+"/another", r.Pin), set.remove(other+"/same"), set.Close()); err != nil {
		t.Error(err)
	}
	if err := errors.Join(os.Rename(r.Pin, other+"/another"), os.Rename(bpffs+"/aside", r.Pin)); err != nil {
		t.Error(err)
	}

	u, err := Unregister(name, UnregisterOptions{})
	if err != nil || !slices.Equal(u.Pins, []string{r.Pin, other + "/same"}) || len(u.Warnings) > 0 {
		t.Errorf("%+v, %v", u, err)
	}
	for path, want := range map[string]bool{r.Pin: false, other + "/same": false, other + "/another": true, forged: true, bpffs + "/same": true, bpffs + "/his/elsewhere": true} {
		if _, err := os.Lstat(path); (err == nil) != want {
			t.Errorf("%s: %v", path, err)
		}
	}
}
