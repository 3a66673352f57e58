// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"ccload/internal/kerneltest"
	"ccload/structops"

	"github.com/jsimonetti/rtnetlink/v2"
	"golang.org/x/sys/unix"
)

// What is set counts at the next loss of a connection that is open already.
func TestSet(t *testing.T) {
	kerneltest.Privileged(t)
	const name = "ccr_set"
	registerAs(t, "cubic.bpf.o", name)
	near, far := linked(t)
	var l net.Listener
	if err := far.Do(func() (err error) { l, err = net.Listen("tcp4", "198.18.7.2:0"); return err }); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var c *net.TCPConn
	if err := near.Do(func() (err error) { c, err = dialHere(netip.MustParseAddrPort(l.Addr().String())); return err }); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetLinger(0) // it would try for minutes to send what is lost
	choosing(t, c, name)
	cwnd, _ := window(t, near, c)

	done, _, err := Set(name, map[string]any{"beta": 512, "fast_convergence": 0})
	slices.SortFunc(done, func(a, b Setting) int { return len(a.Name) - len(b.Name) })
	if err != nil || !slices.Equal(done, []Setting{{"beta", uint64(717), uint64(512)}, {"fast_convergence", uint64(1), uint64(0)}}) {
		t.Fatal(done, err)
	}
	for _, bad := range []struct {
		name  string
		value any
		want  error
	}{{"c", 400, structops.ErrFixed}, {"betta", 1, structops.ErrNotFound}, {"hystart", -1, nil}} {
		_, _, err := Set(name, map[string]any{"beta": 1023, bad.name: bad.value})
		if err == nil || bad.want != nil && !errors.Is(err, bad.want) {
			t.Errorf("%s: %v", bad.name, err)
		}
	}
	e, err := find(name)
	if err != nil || e.Params["beta"] != uint64(512) || e.Params["hystart"] != uint64(1) {
		t.Errorf("after what was refused: %v, %v", e.Params, err)
	}

	// The other end is cut off: what is sent is lost.
	b := rt(t, far)
	index := up(t, b, "ccr0")
	if err := b.Link.Set(&rtnetlink.LinkMessage{Index: index, Change: unix.IFF_UP}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte("lost")); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		_, threshold := window(t, near, c)
		if threshold == cwnd/2 {
			return
		}
		if threshold != unlimited || time.Now().After(deadline) {
			t.Fatalf("window %d, and after the loss the threshold is %d", cwnd, threshold)
		}
	}
}

func TestSetErrors(t *testing.T) {
	kerneltest.Privileged(t)
	var gone *NotFoundError
	var kind *KindError
	if _, _, err := Set("renno", map[string]any{"beta": 1}); !errors.As(err, &gone) || gone.Nearest != "reno" {
		t.Errorf("a name that is not there: %v", err)
	}
	if _, _, err := Set("reno", map[string]any{"beta": 1}); !errors.As(err, &kind) {
		t.Errorf("one that is not BPF: %v", err)
	}
}
