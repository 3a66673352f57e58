// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// flagError says in plain words which value of a flag cannot be read.
func flagError(_ *cobra.Command, err error) error {
	e, ok := errors.AsType[*pflag.InvalidValueError](err)
	if !ok {
		return err
	}
	wanted, ok := map[string]string{
		"int":         fmt.Sprintf("a whole number of at most %d", math.MaxInt),
		"uint64":      fmt.Sprintf("a whole number from 0 to %d", uint64(math.MaxUint64)),
		"bool":        "true or false",
		"stringSlice": "a list with commas between",
	}[e.GetFlag().Value.Type()]
	if !ok {
		return fmt.Errorf("--%s %q: %w", e.GetFlag().Name, e.GetValue(), e.Unwrap())
	}
	return fmt.Errorf("--%s %q: not %s", e.GetFlag().Name, e.GetValue(), wanted)
}

// checkEmpty refuses what is given but empty, as "$UNSET" in a script is: it would
// be taken for what is not given.
func checkEmpty(cmd *cobra.Command, args []string) (err error) {
	if cmd.DisableFlagParsing { // the shell completes an empty word
		return nil
	}
	cmd.Flags().Visit(func(f *pflag.Flag) {
		_, kept := f.Value.(objectValue) // it has refused what is empty
		empty := f.Value.String() == "" && !kept
		if list, ok := f.Value.(pflag.SliceValue); ok {
			empty = len(list.GetSlice()) == 0 || slices.Contains(list.GetSlice(), "")
		}
		if empty && f.Name != "sockets" { // for which it means all
			err = usagef("--%s: it is empty", f.Name)
		}
	})
	if i := slices.Index(args, ""); i >= 0 && err == nil {
		err = usagef("argument %d is empty", i+1)
	}
	return err
}
