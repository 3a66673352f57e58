// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	if Inside() {
		Init(guest)
	}
	os.Exit(m.Run())
}

// guest is what the tests run inside.
func guest(args []string, stdout, stderr io.Writer) int {
	switch args[0] {
	case "uname":
		var u unix.Utsname
		unix.Uname(&u)
		fmt.Fprintln(stdout, unix.ByteSliceToString(u.Release[:]))
		return 7
	case "panic":
		os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0)
	}
	return 0
}

func TestUname(t *testing.T) {
	k, err := OpenKernel(os.Getenv("CCLOAD_KERNEL"))
	if err != nil {
		t.Skip(err)
	}
	self, _ := os.Executable()
	var out, errs, console bytes.Buffer
	g := &Guest{Kernel: k, Binary: self, Args: []string{"uname"}, Modules: []string{"tun"}}
	status, err := g.Run(context.Background(), &out, &errs, &console)
	if err != nil || status != 7 || strings.TrimSpace(out.String()) != k.Release {
		t.Fatalf("%d, %v, %q %q\n%s", status, err, out.String(), errs.String(), console.String())
	}
	g.Args = []string{"panic"}
	_, err = g.Run(context.Background(), &out, &errs, &console)
	t.Log(err)
}
