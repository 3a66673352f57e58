// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestPermission(t *testing.T) {
	for _, c := range []struct {
		caps, lockdown string
		missing        []string
		text           string
	}{
		{"0000000000000000", "", []string{"CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN"}, "needs CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN"},
		{"0000000000200000", "", nil, "the process has all required capabilities"},
		{"0000008000000000", "", []string{"CAP_PERFMON", "CAP_NET_ADMIN"}, "needs CAP_PERFMON, CAP_NET_ADMIN"},
		{"0000008000001000", "", []string{"CAP_PERFMON"}, "needs CAP_PERFMON"},
		{"000001ffffffffff", "none integrity [confidentiality]\n", nil, "lockdown=confidentiality"},
		{"000001ffffffffff", "[none] integrity confidentiality\n", nil, "the process has all required capabilities"},
		{"000001ffffffffff", "", nil, "the process has all required capabilities"},
	} {
		root := t.TempDir()
		write := func(path, text string) {
			path = filepath.Join(root, path)
			if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
				t.Fatal(err)
			}
		}
		write("proc/self/status", "Name:\tx\nCapPrm:\t000001ffffffffff\nCapEff:\t"+c.caps+"\nCapBnd:\t000001ffffffffff\n")
		if c.lockdown != "" {
			write("sys/kernel/security/lockdown", c.lockdown)
		}
		err := permission(root, fmt.Errorf("load program: %w (MEMLOCK may be too low, consider rlimit.RemoveMemlock)", unix.EPERM), loading...)
		var p *PermissionError
		if !errors.As(err, &p) || !slices.Equal(p.Missing, c.missing) || !strings.Contains(err.Error(), c.text) || strings.Contains(err.Error(), "MEMLOCK") {
			t.Errorf("%s %q: %v", c.caps, c.lockdown, err)
		}
		if !errors.Is(err, unix.EPERM) || !errors.Is(err, os.ErrPermission) {
			t.Errorf("it is not EPERM: %v", err)
		}
	}
	// What may forbid it is said as far as that can be told.
	root := t.TempDir()
	for path, text := range map[string]string{"proc/self/status": "Name:\tx\nCapEff:\t000001ffffffffff\nSeccomp:\t2\n", "proc/self/uid_map": "         0       1000          1\n"} {
		if err := errors.Join(os.MkdirAll(filepath.Join(root, "proc/self"), 0o755), os.WriteFile(filepath.Join(root, path), []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	want := "operation not permitted: the process has all required capabilities; blocked by a lockdown, a security module, the seccomp filter that is in force for this process or the user namespace that it is in"
	if err := permission(root, unix.EPERM, loading...); err.Error() != want {
		t.Errorf("%v\nwant %s", err, want)
	}
	if err := permission("/", unix.EINVAL); err != unix.EINVAL {
		t.Errorf("another error became %v", err)
	}
}

func TestDecisive(t *testing.T) {
	for _, c := range []struct{ log, reason, source string }{
		{"0: R1=ctx() R10=fp0\n; tp->snd_nxt = ack; @ x.bpf.c:9\n0: (79) r1 = *(u64 *)(r1 +0)\nno write support to tcp_sock at off 1668\nprocessed 5 insns (limit 1000000) max_states_per_insn 0\n",
			"no write support to tcp_sock at off 1668", "x.bpf.c:9: tp->snd_nxt = ack;"},
		{"; old kernels name no file\n0: (95) exit\nR0 !read_ok\nprocessed 1 insns", "R0 !read_ok", "old kernels name no file"},
		{"attach to unsupported member get_info of struct tcp_congestion_ops\nprocessed 0 insns", "attach to unsupported member get_info of struct tcp_congestion_ops", ""},
		{"from 5 to 7: R0=0 R10=fp0\n7: R0=0\nThe sequence of 8193 jumps is too complex.\nverification time 12 usec\nstack depth 0\nprocessed 8 insns", "The sequence of 8193 jumps is too complex.", ""},
		{"1: (85) call pc+2\ncaller:\n R6=ctx() R10=fp0\ncallee:\n frame1: R1=1 R10=fp0\n;\n3: (95) exit\nR0 !read_ok\nprocessed 2 insns", "R0 !read_ok", ""},
		{"3: (95) exit\n;\nR0 !read_okprocessed 2 insns (limit 1000000)", "R0 !read_ok", ""},
		{"3: (85) call pc+2\nR1 type=scalar expected=fp\nCaller passes invalid args into func#1 ('f')\nprocessed 2 insns", "R1 type=scalar expected=fp", ""},
		{"3: (85) call pc+2\nCaller passes invalid args into func#1 ('f')\nprocessed 2 insns", "Caller passes invalid args into func#1 ('f')", ""},
		{"0: (95) exit\nfunc 'init' arg0 has btf_id 7 type STRUCT 'sock'\nmax struct nesting depth exceeded\narg#0 pointer type STRUCT tcp_sock must point to scalar", "arg#0 pointer type STRUCT tcp_sock must point to scalar", ""},
		{"a sentence\n0: (95) exit\nprocessed 2 insns", "", ""},
		{"", "", ""},
	} {
		reason, _, source := decisive(strings.Split(c.log, "\n"))
		if reason != c.reason || source != c.source {
			t.Errorf("got %q, %q; want %q, %q", reason, source, c.reason, c.source)
		}
	}
}

func TestFindHolders(t *testing.T) {
	proc := t.TempDir()
	for _, p := range []struct{ pid, comm, fdinfo string }{
		{"7", "alpha\n", "pos:\t0\nlink_type:\tstruct_ops\nlink_id:\t42\nmap_id:\t5\n"},
		{"8", "beta\n", "pos:\t0\nlink_id:\t421\n"},
		{"self", "no pid\n", "link_id:\t42\n"},
	} {
		dir := filepath.Join(proc, p.pid)
		if err := errors.Join(os.MkdirAll(dir+"/fdinfo", 0o755), os.WriteFile(dir+"/comm", []byte(p.comm), 0o644),
			os.WriteFile(dir+"/fdinfo/3", []byte(p.fdinfo), 0o644), os.WriteFile(dir+"/fdinfo/4", []byte(p.fdinfo), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := processes(proc, 42); err != nil || !slices.Equal(got, []string{"alpha (pid 7)"}) {
		t.Errorf("%q, %v", got, err)
	}
}

func TestBpffsMount(t *testing.T) {
	for line, want := range map[string]string{
		"36 25 0:32 / /sys/fs/bpf rw,nosuid shared:12 - bpf bpf rw,mode=700": "/sys/fs/bpf",
		`37 25 0:33 / /mnt/a\040b rw - bpf none rw`:                          "/mnt/a b",
		"38 25 0:34 / /sys rw - sysfs sysfs rw":                              "",
		"":                                                                   "",
	} {
		if got, ok := MountPoint(line, "bpf"); got != want || ok != (want != "") {
			t.Errorf("%q: %q, %v", line, got, ok)
		}
	}
}
