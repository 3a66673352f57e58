// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"syscall"
	"testing"
	"time"

	"ccload/internal/inetdiag"
	"ccload/internal/kerneltest"
	"ccload/internal/netns"
	"ccload/structops"

	"golang.org/x/sys/unix"
)

// island is a fresh network namespace with its loopback device up.
func island(t testing.TB) *netns.NS {
	t.Helper()
	ns := newNS(t)
	up(t, rt(t, ns), "lo")
	return ns
}

// congestion is what a socket runs.
func congestion(t *testing.T, c syscall.Conn) (name string) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { name, err = unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION) })
	if err != nil {
		t.Fatal(err)
	}
	return name
}

func choosing(t *testing.T, c syscall.Conn, name string) {
	t.Helper()
	if err := SetSocket(c, name); err != nil {
		t.Fatal(err)
	}
}

// listenTCP listens with TCP itself: the library would with MPTCP, where there is that.
func listenTCP(network, address string) (net.Listener, error) {
	var c net.ListenConfig
	c.SetMultipathTCP(false)
	return c.Listen(context.Background(), network, address)
}

// wire is a connection inside a namespace; whoever dials runs reno.
type wire struct {
	l    *net.TCPListener
	c, s *net.TCPConn
}

func wired(t *testing.T, ns *netns.NS, network, address string) *wire {
	t.Helper()
	p := &wire{}
	err := ns.Do(func() error {
		l, err := listenTCP(network, address)
		if err != nil {
			return err
		}
		p.l = l.(*net.TCPListener)
		if err := SetSocket(p.l, "reno"); err != nil {
			return err
		}
		fd, err := unix.Socket(map[string]int{"tcp4": unix.AF_INET, "tcp6": unix.AF_INET6}[network], unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		f := os.NewFile(uintptr(fd), "")
		defer f.Close()
		if err := unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, "reno"); err != nil {
			return err
		}
		at := l.Addr().(*net.TCPAddr)
		var sa unix.Sockaddr = &unix.SockaddrInet6{Port: at.Port, Addr: [16]byte(at.IP.To16())}
		if network == "tcp4" {
			sa = &unix.SockaddrInet4{Port: at.Port, Addr: [4]byte(at.IP.To4())}
		}
		if err := unix.Connect(fd, sa); err != nil {
			return err
		}
		c, err := net.FileConn(f)
		if err != nil {
			return err
		}
		p.c = c.(*net.TCPConn)
		s, err := l.Accept()
		if err != nil {
			return err
		}
		p.s = s.(*net.TCPConn)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.close)
	return p
}

func (p *wire) close() {
	for _, c := range []io.Closer{p.c, p.s, p.l} {
		c.Close()
	}
}

func filter(t testing.TB, text string) *Filter {
	t.Helper()
	f, err := ParseFilter(text)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// window is the sender's, in segments.
func window(t *testing.T, ns *netns.NS, c net.Conn) (cwnd, ssthresh uint32) {
	t.Helper()
	from := c.LocalAddr().(*net.TCPAddr).AddrPort()
	err := ns.Do(func() error {
		d, err := inetdiag.Dial()
		if err != nil {
			return err
		}
		defer d.Close()
		return d.Dump(0, true, func(s *inetdiag.Socket) error {
			if s.Src == from {
				cwnd, ssthresh = s.Info.Snd_cwnd, s.Info.Snd_ssthresh
			}
			return nil
		})
	})
	if err != nil || cwnd == 0 {
		t.Fatal(cwnd, err)
	}
	return cwnd, ssthresh
}

// Filters choose the right ones, in another namespace and of either family; those
// that were moved get back what each had, and no other.
func TestMoveSockets(t *testing.T) { everyWay(t, movesSockets) }

func movesSockets(t *testing.T) {
	const name = "ccr_move"
	register(t, Options{Name: name}) // restricted
	ns := island(t)
	t.Cleanup(func() { RestoreSockets(ns, nil) })
	pairs := []*wire{wired(t, ns, "tcp4", "127.0.0.1:0"), wired(t, ns, "tcp4", "127.0.0.2:0"), wired(t, ns, "tcp6", "[::1]:0")}
	choosing(t, pairs[1].c, "cubic")
	port := pairs[2].l.Addr().(*net.TCPAddr).Port

	move := func(text string, matched, moved, kept int) {
		t.Helper()
		m, err := MoveSockets(ns, filter(t, text), name)
		if err != nil || m.Matched != matched || m.Moved != moved || m.Kept != kept || m.Window+m.Failed+m.Gone != 0 {
			t.Errorf("%s: %+v, %v", text, m, err)
		}
	}
	runs := func(p *wire, c, s, l string) {
		t.Helper()
		if gc, gs, gl := congestion(t, p.c), congestion(t, p.s), congestion(t, p.l); gc != c || gs != s || gl != l {
			t.Errorf("%v: the dialled end runs %s, the accepted one %s, the listener %s; want %s, %s, %s", p.l.Addr(), gc, gs, gl, c, s, l)
		}
	}
	move("dst 127.0.0.2", 1, 1, 0)
	runs(pairs[0], "reno", "reno", "reno")
	runs(pairs[1], name, "reno", "reno")
	move(fmt.Sprintf("dst [::1] and dport = :%d", port), 1, 1, 0)
	runs(pairs[2], name, "reno", "reno")
	move("cc "+name, 2, 0, 2)
	move("state listening src [::1]", 1, 1, 0)
	runs(pairs[2], name, "reno", name)
	if _, err := os.Stat(formerPath); err != nil {
		t.Error(err)
	}

	// What a moved listener accepts, and what somebody else moves.
	var late net.Conn
	if err := ns.Do(func() (err error) { late, err = net.Dial("tcp6", pairs[2].l.Addr().String()); return err }); err != nil {
		t.Fatal(err)
	}
	defer late.Close()
	accepted, err := pairs[2].l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()
	if got := congestion(t, accepted); got != name {
		t.Errorf("a moved listener accepts with %s", got)
	}
	move("src 127.0.0.1", 3, 2, 1) // the dialled end of the second, too
	choosing(t, pairs[0].s, "cubic")

	m, err := RestoreSockets(ns, filter(t, "src [::1]"))
	if err != nil || m.Matched != 3 || m.Moved != 3 || m.Left != 0 {
		t.Errorf("restored: %+v, %v", m, err)
	}
	runs(pairs[2], "reno", "reno", "reno")
	if got := congestion(t, accepted); got != "reno" {
		t.Errorf("accepted by a moved listener, restored: %s", got)
	}
	m, err = RestoreSockets(ns, nil)
	if err != nil || m.Left != 1 || m.Failed != 0 {
		t.Errorf("restored: %+v, %v", m, err)
	}
	runs(pairs[0], "reno", "cubic", "reno")
	runs(pairs[1], "cubic", "reno", "reno")
	if m, err := RestoreSockets(ns, nil); err != nil || m.Matched != 0 {
		t.Errorf("a second time: %+v, %v", m, err)
	}
	if _, err := os.Stat(formerPath); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the pin is still there: %v", err)
	}
}

// A connection that is sending is moved to and fro: no byte is lost, and the window
// is what it was.
func TestMoveWhileSending(t *testing.T) { everyWay(t, moveWhileSending) }

func moveWhileSending(t *testing.T) {
	const name = "ccr_moving"
	register(t, Options{Name: name})
	ns := island(t)
	t.Cleanup(func() { RestoreSockets(ns, nil) })
	p := wired(t, ns, "tcp4", "127.0.0.1:0")
	data := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{}).Read(data)
	ctx, cancel := context.WithCancel(t.Context())
	sent, received := sha256.New(), sha256.New()
	done := make(chan error, 2)
	go func() {
		var err error
		for err == nil && ctx.Err() == nil {
			_, err = io.MultiWriter(p.c, sent).Write(data)
		}
		done <- errors.Join(err, p.c.CloseWrite())
	}()
	go func() { _, err := io.Copy(received, p.s); done <- err }()
	for _, to := range []string{name, "cubic", name, "reno"} {
		for range 5 {
			m, err := MoveSockets(ns, filter(t, fmt.Sprintf("dst = %v", p.l.Addr())), to)
			if err != nil || m.Matched != 1 || m.Moved+m.Kept != 1 || m.Window != 0 {
				t.Errorf("%s: %+v, %v", to, m, err)
			}
			time.Sleep(2 * time.Millisecond)
		}
	}
	cancel()
	if err := errors.Join(<-done, <-done); err != nil || !bytes.Equal(sent.Sum(nil), received.Sum(nil)) {
		t.Errorf("what arrived is not what was sent: %v", err)
	}

	// At rest the window can be looked at from outside.
	cwnd, ssthresh := window(t, ns, p.s)
	for _, to := range []string{name, "cubic", "reno"} {
		if _, err := MoveSockets(ns, filter(t, "state all"), to); err != nil {
			t.Fatal(err)
		}
		if c, s := window(t, ns, p.s); c != cwnd || s != ssthresh {
			t.Errorf("%s: window %d, threshold %d; before %d, %d", to, c, s, cwnd, ssthresh)
		}
	}
	if _, err := RestoreSockets(ns, nil); err != nil {
		t.Error(err)
	}
}

