// SPDX-License-Identifier: Apache-2.0

// Ccload puts TCP congestion controls written in BPF into the running kernel,
// points traffic at them and measures what they do. See ccload --help.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"runtime/debug"
	"strings"

	"ccload/harness/vm"
	"ccload/registry"

	"github.com/spf13/cobra"
)

// version is set when ccload is built (see the Makefile).
var version = "unknown"

// Exit codes: the contract of every verb. One that a signal ended has 128 and the
// signal's number.
const (
	exitDone   = 0
	exitFailed = 1
	exitMisuse = 2
	exitChecks = 3 // done, but a check of it failed
)

func main() {
	if vm.Inside() {
		vm.Init(prepare, func(args []string, stdout, stderr io.Writer) int {
			return run(context.Background(), args, strings.NewReader(""), stdout, stderr)
		})
	}
	garbage(false)
	os.Exit(run(endOnSignals(os.Stderr), os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// garbage turns the garbage collector on or off. Verbs that only talk to the
// kernel are over before it pays: without it register is a fifth faster. It comes
// back by itself if one needs much memory all the same.
func garbage(collect bool) {
	if collect {
		debug.SetMemoryLimit(math.MaxInt64)
		debug.SetGCPercent(100)
	} else {
		debug.SetMemoryLimit(256 << 20)
		debug.SetGCPercent(-1)
	}
}

// app is what the verbs share.
type app struct {
	out     *bufio.Writer // results
	err     io.Writer     // talk
	tty     io.Writer     // where talk goes in the end, for what moves the cursor on purpose
	verbose bool
	json    bool
}

// usageError is a command line that makes no sense, as opposed to one that
// could not be done.
type usageError struct{ error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// hinted is an error with advice that only the command line can give.
type hinted struct {
	error
	hint string
}

func (h hinted) Unwrap() error { return h.error }

// errSilent fails without a message: the verb has said it all.
var errSilent = errors.New("failed")

func run(ctx context.Context, args []string, _ io.Reader, stdout, stderr io.Writer) int {
	a := &app{out: bufio.NewWriter(&plainWriter{w: stdout}), err: &plainWriter{w: stderr}, tty: stderr}
	root := a.root()
	root.SetArgs(args)
	root.SetOut(a.out)
	root.SetErr(a.err)
	started := false // what fails before a verb starts is misuse
	root.PersistentPreRunE = func(cmd *cobra.Command, args []string) error {
		if err := checkEmpty(cmd, args); err != nil {
			return err
		}
		started = true
		return nil
	}
	root.SetFlagErrorFunc(flagError)

	err := root.ExecuteContext(ctx)
	if ferr := a.out.Flush(); err == nil && ferr != nil {
		err = fmt.Errorf("write the results: %w", ferr)
	}
	signal, stopped := endedBy(ctx)
	switch {
	case err == nil && stopped:
		err = fmt.Errorf("%w when all was done", signal)
	case err == nil:
		return exitDone
	case stopped && errors.Is(err, context.Canceled):
		err = signal
	}
	if !errors.Is(err, errSilent) {
		a.failed(err)
	}
	if stopped {
		return signal.status()
	}
	var usage usageError
	if !started || errors.As(err, &usage) {
		return exitMisuse
	}
	if errors.Is(err, errChecks) {
		return exitChecks
	}
	return exitFailed
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "ccload",
		Short: "TCP congestion controls as BPF plug-ins: register, use, measure, draw",
		Example: `  ccload register bpf_cubic
  ccload run --cc bpf_cubic,cubic --rate 20mbit --rtt 40ms --duration 20s
  ccload unregister bpf_cubic`,
		Version:       release(),
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.ArbitraryArgs,
	}
	root.SetVersionTemplate("ccload {{.Version}}\n")
	root.PersistentFlags().BoolVarP(&a.verbose, "verbose", "v", false, "say what is being done")
	verbs := []*cobra.Command{a.list(), a.show(), a.register(), a.unregister(), a.replace(), a.set(), a.extend(), a.use(), a.apply(), a.verify(), a.doctor(), a.run(), a.plot(), a.kernels()}
	root.AddCommand(verbs...)
	root.AddCommand(a.guestRun())
	root.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			cmd.SetOut(a.err)
			cmd.Help()
			return usageError{errSilent}
		}
		var names []string
		for _, v := range verbs {
			names = append(names, v.Name())
		}
		return hinted{usagef("verb %q: unknown", args[0]), didYouMean(registry.Nearest(args[0], names), "ccload --help lists the verbs")}
	}
	return root
}

// release is the version, or the commit where it was not built by the Makefile.
func release() string {
	if info, ok := debug.ReadBuildInfo(); ok && version == "unknown" {
		return info.Main.Version
	}
	return version
}

// withJSON gives a verb the flag --json.
func (a *app) withJSON(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().BoolVar(&a.json, "json", false, "print the result as JSON")
	return cmd
}

// print writes a result: as JSON if that is wanted, else by the function.
func (a *app) print(result any, text func()) error {
	if !a.json {
		text()
		return nil
	}
	enc := json.NewEncoder(a.out)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(result)
}

// printf prints a part of a result. Texts stay in one line, but for lines.
func (a *app) printf(format string, args ...any) {
	for i, arg := range args {
		if s, ok := arg.(string); ok {
			args[i] = plain(s, "\t")
		}
	}
	fmt.Fprintf(a.out, format, args...)
}

// say talks to the user; sayv only if that is wanted.
func (a *app) say(format string, args ...any) {
	a.out.Flush() // so that talk and results keep their order on a terminal
	fmt.Fprintln(a.err, abridged(fmt.Sprintf(format, args...)))
}

func (a *app) sayv(format string, args ...any) {
	if a.verbose {
		a.say("ccload: "+format, args...)
	}
}

// recover mends what a ccload that was killed has left, before a verb changes anything.
func (a *app) recover(verb string) error {
	warnings, err := registry.Recover()
	a.warn(warnings)
	if err != nil {
		return fmt.Errorf("%s: %w", verb, err)
	}
	return nil
}

// failed says what could not be done, and what to do about it.
func (a *app) failed(err error) {
	a.say("ccload: %s", strings.TrimSpace(err.Error()))
	if h := hint(err); h != "" {
		a.say("hint: %s", h)
	}
}

func (a *app) warn(warnings []string) {
	for _, w := range ofOneKind(warnings) {
		a.say("ccload: warning: %s", w)
	}
}
