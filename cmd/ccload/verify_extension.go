// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"

	"ccload/cc"
	"ccload/structops"
)

// extensionHere tries an extension on the running kernel.
func (d *verdict) extensionHere(e *structops.Extension, log bool) error {
	targets, done, err := extensionTargets()
	defer done()
	if err != nil {
		d.Error = err.Error()
		return nil
	}
	for _, t := range targets {
		d.Extensions = append(d.Extensions, e.Verify(t)...)
	}
	fits, tried := map[string]bool{}, map[string]bool{}
	for _, x := range d.Extensions {
		fits[x.Policy] = fits[x.Policy] || x.Fits
		tried[x.Policy] = true
	}
	d.Loads = true
	for _, f := range e.Forms {
		if !tried[f.Policy] {
			d.Error = fmt.Sprintf("no congestion control that is registered or in the catalogue has a function %q", f.Policy)
		}
		d.Loads = d.Loads && fits[f.Policy]
	}
	d.dropLogs(log)
	return nil
}

// extensionTargets are the BPF congestion controls that are registered, and those
// of the catalogue, loaded, that are not.
func extensionTargets() (targets []*structops.Info, done func(), err error) {
	var loaded []*structops.Object
	done = func() {
		for _, o := range loaded {
			o.Close()
		}
	}
	live, err := structops.Live()
	if err != nil {
		return nil, done, err
	}
	names := map[string]bool{}
	for _, i := range live {
		if i.Registered() {
			targets = append(targets, i)
			names[i.Name] = true
		}
	}
	for _, alg := range cc.All() {
		if names[alg.Name] {
			continue
		}
		spec, err := structops.Parse(alg.Object())
		if err != nil {
			return nil, done, err
		}
		o, err := spec.Load(alg.Name)
		if err != nil {
			return nil, done, err
		}
		loaded = append(loaded, o)
		i, err := o.Info("")
		if err != nil {
			return nil, done, err
		}
		targets = append(targets, i)
	}
	return targets, done, nil
}

func (a *app) extensionText(d *verdict, object string) {
	verb := "fits"
	if !d.Loads {
		verb = "does not fit"
	}
	a.printf("%s: %s %s\n", d.Release, object, verb)
	t := a.table()
	t.row("FUNCTION", "OF", "BY", "PROGRAM", "FITS", "WHY NOT")
	for _, x := range d.Extensions {
		fits, why := "yes", ""
		if !x.Fits {
			fits, why = "no", x.Why.Brief()
		}
		t.row(x.Policy, x.For, string(x.How), x.Program, fits, why)
	}
	t.Flush()
	said := map[string]bool{} // of a program's refusal, which is alike for each
	for _, x := range d.Extensions {
		if x.Why != nil && x.Why.Source+x.Why.Means != "" && !said[x.Program] {
			said[x.Program] = true
			a.reasonText(*x.Why)
		}
	}
	shown := map[string]bool{}
	var functions []structops.Function
	for _, x := range d.Extensions {
		if len(x.Functions) > 0 && !shown[x.Program] {
			shown[x.Program] = true
			functions = append(functions, x.Functions...)
		}
	}
	a.printf("\n")
	a.functionsText(functions)
}
