// SPDX-License-Identifier: Apache-2.0

package tcpca

import (
	"os"
	"slices"
	"strings"
	"testing"

	"ccload/internal/kerneltest"

	"golang.org/x/sys/unix"
)

// One by one they are what the kernel's lists say, whoever asks.
func TestAsk(t *testing.T) {
	list := func(sysctl string) []string {
		b, err := os.ReadFile("/proc/sys/net/ipv4/" + sysctl)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Fields(string(b))
	}
	def := list("tcp_congestion_control")[0]
	allowed := list("tcp_allowed_congestion_control")
	for _, name := range list("tcp_available_congestion_control") {
		there, open, err := Ask(name)
		want := slices.Contains(allowed, name)
		if os.Geteuid() != 0 && name == def {
			want = true
		}
		if !there || open != want || err != nil {
			t.Errorf("%s: there %v, allowed %v, %v; want it allowed: %v", name, there, open, err, want)
		}
	}
	for _, name := range []string{"", "renno", "reno ", "reno2345678901234567", "../reno"} {
		if there, open, err := Ask(name); there || open || err != nil {
			t.Errorf("%q: there %v, allowed %v, %v", name, there, open, err)
		}
	}
}

// A restricted one that is the default is restricted all the same, and asking loads no
// module and takes no capability away for good.
func TestAskAsRoot(t *testing.T) {
	kerneltest.Privileged(t)
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var before, after [2]unix.CapUserData
	if err := unix.Capget(&header, &before[0]); err != nil {
		t.Fatal(err)
	}
	loaded := func(name string) bool { _, err := os.Stat("/sys/module/tcp_" + name); return err == nil }
	for _, name := range []string{"vegas", "dctcp"} {
		was := loaded(name)
		if _, _, err := Ask(name); err != nil || loaded(name) != was {
			t.Errorf("asked for %s: %v; the module is loaded: %v, was %v", name, err, loaded(name), was)
		}
	}
	if err := unix.Capget(&header, &after[0]); err != nil || before != after {
		t.Errorf("capabilities %+v, %v; they were %+v", after, err, before)
	}
}
