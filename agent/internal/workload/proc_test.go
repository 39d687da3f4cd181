// What the kernel writes about a process, read.

package workload

import (
	"errors"
	"strings"
	"testing"
)

func TestParseStat(t *testing.T) {
	rest := " S 1 1 1 0 -1 4194560 1 1 1 1 1 1 1 1 20 0 1 0 777 1 1"
	tests := map[string]struct {
		in    string
		start uint64
		ok    bool
	}{
		"plain":                 {"12 (web)" + rest, 777, true},
		"blanks and brackets":   {"12 (a) R 1 (b c)" + rest, 777, true},
		"fakes the rest":        {"12 (x) Z 1 1 1 0 -1 4 1 1 1 1 1 1 1 1 20 0 1 0 1 )" + rest, 777, true},
		"empty":                 {"", 0, false},
		"no name":               {"12 web S", 0, false},
		"cut off":               {"12 (web) S 1 1", 0, false},
		"start is not a number": {"12 (web)" + strings.Replace(rest, "777", "x", 1), 0, false},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			start, err := parseStat([]byte(tt.in))
			if start != tt.start || (err == nil) != tt.ok {
				t.Errorf("parseStat() = %d, %v; want %d, ok %v", start, err, tt.start, tt.ok)
			}
		})
	}
}

func TestParseStatus(t *testing.T) {
	tests := map[string]struct {
		in       string
		uid, gid uint32
		ok       bool
	}{
		"effective counts":  {"Name:\tx\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t9 10 \n", 2, 6, true},
		"no groups":         {"Uid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t \n", 2, 6, true},
		"name with a break": {"Name:\tx\\nUid:\t0\t0\t0\t0\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t \n", 2, 6, true},
		"two Uid lines":     {"Uid:\t0\t0\t0\t0\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t \n", 0, 0, false},
		"two Groups lines":  {"Uid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t1\nGroups:\t2\n", 0, 0, false},
		"no Groups line":    {"Uid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\n", 0, 0, false},
		"not a group":       {"Uid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t1 x\n", 0, 0, false},
		"no Gid":            {"Uid:\t1\t2\t3\t4\nGroups:\t \n", 0, 0, false},
		"three IDs":         {"Uid:\t1\t2\t3\nGid:\t5\t6\t7\t8\nGroups:\t \n", 0, 0, false},
		"a zombie":          {"State:\tZ (zombie)\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t \n", 0, 0, false},
		"a dead one":        {"State:\tX (dead)\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t \n", 0, 0, false},
		"one that sleeps":   {"State:\tS (sleeping)\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t \n", 2, 6, true},
		"too large":         {"Uid:\t1\t4294967296\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t \n", 0, 0, false},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			uid, gid, _, err := parseStatus([]byte(tt.in))
			if (err == nil) != tt.ok || tt.ok && (uid != tt.uid || gid != tt.gid) {
				t.Errorf("parseStatus() = %d, %d, %v; want %d, %d, ok %v", uid, gid, err, tt.uid, tt.gid, tt.ok)
			}
		})
	}
}

func FuzzParseProc(f *testing.F) {
	f.Add([]byte("12 (web) S 1 1 1 0 -1 4194560 1 1 1 1 1 1 1 1 20 0 1 0 777 1 1"))
	f.Add([]byte("Uid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := parseStat(b); err != nil && !errors.Is(err, ErrGone) {
			t.Errorf("parseStat(%q) = %v; want ErrGone", b, err)
		}
		if _, _, _, err := parseStatus(b); err != nil && !errors.Is(err, ErrGone) {
			t.Errorf("parseStatus(%q) = %v; want ErrGone", b, err)
		}
	})
}
