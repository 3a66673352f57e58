// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// rooms are the packages of the house and which of the others each may depend
// on, directly or not. They meet through the name of a congestion control, which
// only the kernel knows.
var rooms = map[string][]string{
	"bpf":           {},
	"cc":            {"bpf"},
	"structops":     {"internal"},
	"registry":      {"structops", "internal"},
	"harness":       {"harness", "internal"},
	"harness/trace": {"internal"},
	"plots":         {"harness/trace", "internal"},
}

func TestImports(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "-f", `{{.ImportPath}} {{join .Deps " "}}`, "ccload/...").Output()
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for line := range strings.Lines(string(out)) {
		pkg, deps, _ := strings.Cut(strings.TrimSpace(line), " ")
		room, inside := roomOf(pkg)
		if !inside {
			continue
		}
		seen[room] = true
		allowed, ruled := rooms[room]
		if !ruled {
			continue
		}
		for dep := range strings.FieldsSeq(deps) {
			d, inside := strings.CutPrefix(dep, "ccload/")
			if inside && d != room && !slices.ContainsFunc(allowed, func(a string) bool { return d == a || strings.HasPrefix(d, a+"/") }) {
				t.Errorf("%s must not depend on %s", pkg, dep)
			}
		}
	}
	for room := range rooms {
		if !seen[room] {
			t.Errorf("there is no package in room %q", room)
		}
	}
}

// roomOf finds the room of a package of ours.
func roomOf(pkg string) (room string, inside bool) {
	path, inside := strings.CutPrefix(pkg, "ccload/")
	if path == "harness/trace" {
		return path, inside
	}
	room, _, _ = strings.Cut(path, "/")
	return room, inside
}
