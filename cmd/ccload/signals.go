// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"ccload/internal/change"
)

// ended is the error of a command that a signal ends.
type ended struct{ syscall.Signal }

func (e ended) Error() string {
	switch e.Signal {
	case syscall.SIGINT:
		return "interrupted"
	case syscall.SIGHUP:
		return "hung up"
	}
	return "terminated"
}

// status is that of a command which the signal kills, in a shell.
func (e ended) status() int { return 128 + int(e.Signal) }

// endOnSignals returns a context that ends with the first signal. If nothing has
// begun that must be made whole, the process ends at once; and so it does on a
// second signal, whatever it is at.
func endOnSignals(stderr io.Writer) context.Context {
	ctx, cancel := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 2)
	for _, s := range []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		if !signal.Ignored(s) { // as SIGHUP is under nohup(1)
			signal.Notify(signals, s)
		}
	}
	next := func() ended { return ended{(<-signals).(syscall.Signal)} }
	go func() {
		e := next()
		cancel(e)
		if !change.Stop(e) {
			e = next()
		}
		fmt.Fprintf(stderr, "ccload: %v\n", e)
		os.Exit(e.status())
	}()
	return ctx
}

// endedBy returns the signal that ended the context.
func endedBy(ctx context.Context) (ended, bool) {
	return errors.AsType[ended](context.Cause(ctx))
}
