// SPDX-License-Identifier: Apache-2.0

// Package atomicfile writes files so that nobody sees half of one, and so that who
// else may write to the directory cannot choose what is overwritten.
package atomicfile

import (
	"crypto/rand"
	"os"

	"ccload/internal/change"
	"ccload/internal/fault"
)

// Write writes a file of a directory: whole, or not at all. Until then it has a name
// that nobody can foresee. What bears its name is replaced; a symbolic link is not
// followed.
func Write(dir *os.Root, name string, content []byte) (err error) {
	over, err := change.Begin()
	if err != nil {
		return err
	}
	defer over()
	if err := fault.At("write " + name); err != nil {
		return err
	}
	temp := ".ccload-" + rand.Text()
	f, err := dir.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	defer func() {
		f.Close()
		if err != nil {
			dir.Remove(temp)
		}
	}()
	if _, err := f.Write(content); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := fault.At("rename to " + name); err != nil {
		return err
	}
	return dir.Rename(temp, name)
}
