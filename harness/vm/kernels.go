// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// known are the kernels that have a name, a line each: the Debian packages that
// hold one, of which the newest is taken.
var known = []struct{ name, packages string }{
	{"debian-6.1", `linux-image-6\.1\.0-[0-9]+-cloud-amd64-unsigned`},
	{"debian-6.12", `linux-image-6\.12\.[0-9]+\+deb[0-9]+-cloud-amd64-unsigned`},
}

// Known is a kernel that has a name.
type Known struct {
	Name    string  `json:"name"`
	Release string  `json:"release,omitempty"` // of the one that is here
	Dir     string  `json:"dir,omitempty"`     // where it is
	Problem string  `json:"problem,omitempty"` // why it cannot be used, although it is here
	Kernel  *Kernel `json:"-"`                 // nil: not here, or not to be used
}

// packagesOf finds a name in the table.
func packagesOf(name string) (string, error) {
	for _, k := range known {
		if k.name == name {
			return k.packages, nil
		}
	}
	return "", &UnknownKernelError{name}
}

// Names are the names that Pull and FindKernel know.
func Names() (names []string) {
	for _, k := range known {
		names = append(names, k.name)
	}
	return names
}

// Kernels returns the kernels with a name and whether they are here, in the
// directory of CacheDir, and whole: all their files are read.
func Kernels() (kernels []Known) {
	for _, name := range Names() {
		k := Known{Name: name}
		found, err := openPulled(name)
		if err == nil {
			k.Release, err = found.Release, found.sums.all()
		}
		if _, missing := errors.AsType[*NotPulledError](err); !missing {
			k.Dir = filepath.Join(CacheDir(), name)
			if err == nil {
				k.Kernel = found
			} else {
				k.Problem = err.Error()
			}
		}
		kernels = append(kernels, k)
	}
	return kernels
}

// CacheDir is where pulled kernels are: ccload/kernels in the user's cache
// directory, or in /var/cache for who has none.
func CacheDir() string {
	dir, err := os.UserCacheDir()
	if err != nil {
		dir = "/var/cache"
	}
	return filepath.Join(dir, "ccload", "kernels")
}

// NotPulledError says that a kernel that has a name is not here.
type NotPulledError struct{ Name string }

func (e *NotPulledError) Error() string {
	return fmt.Sprintf("kernel %q: not here yet", e.Name)
}

// UnknownKernelError says that something is neither a kernel's name nor a file.
type UnknownKernelError struct{ Name string }

func (e *UnknownKernelError) Error() string {
	return fmt.Sprintf("kernel %q: neither a file nor one of %s", e.Name, strings.Join(Names(), ", "))
}

// FindKernel opens a kernel by its name or by the path of its image.
func FindKernel(what string) (*Kernel, error) {
	if slices.Contains(Names(), what) {
		return openPulled(what)
	}
	if _, err := os.Stat(what); errors.Is(err, fs.ErrNotExist) && !strings.ContainsRune(what, '/') {
		return nil, &UnknownKernelError{what}
	}
	return OpenKernel(what)
}

func openPulled(name string) (*Kernel, error) {
	images, err := filepath.Glob(filepath.Join(CacheDir(), name, "boot", "vmlinuz-*"))
	if err != nil {
		return nil, err
	}
	if len(images) == 0 {
		return nil, &NotPulledError{name}
	}
	for _, path := range []string{images[0], filepath.Join(CacheDir(), name, "lib", "modules")} {
		if err := trusted(path); err != nil {
			return nil, err
		}
	}
	s, err := readSums(name)
	if err != nil {
		return nil, err
	}
	if _, err := s.read(images[0]); err != nil {
		return nil, err
	}
	k, err := OpenKernel(images[0])
	if err == nil {
		k.sums = s
	}
	return k, err
}

