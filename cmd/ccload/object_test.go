// SPDX-License-Identifier: Apache-2.0

package main

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

// What --object and the flags behind it give, by name; a name that two would have, or
// that nothing runs, is refused.
func TestObjectFlags(t *testing.T) {
	const cubic, mixed, variants, several = "../../bpf/cubic.bpf.o", "../../structops/testdata/mixed.bpf.o", "../../structops/testdata/variants.bpf.o", "../../structops/testdata/several.bpf.o"
	for _, c := range []struct {
		run, flags string
		want, err  string
	}{
		{"gentle", "--object " + cubic + " --as gentle --set beta=1000", "gentle", ""},
		{"a b", "--object " + cubic + " --as a --object " + cubic + " --as b", "a b", ""},
		{"so_variants", "--object " + variants, "so_variants", ""},
		{"so_two", "--object " + several, "so_one so_plain so_spare so_two", ""},
		{"so_good", "--object " + mixed, "so_good so_member so_neighbour", ""},
		{"mine", "--object " + mixed + " --map so_long --as mine", "mine", ""},
		{"bpf_cubic", "--object " + cubic, "", `"bpf_cubic" is also the name of one in the catalogue`},
		{"cubic", "--object " + cubic + " --as cubic", "", `"cubic" is also the name of one of the kernel's own`},
		{"a", "--object " + cubic + " --as a --object " + mixed + " --map so_good --as a", "", `"a" is also the name of one in --object "` + cubic},
		{"a", "--object " + mixed + " --as a", "", "name one of so_good, "},
		{"so_lacks", "--object " + mixed + " --map so_lacks", "", `"cong_control": required member is not set`},
		{"a", "--object " + cubic + " --as .b/", "", "not a name"},
		{"a", "--object " + cubic + " --as a --set betta=1", "", `parameter "betta": not found`},
		{"a", "--object " + cubic + " --as a --set beta", "", "not of the form K=V"},
		{"cubic", "--object " + cubic, "", "bpf_cubic is not among the congestion controls to run: cubic"},
		{"a", "--object object_test.go", "", "not a BPF object file"},
		{"a", "--object none.o", "", "no such file"},
		{"a", "--as a --object " + cubic, "", "about the --object before it"},
	} {
		var f objectFlags
		fl := pflag.NewFlagSet("", pflag.ContinueOnError)
		f.add(fl)
		err := fl.Parse(strings.Fields(c.flags))
		var objects map[string]object
		if err == nil {
			objects, err = f.read(strings.Fields(c.run), nil)
		}
		got := strings.Join(slices.Sorted(maps.Keys(objects)), " ")
		if c.err == "" && (err != nil || got != c.want) || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
			t.Errorf("%s: %q, %v", c.flags, got, err)
		}
	}
}
