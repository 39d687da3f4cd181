package main

import (
	"errors"
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

// Whatever the kernel's list says, nothing is given up but what the file has: mappings
// of it that nobody writes to, each from below to above.
func FuzzProgramIn(f *testing.F) {
	const exe = "/usr/bin/merlon-sidecar"
	text := func(perms, anonymous, path string) string {
		return "00400000-00500000 " + perms + " 00000000 08:01 7    " + path + "\nSize: 1024 kB\nAnonymous: " + anonymous + " kB\n"
	}
	f.Add(text("r-xp", "0", exe) + text("rw-p", "0", exe) + text("r--p", "4", exe))
	f.Add(text("r-xp", "0", exe+" (deleted)") + text("r--p", "0", "") + text("r--p", "0", "[heap]"))
	f.Add("5-4 r-xp 0 0 0 " + exe + "\nAnonymous: 0 kB\n")
	f.Add("z-z r-xp 0 0 0 " + exe + "\n")
	f.Fuzz(func(t *testing.T, smaps string) {
		given := 0
		err := programIn(strings.NewReader(smaps), exe, func(from, to uintptr) error {
			given++
			if from >= to {
				t.Fatalf("from %x to %x is given up", from, to)
			}
			return nil
		})
		if given > strings.Count(smaps, exe)*(1+strings.Count(smaps, "Anonymous:")) {
			t.Errorf("%d mappings are given up, %v", given, err)
		}
		stop := errors.New("no")
		if err := programIn(strings.NewReader(smaps), exe, func(uintptr, uintptr) error { return stop }); given > 0 && !errors.Is(err, stop) {
			t.Errorf("an error is passed over: %v", err)
		}
	})
}
