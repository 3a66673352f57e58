// SPDX-License-Identifier: Apache-2.0

package vm_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ccload/harness/vm"
	"ccload/internal/kerneltest"
	"ccload/internal/vmtest"
)

// image is what a kernel image has to begin with, and as long as it says: enough
// to be examined, not to boot.
func image(release string) []byte {
	b := make([]byte, 16<<10)
	b[0x1f1] = 4
	binary.LittleEndian.PutUint32(b[0x1f4:], uint32(len(b)-5*512)/16)
	copy(b[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(b[0x206:], 0x20f)
	binary.LittleEndian.PutUint16(b[0x20e:], 0x400)
	b[0x236] = 1
	copy(b[0x600:], release+" (builder) #1 SMP\x00")
	return b
}

// config is what a kernel has to be built with.
const config = "CONFIG_BPF_SYSCALL=y\nCONFIG_BPF_JIT=y\nCONFIG_DEBUG_INFO_BTF=y\nCONFIG_BLK_DEV_INITRD=y\n" +
	"CONFIG_VIRTIO_PCI=y\nCONFIG_VIRTIO_CONSOLE=m\nCONFIG_SERIAL_8250_CONSOLE=y\n"

// write writes files below a new directory.
func write(t *testing.T, files map[string][]byte) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, content, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestOpenKernel(t *testing.T) {
	good := image("6.99-test")
	change := func(at int, to ...byte) []byte {
		b := bytes.Clone(good)
		copy(b[at:], to)
		return b
	}
	without := func(option string) string { return strings.Replace(config, option, "# "+option+" is not set\n#", 1) }
	for _, c := range []struct {
		name   string
		image  []byte
		config string
		want   string // in the error; "": none
	}{
		{"good", good, config, ""},
		{"no configuration beside it", good, "", ""},
		{"empty", nil, "", "too short"},
		{"text", bytes.Repeat([]byte("not a kernel\n"), 100), "", "not a Linux kernel image"},
		{"old", change(0x206, 0x00, 0x02), "", "not a Linux kernel image"},
		{"unpacked", change(0, 0x7f, 'E', 'L', 'F'), "", "compressed vmlinuz"},
		{"arm64", append(make([]byte, 0x38), "ARM\x64"+strings.Repeat("\x00", 1000)...), "", "arm64"},
		{"32 bits", change(0x236, 0), "", "32-bit"},
		{"truncated", good[:len(good)-1], "", "truncated: it should have 16384 bytes"},
		{"cut off short", good[:0x300], "", "truncated"},
		{"length beyond the file", change(0x1f4, 0xff, 0xff, 0xff, 0xff), "", "truncated"},
		{"no release", change(0x600, 0), "", "does not tell its release"},
		{"no BTF", good, without("CONFIG_DEBUG_INFO_BTF"), "built without BTF (CONFIG_DEBUG_INFO_BTF)"},
		{"no virtio console", good, without("CONFIG_VIRTIO_CONSOLE"), "built without the virtio console"},
		{"no BPF", good, without("CONFIG_BPF_SYSCALL"), "built without BPF"},
	} {
		t.Run(c.name, func(t *testing.T) {
			files := map[string][]byte{"boot/vmlinuz": c.image, "lib/modules/6.99-test/modules.builtin": nil}
			if c.config != "" {
				files["boot/config-6.99-test"] = []byte(c.config)
			}
			path := filepath.Join(write(t, files), "boot/vmlinuz")
			k, err := vm.OpenKernel(path)
			if c.want == "" {
				if err != nil || k.Image != path || k.Release != "6.99-test" || !strings.HasSuffix(k.Modules, "/lib/modules/6.99-test") {
					t.Errorf("%+v, %v", k, err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.HasPrefix(err.Error(), fmt.Sprintf("kernel %q: ", path)) {
				t.Errorf("got %v", err)
			}
		})
	}
	dir := write(t, map[string][]byte{"vmlinuz": good, "config-6.99-test": []byte(config)})
	if _, err := vm.OpenKernel(filepath.Join(dir, "vmlinuz")); err == nil || !strings.Contains(err.Error(), "the virtio console is a module") {
		t.Errorf("without the modules: %v", err)
	}
	if _, err := vm.OpenKernel(dir); !errors.Is(err, unix.EISDIR) && (err == nil || !strings.Contains(err.Error(), "not a kernel image")) {
		t.Errorf("a directory: %v", err)
	}
	if _, err := vm.OpenKernel(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("not there: %v", err)
	}
}

func FuzzOpenKernel(f *testing.F) {
	f.Add(image("6.99"), []byte(config))
	f.Fuzz(func(t *testing.T, img, config []byte) {
		dir := t.TempDir()
		path := filepath.Join(dir, "vmlinuz")
		if err := errors.Join(os.WriteFile(path, img, 0o600), os.WriteFile(filepath.Join(dir, "config-6.99"), config, 0o600)); err != nil {
			t.Fatal(err)
		}
		if k, err := vm.OpenKernel(path); err == nil && k.Release == "" {
			t.Error("a kernel without a release")
		}
	})
}

func TestFindKernel(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	_, err := vm.FindKernel("debian-6.12")
	if missing, ok := errors.AsType[*vm.NotPulledError](err); !ok || missing.Name != "debian-6.12" {
		t.Errorf("one that is not here: %v", err)
	}
	_, err = vm.FindKernel("debain-6.12")
	if _, ok := errors.AsType[*vm.UnknownKernelError](err); !ok || !strings.Contains(err.Error(), "debian-6.1, debian-6.12") {
		t.Errorf("one that there is not: %v", err)
	}
	if _, err := vm.FindKernel("./none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a path: %v", err)
	}
	path := filepath.Join(write(t, map[string][]byte{"vmlinuz": image("6.99")}), "vmlinuz")
	if k, err := vm.FindKernel(path); err != nil || k.Release != "6.99" {
		t.Errorf("a file: %+v, %v", k, err)
	}
	for _, k := range vm.Kernels() {
		if k.Kernel != nil || k.Release != "" {
			t.Errorf("in an empty cache there is %+v", k)
		}
	}
}

func TestCacheDir(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", "")
	t.Setenv("HOME", "/home/x")
	if dir := vm.CacheDir(); dir != "/home/x/.cache/ccload/kernels" {
		t.Errorf("at home: %s", dir)
	}
	os.Unsetenv("HOME") // as in some of cron's and CI's
	if dir := vm.CacheDir(); dir != "/var/cache/ccload/kernels" {
		t.Errorf("without a home: %s", dir)
	}
}

// repository is a source of packages for apt that stands for Debian's. apt itself
// is the real one, with lists and caches of its own.
type repository struct {
	t        *testing.T
	dir      string
	server   *httptest.Server
	packages []byte    // its index
	changed  time.Time // when that was
}

// newRepository makes apt know no other source, and an empty cache of kernels.
func newRepository(t *testing.T) *repository {
	t.Helper()
	for _, p := range []string{"apt-get", "dpkg-deb"} {
		if _, err := exec.LookPath(p); err != nil {
			t.Skip(err)
		}
	}
	r := &repository{t: t, changed: time.Now(), dir: write(t, map[string][]byte{"status": nil, "repo/Packages": nil, "etc/apt.conf.d/none": nil, "etc/preferences.d/none": nil, "state/lists/partial/none": nil, "cache/archives/partial/none": nil})}
	r.server = httptest.NewServer(http.FileServer(http.Dir(r.dir + "/repo")))
	t.Cleanup(r.server.Close)
	conf := fmt.Sprintf(`Dir::Etc %[1]q; Dir::Etc::SourceList "sources.list"; Dir::State %[2]q; Dir::State::Status %[3]q; Dir::Cache %[4]q; Dir::Log %[1]q;
APT::Architecture "amd64"; APT::Sandbox::User "root"; Acquire::Retries "0"; Acquire::http::Proxy "DIRECT";`,
		r.dir+"/etc", r.dir+"/state", r.dir+"/status", r.dir+"/cache")
	source := "deb [trusted=yes] " + r.server.URL + " ./\n"
	if err := errors.Join(os.WriteFile(r.dir+"/apt.conf", []byte(conf), 0o644), os.WriteFile(r.dir+"/etc/sources.list", []byte(source), 0o644)); err != nil {
		t.Fatal(err)
	}
	t.Setenv("APT_CONFIG", r.dir+"/apt.conf")
	t.Setenv("XDG_CACHE_HOME", filepath.Join(r.dir, "home"))
	return r
}

// tree is what a package with a kernel unpacks to.
func tree(release string) map[string][]byte {
	return map[string][]byte{
		"boot/vmlinuz-" + release:                        image(release),
		"boot/config-" + release:                         []byte(config),
		"lib/modules/" + release + "/modules.builtin":    nil,
		"usr/share/doc/" + release + "/what-is-not-kept": nil,
	}
}

// add puts a package into the repository.
func (r *repository) add(name string, files map[string][]byte) {
	r.t.Helper()
	control := fmt.Sprintf("Package: %s\nVersion: 1\nArchitecture: amd64\nMaintainer: nobody\nDescription: a test\n", name)
	files["DEBIAN/control"] = []byte(control)
	path := filepath.Join(r.dir, "repo", name+".deb")
	if out, err := exec.Command("dpkg-deb", "-Znone", "-b", write(r.t, files), path).CombinedOutput(); err != nil {
		r.t.Fatalf("%v\n%s", err, out)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		r.t.Fatal(err)
	}
	r.packages = fmt.Appendf(r.packages, "%sFilename: ./%s.deb\nSize: %d\nSHA256: %x\n\n", control, name, len(b), sha256.Sum256(b))
	// HTTP tells changes by the second.
	r.changed = r.changed.Add(time.Second)
	index := filepath.Join(r.dir, "repo/Packages")
	if err := errors.Join(os.WriteFile(index, r.packages, 0o644), os.Chtimes(index, r.changed, r.changed)); err != nil {
		r.t.Fatal(err)
	}
}

// pull pulls debian-6.1 and returns what it said.
func pull(t *testing.T) (k *vm.Kernel, said string, err error) {
	t.Helper()
	k, err = vm.Pull(t.Context(), "debian-6.1", func(format string, args ...any) { said += fmt.Sprintf(format, args...) + "\n" })
	return k, said, err
}

// nothing fails the test if anything was left in the cache but its lock.
func nothing(t *testing.T) {
	t.Helper()
	left, err := os.ReadDir(vm.CacheDir())
	if err != nil || len(left) > 1 || len(left) == 1 && left[0].Name() != ".lock" {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if _, err := vm.FindKernel("debian-6.1"); err == nil {
		t.Error("there is a kernel")
	}
}

const package61 = "linux-image-6.1.0-%d-cloud-amd64-unsigned"

func TestPull(t *testing.T) {
	r := newRepository(t)
	// The newest is taken, by its numbers; others are none of them.
	for n, release := range map[int]string{9: "6.1.0-9-cloud-amd64", 56: "6.1.0-56-cloud-amd64", 8: "6.1.0-8-cloud-amd64"} {
		r.add(fmt.Sprintf(package61, n), tree(release))
	}
	r.add("linux-image-6.1.0-99-amd64-unsigned", tree("6.1.0-99-amd64"))
	r.add("linux-image-6.12.3+deb12-cloud-amd64-unsigned", tree("6.12.3+deb12-cloud-amd64"))
	k, said, err := pull(t)
	if err != nil || k.Release != "6.1.0-56-cloud-amd64" {
		t.Fatalf("%+v, %v", k, err)
	}
	if want := "updating the list of packages\nfetching " + fmt.Sprintf(package61, 56) + "\n"; said != want {
		t.Errorf("said %q, want %q", said, want)
	}
	dir := filepath.Join(vm.CacheDir(), "debian-6.1")
	var files []string
	filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			files = append(files, strings.TrimPrefix(path, dir+"/"))
		}
		return err
	})
	if want := []string{"SHA256SUMS", "boot/config-" + k.Release, "boot/vmlinuz-" + k.Release, "lib/modules/" + k.Release + "/modules.builtin"}; !slices.Equal(files, want) {
		t.Errorf("there are %q, want %q", files, want)
	}
	if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	// What is here is not fetched again, nor is anything asked of apt.
	t.Setenv("PATH", "")
	again, said, err := pull(t)
	if err != nil || again.Release != k.Release || said != "" {
		t.Errorf("again: %+v, %q, %v", again, said, err)
	}
	for _, k := range vm.Kernels() {
		if here := k.Name == "debian-6.1"; (k.Kernel != nil) != here || here && (k.Release != again.Release || k.Dir != dir) {
			t.Errorf("listed: %+v", k)
		}
	}
}

// What was changed since it was pulled is found, is not booted, and is healed by
// another pull: an image, its configuration, a module, the list of digests itself.
func TestDamaged(t *testing.T) {
	r := newRepository(t)
	const release = "6.1.0-9-cloud-amd64"
	files := tree(release)
	module := "lib/modules/" + release + "/kernel/net/ipv4/tcp_x.ko"
	files[module] = bytes.Repeat([]byte("module"), 100)
	r.add(fmt.Sprintf(package61, 9), files)
	if _, _, err := pull(t); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(vm.CacheDir(), "debian-6.1")
	flip := func(path string) error {
		b, err := os.ReadFile(path)
		if err == nil {
			b[len(b)-1] ^= 1
			err = os.WriteFile(path, b, 0o644)
		}
		return err
	}
	cut := func(path string) error { return os.Truncate(path, 100) }
	for _, c := range []struct {
		name, file string
		damage     func(string) error
		early      bool // seen before it is booted
	}{
		{"image, a byte", "boot/vmlinuz-" + release, flip, true},
		{"image, cut", "boot/vmlinuz-" + release, cut, true},
		{"configuration", "boot/config-" + release, flip, false},
		{"module, a byte", module, flip, false},
		{"module, cut", module, cut, false},
		{"module, gone", module, os.Remove, false},
		{"no digests", "SHA256SUMS", os.Remove, true},
		{"digests of another", "SHA256SUMS", cut, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := c.damage(filepath.Join(dir, c.file)); err != nil {
				t.Fatal(err)
			}
			if _, err := vm.FindKernel("debian-6.1"); c.early {
				if e, ok := errors.AsType[*vm.DamagedKernelError](err); !ok || e.Name != "debian-6.1" {
					t.Errorf("found it: %v", err)
				}
			}
			if k := vm.Kernels()[0]; k.Name != "debian-6.1" || k.Kernel != nil || k.Dir != dir || !strings.Contains(k.Problem, "damaged") {
				t.Errorf("listed: %+v", k)
			}
			if k, said, err := pull(t); err != nil || k.Release != release || !strings.Contains(said, "debian-6.1 is damaged") {
				t.Errorf("%+v, %q, %v", k, said, err)
			}
			if k := vm.Kernels()[0]; k.Kernel == nil || k.Problem != "" {
				t.Errorf("healed, it is listed: %+v", k)
			}
		})
	}
}

// A cache that is somebody else's, or that others can write to, is not used: at no
// level.
func TestUntrusted(t *testing.T) {
	r := newRepository(t)
	const release = "6.1.0-9-cloud-amd64"
	r.add(fmt.Sprintf(package61, 9), tree(release))
	if _, _, err := pull(t); err != nil {
		t.Fatal(err)
	}
	refused := func(t *testing.T, path string) {
		t.Helper()
		_, err := vm.FindKernel("debian-6.1")
		if e, ok := errors.AsType[*vm.UntrustedError](err); !ok || e.Path != path {
			t.Errorf("found it: %v", err)
		}
		if k := vm.Kernels()[0]; k.Kernel != nil || !strings.Contains(k.Problem, "refusing cache") {
			t.Errorf("listed: %+v", k)
		}
		if _, _, err := pull(t); err == nil || !strings.Contains(err.Error(), "refusing cache") {
			t.Errorf("pulled: %v", err)
		}
	}
	dir := vm.CacheDir()
	for _, path := range []string{
		filepath.Dir(dir), dir, filepath.Join(dir, "debian-6.1"), filepath.Join(dir, "debian-6.1/boot"), filepath.Join(dir, "debian-6.1/boot/vmlinuz-"+release),
		filepath.Join(dir, "debian-6.1/lib/modules"),
	} {
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Run("writable "+filepath.Base(path), func(t *testing.T) {
			os.Chmod(path, st.Mode().Perm()|0o020)
			defer os.Chmod(path, st.Mode().Perm())
			refused(t, path)
		})
		t.Run("foreign "+filepath.Base(path), func(t *testing.T) {
			if os.Geteuid() != 0 {
				t.Skip("only root can give a file away")
			}
			os.Chown(path, 65534, 65534)
			defer os.Chown(path, 0, 0)
			refused(t, path)
		})
	}
	if k, err := vm.FindKernel("debian-6.1"); err != nil || k.Release != release {
		t.Errorf("at last: %+v, %v", k, err)
	}
}

func TestOffered(t *testing.T) {
	r := newRepository(t)
	if offered, err := vm.Offered(t.Context(), "debian-6.1"); offered || err == nil {
		t.Errorf("without a list of packages: %v, %v", offered, err)
	}
	r.add(fmt.Sprintf(package61, 1), tree("6.1.0-1-cloud-amd64"))
	if out, err := exec.Command("apt-get", "-qq", "update").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, name := range vm.Names() {
		if offered, err := vm.Offered(t.Context(), name); offered != (name == "debian-6.1") || err != nil {
			t.Errorf("%s: %v, %v", name, offered, err)
		}
	}
	t.Setenv("PATH", "")
	if offered, err := vm.Offered(t.Context(), "debian-6.1"); offered || err != nil {
		t.Errorf("without apt: %v, %v", offered, err)
	}
}

// A list of packages that names what is no longer there is brought up to date.
func TestPullWithAnOldList(t *testing.T) {
	r := newRepository(t)
	r.add(fmt.Sprintf(package61, 7), tree("6.1.0-7-cloud-amd64"))
	if out, err := exec.Command("apt-get", "-qq", "update").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	os.Remove(filepath.Join(r.dir, "repo", fmt.Sprintf(package61, 7)+".deb"))
	r.packages = nil
	r.add(fmt.Sprintf(package61, 8), tree("6.1.0-8-cloud-amd64"))
	if k, said, err := pull(t); err != nil || k.Release != "6.1.0-8-cloud-amd64" {
		t.Errorf("%+v, %q, %v", k, said, err)
	}
}

// Whatever is wrong, the error says what, and nothing is left.
func TestPullErrors(t *testing.T) {
	const release = "6.1.0-1-cloud-amd64"
	with := func(name string, content []byte) map[string][]byte {
		files := tree(release)
		if files[name] = content; content == nil {
			delete(files, name)
		}
		return files
	}
	for _, c := range []struct {
		name  string
		files map[string][]byte // of the package; nil: there is none
		mend  func(*repository)
		want  string
	}{
		{"no such package", nil, nil, "this distribution has no such package; give the path of a vmlinuz"},
		{"no network", nil, func(r *repository) { r.server.Close() }, "Could not connect to 127.0.0.1"},
		{"package that is not there", tree(release), func(r *repository) { os.Remove(r.dir + "/repo/" + fmt.Sprintf(package61, 1) + ".deb") }, "404  Not Found"},
		{"other bytes", tree(release), func(r *repository) {
			path := r.dir + "/repo/" + fmt.Sprintf(package61, 1) + ".deb"
			b, _ := os.ReadFile(path)
			b[len(b)-1000] ^= 1
			os.WriteFile(path, b, 0o644)
		}, "SHA"},
		{"no kernel in it", with("boot/vmlinuz-"+release, nil), nil, "holds 0 kernels"},
		{"two kernels in it", with("boot/vmlinuz-x", image("x")), nil, "holds 2 kernels"},
		{"truncated kernel", with("boot/vmlinuz-"+release, image(release)[:1<<13]), nil, "truncated"},
		{"no modules", with("lib/modules/"+release+"/modules.builtin", nil), nil, "modules"},
		{"no BTF", with("boot/config-"+release, []byte("CONFIG_BPF_SYSCALL=y\nCONFIG_BPF_JIT=y\n")), nil, "built without BTF"},
		{"no apt", nil, func(r *repository) { r.t.Setenv("PATH", "") }, "there is no apt-get here; give the path of a vmlinuz"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRepository(t)
			if c.files != nil {
				r.add(fmt.Sprintf(package61, 1), c.files)
			}
			if c.mend != nil {
				c.mend(r)
			}
			_, _, err := pull(t)
			if err == nil || !strings.HasPrefix(err.Error(), `pull kernel "debian-6.1": `) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v", err)
			}
			nothing(t)
		})
	}
	_, err := vm.Pull(t.Context(), "debian-6", nil)
	if _, ok := errors.AsType[*vm.UnknownKernelError](err); !ok {
		t.Errorf("an unknown name: %v", err)
	}
}

