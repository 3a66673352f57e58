// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"testing"

	"ccload/internal/fault"
	"ccload/internal/kerneltest"
	"ccload/structops"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// theirs parses an object of structops' tests.
func theirs(t *testing.T, name string) *structops.Spec {
	return parseObject(t, "../structops/testdata/"+name+".bpf.o", structops.Parse)
}

// registerTheirs registers one of them for the length of the test.
func registerTheirs(t *testing.T, object string, o Options) *Registration {
	t.Helper()
	r, err := Register(theirs(t, object), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		var gone *NotFoundError
		if _, err := Unregister(o.Name, UnregisterOptions{}); err != nil && !errors.As(err, &gone) {
			t.Error(err)
		}
	})
	return r
}

// Parameters that were set outlive a replacement, as far as the new code has them and
// is not given others, with links and without.
func TestReplaceKeeps(t *testing.T) {
	kerneltest.Privileged(t)
	const name = "ccr_keeps"
	for _, links := range []bool{true, false} {
		t.Run(fmt.Sprintf("links=%t", links), func(t *testing.T) {
			kerneltest.Privileged(t)
			spec := theirs(t, "tuned")
			spec.Ops[0].Link = links
			if err := spec.Set("so_gain", 7); err != nil {
				t.Fatal(err)
			}
			if _, err := Register(spec, Options{Name: name}); err != nil {
				t.Fatal(err)
			}
			defer Unregister(name, UnregisterOptions{})
			if _, _, err := Set(name, map[string]any{"so_floor": 200, "so_off": true}); err != nil {
				t.Fatal(err)
			}
			d, _, err := Lookup(name)
			if err != nil {
				t.Fatal(err)
			}
			again, ops, err := d.Object()
			if err != nil || ops.Map != "so_tuned" || !slices.Equal(d.Set, []string{"so_floor", "so_gain", "so_off"}) {
				t.Fatalf("%v, %v, %v", ops, d.Set, err)
			}
			if err := again.Set("so_gain", 8); err != nil {
				t.Fatal(err)
			}
			r, err := Replace(name, again, ReplaceOptions{Keep: true})
			if err != nil || !slices.Equal(r.Kept, []Setting{{"so_floor", uint64(4), uint64(200)}, {"so_off", false, true}}) || len(r.Dropped) > 0 {
				t.Fatalf("%+v, %v", r, err)
			}
			r, err = Replace(name, theirs(t, "tuned2"), ReplaceOptions{Keep: true})
			if err != nil || !slices.Equal(r.Kept, []Setting{{"so_floor", uint64(6), uint64(200)}, {"so_gain", uint64(5), uint64(8)}}) ||
				!slices.Equal(r.Dropped, []Setting{{"so_off", true, nil}}) {
				t.Fatalf("%+v, %v", r, err)
			}
			// Who does not ask for it gets the object as it is.
			if _, err := Replace(name, theirs(t, "tuned2"), ReplaceOptions{}); err != nil {
				t.Fatal(err)
			}
			if d, _, err = Lookup(name); err != nil || len(d.Set) > 0 || d.Params["so_gain"] != uint64(5) {
				t.Errorf("%v, %v, %v", d.Set, d.Params, err)
			}
		})
	}
}

// A map that is pinned by its name is one for all that use it, and goes with the last.
func TestMapPins(t *testing.T) {
	kerneltest.Privileged(t)
	const path = mapDir + "/so_shared"
	pinned := func() uint32 { return ownMap(path) }
	one := registerTheirs(t, "maps", Options{Map: "so_sharer", Name: "ccr_one"})
	id := pinned()
	if !slices.Equal(one.MapPins, []string{path}) || id == 0 {
		t.Fatalf("%+v, map %d", *one, id)
	}
	registerTheirs(t, "maps", Options{Map: "so_second", Name: "ccr_two"})
	for _, name := range []string{"ccr_one", "ccr_two"} {
		d, _, err := Lookup(name)
		if err != nil || len(d.Maps) != 1 || d.Maps[0].Name != "so_shared" || d.Maps[0].ID != id || !slices.Equal(d.Maps[0].Pins, []string{path}) {
			t.Errorf("%s: %+v, %v", name, d.Maps, err)
		}
	}
	if u, err := Unregister("ccr_one", UnregisterOptions{}); err != nil || slices.Contains(u.Pins, path) || pinned() != id {
		t.Errorf("%+v, %v; map %d", u, err, pinned())
	}
	if u, err := Unregister("ccr_two", UnregisterOptions{}); err != nil || !slices.Contains(u.Pins, path) {
		t.Errorf("%+v, %v", u, err)
	}
	if _, err := os.Stat(mapDir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s: %v", mapDir, err)
	}
}

