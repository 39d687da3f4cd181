// What was found: of each requirement, part by part, what was seen, and what became of
// the whole.

package main

import (
	"cmp"
	"fmt"
	"slices"
)

// outcome is what became of a requirement.
type outcome string

const (
	pass outcome = "pass"
	fail outcome = "fail"
	skip outcome = "skip"
	// partial: some of the parts that were given keep it, and others were not asked, or
	// not all that it says.
	partial outcome = "partial"
)

// result is what was found about one requirement.
type result struct {
	ID     string  `json:"id"`
	Level  string  `json:"level"` // MUST or SHOULD
	Title  string  `json:"title"`
	Status outcome `json:"status"`
	// Parts are what it is put to, and what became of each.
	Parts []partResult `json:"parts"`
	// Findings say what was seen: of a failure each deviation, of what was not checked
	// why.
	Findings []string `json:"findings,omitempty"`
	// Remarks say what a careful implementation does otherwise; the standards leave it
	// open.
	Remarks []string `json:"remarks,omitempty"`
	// LeftOut are cases that could not be presented.
	LeftOut []string `json:"left_out,omitempty"`
	// Checks is how many were made.
	Checks int `json:"checks"`
}

// partResult is what became of a requirement of one part.
type partResult struct {
	Part   part    `json:"part"`
	Status outcome `json:"status"`
	Checks int     `json:"checks"`
	// Why it was not checked, or in part.
	Why string `json:"why,omitempty"`
}

// report collects findings. It is not safe for concurrent use.
type report struct {
	results map[string]*result
}

func newReport() *report {
	r := &report{results: make(map[string]*result)}
	for _, row := range checklist {
		level := "SHOULD"
		if row.Must {
			level = "MUST"
		}
		res := &result{ID: row.ID, Level: level, Title: row.Title, Parts: []partResult{}}
		for _, p := range row.Parts {
			res.Parts = append(res.Parts, partResult{Part: p, Status: skip})
		}
		r.results[row.ID] = res
	}
	return r
}

func (r *report) of(id string) *result {
	res, ok := r.results[id]
	if !ok {
		panic("spiffe-conform: no requirement " + id)
	}
	return res
}

// check notes what a check of one part has found: err, or that it is as it should be.
func (r *report) check(id string, of part, err error) {
	res := r.of(id)
	p := res.part(of)
	p.Checks++
	res.Checks++
	if err == nil {
		if p.Status != fail {
			p.Status, p.Why = pass, ""
		}
		return
	}
	p.Status, p.Why = fail, ""
	if !slices.Contains(res.Findings, err.Error()) {
		res.Findings = append(res.Findings, err.Error())
	}
}

func (res *result) part(of part) *partResult {
	i := slices.IndexFunc(res.Parts, func(p partResult) bool { return p.Part == of })
	if i < 0 {
		panic(fmt.Sprintf("spiffe-conform: %s is no requirement of the %s", res.ID, of))
	}
	return &res.Parts[i]
}

// half is a check that found nothing wrong and does not show that the part keeps the
// requirement, for the reason why. It passes when another check does.
func (r *report) half(id string, of part, why string) {
	res := r.of(id)
	p := res.part(of)
	p.Checks++
	res.Checks++
	if p.Status == skip {
		p.Status, p.Why = partial, why
	}
}

// accepted is a check of what the standards leave open, and the part has accepted it.
func (r *report) accepted(id string, of part, format string, args ...any) {
	r.half(id, of, "nothing was refused: what was presented is left open by the standards, and was accepted")
	r.remark(id, format, args...)
}

// ok is a check that found nothing wrong.
func (r *report) ok(id string, of part) { r.check(id, of, nil) }

// must is err, which keeps a part from being checked: the requirement that it then
// fails has it as a finding.
func (r *report) must(id string, of part, err error) error {
	if err != nil {
		r.check(id, of, err)
	}
	return err
}

// fail is a check that found what is said.
func (r *report) fail(id string, of part, format string, args ...any) {
	r.check(id, of, fmt.Errorf(format, args...))
}

// remark adds something that is no failure.
func (r *report) remark(id, format string, args ...any) {
	res, what := r.of(id), fmt.Sprintf(format, args...)
	if !slices.Contains(res.Remarks, what) {
		res.Remarks = append(res.Remarks, what)
	}
}

// leaveOut adds a case that could not be presented.
func (r *report) leaveOut(id, what string) {
	res := r.of(id)
	if !slices.Contains(res.LeftOut, what) {
		res.LeftOut = append(res.LeftOut, what)
	}
}

// list gives the results in the order of the checklist. given says whether a target was
// named that has this part, and missing by which flag a part would have been checked.
func (r *report) list(given func(part) bool, missing func(id string, of part) string) []*result {
	var out []*result
	for _, row := range checklist {
		res := r.results[row.ID]
		res.conclude(given, missing)
		out = append(out, res)
	}
	return out
}

// conclude says what became of the whole: a failure of one part is one, and it passes
// when each part was checked that was given.
func (res *result) conclude(given func(part) bool, missing func(id string, of part) string) {
	var failed, passed, open bool
	var why []string
	for i := range res.Parts {
		p := &res.Parts[i]
		failed, passed = failed || p.Status == fail, passed || p.Status == pass
		if p.Status == skip {
			p.Why = missing(res.ID, p.Part)
			why = append(why, fmt.Sprintf("not checked of the %s: %s", p.Part, p.Why))
			open = open || given(p.Part)
		}
		if p.Status == partial {
			why = append(why, fmt.Sprintf("checked in part of the %s: %s", p.Part, p.Why))
			passed, open = true, true
		}
	}
	switch {
	case failed:
		res.Status = fail
	case passed && !open:
		res.Status = pass
	case passed:
		res.Status, res.Findings = partial, why
	case len(res.Parts) > 0:
		res.Status, res.Findings = skip, why
	default:
		res.Status, res.Findings = skip, []string{cmp.Or(cannot[res.ID], incubating(res.ID))}
	}
}

// mustFailures counts the requirements of level MUST that failed.
func mustFailures(results []*result) (n int) {
	for _, res := range results {
		if res.Status == fail && res.Level == "MUST" {
			n++
		}
	}
	return n
}
