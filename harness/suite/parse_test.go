// SPDX-License-Identifier: Apache-2.0

package suite

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"ccload/harness"
	"ccload/harness/trace"
)

const whole1 = `name: all
description: of everything
cc: [mine, cubic]
defaults:
  link: {rate: 20mbit, rtt: 40ms, loss: 1/1000}
  from: 1s
  epochs: whole
  checks:
    - {measure: timeouts, is: 0, why: nothing is reordered}
runs:
  - name: first
    duration: 10s
    link: {rate: 1gbit, buffer: 64kb, mtu: 9000, burst: 1p, kind: userspace}
    until: 9s
    checks:
      - {compare: cwnd_mean, within: 1%, why: it is the same}
      - {compare: loss_episodes, within: 1}
      - {measure: cwnd_mean, theory: cubic-window, within: 10%}
      - {measure: throughput, least: 1.5mbit}
      - {measure: utilisation, most: 99%}
  - name: second
    cc: reno
    seed: 7
    repeat: 2
    interval: 20ms
    per_ack: false
    flows: [{}, {start: 1s, duration: 5s, bytes: 100, rate: 1mbit, cc: bbr}, {cc: $cc}]
  - name: third
    pairs: [[a, b], c]
    flows: 2
`

func TestParse(t *testing.T) {
	s, err := Parse("x.yaml", []byte(whole1))
	if err != nil {
		t.Fatal(err)
	}
	if s.Name != "all" || s.Description != "of everything" {
		t.Errorf("%+v", s)
	}
	first := s.runs[0]
	want := trace.Experiment{
		Link:     trace.Link{Kind: "userspace", Rate: 1e9, RTT: .04, BufferBytes: 65536, MTU: 9000, Loss: trace.Loss{Every: 1000}, Burst: 1},
		Duration: 10, Seed: 1, PerAck: true, Jitter: .04, Flows: []trace.Flow{{CC: underTest}},
	}
	if !reflect.DeepEqual(first.experiment, want) {
		t.Errorf("got  %+v\nwant %+v", first.experiment, want)
	}
	if first.from != 1 || first.until != 9 || !first.epochs || first.repeat != 1 {
		t.Errorf("%+v", first)
	}
	type claim struct {
		quantity string
		kind     checkKind
		value    float64
		within   band
	}
	var claims []claim
	for _, c := range first.checks {
		claims = append(claims, claim{c.quantity.name, c.kind, c.value, c.within})
	}
	if want := []claim{
		{"timeouts", is, 0, band{}}, {"cwnd_mean", compare, 0, band{.01, true}}, {"loss_episodes", compare, 0, band{1, false}},
		{"cwnd_mean", theory, 0, band{.1, true}}, {"throughput", least, 1.5e6, band{}}, {"utilisation", most, .99, band{}},
	}; !reflect.DeepEqual(claims, want) {
		t.Errorf("got  %+v\nwant %+v", claims, want)
	}
	if first.checks[0].why != "nothing is reordered" || first.checks[3].theory.name != "cubic-window" {
		t.Errorf("%+v", first.checks)
	}

	p, err := s.Plan(nil)
	if err != nil {
		t.Fatal(err)
	}
	var dirs []string
	for _, task := range p.Tasks {
		dirs = append(dirs, task.Dir)
		if _, err := harness.Defaults(task.Experiment); err != nil {
			t.Error(err)
		}
	}
	if want := []string{"first/mine", "first/cubic", "second/reno/1", "second/reno/2", "third/a", "third/b", "third/c"}; !reflect.DeepEqual(dirs, want) {
		t.Errorf("got %q, want %q", dirs, want)
	}
	again := p.Tasks[3].Experiment
	if want := []trace.Flow{{CC: "reno"}, {CC: "bbr", Start: 1, Duration: 5, Bytes: 100, Rate: 1e6}, {CC: "reno"}}; !reflect.DeepEqual(again.Flows, want) {
		t.Errorf("flows %+v, want %+v", again.Flows, want)
	}
	if again.Seed != 8 || again.Name != "second reno 2" || again.PerAck || again.Interval != .02 || again.Link.Rate != 20e6 {
		t.Errorf("%+v", again)
	}

	if p, err = s.Plan([]string{"x", "y"}); err != nil || len(p.Tasks) != 2+4+2 || p.Tasks[0].Dir != "first/x" {
		t.Errorf("others: %+v, %v", p, err)
	}
	for want, cc := range map[string][]string{"with which reference": {"x"}, "3 congestion controls": {"x", "y", "z"}} {
		if _, err := s.Plan(cc); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", cc, err, want)
		}
	}
	many := "{name: x, runs: [{name: y, link: {rate: 1mbit}, flows: 1000, repeat: 1000}]}"
	if s, err = Parse("x", []byte(many)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Plan([]string{"a", "b"}); err == nil || !strings.Contains(err.Error(), "1000000 flows") {
		t.Error(err)
	}
	if s, err = Parse("x", []byte("{name: x, runs: [{name: y, link: {rate: 1mbit}}]}")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Plan(nil); err == nil || !strings.Contains(err.Error(), "the file names none") {
		t.Error(err)
	}
}

// What is wrong is told with its place.
func TestParseRefuses(t *testing.T) {
	head := "name: x\ncc: a\nruns:\n  - name: y\n    link: {rate: 1mbit, rtt: 40ms}\n    " // line 6, column 5
	for _, c := range []struct{ file, want string }{
		{"", "x.yaml: it is empty"},
		{"a: [", "x.yaml:2:1: did not find"},
		{"# nothing", "x.yaml: "},
		{"- a", "x.yaml:1:1: a list where keys"},
		{"name: x\ncc: a", "x.yaml:1:1: it has no runs"},
		{"runs: []", "x.yaml:1:1: it has no name"},
		{"name: x\nruns: []", "x.yaml:2:7: there are no runs"},
		{"name: a/b\nruns: []", `x.yaml:1:7: name "a/b"`},
		{"name: x\nrun: []", `x.yaml:2:1: unknown key "run": there are cc, defaults, description, name, pairs, runs`},
		{"name: x\nname: y", `x.yaml:2:1: key "name": twice`},
		{"name:\nruns: []", "x.yaml:1:6: nothing where a value"},
		{"name: x\ncc: [a, a]", `x.yaml:2:9: "a": twice`},
		{"name: x\ncc: [a, b, c]", "x.yaml:2:5: 3 congestion controls"},
		{"name: x\ncc: a\npairs: [a]", "x.yaml:3:8: cc and pairs: one of them"},
		{"name: x\ncc: ../a", `x.yaml:2:5: congestion control "../a"`},
		{"name: x\ncc: a\nruns:\n  - link: {rate: 1mbit}", "x.yaml:4:5: the run has no name"},
		{"name: x\ncc: a\nruns:\n  - name: y", `x.yaml:4:5: run "y": experiment: the link has no rate`},
		{head + "duration: 20", `x.yaml:6:15: time "20": which unit?`},
		{head + "durations: 20s", `x.yaml:6:5: unknown key "durations"`},
		{head + "link: {rate: 20mbut}", "x.yaml:6:5: key \"link\": twice"},
		{head + "per_ack: maybe", `x.yaml:6:14: "maybe": true or false`},
		{"name: y\ncc: ..\nruns: []", `x.yaml:2:5: congestion control "..": not a name`},
		{"name: ..\nruns: []", `x.yaml:1:7: name ".."`},
		{"name: y\npairs: [[a, .]]\nruns: []", `x.yaml:2:13: congestion control ".": not a name`},
		{"name: y\ncc: a\nruns: [{name: ..}]", `x.yaml:3:15: name ".."`},
		{"name: y\ncc: a\nruns: [{name: b, link: {rate: 50, rtt: 1ms}}]", `x.yaml:3:31: rate "50": which unit?`},
		{"name: y\ncc: a\nruns: [{name: b, link: {rate: 2Mbps, rtt: 1ms}}]", `x.yaml:3:31: rate "2Mbps": in bits or in bytes? say 2mbit or 16mbit`},
		{"name: y\ncc: a\nruns: [{name: b, link: {rate: 1mbit, mtu: 10}}]", `x.yaml:3:43: mtu "10": a whole number of bytes from 576 to 9000`},
		{"name: y\ncc: a\nruns: [{name: b, checks: [{measure: throughput, least: 5}]}]", `x.yaml:3:56: rate "5": which unit?`},
		{head + "seed: -1", `x.yaml:6:11: seed "-1"`},
		{head + "repeat: 0", `x.yaml:6:13: "0": a whole number`},
		{head + "epochs: half", `x.yaml:6:13: epochs "half"`},
		{head + "from: 30s", `x.yaml:4:5: run "y": measured from 30 s until 20 s`},
		{head + "until: 30s", `x.yaml:4:5: run "y": measured from 0 s until 30 s`},
		{head + "flows: 0", `x.yaml:6:12: "0": a whole number`},
		{head + "flows: [{cc: b}]", `x.yaml:4:5: run "y": none of its flows`},
		{head + "flows: [{rate: 1bit}]", `x.yaml:4:5: run "y": experiment: flow 1 is offered 1 bit/s`},
		{head + "flows: [{start: 5s, duration: 50s}]", `x.yaml:4:5: run "y": experiment: flow 1 lasts 50 s`},
		{head + "checks: {}", "x.yaml:6:13: a mapping where a list"},
		{head + "checks: [{measure: drops}]", "x.yaml:6:14: a check is"},
		{head + "checks: [{compare: drops, is: 0}]", "x.yaml:6:14: a check is"},
		{head + "checks: [{compare: drop, within: 1%}]", `x.yaml:6:24: unknown quantity "drop"`},
		{head + "checks: [{compare: drops}]", "x.yaml:6:14: it has no band"},
		{head + "checks: [{compare: drops, within: -1%}]", "x.yaml:6:39: "},
		{head + "checks: [{measure: drops, least: 1, within: 1%}]", "x.yaml:6:49: a bound has no band"},
		{head + "checks: [{compare: drops, flows: together, within: 1}]", "x.yaml:6:24: flows together"},
		{head + "checks: [{compare: throughput, flows: apart, within: 1%}]", `x.yaml:6:43: flows "apart"`},
		{head + "checks: [{measure: drops, is: 1%}]", `x.yaml:6:35: "1%": not a number`},
		{head + "checks: [{measure: throughput, is: 1mbyte}]", `x.yaml:6:40: rate "1mbyte"`},
		{head + "checks: [{measure: drops, theory: tahoe, within: 1%}]", `x.yaml:6:39: unknown theory "tahoe"`},
		{head + "checks: [{measure: cwnd_mean, theory: reno-window, within: 1%}]", `x.yaml:6:14: run "y": theory "reno-window": the link does not lose`},
		{head + "checks: [{measure: drops, theory: cubic-sawtooth, within: 1%}]", `x.yaml:6:14: run "y": theory "cubic-sawtooth" says nothing of drops`},
		{"name: x\ncc: a\ndefaults: {link: {rate: 1mbit, buffer: 0p}}\nruns: [{name: y}]", `x.yaml:3:40: buffer "0p"`},
		{head + "duration: 1s\n  - name: y\n    link: {rate: 1mbit}", `x.yaml:7:5: run "y": there is another`},
	} {
		s, err := Parse("x.yaml", []byte(c.file))
		if err == nil || !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("%s\n%+v, error %v, want %s", c.file, s, err, c.want)
		}
	}
}

