// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"slices"
	"strings"

	"ccload/cc"
	"ccload/harness/vm"
	"ccload/internal/bpfload"
	"ccload/internal/fault"
	"ccload/internal/inetdiag"
	"ccload/internal/netns"
	"ccload/registry"
	"ccload/structops"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/mdlayher/netlink"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// finding is what the doctor found about one thing.
type finding struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Needed bool   `json:"needed"` // register or run cannot work without it
	Found  string `json:"found"`
	Means  string `json:"means,omitempty"` // for the user, where it is not there
}

func (a *app) doctor() *cobra.Command {
	return a.withJSON(&cobra.Command{
		Use:   "doctor",
		Short: "What this machine has and lacks for each thing ccload does",
		Long: `What this machine has and lacks for each thing ccload does. Everything is tried
for real, and nothing is changed by it. The exit status is 1 if congestion
controls cannot be registered or measured here.`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			findings := examine(a.sayv)
			healthy := true
			for _, f := range findings {
				healthy = healthy && (f.OK || !f.Needed)
			}
			err := a.print(findings, func() {
				var nameWidth, verdictWidth int
				for _, f := range findings {
					nameWidth, verdictWidth = max(nameWidth, len(f.Name)), max(verdictWidth, len(f.verdict()))
				}
				for _, f := range findings {
					a.wrapped(fmt.Sprintf("%-*s  %-*s  ", verdictWidth, f.verdict(), nameWidth, f.Name), f.Found)
				}
				for _, f := range findings {
					if !f.OK && f.Means != "" {
						a.printf("\n")
						a.wrapped("", f.Name+": "+f.Means)
					}
				}
			})
			if err == nil && !healthy {
				return errors.New("this machine lacks what ccload needs")
			}
			return err
		},
	})
}

func (f finding) verdict() string {
	switch {
	case f.OK:
		return "ok"
	case f.Needed:
		return "MISSING"
	}
	return "no"
}

// wrapped prints text after a label, its further lines below its first, so that no
// line is longer than a terminal is wide.
func (a *app) wrapped(label, text string) {
	const width = 80
	line := label
	for i, word := range strings.Fields(text) {
		switch {
		case i == 0:
			line += word
		case len(line)+1+len(word) > width:
			a.printf("%s\n", line)
			line = strings.Repeat(" ", len(label)) + word
		default:
			line += " " + word
		}
	}
	a.printf("%s\n", line)
}

// probe looks at one thing and says what it found.
type probe struct {
	name   string
	needed bool
	means  string
	try    func() (found string, err error)
}

func examine(sayv func(string, ...any)) []finding {
	var out []finding
	for _, p := range probes {
		sayv("trying %s", p.name)
		found, err := p.try()
		f := finding{Name: p.name, Needed: p.needed, OK: err == nil, Found: found}
		if err != nil {
			f.Found, f.Means = firstLine(err), p.means
		}
		out = append(out, f)
	}
	return out
}

func firstLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}