func TestMoveErrors(t *testing.T) { everyWay(t, moveErrors) }

func moveErrors(t *testing.T) {
	ns := island(t)
	wired(t, ns, "tcp4", "127.0.0.1:0")
	var gone *NotFoundError
	if _, err := MoveSockets(ns, nil, "renno"); !errors.As(err, &gone) || gone.Nearest != "reno" {
		t.Errorf("a name that is not there: %v", err)
	}
	m, err := MoveSockets(ns, filter(t, "dst 198.18.0.1"), "reno")
	if err != nil || m.Matched != 0 {
		t.Errorf("none matches: %+v, %v", m, err)
	}

	// One that needs ECN, which the connection did not ask for.
	const name = "ccr_needs_ecn"
	b, err := os.ReadFile("../bpf/dctcp.bpf.o")
	if err != nil {
		t.Fatal(err)
	}
	spec, err := structops.Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Register(spec, Options{Name: name}); err != nil {
		t.Fatal(err)
	}
	m, err = MoveSockets(ns, filter(t, "state connected state listening"), name)
	if err != nil || m.Matched != 3 || m.Moved != 1 || m.Failed != 2 || m.Reasons[outcome{State: hadNoECN}.reason()] != 2 {
		t.Errorf("needs ECN: %+v, %v", m, err)
	}
	if m, err := RestoreSockets(ns, nil); err != nil || m.Moved != 1 {
		t.Errorf("restored: %+v, %v", m, err)
	}
	if _, err := Unregister(name, UnregisterOptions{}); err != nil {
		t.Error(err)
	}
}