func TestPullFullDisk(t *testing.T) {
	kerneltest.Privileged(t)
	r := newRepository(t)
	files := tree("6.1.0-1-cloud-amd64")
	files["lib/modules/6.1.0-1-cloud-amd64/large"] = make([]byte, 3<<20)
	r.add(fmt.Sprintf(package61, 1), files)
	for _, size := range []string{"2m", "5m"} { // too small for the package, and for what is in it
		small := t.TempDir()
		if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size="+size); err != nil {
			t.Fatal(err)
		}
		defer unix.Unmount(small, 0)
		t.Setenv("XDG_CACHE_HOME", small)
		if _, _, err := pull(t); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("%s: %v", size, err)
		}
		nothing(t)
	}
}

// Two at once fetch one kernel, and both have it.
func TestPullAtOnce(t *testing.T) {
	r := newRepository(t)
	r.add(fmt.Sprintf(package61, 1), tree("6.1.0-1-cloud-amd64"))
	var wg sync.WaitGroup
	var fetched int
	var mu sync.Mutex
	for range 4 {
		wg.Go(func() {
			k, err := vm.Pull(t.Context(), "debian-6.1", func(format string, _ ...any) {
				mu.Lock()
				defer mu.Unlock()
				if strings.HasPrefix(format, "fetching") {
					fetched++
				}
			})
			if err != nil || k.Release != "6.1.0-1-cloud-amd64" {
				t.Errorf("%+v, %v", k, err)
			}
		})
	}
	wg.Wait()
	if fetched != 1 {
		t.Errorf("fetched %d times", fetched)
	}
}