var probes = []probe{
	{"capabilities", true, "ccload registers congestion controls and makes network namespaces: run it as root.", func() (string, error) {
		missing, err := registry.Missing("/", "CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN", "CAP_SYS_ADMIN")
		if err == nil && len(missing) > 0 {
			err = &structops.PermissionError{Missing: missing, Errno: unix.EPERM}
		}
		return "all that are needed", err
	}},
	{"kernel", true, "congestion controls in BPF came with Linux 5.13.", func() (string, error) {
		var u unix.Utsname
		if err := unix.Uname(&u); err != nil {
			return "", err
		}
		release := unix.ByteSliceToString(u.Release[:])
		var major, minor int
		if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
			return "", fmt.Errorf("release %q: %w", release, err)
		}
		if major < 5 || major == 5 && minor < 13 {
			return "", fmt.Errorf("Linux %s is too old", release)
		}
		return "Linux " + release, nil
	}},
	{"BTF", true, "the kernel does not describe its types (CONFIG_DEBUG_INFO_BTF), so no BPF object can be fitted to it.", func() (string, error) {
		_, err := btf.LoadKernelSpec()
		return "the kernel describes its types", err
	}},
	{"JIT", true, "BPF struct_ops works with the BPF compiler only: sysctl net.core.bpf_jit_enable=1.", func() (string, error) {
		b, err := os.ReadFile("/proc/sys/net/core/bpf_jit_enable")
		if errors.Is(err, fs.ErrPermission) { // only root may read it; struct_ops tells
			return "not known: " + firstLine(err), nil
		}
		if err == nil && strings.TrimSpace(string(b)) == "0" {
			err = errors.New("net.core.bpf_jit_enable is 0")
		}
		return "on", err
	}},
	{"struct_ops", true, "no congestion control can be registered.", func() (string, error) {
		alg := cc.Lookup("bpf_reno")
		spec, err := structops.Parse(alg.Object())
		if err != nil {
			return "", err
		}
		obj, err := spec.Load(alg.Name)
		if err != nil {
			return "", err
		}
		return alg.Name + " passes the verifier", obj.Close()
	}},
	{"BPF links", false, "a registration without a link (before Linux 6.4) has no owner: it stays until it is unregistered, and cannot be replaced.", func() (string, error) {
		return "registrations can be replaced", kernelHas("bpf_struct_ops_link_create")
	}},
	{"detach", false, "to unregister what another program holds, that program must end (before Linux 6.11).", func() (string, error) {
		return "links of others can be detached", kernelHas("bpf_struct_ops_map_link_detach")
	}},
	{"iter/tcp", false, "open sockets are moved (use --sockets, replace --migrate) through the processes that hold them. Those that no process holds are not, nor listening ones whose code was replaced, and windows that were set anew are not counted.", func() (string, error) {
		return "open sockets can be moved", reason(registry.Try("move"))
	}},
	{"iter/bpf_sk_storage_map", false, "nothing: which sockets still remember what they had is looked up in each network namespace instead.", func() (string, error) {
		return "moved sockets can be counted", reason(registry.Try("count"))
	}},
	{"pidfd_getfd", false, "sockets of other processes cannot be moved where iter/tcp is refused.", func() (string, error) {
		return "sockets of processes can be reached", registry.Try("pidfd_getfd")
	}},
	{"sockops", false, "no congestion control can be chosen for a control group (use --cgroup).", func() (string, error) {
		return "control groups can choose", reason(registry.Try("choose"))
	}},
	{"freplace", false, "extend works by tail calls only, for functions that have a slot.", func() (string, error) {
		return "functions of congestion controls can be replaced", tryFreplace()
	}},
	{"bpffs", true, "without it a registration ends with the process that made it.", func() (string, error) {
		var st unix.Statfs_t
		if err := unix.Statfs("/sys/fs/bpf", &st); err != nil {
			return "", fmt.Errorf("/sys/fs/bpf: %w", err)
		}
		if st.Type == unix.BPF_FS_MAGIC {
			return "mounted on /sys/fs/bpf", nil
		}
		b, err := os.ReadFile("/proc/filesystems")
		if err == nil && !strings.Contains(string(b), "\tbpf\n") {
			err = errors.New("the kernel has no bpffs")
		}
		return "not mounted; register mounts it on /sys/fs/bpf", err
	}},
	{"lockdown", false, "a locked-down kernel may refuse BPF programs even to root.", func() (string, error) {
		b, err := os.ReadFile("/sys/kernel/security/lockdown")
		if errors.Is(err, fs.ErrNotExist) {
			return "not known: securityfs does not tell", nil
		}
		if err != nil {
			return "", err
		}
		_, mode, _ := strings.Cut(string(b), "[")
		if mode, _, _ = strings.Cut(mode, "]"); mode == "confidentiality" {
			return "", errors.New(mode)
		}
		return cmp.Or(mode, "none"), nil
	}},
	{"confinement", false, "a container's seccomp filter or user namespace may refuse BPF, namespaces and other processes even to root: run ccload outside, or allow it bpf(2), setns(2) and pidfd_getfd(2).", func() (string, error) { return "none", confined("/") }},
	{"cgroup2", false, "no congestion control can be chosen for a control group (use --cgroup).", func() (string, error) {
		b, err := os.ReadFile("/proc/self/mounts")
		if err != nil {
			return "", err
		}
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) > 2 && f[2] == "cgroup2" {
				return "mounted on " + f[1], nil
			}
		}
		return "", errors.New("not mounted")
	}},
	{"network namespaces", true, "run needs namespaces of its own.", func() (string, error) {
		ns, err := netns.New()
		if err != nil {
			return "", err
		}
		return "can be made", ns.Close()
	}},
	{"TUN", true, "run emulates its link over TUN devices (CONFIG_TUN).", func() (string, error) { return "devices can be made", inNew(tryTUN) }},
	{"inet_diag", true, "run reads the state of sockets through it (CONFIG_INET_DIAG).", func() (string, error) {
		conn, err := inetdiag.Dial()
		if err != nil {
			return "", err
		}
		defer conn.Close()
		return "lists sockets", conn.Dump(0, true, func(*inetdiag.Socket) error { return nil })
	}},
	{"tp_btf/tcp_probe", false, "run samples at intervals only, not on every ACK, and may miss what happens in between.", func() (string, error) { return "run can sample on every ACK", tryTracepoint("tcp_probe", "tcp_probe") }},
	{"tp_btf/tcp_cong_state_set", false, "run may miss losses and timeouts that no ACK and no interval shows.", func() (string, error) {
		return "run sees each change of state", tryTracepoint("tcp_state", "tcp_cong_state_set")
	}},
	{"netem", false, "the links of run are its own only (not --link netem). Those made with tc(8) cannot delay or lose packets here.", func() (string, error) { return "there", inNew(func() error { return tryQdisc("netem") }) }},
	{"fq", false, "nothing: TCP paces by itself.", func() (string, error) { return "there", inNew(func() error { return tryQdisc("fq") }) }},
	{"QEMU", false, "nothing runs in guests: no virtual time (run --vm), and no kernels but this one (verify --kernel).", func() (string, error) { return "there", vm.Available() }},
	{"guest kernels", false, "ccload kernels pull NAME fetches one; the path of any vmlinuz for x86-64 will do, too.", func() (string, error) {
		var here []string
		for _, k := range vm.Kernels() {
			if k.Kernel != nil {
				here = append(here, k.Name)
			}
		}
		if len(here) == 0 {
			return "", errors.New("none is here")
		}
		return strings.Join(here, ", "), nil
	}},
	{"KVM", false, "run --realtime emulates the guest's processor, which is slow. Virtual time has no use for KVM.", func() (string, error) {
		fd, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return "", fmt.Errorf("/dev/kvm: %w", err)
		}
		return "/dev/kvm is there; whether it works, run --realtime finds out", unix.Close(fd)
	}},
}

