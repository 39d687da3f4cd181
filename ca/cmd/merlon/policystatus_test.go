// What agents say is shown, and steers no terminal.

package main

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

func TestStatusShowsNoControlCharacters(t *testing.T) {
	now := time.Now()
	s := statusJSON{
		Name: "main", Generation: 1, IssuedAt: &now,
		Differences: []differenceJSON{{Would: "deny", Reason: "A\x1b[2J", RuleID: "x\ny", CandidateReason: "\u202e", Calls: 1}},
		Points: []pointJSON{
			{Kind: "agent", SPIFFEID: "spiffe://shop.test/agent/n", Fault: "first\nsecond\r\x1b[31m"},
			{Kind: "opa", Uploader: "token:main:7f", Instance: "east\x1b[2J\n1", Fault: "bundle_error"},
		},
		OPAsLeftOut: 12,
	}
	var out bytes.Buffer
	if err := s.print(&out); err != nil {
		t.Fatal(err)
	}
	if text := out.String(); strings.ContainsAny(text, "\x1b\r\u202e") || !strings.Contains(text, "first second") || !strings.Contains(text, "x y") ||
		!strings.Contains(text, "token:main:7f") || !strings.Contains(text, "east [2J 1") || !strings.Contains(text, "and 12 more") {
		t.Errorf("%q", text)
	}
}
