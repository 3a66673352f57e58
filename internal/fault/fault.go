// SPDX-License-Identifier: Apache-2.0

// Package fault is the seam by which tests make a chosen step fail that a kernel
// could refuse: a program that is loaded, a map that is updated, a file that is
// written. What changes the kernel, or may be refused by one, asks At before it
// acts. Outside tests nothing is set, and At costs a load and a comparison.
package fault

import "sync/atomic"

var hook atomic.Pointer[func(step string) error]

// At returns the error that a test wants of a step, and nil otherwise. A step is
// named by what it does and to what: "load program move", "write sysctl
// net.ipv4.tcp_congestion_control".
func At(step string) error {
	if h := hook.Load(); h != nil {
		return (*h)(step)
	}
	return nil
}

// Set has all steps ask f, also concurrently, until restore is called.
func Set(f func(step string) error) (restore func()) {
	before := hook.Swap(&f)
	return func() { hook.Store(before) }
}
