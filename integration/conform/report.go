// What was found, one line for each requirement: as text, JSON or JUnit.

package main

import (
	"cmp"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"io"
	"slices"
	"strings"
)

// outcome is what became of a requirement.
type outcome string

const (
	pass outcome = "pass"
	fail outcome = "fail"
	skip outcome = "skip"
)

// worse says which of two findings counts: one failure is enough.
var worse = map[outcome]int{skip: 0, pass: 1, fail: 2}

// result is what was found about one requirement.
type result struct {
	ID     string  `json:"id"`
	Level  string  `json:"level"` // MUST or SHOULD
	Title  string  `json:"title"`
	Status outcome `json:"status"`
	// Findings say what was seen: of a failure each deviation, of a skipped one why.
	Findings []string `json:"findings,omitempty"`
	// Remarks say what a careful implementation does otherwise; the standards leave it
	// open.
	Remarks []string `json:"remarks,omitempty"`
	// Checks is how many were made.
	Checks int `json:"checks"`
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
		r.results[row.ID] = &result{ID: row.ID, Level: level, Title: row.Title, Status: skip}
	}
	return r
}

// note adds a finding about a requirement of the checklist.
func (r *report) note(id string, s outcome, finding string) {
	res, ok := r.results[id]
	if !ok {
		panic("spiffe-conform: no requirement " + id)
	}
	if s != skip {
		res.Checks++
	}
	if worse[s] > worse[res.Status] {
		res.Status, res.Findings = s, nil
	}
	if finding != "" && s == res.Status && s != pass && !slices.Contains(res.Findings, finding) {
		res.Findings = append(res.Findings, finding)
	}
}

// remark adds something that is no failure.
func (r *report) remark(id, what string) {
	res := r.results[id]
	if !slices.Contains(res.Remarks, what) {
		res.Remarks = append(res.Remarks, what)
	}
}

// check notes a failure if err is one, and else that it passed.
func (r *report) check(id string, err error) {
	if err != nil {
		r.note(id, fail, err.Error())
		return
	}
	r.note(id, pass, "")
}

// list gives the results in the order of the checklist. A requirement about which
// nothing was found says why.
func (r *report) list(missing func(id string) string) []*result {
	var out []*result
	for _, row := range checklist {
		res := r.results[row.ID]
		if res.Status == skip && len(res.Findings) == 0 {
			res.Findings = []string{cmp.Or(cannot[row.ID], missing(row.ID))}
		}
		out = append(out, res)
	}
	return out
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

func writeText(w io.Writer, results []*result) error {
	count := make(map[outcome]int)
	for _, res := range results {
		count[res.Status]++
		if _, err := fmt.Fprintf(w, "%-5s %-4s %-6s %s\n", res.ID, res.Status, res.Level, res.Title); err != nil {
			return err
		}
		for _, finding := range res.Findings {
			if _, err := fmt.Fprintf(w, "           %s\n", printable(finding)); err != nil {
				return err
			}
		}
		for _, remark := range res.Remarks {
			if _, err := fmt.Fprintf(w, "           note: %s\n", printable(remark)); err != nil {
				return err
			}
		}
	}
	_, err := fmt.Fprintf(w, "\n%d passed, %d failed (%d of them MUST), %d skipped\n", count[pass], count[fail], mustFailures(results), count[skip])
	return err
}

// printable keeps what the other side said on one line.
func printable(s string) string {
	return strings.Map(func(c rune) rune {
		if c < ' ' || c == 0x7f || c == 0x2028 || c == 0x2029 {
			return '·'
		}
		return c
	}, s)
}

func writeJSON(w io.Writer, results []*result) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(results)
}

// junit is the part of JUnit's format that build servers read.
type junit struct {
	XMLName  xml.Name    `xml:"testsuite"`
	Name     string      `xml:"name,attr"`
	Tests    int         `xml:"tests,attr"`
	Failures int         `xml:"failures,attr"`
	Skipped  int         `xml:"skipped,attr"`
	Cases    []junitCase `xml:"testcase"`
}

type junitCase struct {
	Class   string     `xml:"classname,attr"`
	Name    string     `xml:"name,attr"`
	Failure *junitText `xml:"failure,omitempty"`
	Skipped *junitText `xml:"skipped,omitempty"`
}

type junitText struct {
	Message string `xml:"message,attr"`
	Text    string `xml:",chardata"`
}

func writeJUnit(w io.Writer, results []*result) error {
	suite := junit{Name: "spiffe-conform", Tests: len(results)}
	for _, res := range results {
		c := junitCase{Class: "spiffe-conform." + res.Level, Name: res.ID + " " + res.Title}
		text := &junitText{Text: printable(strings.Join(res.Findings, "; "))}
		switch res.Status {
		case fail:
			suite.Failures++
			text.Message = "does not conform"
			c.Failure = text
		case skip:
			suite.Skipped++
			text.Message = "not checked"
			c.Skipped = text
		}
		suite.Cases = append(suite.Cases, c)
	}
	if _, err := io.WriteString(w, xml.Header); err != nil {
		return err
	}
	enc := xml.NewEncoder(w)
	enc.Indent("", "  ")
	if err := enc.Encode(suite); err != nil {
		return err
	}
	_, err := io.WriteString(w, "\n")
	return err
}
