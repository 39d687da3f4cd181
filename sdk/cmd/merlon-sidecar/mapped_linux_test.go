package main

import (
	"os"
	"strconv"
	"strings"
	"testing"
)

// fileKiB is how much of files is mapped and in memory.
func fileKiB(t *testing.T) int {
	t.Helper()
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(text), "RssFile:")
	n, err := strconv.Atoi(strings.Fields(after)[0])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// The program goes on as before, and is smaller.
func TestForgetProgram(t *testing.T) {
	before := fileKiB(t)
	if err := forgetProgram(); err != nil {
		t.Fatal(err)
	}
	if after := fileKiB(t); after >= before {
		t.Errorf("%d KiB of files in memory; %d before", after, before)
	}
}
