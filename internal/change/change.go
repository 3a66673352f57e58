// SPDX-License-Identifier: Apache-2.0

// Package change lets a signal end the process at any moment but in the middle of a
// change. What changes the kernel, or replaces a file, says when that begins and
// when it is over; who handles signals calls Stop.
package change

import "sync"

var (
	mu       sync.Mutex
	stopped  error // why nothing more may begin
	open     int   // changes that have begun and are not over
	together int   // calls of Together that have not ended
	begun    bool  // a change, in one of these
)

func busy() bool { return open > 0 || together > 0 && begun }

// Begin begins a change. After Stop it fails with the error given there, unless it
// is part of what is under way.
func Begin() (end func(), err error) {
	mu.Lock()
	defer mu.Unlock()
	if stopped != nil && !busy() {
		return nil, stopped
	}
	open++
	begun = begun || together > 0
	return sync.OnceFunc(func() {
		mu.Lock()
		defer mu.Unlock()
		open--
	}), nil
}

// Together makes one change of all that begin before end is called: once the first
// has begun, Stop no longer comes between them.
func Together() (end func()) {
	mu.Lock()
	defer mu.Unlock()
	together++
	return sync.OnceFunc(func() {
		mu.Lock()
		defer mu.Unlock()
		together--
		begun = begun && together > 0
	})
}

// Stop keeps changes from beginning. If none is under way, the process may end at
// once; otherwise what has begun goes on to its end.
func Stop(why error) (atOnce bool) {
	mu.Lock()
	defer mu.Unlock()
	stopped = why
	return !busy()
}
