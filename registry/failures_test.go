// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"

	"ccload/internal/fault"
	"ccload/internal/kerneltest"

	"github.com/cilium/ebpf"
)

// Who waits for the lock gets it also when its directory goes at that moment.
func TestLockGoes(t *testing.T) {
	kerneltest.Privileged(t)
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for range 200 {
				unlock, err := lockDir(mountLock)
				if err != nil {
					t.Error(err)
					return
				}
				unlock()
			}
		})
	}
	all.Wait()
}

// What cannot be registered, or cannot replace, leaves no map pinned that it has made, and
// no directory.
func TestMapPinsTakenBack(t *testing.T) {
	kerneltest.Privileged(t)
	const dir = bpffs + "/ccr_maps"
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	register(t, Options{Name: "ccr_old"})
	for _, in := range []string{"", dir} {
		at := mapDir
		if in != "" {
			at = in
		}
		for _, steps := range [][]string{{"pin " + at + "/so_shared"}, {"attach BPF link", "update BPF"}} {
			restore := fault.Set(failing(steps...))
			_, err := Register(theirs(t, "maps"), Options{Map: "so_sharer", Name: "ccr_new", MapPins: in})
			_, rerr := Replace("ccr_old", theirs(t, "maps"), ReplaceOptions{Map: "so_sharer", MapPins: in})
			restore()
			if !errors.Is(err, errFault) || !errors.Is(rerr, errFault) {
				t.Errorf("%s: %v, %v", steps, err, rerr)
			}
			if _, err := os.Stat(mapDir); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s: %s: %v", steps, mapDir, err)
			}
			if found, err := os.ReadDir(dir); err != nil || len(found) > 0 {
				t.Errorf("%s: in %s is %v, %v", steps, dir, found, err)
			}
		}
	}
}

// A map that ccload pins stays where it is, also if somebody has pinned it elsewhere, too.
func TestMapPinsElsewhereToo(t *testing.T) {
	kerneltest.Privileged(t)
	registerTheirs(t, "maps", Options{Map: "so_sharer", Name: "ccr_one"})
	id := ownMap(mapDir + "/so_shared")
	m, err := openMap(mapDir + "/so_shared")
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	const too = bpffs + "/so_shared"
	if err := m.Pin(too); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(too)
	if _, err := Replace("ccr_one", theirs(t, "maps"), ReplaceOptions{Map: "so_sharer"}); err != nil || ownMap(mapDir+"/so_shared") != id {
		t.Errorf("map %d, was %d: %v", ownMap(mapDir+"/so_shared"), id, err)
	}
}

// What Restore has put back it says, also when the journal cannot be read.
func TestRestoreDamaged(t *testing.T) {
	privateBPFFS(t)
	outer, _ := groups(t)
	if _, err := UseGroup(outer, []Arm{{"reno", 1}}); err != nil {
		t.Fatal(err)
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := newPin(undoPath, m.Pin); err != nil {
		t.Fatal(err)
	}
	defer unpin(undoPath)
	r, err := Restore()
	if err == nil || !strings.Contains(err.Error(), "undo journal") || r == nil || len(r.Restored) != 1 {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestRenameFails(t *testing.T) {
	privateBPFFS(t)
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := newPin(mapDir+"/x", m.Pin); err != nil {
		t.Fatal(err)
	}
	defer unpin(mapDir + "/x")
	defer fault.Set(failing("rename "))()
	if err := rename(mapDir+"/x", pinDir+"/x"); !errors.Is(err, errFault) {
		t.Error(err)
	}
	if _, err := os.Stat(pinDir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s: %v", pinDir, err)
	}
}

func TestTryUnknown(t *testing.T) {
	if err := Try("nonsense"); err == nil {
		t.Error("it is there")
	}
}

// What the kernel has is not missing, be it in the list that it gives or not.
func TestNotMissing(t *testing.T) {
	s := &seen{selections: map[string][]Selection{}}
	for _, name := range []string{"reno", "ccr_none"} {
		s.selections[name] = []Selection{{Name: name, Kind: byDefault}}
	}
	if got := s.missing(nil); len(got) != 1 || !strings.Contains(got[0], "ccr_none") {
		t.Errorf("%s", fmt.Sprint(got))
	}
}

// A directory of ours with another mode is not to be removed, for pins are in it, unless
// others may have put them there.
func TestModeAdvice(t *testing.T) {
	privateBPFFS(t)
	if err := os.Mkdir(rootDir, 0o700); err != nil {
		t.Fatal(err)
	}
	for mode, want := range map[os.FileMode]string{0o755: "chmod 700 " + rootDir, 0o777: "if nobody else needs it, remove it: rm -r " + rootDir} {
		if err := os.Chmod(rootDir, mode); err != nil {
			t.Fatal(err)
		}
		_, err := openDir(rootDir)
		if e, refused := errors.AsType[*RefusedError](err); !refused || !strings.HasPrefix(e.Do, want) {
			t.Errorf("%v: %v", mode, err)
		}
	}
}

// What is set but cannot be recorded as set is a warning; what cannot be swept, too.
func TestLaterFailures(t *testing.T) {
	kerneltest.Privileged(t)
	registerTheirs(t, "tuned", Options{Name: "ccr_set"})
	restore := fault.Set(failing("update BPF map"))
	done, warnings, err := Set("ccr_set", map[string]any{"so_floor": 200})
	restore()
	if err != nil || len(done) != 1 || done[0].After != uint64(200) || len(warnings) != 1 || !strings.Contains(warnings[0], "recorded") {
		t.Errorf("%+v, %q, %v", done, warnings, err)
	}
	registerTheirs(t, "maps", Options{Map: "so_sharer", Name: "ccr_maps"})
	restore = fault.Set(failing("remove " + mapDir))
	u, err := Unregister("ccr_maps", UnregisterOptions{})
	restore()
	if err != nil || len(u.Warnings) != 1 || !strings.Contains(u.Warnings[0], mapDir+"/so_shared") {
		t.Errorf("%+v, %v", u, err)
	}
	if swept, err := sweepMaps(); err != nil || len(swept) != 1 || isPinned(swept[0]) {
		t.Errorf("%q, %v", swept, err)
	}
}
