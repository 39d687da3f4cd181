// Package scale_test lets one CA process serve a whole fleet: up to 10 000 agents,
// played by this process with real TLS and real Sync streams, and up to a million
// registration entries in a real store. `make scale` measures it (README.md), and
// `go test` does all of it once, small, and looks at outcomes alone.
package scale_test

import (
	"cmp"
	"os"
	"strconv"
	"syscall"
	"testing"
	"time"

	"merlon.dev/integration/measure"
	"merlon.dev/integration/stage"
)

func TestMain(m *testing.M) {
	m.Run()
	stage.RemoveBins()
}

// sizes are what `make scale` is told.
type sizes struct {
	Agents  int           `json:"agents"`
	Entries int           `json:"entries"`
	Changes int           `json:"changes"` // how many times one entry is added
	Rest    time.Duration `json:"rest_ns"` // how long nothing happens
	Steps   int           `json:"-"`       // how many tenths the matrix goes down
	Out     string        `json:"-"`       // folder for the results
}

// banned and revoked are those of the storm: of 10 000 agents 1 000 and 5 000.
func (s sizes) banned() int  { return s.Agents / 10 }
func (s sizes) revoked() int { return s.Agents / 2 }

// down are the sizes that a curve is made of, the largest last.
func (s sizes) down(largest int) (all []int) {
	all = []int{largest}
	for range s.Steps {
		all = append([]int{all[0] / 10}, all...)
	}
	return all
}

func sizesOf(t *testing.T) sizes {
	t.Helper()
	s := sizes{Agents: 50, Entries: 500, Changes: 5, Rest: 100 * time.Millisecond, Out: t.TempDir()}
	if os.Getenv("MERLON_SCALE_AGENTS") == "" {
		return s
	}
	number := func(name string) int {
		n, err := strconv.Atoi(os.Getenv(name))
		if err != nil || n < 10 {
			t.Fatalf("%s=%q: want a number, at least 10", name, os.Getenv(name))
		}
		return n
	}
	s = sizes{Agents: number("MERLON_SCALE_AGENTS"), Entries: number("MERLON_SCALE_ENTRIES"), Changes: 300, Rest: 30 * time.Second, Steps: 2}
	if text := os.Getenv("MERLON_SCALE_REST"); text != "" {
		var err error
		if s.Rest, err = time.ParseDuration(text); err != nil {
			t.Fatalf("MERLON_SCALE_REST: %v", err)
		}
	}
	s.Out = cmp.Or(os.Getenv("MERLON_SCALE_OUT"), "results")
	if s.Agents < 1000 || s.Entries < 1000 || os.Getenv("MERLON_SCALE_STEPS") == "0" {
		s.Steps = 0
	}
	return s
}

// TestScale goes through everything that one CA has to bear, from small to large.
func TestScale(t *testing.T) {
	s := sizesOf(t)
	allowFiles(t, uint64(s.Agents+s.Agents/4+1000)) // some connections end while others begin
	before := measure.Here(".")
	d := stage.CAAlone(t, "merlon-ca", nil,
		"trust_refresh_hint: 1s",  // a new root waits three of them for those who poll
		"agent_svid_ttl: 24h",     // what renewals cost is measured by itself: rotate
		"agent_issue_rate: 10000") // one agent is asked for much: storm
	begun, used := time.Now(), measure.CPUOf(t, d.CA.PID())
	f := newFleet(t, d, s.Agents)
	r := results{Machine: before, Sizes: s, Attest: spent(t, d, begun, used, s.Agents)}
	t.Logf("%d agents are attested: %v", s.Agents, r.Attest)

	b := bench{t: t, f: f, sizes: s}
	for _, entries := range s.down(s.Entries) {
		r.Fill = b.fill(entries, r.Fill)
		start := b.coldStart()
		for _, agents := range s.down(s.Agents) {
			c := b.cell(entries, agents)
			c.Start = start
			r.Cells = append(r.Cells, c)
			r.write(t)
		}
	}
	f.connect(s.Agents)
	r.Cut = b.herd("the network cuts all streams", f.cut)
	r.write(t)
	r.Killed = b.herd("the CA is killed", func() { d.CA.Kill(); d.CA.Restart() })
	r.write(t)
	r.Rotation = b.rotate()
	r.write(t)
	r.Storm = b.storm()
	r.Machine.Load = before.Load + " before, " + measure.Here(".").Load + " after"
	r.write(t)
	r.print()
}

// allowFiles raises the limit of open files: each connection is one.
func allowFiles(t *testing.T, n uint64) {
	t.Helper()
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if limit.Cur >= n {
		return
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: n, Max: max(n, limit.Max)}); err != nil {
		t.Fatalf("%d open files are needed, and %d allowed: %v; as root, or after ulimit -n %d", n, limit.Cur, err, n)
	}
}
