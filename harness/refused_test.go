// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"slices"
	"strings"
	"testing"

	"ccload/harness/trace"
	"ccload/internal/fault"
	"ccload/internal/kerneltest"

	"golang.org/x/sys/unix"
)

// A kernel that refuses the program for what happens between ACKs is sampled on ACKs;
// one that refuses that for ACKs, too, at the interval. Either is said.
func TestRefused(t *testing.T) {
	kerneltest.Privileged(t)
	e := trace.Experiment{Link: trace.Link{Rate: 5e6, RTT: 0.01}, Flows: flows("reno"), Duration: 0.5, PerAck: true}
	for _, c := range []struct {
		steps []string
		acks  bool
		says  string
	}{
		{[]string{"load program tcp_state"}, true, `sample between ACKs: the kernel refuses the tp_btf/tcp_cong_state_set program "tcp_state": operation not permitted; what happens there is seen at the interval only`},
		{[]string{"attach program tcp_state"}, true, `sample between ACKs: the kernel refuses the tp_btf program "tcp_state": operation not permitted; `},
		{[]string{"load program tcp_probe"}, false, `sample on every ACK: the kernel refuses the tp_btf/tcp_probe program "tcp_probe": operation not permitted; there are samples at the interval only`},
		{[]string{"attach program tcp_probe"}, false, `sample on every ACK: the kernel refuses the tp_btf program "tcp_probe": operation not permitted; `},
		{[]string{"load program tcp_probe", "load program tcp_state"}, false, `sample on every ACK: `},
	} {
		restore := fault.Set(func(step string) error {
			if slices.Contains(c.steps, step) {
				return unix.EPERM
			}
			return nil
		})
		r := run(t, e, Options{}).Run
		restore()
		if s := r.Sampling; (s.Ack > 0) != c.acks || s.Events > 0 && slices.ContainsFunc(c.steps, func(s string) bool { return strings.HasSuffix(s, "tcp_state") }) || s.Diag == 0 || !strings.Contains(strings.Join(r.Warnings, "\n"), c.says) {
			t.Errorf("%v: warnings %q, %+v", c.steps, r.Warnings, s)
		}
	}
}
