// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// tree writes files under a temporary root.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestRead(t *testing.T) {
	root := tree(t, map[string]string{
		sysctlDefault:                          "cubic\n",
		"sys/module/tcp_cubic/parameters/beta": "717\n", // built in, with parameters
		"sys/module/tcp_dctcp/refcnt":          "3\n",
		"sys/module/tcp_diag/refcnt":           "0\n", // not a congestion control
	})
	entries, err := read(root, strings.Fields("reno cubic dctcp dctcp-reno bpf_x"))
	if err != nil {
		t.Fatal(err)
	}
	want := []struct {
		name, module string
		def          bool
		refs         int // -1: none
	}{
		{"reno", "", false, -1},
		{"cubic", "", true, -1},
		{"dctcp", "tcp_dctcp", false, 3},
		{"dctcp-reno", "tcp_dctcp", false, 3},
		{"bpf_x", "", false, -1},
	}
	if len(entries) != len(want) {
		t.Fatalf("%d entries, want %d", len(entries), len(want))
	}
	for i, w := range want {
		e := entries[i]
		refs := -1
		if e.Refs != nil {
			refs = *e.Refs
		}
		if e.Name != w.name || e.Module != w.module || e.Default != w.def || refs != w.refs || (e.Kind == Module) != (w.module != "") {
			t.Errorf("%d: got %+v with refs %d, want %+v", i, e, refs, w)
		}
	}
}

func TestReadErrors(t *testing.T) {
	for name, files := range map[string]map[string]string{
		"no such file": {},
		"not one name": {sysctlDefault: "\n"},
		"reference count": {sysctlDefault: "reno\n",
			"sys/module/tcp_reno/refcnt": "many\n"},
	} {
		if _, err := read(tree(t, files), []string{"reno"}); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestParseMapID(t *testing.T) {
	for text, want := range map[string]uint32{
		"pos:\t0\nmap_type:\t26\nmap_id:\t12\nfrozen:\t0\n":        12,
		"link_type:\tstruct_ops\nlink_id:\t3\nmap_id:\t4294967295": 1<<32 - 1,
		"link_type:\tstruct_ops\nlink_id:\t3\n":                    0, // detached
		"prog_id:\t7\n":                                            0,
		"map_id:\tx\n":                                             0,
		"":                                                         0,
	} {
		if got := parseMapID(strings.NewReader(text)); got != want {
			t.Errorf("%q: got %d, want %d", text, got, want)
		}
	}
}

func TestParseCaps(t *testing.T) {
	got, err := parseCaps([]byte("Name:\tx\nCapPrm:\t0\nCapEff:\t000001ffffffffff\nCapBnd:\t0\n"))
	if err != nil || got != 0x1ffffffffff {
		t.Errorf("got %#x, %v", got, err)
	}
	for _, bad := range []string{"", "CapPrm:\t0\n", "CapEff:\tzz\n"} {
		if _, err := parseCaps([]byte(bad)); err == nil {
			t.Errorf("%q: no error", bad)
		}
	}
}

func TestMissing(t *testing.T) {
	for _, c := range []struct{ eff, want string }{
		{"0000000000000000", "CAP_BPF CAP_NET_ADMIN CAP_SYS_ADMIN"},
		{"0000000000001000", "CAP_BPF CAP_SYS_ADMIN"}, // NET_ADMIN
		{"0000000000200000", "CAP_NET_ADMIN"},         // SYS_ADMIN includes BPF
		{"000001ffffffffff", ""},
	} {
		root := tree(t, map[string]string{"proc/self/status": "CapEff:\t" + c.eff + "\n"})
		got, err := Missing(root, "CAP_BPF", "CAP_NET_ADMIN", "CAP_SYS_ADMIN")
		if err != nil || strings.Join(got, " ") != c.want {
			t.Errorf("%s: got %q, %v, want %q", c.eff, got, err, c.want)
		}
	}
}

func TestNearest(t *testing.T) {
	names := []string{"reno", "cubic", "bbr", "bpf_cubic", "bpf_dctcp", "bpf_reno"}
	for name, want := range map[string]string{
		"bpf_cubik": "bpf_cubic",
		"cubc":      "cubic",
		"dctcp":     "bpf_dctcp", // the forgotten prefix
		"bpf_cu":    "bpf_cubic",
		"bpr":       "bbr",
		"vegas":     "",
		"x":         "",
		"":          "",
	} {
		if got := Nearest(name, names); got != want {
			t.Errorf("%q: got %q, want %q", name, got, want)
		}
	}
}

// No two names may share a pin.
func TestPinName(t *testing.T) {
	seen := map[string]string{}
	for _, n := range []string{"a.b", "a_b", "a.b.", "a..b", "ab", "A.b"} {
		p := pinName(n)
		if strings.ContainsRune(p, '.') || seen[p] != "" {
			t.Errorf("%q and %q are both pinned as %q", n, seen[p], p)
		}
		seen[p] = n
	}
}

func TestFlagNames(t *testing.T) {
	if got := strings.Join(flagNames(3), " "); got != "non_restricted needs_ecn" {
		t.Errorf("got %q", got)
	}
	if got := flagNames(0); got != nil {
		t.Errorf("got %q for none", got)
	}
}
