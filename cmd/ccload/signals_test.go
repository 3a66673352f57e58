// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"ccload/internal/fault"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// at runs ccload, and makes a file when it first comes to a step: at STEP FILE COMMAND…
// There it waits until there is no such file any more, or half a minute.
func at() {
	step, file := os.Args[1], os.Args[2]
	os.Args = append([]string{"ccload"}, os.Args[4:]...)
	var once sync.Once
	fault.Set(func(s string) error {
		if s == step {
			once.Do(func() {
				check(os.WriteFile(file, nil, 0o600))
				for n := 0; n < 6000 && exists(file); n++ {
					time.Sleep(5 * time.Millisecond)
				}
			})
		}
		return nil
	})
	main()
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// pending says whether a process has signals that have not come to it.
func pending(pid int) bool {
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	_, mask, ok := strings.Cut(string(status), "\nShdPnd:\t")
	return ok && !strings.HasPrefix(mask, "0000000000000000")
}

// appears waits for a file.
func appears(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: appears FILE")
	}
	for deadline := time.Now().Add(time.Minute); !exists(ts.MkAbs(args[0])); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			ts.Fatalf("there is no %s", args[0])
		}
	}
}

// signalled runs a command, sends it signals once a file is there or a time is over,
// and wants the exit status that the last one makes: signalled SIGNAL[,SIGNAL…]
// FILE|TIME COMMAND… With one signal, at goes on then. What was printed is in a file
// named said.
func signalled(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 3 {
		ts.Fatalf("usage: signalled SIGNAL[,SIGNAL…] FILE|TIME COMMAND…")
	}
	signals := strings.Split(args[0], ",")
	var path string
	for _, dir := range filepath.SplitList(ts.Getenv("PATH")) {
		if path = filepath.Join(dir, args[2]); exists(path) {
			break
		}
	}
	cmd := &exec.Cmd{Path: path, Args: args[2:], Dir: ts.MkAbs(".")}
	for _, v := range []string{"PATH", "WORK", "HOME", "TMPDIR", "XDG_CACHE_HOME"} {
		cmd.Env = append(cmd.Env, v+"="+ts.Getenv(v))
	}
	var out, talk bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &talk
	ts.Check(cmd.Start())
	over := make(chan struct{})
	var err error
	go func() { err = cmd.Wait(); close(over) }()
	if wait, derr := time.ParseDuration(args[1]); derr == nil {
		time.Sleep(wait)
	} else {
		appears(ts, false, args[1:2])
		time.Sleep(500 * time.Millisecond) // what comes after the file has begun, too
	}
	sent := time.Now()
	for _, name := range signals {
		ts.Check(cmd.Process.Signal(unix.SignalNum("SIG" + name)))
		for pending(cmd.Process.Pid) {
			time.Sleep(5 * time.Millisecond)
		}
		time.Sleep(200 * time.Millisecond) // that it be seen before what comes next
	}
	if len(signals) == 1 && args[2] == "at" {
		os.Remove(ts.MkAbs(args[1])) // it goes on
	}
	select {
	case <-over:
	case <-time.After(time.Minute):
		cmd.Process.Kill()
		<-over
	}
	if args[2] == "at" {
		os.Remove(ts.MkAbs(args[1]))
	}
	ts.Logf("%s%s(ended %v after the signal)", &out, &talk, time.Since(sent).Round(time.Millisecond))
	ts.Check(os.WriteFile(ts.MkAbs("said"), out.Bytes(), 0o600))
	want := 128 + int(unix.SignalNum("SIG"+signals[len(signals)-1]))
	got := 0
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		if got = exit.ExitCode(); exit.Sys().(syscall.WaitStatus).Signaled() { // as a shell has it
			got = 128 + int(exit.Sys().(syscall.WaitStatus).Signal())
		}
	}
	if got != want {
		ts.Fatalf("exit status is %d, want %d", got, want)
	}
}
