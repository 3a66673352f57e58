// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// kconfigValues decodes the map that the programs read.
func kconfigValues(t *testing.T, s *Spec, value []byte) map[string]any {
	t.Helper()
	got := map[string]any{}
	for _, v := range s.kconfig.Vars {
		got[v.Type.TypeName()] = decode(v.Type.(*btf.Var).Type, value[v.Offset:][:v.Size])
	}
	return got
}

func TestKconfig(t *testing.T) {
	s := mustParse(t, "kconfig")
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	const text = "# a comment\nCONFIG_SO_YES=y\nCONFIG_SO_MODULE=m\nCONFIG_SO_CHAR=m\n" +
		"CONFIG_SO_TEXT=\"abc\"\nCONFIG_SO_NUMBER=-0x10\n# CONFIG_SO_UNSET is not set\n"
	plain, packed := t.TempDir(), t.TempDir()
	for _, d := range []string{plain + "/boot", packed + "/proc"} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	w.Write([]byte(text))
	w.Close()
	if err := errors.Join(
		os.WriteFile(filepath.Join(plain, "boot", "config-"+cString(u.Release[:])), []byte(text), 0o644),
		os.WriteFile(filepath.Join(packed, "proc", "config.gz"), z.Bytes(), 0o644),
	); err != nil {
		t.Fatal(err)
	}
	for _, root := range []string{plain, packed} {
		m, err := s.kconfigFrom(root)
		if err != nil {
			t.Fatal(err)
		}
		got := kconfigValues(t, s, m.Contents[0].Value.([]byte))
		for k, want := range map[string]any{
			"CONFIG_SO_YES": true, "CONFIG_SO_MODULE": uint64(2), "CONFIG_SO_CHAR": int64('m'),
			"CONFIG_SO_NUMBER": int64(-16), "CONFIG_SO_UNSET": int64(0),
		} {
			if got[k] != want {
				t.Errorf("%s is %v, want %v", k, got[k], want)
			}
		}
		if b := got["CONFIG_SO_TEXT"].([]byte); string(b) != "abc\x00\x00\x00\x00\x00" {
			t.Errorf("CONFIG_SO_TEXT is %q", b)
		}
	}
}

// Neither file is there: the clock tells CONFIG_HZ, and what may be missing is 0.
func TestKconfigWithoutFile(t *testing.T) {
	s := mustParse(t, "kconfig")
	m, err := s.kconfigFrom(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	got := kconfigValues(t, s, m.Contents[0].Value.([]byte))
	if got["CONFIG_SO_YES"] != false || got["CONFIG_SO_NUMBER"] != int64(0) || got["LINUX_KERNEL_VERSION"].(int64) < 5<<16 {
		t.Errorf("got %v", got)
	}
	if hz := got["CONFIG_HZ"].(uint64); hz != 100 && hz != 250 && hz != 300 && hz != 1000 {
		t.Errorf("CONFIG_HZ is %d", hz)
	}
	if config, err := readConfig("/"); err == nil {
		if want, _ := strconv.ParseUint(config["CONFIG_HZ"], 10, 64); want != got["CONFIG_HZ"] {
			t.Errorf("CONFIG_HZ is %v, and the configuration says %d", got["CONFIG_HZ"], want)
		}
	}

	s.weak["CONFIG_SO_NUMBER"] = false
	_, err = s.kconfigFrom(t.TempDir())
	if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "CONFIG_SO_NUMBER") {
		t.Errorf("one that must be there: %v", err)
	}
}

func TestPutConfig(t *testing.T) {
	u8 := &btf.Int{Size: 1}
	s8 := &btf.Int{Size: 1, Encoding: btf.Signed}
	boolean := &btf.Int{Size: 1, Encoding: btf.Bool}
	text := &btf.Array{Type: s8, Nelems: 4}
	for _, c := range []struct {
		t    btf.Type
		size int
		text string
		want string // "" is an error
	}{
		{u8, 1, "255", "\xff"}, {u8, 1, "256", ""}, {u8, 1, "-1", ""}, {u8, 1, "0x7f", "\x7f"}, {u8, 1, "x", ""}, {u8, 1, "m", "m"},
		{s8, 1, "-128", "\x80"}, {s8, 1, "-129", ""}, {s8, 1, "127", "\x7f"}, {s8, 1, "128", ""},
		{boolean, 1, "y", "\x01"}, {boolean, 1, "n", "\x00"}, {boolean, 1, "m", ""},
		{text, 4, `"abcdef"`, "abc\x00"}, {text, 4, `1`, ""}, {u8, 1, `"a"`, ""},
	} {
		b := make([]byte, c.size)
		err := putConfig(b, c.t, c.text)
		if (err != nil) != (c.want == "") || err == nil && string(b) != c.want {
			t.Errorf("%v = %s: got %q, %v", c.t, c.text, b, err)
		}
	}
}
