// SPDX-License-Identifier: Apache-2.0

package cc

import (
	"bytes"
	"encoding/binary"
	"reflect"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
)

func spec(t *testing.T, a *Algorithm) *ebpf.CollectionSpec {
	t.Helper()
	s, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(a.Object()))
	if err != nil {
		t.Fatalf("%s: %v", a.Name, err)
	}
	return s
}

// The catalogue and the C file are two places that tell of the same tunables.
func TestTunablesAreTheObjects(t *testing.T) {
	for _, a := range All() {
		s := spec(t, a)
		if m := s.Maps[a.Name]; m == nil || m.Type != ebpf.StructOpsMap {
			t.Errorf("%s: the object has no ops table of that name", a.Name)
		}
		for _, tun := range a.Tunables {
			v := s.Variables[tun.Name]
			if v == nil {
				t.Errorf("%s: the object has no variable %q", a.Name, tun.Name)
				continue
			}
			var have uint32
			if err := v.Get(&have); err != nil {
				t.Errorf("%s.%s: %v", a.Name, tun.Name, err)
			} else if have != tun.Default {
				t.Errorf("%s.%s: default %d in C, %d in the catalogue", a.Name, tun.Name, have, tun.Default)
			}
			if tun.Default < tun.Min || tun.Default > tun.Max {
				t.Errorf("%s.%s: default %d is outside %d..%d", a.Name, tun.Name, tun.Default, tun.Min, tun.Max)
			}
		}
		for name, v := range s.Variables {
			if v.Constant() && name != "LICENSE" && name != "CONFIG_HZ" && a.Tunable(name) == nil {
				t.Errorf("%s: the catalogue does not know the variable %q", a.Name, name)
			}
		}
	}
}

// The Go type must lie in icsk_ca_priv as the C struct does.
func TestStateIsTheObjects(t *testing.T) {
	for _, a := range All() {
		if a.NewState == nil {
			continue
		}
		var c *btf.Struct
		if err := spec(t, a).Types.TypeByName(a.Name, &c); err != nil {
			t.Errorf("%s: private state: %v", a.Name, err)
			continue
		}
		g := reflect.TypeOf(a.NewState()).Elem()
		if int(c.Size) != binary.Size(a.NewState()) || uintptr(c.Size) != g.Size() {
			t.Errorf("%s: %d bytes in C, %d in Go", a.Name, c.Size, g.Size())
		}
		for i, m := range c.Members {
			f := g.Field(i)
			size, err := btf.Sizeof(m.Type)
			if err != nil {
				t.Fatal(err)
			}
			if strings.ReplaceAll(m.Name, "_", "") != strings.ToLower(f.Name) || uintptr(m.Offset.Bytes()) != f.Offset || uintptr(size) != f.Type.Size() {
				t.Errorf("%s: C has %s at %d (%d bytes), Go has %s at %d (%d bytes)",
					a.Name, m.Name, m.Offset.Bytes(), size, f.Name, f.Offset, f.Type.Size())
			}
		}
	}
}

func TestParse(t *testing.T) {
	beta := cubic.Tunable("beta")
	for _, c := range []struct {
		tun  *Tunable
		text string
		want uint32
		err  string
	}{
		{beta, "0.7", 717, ""},
		{beta, "1/2", 512, ""},
		{beta, ".999", 1023, ""},
		{beta, "0.4", 0, "out of bounds: 0.5 to 0.999"},
		{beta, "1", 0, "out of bounds"},
		{beta, "-0.7", 0, "out of bounds"},
		{beta, "NaN", 0, "out of bounds"},
		{beta, "1/0", 0, "out of bounds"},
		{beta, "seven", 0, "not a number"},
		{beta, "", 0, "not a number"},
		{dctcp.Tunable("g"), "1/16", 64, ""},
		{dctcp.Tunable("alpha_on_init"), "0", 0, ""},
		{cubic.Tunable("c"), "0.04", 41, ""},
		{cubic.Tunable("c"), "4", 4096, ""},
		{cubic.Tunable("hystart"), "off", 0, ""},
		{cubic.Tunable("hystart"), "True", 1, ""},
		{cubic.Tunable("hystart"), "2", 0, "not on or off"},
		{cubic.Tunable("hystart_detect"), "3", 3, ""},
		{cubic.Tunable("hystart_detect"), "4", 0, "out of bounds: 1 to 3"},
		{cubic.Tunable("hystart_detect"), "1.5", 0, "not a whole number"},
		{cubic.Tunable("initial_ssthresh"), "99999999999999999999", 0, "not a whole number"},
	} {
		got, err := c.tun.Parse(c.text)
		if c.err == "" {
			if err != nil || got != c.want {
				t.Errorf("%s=%s: got %d, %v; want %d", c.tun.Name, c.text, got, err, c.want)
			} else if back, err := c.tun.Parse(c.tun.Format(got)); err != nil || back != got {
				t.Errorf("%s=%s: written as %q, read back as %d, %v", c.tun.Name, c.text, c.tun.Format(got), back, err)
			}
		} else if err == nil || !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s=%s: got %d, %v; want an error with %q", c.tun.Name, c.text, got, err, c.err)
		}
	}
}

func TestConfigure(t *testing.T) {
	got, err := cubic.Configure(map[string]string{"beta": "0.8", "hystart": "off"})
	if want := map[string]uint32{"beta": 819, "hystart": 0}; err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, %v; want %v", got, err, want)
	}
	for alg, set := range map[*Algorithm]map[string]string{
		cubic: {"betta": "0.8"},
		reno:  {"beta": "0.8"},
	} {
		if _, err := alg.Configure(set); err == nil || !strings.Contains(err.Error(), "unknown tunable") {
			t.Errorf("%s %v: got error %v", alg.Name, set, err)
		}
	}
	if Lookup("bpf_cubic") != cubic || Lookup("cubic") != nil {
		t.Error("Lookup does not find by the exact name")
	}
}