// Pull fetches a kernel that has a name with the system's package manager, checks
// what it got, and unpacks it below CacheDir. One that is here already, and whole, is
// returned as it is; to have a newer one, remove it. One that is damaged is fetched
// again. say is told what is being done.
//
// Whatever happens, there is a whole kernel under the name afterwards or none.
// Several processes may pull at once.
func Pull(ctx context.Context, name string, say func(format string, args ...any)) (*Kernel, error) {
	packages, err := packagesOf(name)
	if err != nil {
		return nil, err
	}
	fail := func(err error) (*Kernel, error) { return nil, fmt.Errorf("pull kernel %q: %w", name, err) }
	dir := CacheDir()
	if err := errors.Join(os.MkdirAll(dir, 0o755), trusted(dir)); err != nil {
		return fail(err)
	}
	unlock, err := lock(ctx, filepath.Join(dir, ".lock"), func() { say("waiting for another that pulls") })
	if err != nil {
		return fail(err)
	}
	defer unlock()
	k, err := openPulled(name)
	if err == nil {
		err = k.sums.all()
	}
	if _, untrusted := errors.AsType[*UntrustedError](err); err == nil || untrusted {
		return k, err
	}
	if damaged, ok := errors.AsType[*DamagedKernelError](err); ok {
		say("%s is damaged (%s: %s), fetching it again", name, damaged.File, damaged.Why)
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return fail(errors.New("it comes from Debian's packages, and there is no apt-get here; give the path of a vmlinuz in place of a name"))
	}
	// What an earlier one that was killed has left: nobody else is at it now.
	old, _ := filepath.Glob(filepath.Join(dir, ".pull-*"))
	for _, o := range old {
		os.RemoveAll(o)
	}
	tmp, err := os.MkdirTemp(dir, ".pull-")
	if err != nil {
		return fail(err)
	}
	defer os.RemoveAll(tmp)
	root := filepath.Join(tmp, "root")
	if err := fetch(ctx, packages, tmp, root, say); err != nil {
		if full(tmp) && !errors.Is(err, unix.ENOSPC) { // which the programs do not always say
			err = fmt.Errorf("%s: %w: %w", dir, unix.ENOSPC, err)
		}
		return fail(err)
	}
	if err := errors.Join(writeSums(root), os.Chmod(root, 0o755)); err != nil {
		return fail(err)
	}
	final := filepath.Join(dir, name)
	os.RemoveAll(final) // what has no image or a bad one
	if err := os.Rename(root, final); err != nil {
		return fail(err)
	}
	return openPulled(name)
}