// So is one that only a program uses which others call, or that is in another map; and
// what is called stays.
func TestMapPinsReached(t *testing.T) {
	kerneltest.Privileged(t)
	paths := []string{mapDir + "/so_inner", mapDir + "/so_seen"}
	r := registerTheirs(t, "tail", Options{Name: "ccr_tails"})
	if !slices.Equal(r.MapPins, paths) || !isPinned(paths[0]) || !isPinned(paths[1]) {
		t.Errorf("%+v", *r)
	}
	e, err := find("ccr_tails")
	if err != nil {
		t.Fatal(err)
	}
	called := fmt.Sprintf("%s/so_jumps-%d", mapDir, e.info.Maps[0].ID)
	m, err := openMap(called)
	if err != nil {
		t.Fatal(err)
	}
	m.Close()
	if n := len(e.info.Maps); n != 5 { // so_jumps, the record, so_outer, so_seen, so_inner
		t.Errorf("maps: %+v", e.info.Maps)
	}
	if r, err := Replace("ccr_tails", theirs(t, "tail"), ReplaceOptions{}); err != nil || isPinned(called) || !isPinned(paths[0]) {
		t.Errorf("%+v, %v", r, err)
	}
	u, err := Unregister("ccr_tails", UnregisterOptions{})
	if err != nil || !slices.Contains(u.Pins, paths[0]) || !slices.Contains(u.Pins, paths[1]) {
		t.Errorf("%+v, %v", u, err)
	}
}

// What fails, or was killed, leaves no map pinned; what others have pinned there is not
// used unless it is as the object says.
func TestMapPinsRefused(t *testing.T) {
	kerneltest.Privileged(t)
	restore := fault.Set(func(step string) error {
		if step == "pin "+pinPath("ccr_fails") || step == "attach BPF link" || step == "update BPF map" {
			return unix.EPERM
		}
		return nil
	})
	_, err := Register(theirs(t, "maps"), Options{Map: "so_sharer", Name: "ccr_fails"})
	restore()
	if !errors.Is(err, unix.EPERM) {
		t.Errorf("%v", err)
	}
	if _, err := os.Stat(mapDir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s: %v", mapDir, err)
	}

	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 3})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	const dir = bpffs + "/ccr_maps"
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := m.Pin(dir + "/so_shared"); err != nil {
		t.Fatal(err)
	}
	in := Options{Map: "so_sharer", Name: "ccr_fails", MapPins: dir}
	if _, err := Register(theirs(t, "maps"), in); !errors.Is(err, structops.ErrIncompatible) {
		t.Errorf("another map: %v", err)
	}
	os.Remove(dir + "/so_shared")
	for _, c := range []struct {
		what string
		do   func() error
	}{
		{"mode", func() error { return os.Chmod(dir, 0o777) }},
		{"owner", func() error { return errors.Join(os.Chmod(dir, 0o700), os.Chown(dir, 65534, 0)) }},
		{"link", func() error {
			return errors.Join(os.Remove(dir), os.Symlink(t.TempDir(), dir))
		}},
		{"none", func() error { return os.Remove(dir) }},
	} {
		if err := c.do(); err != nil {
			t.Fatalf("%s: %v", c.what, err)
		}
		_, err := Register(theirs(t, "maps"), in)
		if _, refused := errors.AsType[*RefusedError](err); !refused {
			t.Errorf("%s: %v", c.what, err)
		}
	}
}

// Of variants the one for this kernel is registered, and replaces.
func TestVariants(t *testing.T) {
	kerneltest.Privileged(t)
	r := registerTheirs(t, "variants", Options{Name: "ccr_variants"})
	if r.Map != "so_old" && r.Map != "so_new" {
		t.Errorf("%+v", *r)
	}
	if _, err := Replace("ccr_variants", theirs(t, "variants"), ReplaceOptions{}); err != nil {
		t.Error(err)
	}
}
