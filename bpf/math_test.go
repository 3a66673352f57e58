// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"bytes"
	_ "embed"
	"math"
	"math/big"
	"math/rand/v2"
	"testing"

	"github.com/cilium/ebpf"

	"ccload/internal/kerneltest"
)

//go:embed testdata/math.bpf.o
var mathObject []byte

const (
	fnRoot = iota
	fnK
	fnWindow
	fnRenoAcks
	fnAlpha
)

// caller loads the functions into the kernel and returns a way to call them.
func caller(t *testing.T) func(fn, a, b, c uint64) uint64 {
	kerneltest.Privileged(t)
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(mathObject))
	if err != nil {
		t.Fatal(err)
	}
	for name, m := range spec.Maps {
		if m.Type == ebpf.StructOpsMap {
			delete(spec.Maps, name)
		}
	}
	for name, p := range spec.Programs {
		if p.Type == ebpf.StructOps {
			delete(spec.Programs, name)
		}
	}
	coll, err := ebpf.NewCollection(spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(coll.Close)
	return func(fn, a, b, c uint64) uint64 {
		args := struct{ Fn, A, B, C, Result uint64 }{fn, a, b, c, 0}
		ret, err := coll.Programs["call"].Run(&ebpf.RunOptions{Context: args, ContextOut: &args})
		if err != nil || ret != 0 {
			t.Fatalf("function %d(%d, %d, %d): returned %d, %v", fn, a, b, c, ret, err)
		}
		return args.Result
	}
}

func TestCubicRoot(t *testing.T) {
	call := caller(t)
	var roots []uint64
	for r := uint64(0); r < 2000; r++ {
		roots = append(roots, r)
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		roots = append(roots, rnd.Uint64N(2642245)) // the largest whose cube fits 64 bits
	}
	roots = append(roots, 2642245)
	for _, r := range roots {
		if got := call(fnRoot, r*r*r, 0, 0); got != r {
			t.Fatalf("cube root of %d³: got %d", r, got)
		}
		if r == 0 {
			continue
		}
		if got := call(fnRoot, r*r*r-1, 0, 0); got != r-1 {
			t.Fatalf("cube root of %d³-1: got %d, want it rounded down to %d", r, got, r-1)
		}
	}
	if got := call(fnRoot, math.MaxUint64, 0, 0); got != 2642245 {
		t.Fatalf("cube root of 2⁶⁴-1: got %d", got)
	}
}

// RFC 9438 §4.2, equation 2; C is 410/1024.
func TestCubicK(t *testing.T) {
	call := caller(t)
	for _, d := range []uint64{1, 2, 10, 75, 100, 1000, 54321, 1 << 20} {
		got, want := float64(call(fnK, d, 0, 0))/1024, math.Cbrt(float64(d)/(410./1024))
		if math.Abs(got-want) > 1./1024 {
			t.Errorf("K for %d segments: got %.4f s, want %.4f s", d, got, want)
		}
	}
}

// RFC 9438 §4.2, equation 1, exact within 128 s of the plateau.
func TestCubicWindow(t *testing.T) {
	call := caller(t)
	window := func(tm, k, origin uint64) uint64 {
		d := big.NewInt(int64(tm) - int64(k))
		d.Exp(d, big.NewInt(3), nil).Mul(d, big.NewInt(410))
		d.Quo(d, new(big.Int).Lsh(big.NewInt(1), 40)).Add(d, big.NewInt(int64(origin)))
		return d.Uint64()
	}
	rnd := rand.New(rand.NewPCG(3, 4))
	for range 5000 {
		origin := 2 + rnd.Uint64N(200000)
		// The window at the start of an epoch is never below zero: K is at most that of a loss of all.
		k := call(fnK, rnd.Uint64N(origin), 0, 0)
		tm := rnd.Uint64N(k + 120<<10)
		if got, want := call(fnWindow, tm, k, origin), window(tm, k, origin); got != want {
			t.Fatalf("W(%d) with K %d, origin %d: got %d, want %d", tm, k, origin, got, want)
		}
	}
	last := uint64(0)
	for _, seconds := range []uint64{100, 127, 128, 129, 300, 1000, 3600, 18 * 3600, 100 * 3600} {
		got := call(fnWindow, seconds<<10, 0, 1000)
		want := 1000 + 0.4*math.Pow(float64(seconds), 3)
		if got < last || (want < 1<<30 && math.Abs(float64(got)/want-1) > 0.01) || got > 1<<30 {
			t.Errorf("W(%d s): got %d, want about %.0f, not below %d and bounded", seconds, got, want, last)
		}
		last = got
	}
}

// RFC 9438 §4.3: Reno with beta 0.7 grows by 3(1-b)/(1+b) = 0.53 segments a round trip.
func TestRenoFriendly(t *testing.T) {
	call := caller(t)
	for _, cwnd := range []uint64{2, 10, 100, 1000, 1 << 20} {
		got, want := float64(call(fnRenoAcks, cwnd, 0, 0)), float64(cwnd)*1.7/0.9
		if math.Abs(got-want) > 0.01*want+1 {
			t.Errorf("cwnd %d: one segment for %.0f ACKed, want %.1f", cwnd, got, want)
		}
	}
}

// RFC 8257 §3.3, equation 1.
func TestDCTCPAlpha(t *testing.T) {
	call := caller(t)
	for _, c := range []struct{ alpha, delivered, ce, want uint64 }{
		{1024, 100, 0, 960},       // no marks: 15/16 is kept
		{1024, 100, 100, 1024},    // all marked: stays at 1
		{0, 100, 50, 32},          // half marked: g/2
		{512, 100, 50, 512},       // at its fixed point
		{16, 10, 0, 15},           // 1/16 of it is one part
		{15, 10, 0, 0},            // less than one part: goes to zero
		{0, 0, 0, 0},              // nothing delivered
		{100, 0, 1, 100 - 6 + 64}, // an echo without a delivery counts as one segment
		{1024, 1, 1 << 31, 1024},  // never above 1
	} {
		if got := call(fnAlpha, c.alpha, c.delivered, c.ce); got != c.want {
			t.Errorf("alpha %d, %d of %d marked: got %d, want %d", c.alpha, c.ce, c.delivered, got, c.want)
		}
	}
}
