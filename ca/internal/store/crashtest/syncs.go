package crashtest

// What a child did to make its writes durable, as strace saw it. A SIGKILL does
// not show whether anything was synced, since the kernel still has all pages;
// the order of system calls and answers does.

import (
	"bufio"
	"cmp"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// syncCall is one fsync, fdatasync or msync, in the time of lines.
type syncCall struct {
	from, to int64
	name     string // fsync, fdatasync or msync
	file     string // of an msync too: what was mapped at its address
	ok       bool
	injected bool
}

// traced is the command that runs a child under strace and lets its syncs fail,
// in each thread from its n-th on; 0: none fails.
func traced(output string, n int) []string {
	const calls = "fsync,fdatasync,msync"
	args := []string{"strace", "-f", "-y", "-ttt", "-T", "-s", "0", "--seccomp-bpf", "-e", "signal=none", "-e", "trace=mmap,mremap," + calls, "-o", output}
	if n > 0 {
		args = append(args, "-e", fmt.Sprintf("inject=%s:error=EIO:when=%d+", calls, n))
	}
	return args
}

// Lines of strace: a whole call, its first half, its second half.
var (
	wholeCall  = regexp.MustCompile(`^(\d+) +([\d.]+) (\w+)\((.*)\) += (-?\w+)(.*)<([\d.]+)>$`)
	firstHalf  = regexp.MustCompile(`^(\d+) +([\d.]+) (\w+)\((.*) <unfinished \.\.\.>$`)
	secondHalf = regexp.MustCompile(`^(\d+) +([\d.]+) <\.\.\. (\w+) resumed>.*\) += (-?\w+)(.*)<([\d.]+)>$`)
	fdPath     = regexp.MustCompile(`<([^>]*)>`)
)

// readTrace reads what strace wrote. offset is the wall clock less
// CLOCK_MONOTONIC, in nanoseconds.
func readTrace(path string, offset int64) (calls []syncCall, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	type half struct {
		at   int64
		args string
	}
	begun := make(map[string]half)    // by thread
	mapped := make(map[string]string) // address -> file
	ended := func(from, to int64, name, args, result, note string) {
		switch name {
		case "mmap":
			mapped[result] = fileOf(args)
			return
		case "mremap":
			mapped[result] = mapped[firstArg(args)]
			return
		}
		c := syncCall{from: from, to: to, name: name, file: fileOf(args), ok: result == "0", injected: strings.Contains(note, "INJECTED")}
		if name == "msync" {
			c.file = mapped[firstArg(args)]
		}
		calls = append(calls, c)
	}
	for lines := bufio.NewScanner(f); lines.Scan(); {
		text := lines.Text()
		if m := wholeCall.FindStringSubmatch(text); m != nil {
			from := stamp(m[2]) - offset
			ended(from, from+stamp(m[7]), m[3], m[4], m[5], m[6])
		} else if m := firstHalf.FindStringSubmatch(text); m != nil {
			begun[m[1]] = half{stamp(m[2]) - offset, m[4]}
		} else if m := secondHalf.FindStringSubmatch(text); m != nil {
			ended(begun[m[1]].at, stamp(m[2])-offset, m[3], begun[m[1]].args, m[4], m[5])
		}
	}
	slices.SortFunc(calls, func(a, b syncCall) int { return cmp.Compare(a.from, b.from) })
	return calls, nil
}

func firstArg(args string) string {
	first, _, _ := strings.Cut(args, ",")
	return first
}

// stamp reads seconds with six digits behind the point as nanoseconds.
func stamp(text string) int64 {
	seconds, micros, _ := strings.Cut(text, ".")
	s, _ := strconv.ParseInt(seconds, 10, 64)
	us, _ := strconv.ParseInt(micros, 10, 64)
	return s*int64(time.Second) + us*int64(time.Microsecond)
}

func fileOf(args string) string {
	if m := fdPath.FindStringSubmatch(args); m != nil {
		return m[1]
	}
	return ""
}

// clockOffset is the wall clock less CLOCK_MONOTONIC.
func clockOffset() int64 {
	before := now()
	wall := time.Now().UnixNano()
	return wall - (before+now())/2
}

// clockError is how far the two readings may be apart, and strace's rounding.
const clockError = int64(50 * time.Microsecond)

// needed is a sync that each write must wait for.
type needed struct {
	what string
	is   func(syncCall) bool
}

// checkSyncs says which acknowledged writes had not been synced: between the
// begin of the call and the answer there must be a whole sync of each kind that
// is needed, for what the call writes cannot have been covered by an earlier
// one. After the first of these that failed, no call that began later may
// succeed. Others may fail: when the spare file of the disk guard cannot be made
// durable, writes are refused until it can.
func (h *history) checkSyncs(calls []syncCall, need []needed) (found []string) {
	firstFailed := int64(-1)
	for _, c := range calls {
		if !c.ok && firstFailed < 0 && slices.ContainsFunc(need, func(n needed) bool { return n.is(c) }) {
			firstFailed = c.to
		}
	}
	for _, n := range need {
		var done []syncCall
		for _, c := range calls {
			if c.ok && n.is(c) {
				done = append(done, c)
			}
		}
		for _, e := range h.order {
			writes, _ := e.wrote()
			if e.outcome != acknowledged || !puts(writes) {
				continue
			}
			i, _ := slices.BinarySearchFunc(done, e.from-clockError, func(c syncCall, at int64) int { return cmp.Compare(c.from, at) })
			if !slices.ContainsFunc(done[i:], func(c syncCall) bool { return c.to <= e.to+clockError }) {
				found = append(found, fmt.Sprintf("%s was acknowledged without a sync of %s", e.id, n.what))
			}
		}
	}
	for _, e := range h.order {
		if writes, _ := e.wrote(); firstFailed >= 0 && e.outcome == acknowledged && puts(writes) && e.from > firstFailed+clockError {
			found = append(found, fmt.Sprintf("%s began %s after a sync had failed, and was acknowledged", e.id, time.Duration(e.from-firstFailed)))
		}
	}
	return found
}
