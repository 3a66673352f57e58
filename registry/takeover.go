// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"errors"
	"io/fs"
	"path/filepath"
)

// Earlier versions had these beside rootDir, and the pins of names in that itself.
var formerDirs = []struct{ from, to string }{
	{bpffs + "/ccload-use", useDir},
	{bpffs + "/ccload-extend", extendDir},
	{bpffs + "/ccload-replace", shadowDir},
	{bpffs + "/ccload-replaced", replacedDir},
}

// nameAside is where the former pin of a congestion control called "name" waits until
// the directory of that name is made. No name is that long.
const nameAside = rootDir + "/name-of-a-congestion-control"

// takeOver puts what an earlier version left in its directories, if they are ours, where
// it belongs now. What it cannot move it leaves, and says so. It is for who has the
// lock.
func takeOver() (problems []error) {
	note := func(errs ...error) {
		for _, err := range errs {
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				problems = append(problems, err)
			}
		}
	}
	root, err := openDir(rootDir)
	note(err)
	if err == nil {
		if holdsName(pinDir) {
			note(rename(pinDir, nameAside))
		}
		_, files, err := root.names()
		root.Close()
		note(err)
		for _, name := range files {
			if path := filepath.Join(rootDir, name); path != nameAside && holdsName(path) {
				note(rename(path, filepath.Join(pinDir, name)))
			}
		}
		note(rename(nameAside, filepath.Join(pinDir, "name")))
	}
	for _, f := range formerDirs {
		note(moveAll(f.from, f.to)...)
	}
	return problems
}

// holdsName is isName of a pin of ours.
func holdsName(path string) (yes bool) {
	withPin(path, func(path string) error { yes = isName(path); return nil })
	return yes
}

// moveAll moves what is in a directory of ours into another.
func moveAll(from, to string) []error {
	old, err := openDir(from)
	if err != nil {
		return []error{err}
	}
	defer tidyUp(from)
	defer old.Close()
	dirs, files, err := old.names()
	errs := []error{err}
	for _, name := range dirs {
		errs = append(errs, moveAll(filepath.Join(from, name), filepath.Join(to, name))...)
	}
	for _, name := range files {
		errs = append(errs, rename(filepath.Join(from, name), filepath.Join(to, name)))
	}
	return errs
}