// One that is interrupted leaves nothing, whether it works or waits; what one
// leaves that was killed, the next removes.
func TestPullInterrupted(t *testing.T) {
	r := newRepository(t)
	r.add(fmt.Sprintf(package61, 1), tree("6.1.0-1-cloud-amd64"))
	ctx, cancel := context.WithCancel(t.Context())
	_, err := vm.Pull(ctx, "debian-6.1", func(format string, _ ...any) {
		if strings.HasPrefix(format, "fetching") {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	nothing(t)

	f, err := os.Open(filepath.Join(vm.CacheDir(), ".lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	ctx, cancel = context.WithCancel(t.Context())
	if _, err := vm.Pull(ctx, "debian-6.1", func(string, ...any) { cancel() }); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	f.Close()

	if err := os.MkdirAll(filepath.Join(vm.CacheDir(), ".pull-1/unpacked"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, _, err := pull(t); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(vm.CacheDir(), ".pull*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// copied is a kernel with other bytes in its image and other modules than the real
// one: links to those, beside what is given.
func copied(t *testing.T, change func(dir, release string)) *vm.Kernel {
	t.Helper()
	real := vmtest.Kernel(t, "debian-6.12")
	dir := t.TempDir()
	modules := filepath.Join(dir, "lib/modules", real.Release)
	err := errors.Join(os.MkdirAll(filepath.Join(dir, "boot"), 0o755), os.CopyFS(modules, os.DirFS(real.Modules)))
	b, rerr := os.ReadFile(real.Image)
	if err := errors.Join(err, rerr, os.WriteFile(filepath.Join(dir, "boot/vmlinuz"), b, 0o644)); err != nil {
		t.Fatal(err)
	}
	change(dir, real.Release)
	k, err := vm.OpenKernel(filepath.Join(dir, "boot/vmlinuz"))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// What cannot be seen before is an error when the guest is made.
func TestBadKernels(t *testing.T) {
	flip := func(file string) func(string, string) {
		return func(dir, release string) {
			path := filepath.Join(dir, strings.ReplaceAll(file, "RELEASE", release))
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			b[len(b)/2] ^= 1
			if err := os.WriteFile(path, b, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	const tun = "lib/modules/RELEASE/kernel/drivers/net/tun.ko.xz"
	for _, c := range []struct {
		name   string
		change func(dir, release string)
		want   string
	}{
		{"corrupt image", flip("boot/vmlinuz"), "corrupt"},
		{"corrupt module", flip(tun), "tun.ko.xz"},
		{"missing module", func(dir, release string) { os.Remove(filepath.Join(dir, strings.ReplaceAll(tun, "RELEASE", release))) }, `module "tun": neither built in nor there`},
		{"no list of what is built in", func(dir, release string) { os.Remove(filepath.Join(dir, "lib/modules", release, "modules.builtin")) }, "modules.builtin: no such file"},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := &vm.Guest{Kernel: copied(t, c.change), Binary: program(t), Args: []string{"uname"}, Modules: []string{"tun"}}
			if _, err := g.Run(t.Context(), io.Discard, io.Discard, nil); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v", err)
			}
		})
	}
	missing := &vm.MissingModuleError{}
	g := newGuest(t, "uname")
	g.Modules = []string{"no-such"}
	if _, err := g.Run(t.Context(), io.Discard, io.Discard, nil); !errors.As(err, &missing) || missing.Module != "no_such" {
		t.Errorf("got %v", err)
	}
}
