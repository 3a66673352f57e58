// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"errors"
	"fmt"

	"ccload/structops"
)

// Setting is a parameter that was set.
type Setting struct {
	Name   string `json:"name"`
	Before any    `json:"before"`
	After  any    `json:"after"`
}

// Set gives parameters of a registered BPF congestion control other values, at once
// for all of its connections: those that may change while it runs. All are set or
// none; the warnings say what is not as it should be all the same. The errors are those of structops.Info.Set. It needs CAP_SYS_ADMIN.
func Set(name string, values map[string]any) ([]Setting, []string, error) {
	fail := func(err error) ([]Setting, []string, error) { return nil, nil, fmt.Errorf("set %q: %w", name, err) }
	if err := need("/", "CAP_SYS_ADMIN"); err != nil {
		return fail(err)
	}
	unlock, err := lock()
	if err != nil {
		return fail(err)
	}
	defer unlock()
	e, err := findBPF(name)
	if err != nil {
		return fail(err)
	}
	before := e.Params
	var warnings []string
	err = e.info.Set(values)
	if _, unrecorded := errors.AsType[*structops.UnrecordedError](err); unrecorded {
		warnings = append(warnings, err.Error())
	} else if err != nil {
		return fail(err)
	}
	var done []Setting
	for _, p := range e.info.Params {
		if _, ok := values[p.Name]; ok {
			done = append(done, Setting{p.Name, before[p.Name], p.Value})
		}
	}
	return done, warnings, nil
}