// fetch brings the newest of some packages into root, which it makes.
func fetch(ctx context.Context, packages, tmp, root string, say func(string, ...any)) error {
	pkg, err := newest(ctx, packages)
	if err != nil {
		return err
	}
	if pkg != "" {
		err = download(ctx, pkg, tmp, say)
	}
	if pkg == "" || err != nil && ctx.Err() == nil { // an old list names packages that are gone
		say("updating the list of packages")
		// It may fail at sources that have nothing to do with this.
		_, uerr := command(ctx, tmp, "apt-get", "-qq", "-o", "APT::Update::Error-Mode=any", "update")
		now, nerr := newest(ctx, packages)
		if nerr != nil {
			return nerr
		}
		if now == "" || now == pkg && uerr != nil {
			return cmp.Or(err, uerr, errors.New("this distribution has no such package; give the path of a vmlinuz in place of a name"))
		}
		pkg = now
		err = download(ctx, pkg, tmp, say)
	}
	if err != nil {
		return err
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(debs) != 1 {
		return fmt.Errorf("apt-get download %s left %d packages", pkg, len(debs))
	}
	if err := checkSum(ctx, pkg, debs[0]); err != nil {
		return err
	}
	unpacked := filepath.Join(tmp, "unpacked")
	if _, err := command(ctx, tmp, "dpkg-deb", "-x", debs[0], unpacked); err != nil {
		return err
	}
	// lib/modules, or usr/lib/modules in later releases.
	for _, from := range []string{"lib", "usr/lib"} {
		modules := filepath.Join(unpacked, from, "modules")
		if _, err := os.Stat(modules); err == nil {
			if err := os.MkdirAll(filepath.Join(root, "lib"), 0o755); err != nil {
				return err
			}
			if err := os.Rename(modules, filepath.Join(root, "lib", "modules")); err != nil {
				return err
			}
		}
	}
	if err := os.Rename(filepath.Join(unpacked, "boot"), filepath.Join(root, "boot")); err != nil {
		return err
	}
	images, err := filepath.Glob(filepath.Join(root, "boot", "vmlinuz-*"))
	if err != nil || len(images) != 1 {
		return fmt.Errorf("package %s holds %d kernels", pkg, len(images))
	}
	k, err := OpenKernel(images[0])
	if err == nil && k.Modules == "" {
		err = fmt.Errorf("package %s has no modules for its kernel", pkg)
	}
	return err
}

// download leaves a package in a directory.
func download(ctx context.Context, pkg, dir string, say func(string, ...any)) error {
	say("fetching %s", pkg)
	// The directory is the user's, which apt's own user may not write to.
	_, err := command(ctx, dir, "apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", pkg)
	return err
}

// Offered says whether this system's packages hold a kernel that has a name, as far
// as the list of packages that is here tells.
func Offered(ctx context.Context, name string) (bool, error) {
	packages, err := packagesOf(name)
	if err != nil {
		return false, err
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return false, nil
	}
	out, err := command(ctx, "", "apt-cache", "pkgnames", "linux-image-")
	if err == nil && out == "" {
		err = errors.New("there is no list of packages")
	}
	return newestOf(strings.Fields(out), packages) != "", err
}

// newest finds the newest package that the list of packages has of some; "" if it
// has none.
func newest(ctx context.Context, packages string) (string, error) {
	out, err := command(ctx, "", "apt-cache", "pkgnames", "linux-image-")
	if err != nil {
		return "", err
	}
	return newestOf(strings.Fields(out), packages), nil
}

var number = regexp.MustCompile("[0-9]+")

func newestOf(names []string, packages string) (newest string) {
	match := regexp.MustCompile("^" + packages + "$")
	numbers := func(s string) (n []int) {
		for _, d := range number.FindAllString(s, -1) {
			v, _ := strconv.Atoi(d)
			n = append(n, v)
		}
		return n
	}
	for _, name := range names {
		if match.MatchString(name) && (newest == "" || slices.Compare(numbers(name), numbers(newest)) > 0) {
			newest = name
		}
	}
	return newest
}

// checkSum compares a package with what the signed list of packages says of it.
func checkSum(ctx context.Context, pkg, file string) error {
	out, err := command(ctx, "", "apt-cache", "show", "--no-all-versions", pkg)
	if err != nil {
		return err
	}
	want := ""
	for s := bufio.NewScanner(strings.NewReader(out)); s.Scan(); {
		if v, ok := strings.CutPrefix(s.Text(), "SHA256: "); ok {
			want = strings.TrimSpace(v)
		}
	}
	got, err := digest(file)
	if err != nil {
		return err
	}
	if got != want {
		return fmt.Errorf("package %s: its SHA-256 is %s, should be %q", pkg, got, want)
	}
	return nil
}

// full says whether the file system of a directory has next to nothing left.
func full(dir string) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && st.Bavail*uint64(st.Bsize) < 1<<20
}

// command runs a program and returns what it prints; the error has what it
// complains about.
func command(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var out, errs bytes.Buffer
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &out, &errs
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return "", ctx.Err()
		}
		return "", fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

// lock takes a file's lock, which ends with the process. Where another has it, it
// calls waiting and waits.
func lock(ctx context.Context, path string, waiting func()) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o644)
	if err != nil {
		return nil, err
	}
	for said := false; ; said = true {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, err
		}
		if !said {
			waiting()
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}
