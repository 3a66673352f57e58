// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// The cache has kernels that are booted and states that are resumed, so it counts
// only while nobody else can write to it; and what a disk or a person has changed
// since it was pulled is found by its digest.

// UntrustedError reports that somebody else owns, or can write to, a part of the cache.
type UntrustedError struct{ Path, Why string }

func (e *UntrustedError) Error() string {
	return fmt.Sprintf("refusing cache %q: %s", e.Path, e.Why)
}

// trusted returns an *UntrustedError unless what is at path, and the directories of
// the cache above it, belong to this user or root and nobody else can write there.
// What does not exist is trusted.
func trusted(path string) error {
	top := filepath.Dir(CacheDir())
	for p := path; ; p = filepath.Dir(p) {
		if err := trustedFile(p); err != nil || p == top || len(p) <= len(top) {
			return err
		}
	}
}

func trustedFile(path string) error {
	st, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	sys := st.Sys().(*syscall.Stat_t)
	switch {
	case sys.Uid != 0 && int(sys.Uid) != os.Geteuid():
		return &UntrustedError{path, fmt.Sprintf("it belongs to uid %d", sys.Uid)}
	case st.Mode().Perm()&0o022 != 0:
		return &UntrustedError{path, fmt.Sprintf("others can write to it (mode %04o)", st.Mode().Perm())}
	}
	return nil
}

// sumsFile has the digests of a pulled kernel's files, as sha256sum(1) writes them.
const sumsFile = "SHA256SUMS"

// DamagedKernelError reports that a pulled kernel is not what was pulled.
type DamagedKernelError struct{ Name, File, Why string }

func (e *DamagedKernelError) Error() string {
	return fmt.Sprintf("kernel %q: damaged: %s: %s", e.Name, e.File, e.Why)
}

// sums are the digests of a pulled kernel's files, by their paths below its directory.
type sums struct {
	name, dir string
	of        map[string]string
}

// digest is a file's SHA-256, in hexadecimal digits.
func digest(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// writeSums notes the digests of all files below a directory.
func writeSums(dir string) error {
	var out bytes.Buffer
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		sum, err := digest(path)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(&out, "%s  %s\n", sum, strings.TrimPrefix(path, dir+"/"))
		return err
	})
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, sumsFile), out.Bytes(), 0o644)
}

// readSums reads the digests of the kernel that has a name.
func readSums(name string) (*sums, error) {
	s := &sums{name: name, dir: filepath.Join(CacheDir(), name), of: map[string]string{}}
	b, err := os.ReadFile(filepath.Join(s.dir, sumsFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, &DamagedKernelError{name, sumsFile, "it is missing"}
	}
	if err != nil {
		return nil, err
	}
	for l := bufio.NewScanner(bytes.NewReader(b)); l.Scan(); {
		sum, file, ok := strings.Cut(l.Text(), "  ")
		if !ok {
			return nil, &DamagedKernelError{name, sumsFile, "not a list of digests"}
		}
		s.of[file] = sum
	}
	return s, nil
}

// read reads a file and checks it. Without digests, as of a kernel that was given by
// its path, it just reads.
func (s *sums) read(path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if s == nil {
		return b, err
	}
	file := strings.TrimPrefix(path, s.dir+"/")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, &DamagedKernelError{s.name, file, "it is missing"}
	}
	if err != nil {
		return nil, err
	}
	if sum := sha256.Sum256(b); hex.EncodeToString(sum[:]) != s.of[file] {
		return nil, &DamagedKernelError{s.name, file, "its SHA-256 is not that of what was pulled"}
	}
	return b, nil
}

// all checks every file.
func (s *sums) all() error {
	for file := range s.of {
		if _, err := s.read(filepath.Join(s.dir, file)); err != nil {
			return err
		}
	}
	return nil
}
