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
	file     string // empty for msync, which strace knows by address only
	ok       bool
	injected bool
}

// traced is the command that runs a child under strace and lets its syncs fail,
// in each thread from its n-th on; 0: none fails.
func traced(output string, n int) []string {
	const calls = "fsync,fdatasync,msync"
	args := []string{"strace", "-f", "-y", "-ttt", "-T", "-s", "0", "--seccomp-bpf", "-e", "signal=none", "-e", "trace=" + calls, "-o", output}
	if n > 0 {
		args = append(args, "-e", fmt.Sprintf("inject=%s:error=EIO:when=%d+", calls, n))
	}
	return args
}

// Lines of strace: a whole call, its first half, its second half.
var (
	wholeCall  = regexp.MustCompile(`^(\d+) +([\d.]+) (\w+)\((.*)\) += (-?\d+)(.*)<([\d.]+)>$`)
	firstHalf  = regexp.MustCompile(`^(\d+) +([\d.]+) (\w+)\((.*) <unfinished \.\.\.>$`)
	secondHalf = regexp.MustCompile(`^(\d+) +([\d.]+) <\.\.\. (\w+) resumed>.*\) += (-?\d+)(.*)<([\d.]+)>$`)
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
	begun := make(map[string]syncCall) // by thread
	for lines := bufio.NewScanner(f); lines.Scan(); {
		text := lines.Text()
		if m := wholeCall.FindStringSubmatch(text); m != nil {
			from := stamp(m[2]) - offset
			calls = append(calls, syncCall{
				from: from, to: from + stamp(m[7]), name: m[3], file: fileOf(m[4]), ok: m[5] == "0", injected: strings.Contains(m[6], "INJECTED"),
			})
		} else if m := firstHalf.FindStringSubmatch(text); m != nil {
			begun[m[1]] = syncCall{from: stamp(m[2]) - offset, name: m[3], file: fileOf(m[4])}
		} else if m := secondHalf.FindStringSubmatch(text); m != nil {
			c := begun[m[1]]
			c.to, c.ok, c.injected = stamp(m[2])-offset, m[4] == "0", strings.Contains(m[5], "INJECTED")
			calls = append(calls, c)
		}
	}
	slices.SortFunc(calls, func(a, b syncCall) int { return cmp.Compare(a.from, b.from) })
	return calls, nil
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