func files(t testing.TB) []string {
	t.Helper()
	files, err := filepath.Glob("../../experiments/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	return files
}

// The files that come with ccload are in order, and say why of each claim.
func TestExperiments(t *testing.T) {
	for _, file := range files(t) {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		s, err := Parse(file, b)
		if err != nil {
			t.Error(err)
			continue
		}
		if name, _, _ := strings.Cut(filepath.Base(file), "."); s.Name != name || s.Description == "" {
			t.Errorf("%s: name %q, description %q", file, s.Name, s.Description)
		}
		if _, err := s.Plan(nil); err != nil {
			t.Error(err)
		}
		for _, r := range s.runs {
			if len(r.checks) == 0 {
				t.Errorf("%s: run %q has no checks", file, r.name)
			}
			for _, c := range r.checks {
				if c.why == "" {
					t.Errorf("%s: run %q: %s: why?", file, r.name, c.quantity.name)
				}
			}
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(whole1))
	f.Add([]byte("{name: x, cc: &a [b], pairs: *a, runs: [{name: y, link: {rate: 1mbit}}]}"))
	for _, file := range files(f) {
		b, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := Parse("x.yaml", b)
		if err != nil {
			if !strings.HasPrefix(err.Error(), "x.yaml:") {
				t.Errorf("without its place: %v", err)
			}
			return
		}
		p, err := s.Plan([]string{"mine", "cubic"})
		if err != nil {
			if !strings.HasPrefix(err.Error(), "more than") {
				t.Error(err)
			}
			return
		}
		dirs := map[string]bool{}
		for _, task := range p.Tasks {
			if dirs[task.Dir] || !filepath.IsLocal(task.Dir) {
				t.Errorf("directory %q", task.Dir)
			}
			dirs[task.Dir] = true
			if _, err := harness.Defaults(task.Experiment); err != nil {
				t.Error(err)
			}
		}
	})
}
