// SPDX-License-Identifier: Apache-2.0

package structops

import "errors"

// ExtensionReport is what the running kernel makes of one program of an extension,
// for one congestion control.
type ExtensionReport struct {
	For string `json:"for"` // the congestion control
	Form
	Fits      bool       `json:"fits"`
	Why       *Reason    `json:"why,omitempty"` // why not
	Functions []Function `json:"functions"`     // the program, followed by the functions that it calls
}

// Verify loads the extension's programs for a congestion control to see what the
// running kernel makes of them; nothing is attached, and nothing stays loaded. A
// program for something that the congestion control does not have has no report.
func (e *Extension) Verify(to *Info) []*ExtensionReport {
	var reports []*ExtensionReport
	for _, f := range e.Forms {
		r := &ExtensionReport{For: to.Name, Form: f, Functions: []Function{}}
		err := e.verify(to, r)
		if errors.Is(err, ErrNotFound) || errors.Is(err, errWay) {
			continue
		}
		if errors.Is(err, ErrPolicy) {
			r.Why = &Reason{Kind: SignatureChanged, Detail: oneLine(err)}
		} else if err != nil {
			why := generalReason(err)
			r.Why = &why
		}
		r.Fits = r.Why == nil
		reports = append(reports, r)
	}
	return reports
}

// verify fills in a report; the error is what is not about the program.
func (e *Extension) verify(to *Info, r *ExtensionReport) error {
	object, coll, err := e.prepare(to, r.Policy, r.How)
	if err != nil {
		return err
	}
	defer closeTargets(coll)
	for _, member := range object.Members() {
		p := coll.Programs[key(r.Program, member)]
		fs, err := e.spec.examine(p)
		for i := range fs {
			fs[i].Program, fs[i].Section, fs[i].Member, fs[i].Loads = r.Program, p.SectionName, member, err == nil
		}
		r.Functions = fs // the copies are alike
		if err != nil {
			why := e.spec.programReason(err, p, &Ops{}, r.Member)
			why.Program, why.Member = r.Program, r.Policy
			r.Why = &why
			break
		}
	}
	return nil
}
