// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"ccload/harness/trace"
	"ccload/internal/netns"
	"ccload/internal/tcpca"
)

// known says whether the kernel has the congestion controls of the flows. One
// that is a module may get loaded by the question.
func known(flows []trace.Flow) error {
	for _, f := range flows {
		there, _, err := tcpca.Load(f.CC)
		if err != nil {
			return err
		}
		if !there {
			return fmt.Errorf("congestion control %q: the kernel has none of that name", f.CC)
		}
	}
	return nil
}

// namespace makes one end of the link's path, set up so that nothing but the
// link and the congestion control shapes what goes over it.
func namespace(l trace.Link) (_ *netns.NS, err error) {
	ns, err := netns.New()
	if err != nil {
		return nil, err
	}
	// Room for all that the path and the buffer hold, several times over, for the
	// kernel counts a packet with all its overhead; TCP's window ends at 1 GiB.
	hold := l.Rate*l.RTT/8 + float64(l.Buffer*l.MTU)
	room := int(min(8*hold+6<<20, 1<<30))
	for name, value := range map[string]string{
		"net.ipv4.tcp_rmem":            fmt.Sprint(4096, room, room), // at once: a window that has to grow first slows slow start
		"net.ipv4.tcp_wmem":            fmt.Sprint(4096, 16384, room),
		"net.ipv4.tcp_no_metrics_save": "1", // each flow starts afresh
		"net.ipv4.tcp_ecn":             ecn(l),
		// No packets but the flows': neither router solicitations nor duplicate
		// address detection.
		"net.ipv6.conf.all.disable_ipv6":     "1",
		"net.ipv6.conf.default.disable_ipv6": "1",
	} {
		err := ns.Do(func() error { return os.WriteFile(sysctlPath(name), []byte(value), 0) })
		if errors.Is(err, fs.ErrNotExist) && strings.HasPrefix(name, "net.ipv6.") {
			continue // a kernel without IPv6
		}
		if err != nil {
			ns.Close()
			return nil, fmt.Errorf("sysctl %q: %w", name, err)
		}
	}
	return ns, nil
}

// ecn asks for ECN as of RFC 3168 where the link marks; else it is agreed upon
// only if a congestion control insists.
func ecn(l trace.Link) string {
	if l.ECN > 0 {
		return "1"
	}
	return "2"
}

// noted are the sysctls that bear on what TCP does.
var noted = strings.Fields(`
	net.core.default_qdisc net.core.rmem_max net.core.wmem_max
	net.ipv4.tcp_adv_win_scale net.ipv4.tcp_autocorking net.ipv4.tcp_comp_sack_delay_ns net.ipv4.tcp_comp_sack_nr
	net.ipv4.tcp_congestion_control net.ipv4.tcp_dsack net.ipv4.tcp_early_retrans net.ipv4.tcp_ecn
	net.ipv4.tcp_ecn_fallback net.ipv4.tcp_frto net.ipv4.tcp_limit_output_bytes net.ipv4.tcp_min_rtt_wlen
	net.ipv4.tcp_min_tso_segs net.ipv4.tcp_moderate_rcvbuf net.ipv4.tcp_mtu_probing net.ipv4.tcp_no_metrics_save
	net.ipv4.tcp_notsent_lowat net.ipv4.tcp_pacing_ca_ratio net.ipv4.tcp_pacing_ss_ratio net.ipv4.tcp_recovery
	net.ipv4.tcp_reordering net.ipv4.tcp_rmem net.ipv4.tcp_sack net.ipv4.tcp_slow_start_after_idle
	net.ipv4.tcp_thin_linear_timeouts net.ipv4.tcp_timestamps net.ipv4.tcp_tso_rtt_log net.ipv4.tcp_tso_win_divisor
	net.ipv4.tcp_window_scaling net.ipv4.tcp_wmem net.ipv6.conf.all.disable_ipv6`)

// sysctls reads them back. Those that the kernel or the namespace does not have
// are left out.
func sysctls(ns *netns.NS) (map[string]string, error) {
	values := map[string]string{}
	err := ns.Do(func() error {
		for _, name := range noted {
			b, err := os.ReadFile(sysctlPath(name))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return fmt.Errorf("sysctl %q: %w", name, err)
			}
			values[name] = strings.Join(strings.Fields(string(b)), " ")
		}
		return nil
	})
	return values, err
}

func sysctlPath(name string) string { return "/proc/sys/" + strings.ReplaceAll(name, ".", "/") }
