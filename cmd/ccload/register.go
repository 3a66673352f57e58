// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"ccload/cc"
	"ccload/internal/change"
	"ccload/registry"
	"ccload/structops"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// registered is what register did.
type registered struct {
	*registry.Registration
	Default *registry.Change `json:"default,omitempty"`
}

func (a *app) register() *cobra.Command {
	var o registry.Options
	var set []string
	var def, log bool
	cmd := a.withJSON(&cobra.Command{
		Use:   "register NAME|FILE.o",
		Short: "Put a congestion control into the kernel",
		Long: `Put a congestion control into the kernel: one from the catalogue by its name, or
one from any BPF object file. It stays until it is unregistered or the machine
goes down; a pin on bpffs holds it.

The catalogue: ` + catalogue(),
		Example: `  ccload register bpf_cubic
  ccload register bpf_cubic --as gentle --set beta=0.9 --allow
  ccload register mine.bpf.o --map mine`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: objects,
		RunE: func(_ *cobra.Command, args []string) error {
			spec, err := parse("register", args[0], set)
			if err != nil {
				return err
			}
			if alg := cc.Lookup(args[0]); alg != nil && o.Map == "" {
				o.Map = alg.Name
			}
			for _, ops := range spec.Ops {
				a.sayv("object: map %q, congestion control %q, licence %q", ops.Map, ops.Name, spec.License)
			}
			if err := a.recover("register"); err != nil {
				return err
			}
			defer change.Together()()
			r, err := registry.Register(spec, o)
			if v, ok := errors.AsType[*structops.VerifierError](err); ok && log {
				return hinted{fmt.Errorf("register %q:\n%+v", args[0], v), ""}
			}
			if err != nil {
				return err
			}
			done := &registered{Registration: r}
			if def {
				if done.Default, err = registry.SetDefault(nil, r.Name, false); err != nil {
					_, uerr := registry.Unregister(r.Name, registry.UnregisterOptions{})
					return errors.Join(err, uerr)
				}
			}
			a.warn(r.Warnings)
			err = a.print(done, func() {
				a.printf("registered %s (map %d", r.Name, r.MapID)
				if r.LinkID != 0 {
					a.printf(", link %d", r.LinkID)
				}
				a.printf("), pinned at %s\n", r.Pin)
				if len(r.MapPins) > 0 {
					a.printf("maps pinned by name: %s\n", strings.Join(r.MapPins, ", "))
				}
			})
			switch {
			case a.json:
			case def:
				a.say("default: %[1]s → %[2]s; to undo: ccload unregister %[2]s --reset %[1]s", done.Default.Before, r.Name)
			default:
				a.say("to make it the default: ccload use %[1]s; to take it out: ccload unregister %[1]s", r.Name)
			}
			return err
		},
	})
	f := cmd.Flags()
	f.StringVar(&o.Map, "map", "", "which (`M`) of several congestion controls in the file, by its variable")
	f.StringVar(&o.Name, "as", "", "register it under another `NAME`")
	f.StringArrayVar(&set, "set", nil, "set a tunable, `K=V`; may be repeated")
	f.StringVar(&o.MapPins, "map-pins", "", "`DIR` on bpffs of maps that the object pins by name, which stay there (default ccload's own)")
	f.BoolVar(&o.Allow, "allow", false, "let unprivileged sockets and other network namespaces choose it")
	f.BoolVar(&def, "default", false, "make it the default of this network namespace")
	f.BoolVar(&log, "log", false, "when the verifier refuses it, print its whole log")
	cmd.RegisterFlagCompletionFunc("set", settings)
	cmd.RegisterFlagCompletionFunc("map", cobra.NoFileCompletions)
	cmd.RegisterFlagCompletionFunc("as", cobra.NoFileCompletions)
	return cmd
}

func catalogue() string {
	var names []string
	for _, alg := range cc.All() {
		names = append(names, alg.Name)
	}
	return strings.Join(names, ", ")
}

// splitSettings reads K=V of several --set.
func splitSettings(set []string) (map[string]string, error) {
	settings := map[string]string{}
	for _, s := range set {
		k, v, ok := strings.Cut(s, "=")
		if !ok || k == "" {
			return nil, usagef("--set %q: not of the form K=V", s)
		}
		if _, twice := settings[k]; twice {
			return nil, usagef("--set %q: set twice", k)
		}
		settings[k] = v
	}
	return settings, nil
}

// parse finds the object that the user means and sets its tunables.
func parse(verb, what string, set []string) (*structops.Spec, error) {
	settings, err := splitSettings(set)
	if err != nil {
		return nil, err
	}
	return configured(verb, what, settings)
}

func configured(verb, what string, settings map[string]string) (*structops.Spec, error) {
	obj, alg, err := readObject(verb, what)
	if err != nil {
		return nil, err
	}
	if alg == nil {
		return parseFile(verb, what, obj, settings)
	}
	vars, err := alg.Configure(settings)
	if err != nil {
		return nil, err
	}
	spec, err := structops.Parse(obj)
	if err != nil {
		return nil, fmt.Errorf("%s %q: %w", verb, what, err)
	}
	for k, v := range vars {
		if err := spec.Set(k, v); err != nil {
			return nil, err
		}
	}
	return spec, nil
}

// readObject finds an object: the catalogue's of that name, or a file. The
// algorithm is nil for a file.
func readObject(verb, what string) ([]byte, *cc.Algorithm, error) {
	if alg := cc.Lookup(what); alg != nil && !strings.ContainsRune(what, '/') {
		return alg.Object(), alg, nil
	}
	b, err := readFile(verb, what)
	if errors.Is(err, fs.ErrNotExist) && !strings.ContainsRune(what, '/') && !strings.HasSuffix(what, ".o") {
		return nil, nil, hinted{fmt.Errorf("%s %q: neither in the catalogue (%s) nor a file", verb, what, catalogue()),
			didYouMean(registry.Nearest(what, strings.Split(catalogue(), ", ")), "")}
	}
	return b, nil, err
}

func readFile(verb, path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		err = e.Err // the path is said already
	}
	if errors.Is(err, unix.EISDIR) {
		err = fmt.Errorf("%w: an object file is wanted", err)
	}
	if err != nil {
		return nil, fmt.Errorf("%s %q: %w", verb, path, err)
	}
	return b, nil
}

func parseFile(verb, path string, obj []byte, settings map[string]string) (*structops.Spec, error) {
	spec, err := structops.Parse(obj)
	if err != nil {
		return nil, fmt.Errorf("%s %q: %w", verb, path, err)
	}
	return spec, settle(verb, path, spec, settings)
}

// settle sets tunables of an object that is not of the catalogue.
func settle(verb, what string, spec *structops.Spec, settings map[string]string) error {
	for k, v := range settings {
		err := spec.Set(k, v)
		if err == nil {
			continue
		}
		err = fmt.Errorf("%s %q: %w", verb, what, err)
		if errors.Is(err, structops.ErrNotFound) {
			var names []string
			for _, p := range spec.Params() {
				names = append(names, p.Name)
			}
			err = hinted{err, didYouMean(registry.Nearest(k, names), "")}
		}
		return err
	}
	return nil
}
