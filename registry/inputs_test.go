// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"ccload/internal/fault"
	"ccload/internal/kerneltest"
	"ccload/structops"
)

// whole is all of a Spec that a caller can see.
func whole(s *structops.Spec) string {
	text := fmt.Sprintf("%q %q %v", s.License, s.Warnings, s.Params())
	for _, o := range s.Ops {
		text += fmt.Sprintf("\n%+v", *o)
	}
	return text
}

// What callers hand in is theirs: nothing is written into it, whether it succeeds or not.
func TestInputs(t *testing.T) {
	kerneltest.Privileged(t)
	const name = "ccr_inputs"
	spec, e := parseObject(t, "cubic.bpf.o", structops.Parse), gentle(t)
	before := whole(spec)
	forms := fmt.Sprintf("%+v %q", e.Forms, e.Warnings)
	check := func(what string) {
		t.Helper()
		if now := whole(spec); now != before {
			t.Errorf("%s: the Spec was\n%s\nand is\n%s", what, before, now)
		}
		if now := fmt.Sprintf("%+v %q", e.Forms, e.Warnings); now != forms {
			t.Errorf("%s: the Extension was\n%s\nand is\n%s", what, forms, now)
		}
	}

	if _, err := Register(spec, Options{Name: "reno", Allow: true}); err == nil {
		t.Error("the name of a built-in one was free")
	}
	check("a name that is taken")
	restore := fault.Set(failing("attach BPF link", "update BPF map"))
	_, err := Register(spec, Options{Name: name, Allow: true})
	restore()
	if !errors.Is(err, errFault) {
		t.Error(err)
	}
	check("a refused registration")
	if _, err := Register(spec, Options{Name: name, Allow: true}); err != nil {
		t.Fatal(err)
	}
	defer Unregister(name, UnregisterOptions{})
	check("a registration")

	other := parseObject(t, "reno.bpf.o", structops.Parse)
	if _, err := Replace(name, spec, ReplaceOptions{}); err != nil {
		t.Error(err)
	}
	check("a replacement")
	if _, err := Extend(name, "backoff", e, structops.TailCall); err != nil {
		t.Error(err)
	}
	check("an extension")
	others := whole(other)
	if _, err := Replace(name, other, ReplaceOptions{}); err == nil {
		t.Error("the new code has no place for the extension, and that is no error")
	}
	if now := whole(other); now != others {
		t.Errorf("a refused replacement: the Spec was\n%s\nand is\n%s", others, now)
	}
	values := map[string]any{"beta": 800}
	if _, _, err := Set(name, values); err != nil || len(values) != 1 || values["beta"] != 800 {
		t.Errorf("%v, %v", values, err)
	}

	arms := []Arm{{name, 1}, {"reno", 2}}
	given := slices.Clone(arms)
	_, group := groups(t)
	c, err := UseGroup(group, arms)
	if err != nil {
		t.Fatal(err)
	}
	defer RestoreGroup(group)
	if !slices.Equal(arms, given) {
		t.Errorf("the arms were %v and are %v", given, arms)
	}
	arms[0].Name = "other"
	if !slices.Equal(c.After, given) {
		t.Errorf("the result changes with the caller's slice: %v", c.After)
	}
}