func TestSetSocket(t *testing.T) {
	kerneltest.Privileged(t)
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	choosing(t, l.(*net.TCPListener), "reno")
	if got := congestion(t, l.(*net.TCPListener)); got != "reno" {
		t.Errorf("it runs %s", got)
	}
	var gone *NotFoundError
	if err := SetSocket(l.(*net.TCPListener), "renno"); !errors.As(err, &gone) || gone.Nearest != "reno" {
		t.Errorf("a name that is not there: %v", err)
	}
	const name = "ccr_socket"
	register(t, Options{Name: name}) // restricted
	if err := uncapable(t, func() error { return SetSocket(l.(*net.TCPListener), name) }); !errors.Is(err, os.ErrPermission) {
		t.Errorf("a restricted one, without capabilities: %v", err)
	}
	if got := congestion(t, l.(*net.TCPListener)); got != "reno" {
		t.Errorf("refused, and it runs %s", got)
	}
	choosing(t, l.(*net.TCPListener), name)
	u, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	if err := SetSocket(u.(*net.UDPConn), "reno"); err == nil {
		t.Error("a UDP socket was taken")
	}
}

// uncapable runs fn on a thread without effective capabilities.
func uncapable(t *testing.T, fn func() error) error {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var have [2]unix.CapUserData
	if err := unix.Capget(&header, &have[0]); err != nil {
		t.Fatal(err)
	}
	none := have
	none[0].Effective, none[1].Effective = 0, 0
	if err := unix.Capset(&header, &none[0]); err != nil {
		t.Fatal(err)
	}
	err := fn()
	if err := unix.Capset(&header, &have[0]); err != nil {
		t.Fatal(err)
	}
	return err
}