// kernelHas says whether the kernel has a function, exported or not.
func kernelHas(function string) error {
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		return errors.New("not known without BTF")
	}
	var f *btf.Func
	if err := spec.TypeByName(function, &f); err != nil {
		return errors.New("this kernel has none")
	}
	return nil
}

// confined says what takes root's rights from this process. root is where proc/ is.
func confined(root string) error {
	status, err := os.ReadFile(root + "/proc/self/status")
	if err != nil {
		return err
	}
	ids, err := os.ReadFile(root + "/proc/self/uid_map")
	if err != nil {
		return err
	}
	var by []string
	if strings.Contains(string(status), "\nSeccomp:\t2\n") {
		by = append(by, "a seccomp filter")
	}
	if !slices.Equal(strings.Fields(string(ids)), []string{"0", "0", "4294967295"}) {
		by = append(by, "a user namespace")
	}
	if by != nil {
		return errors.New(strings.Join(by, " and "))
	}
	return nil
}

// tryFreplace loads a program for the place of a function of one that is loaded.
func tryFreplace() error {
	const alg, member, function = "bpf_cubic", "ssthresh", "backoff"
	spec, err := structops.Parse(cc.Lookup(alg).Object())
	if err != nil {
		return err
	}
	obj, err := spec.Load(alg)
	if err != nil {
		return err
	}
	defer obj.Close()
	info, err := obj.Info(alg)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(info.Members, func(m structops.Member) bool { return m.Member == member })
	target, err := ebpf.NewProgramFromID(ebpf.ProgramID(info.Members[i].ID))
	if err != nil {
		return err
	}
	defer target.Close()
	u32 := &btf.Int{Name: "__u32", Size: 4}
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "ccload_doctor", Type: ebpf.Extension, AttachTarget: target, AttachTo: function, License: "GPL",
		Instructions: asm.Instructions{
			btf.WithFuncMetadata(asm.Mov.Reg(asm.R0, asm.R1).WithSymbol("ccload_doctor"), &btf.Func{
				Name: "ccload_doctor", Linkage: btf.GlobalFunc,
				Type: &btf.FuncProto{Return: u32, Params: []btf.FuncParam{{Name: "cwnd", Type: u32}}},
			}),
			asm.Return(),
		},
	})
	if err != nil {
		return bpfload.Plain(err)
	}
	return prog.Close()
}

