// One line for each requirement: as text, JSON, or in JUnit's format.

package main

import (
	"encoding/json"
	"encoding/xml"
	"fmt"
	"io"
	"strings"
)

func writeText(w io.Writer, results []*result) error {
	count := make(map[outcome]int)
	for _, res := range results {
		count[res.Status]++
		if _, err := fmt.Fprintf(w, "%-5s %-7s %-6s %s\n", res.ID, res.Status, res.Level, res.Title); err != nil {
			return err
		}
		if err := writeLines(w, "", res.Findings); err != nil {
			return err
		}
		if err := writeLines(w, "note: ", res.Remarks); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintf(w, "\n%d passed, %d failed (%d of them MUST), %d in part, %d skipped\n", count[pass], count[fail], mustFailures(results), count[partial], count[skip])
	return err
}

func writeLines(w io.Writer, kind string, lines []string) error {
	for _, line := range lines {
		if _, err := fmt.Fprintf(w, "           %s%s\n", kind, printable(line)); err != nil {
			return err
		}
	}
	return nil
}

// printable keeps what the other side said on one line.
func printable(s string) string {
	return strings.Map(func(c rune) rune {
		if c < ' ' || c == 0x7f || c >= 0x80 && c < 0xa0 || c == 0x2028 || c == 0x2029 {
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

// writeJUnit: a requirement that was checked in part is skipped, since the format knows
// nothing between that and passed.
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
		case skip, partial:
			suite.Skipped++
			text.Message = map[outcome]string{skip: "not checked", partial: "checked in part"}[res.Status]
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