// inNew runs fn in a network namespace that ends with it.
func inNew(fn func() error) error {
	ns, err := netns.New()
	if err != nil {
		return err
	}
	defer ns.Close()
	return ns.Do(fn)
}

func tryTUN() error {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("/dev/net/tun: %w", err)
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("ccload%d")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	return unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
}

// reason is why the kernel refuses a program, which the row names.
func reason(err error) error {
	if e, ok := errors.AsType[*bpfload.RefusedError](err); ok {
		return e.Err
	}
	return err
}

// tryTracepoint attaches a program that does nothing, in the place of one of ours, for
// a moment.
func tryTracepoint(program, tracepoint string) error {
	if err := fault.At("load program " + program); err != nil {
		return err
	}
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "ccload_doctor", Type: ebpf.Tracing, AttachType: ebpf.AttachTraceRawTp, AttachTo: tracepoint, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	if err != nil {
		return bpfload.Plain(err)
	}
	defer prog.Close()
	l, err := link.AttachTracing(link.TracingOptions{Program: prog, AttachType: ebpf.AttachTraceRawTp})
	if err != nil {
		return bpfload.Plain(err)
	}
	return l.Close()
}

// tryQdisc sets a queueing discipline on the loopback device of the namespace
// that the thread is in. Without options netem refuses with EINVAL, which is an
// answer too: a kind that is not there is ENOENT.
func tryQdisc(kind string) error {
	conn, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		return err
	}
	defer conn.Close()
	ae := netlink.NewAttributeEncoder()
	ae.String(unix.TCA_KIND, kind)
	attrs, err := ae.Encode()
	if err != nil {
		return err
	}
	// struct tcmsg (rtnetlink(7)): family and padding, device, handle, parent, info.
	msg := binary.NativeEndian.AppendUint32(nil, unix.AF_UNSPEC)
	msg = binary.NativeEndian.AppendUint32(msg, 1) // lo
	msg = binary.NativeEndian.AppendUint32(msg, 0)
	msg = binary.NativeEndian.AppendUint32(msg, math.MaxUint32) // the root
	msg = binary.NativeEndian.AppendUint32(msg, 0)
	_, err = conn.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.RTM_NEWQDISC, Flags: netlink.Request | netlink.Acknowledge | netlink.Create},
		Data:   append(msg, attrs...),
	})
	switch {
	case errors.Is(err, unix.EINVAL):
		return nil
	case errors.Is(err, unix.ENOENT):
		return errors.New("the kernel has none")
	}
	return err
}
