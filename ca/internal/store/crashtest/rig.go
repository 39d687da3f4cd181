package crashtest

// The parent's side: starts children, kills them at random moments, and
// collects what they say.

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// rig runs children on one store, one after the other.
type rig struct {
	t       testing.TB
	target  target
	program string   // what runs as a child
	wrap    []string // a command to run it under, e.g. strace
	rng     *rand.Rand
	lives   int
	kills   int
	history *history
	// expected: what is found is no surprise, and its history is not kept.
	expected bool
}

// newRig returns a rig whose random choices follow from seed. program is empty
// for the test binary itself.
func newRig(t testing.TB, where target, program string, seed uint64) *rig {
	t.Helper()
	if program == "" {
		var err error
		if program, err = os.Executable(); err != nil {
			t.Fatal(err)
		}
	}
	return &rig{
		t: t, target: where, program: program, history: newHistory(!where.clustered()),
		rng: rand.New(rand.NewPCG(seed, 0)), //nolint:gosec // replayed by its seed
	}
}

// patience bounds what a child is given to open, and a whole Finish.
const patience = time.Minute

// process is a running child.
type process struct {
	cmd    *exec.Cmd
	opened chan struct{} // closed with the first line
	ended  chan struct{} // closed when stdout has ended
	stderr bytes.Buffer

	mu  sync.Mutex
	out bytes.Buffer // guarded by mu
}

// launch starts a child with a life.
func (r *rig) launch(l life) *process {
	r.t.Helper()
	told, err := json.Marshal(l)
	if err != nil {
		r.t.Fatal(err)
	}
	args := append(slices.Clip(r.wrap), r.program)
	p := &process{cmd: exec.Command(args[0], args[1:]...), opened: make(chan struct{}), ended: make(chan struct{})} //nolint:gosec // ourselves
	p.cmd.Env = append(os.Environ(), lifeVariable+"="+string(told))
	p.cmd.Stderr = &p.stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // what it runs under ends with it
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		r.t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		p.signal() // most often gone already
		<-p.ended
	})
	go p.collect(stdout)
	return p
}

// signal sends SIGKILL to the child, and to what it runs under.
func (p *process) signal() { _ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL) }

// collect reads stdout to its end.
func (p *process) collect(stdout io.Reader) {
	defer close(p.ended)
	buf := make([]byte, 64<<10)
	for first := true; ; first = false {
		n, err := stdout.Read(buf)
		p.mu.Lock()
		p.out.Write(buf[:n])
		p.mu.Unlock()
		if first {
			close(p.opened)
		}
		if err != nil {
			return
		}
	}
}

// bury waits for the end of a child that was killed, or ends by itself, and
// returns what it said.
func (p *process) bury() (lines []line, dead int64, err error) {
	<-p.ended
	err = p.cmd.Wait()
	dead = now()
	lines, broken := parseLines(p.out.Bytes())
	return lines, dead, errors.Join(broken, err)
}

// life is the next one: everything is watched from where the last watch ended,
// one group too, and one watch begins anew somewhere in the past.
func (r *rig) life() life {
	r.lives++
	from := r.history.first()
	last := r.history.lastSeen(everything, from)
	behind := min(last-from, r.rng.Uint64N(400))
	group := fmt.Sprintf("g2/@%d", from)
	return life{
		Number: r.lives, Seed: r.rng.Uint64(), Target: r.target, Writers: 32, Readers: 4, Large: 40,
		Watches: []watchFrom{
			{everything, "", last},
			{group, "g2/", r.history.lastSeen(group, from)},
			{fmt.Sprintf("@%d@%d", last-behind, r.lives), "", last - behind},
		},
	}
}

// killOne runs one life and ends it at a random moment: often in the midst of
// its work, now and then while it opens the store.
func (r *rig) killOne() {
	r.t.Helper()
	l := r.life()
	if !r.target.clustered() {
		l.Target.RecentRevisions = []int{2, 64, 4096}[r.rng.IntN(3)]
	}
	p := r.launch(l)
	if early := time.Duration(r.rng.IntN(100)) * time.Millisecond; r.rng.IntN(6) == 0 {
		time.Sleep(early)
	} else {
		r.await(p, p.opened, "opening the store")
		time.Sleep(time.Duration(10+r.rng.IntN(400)) * time.Millisecond)
	}
	r.kill(p)
}

// kill sends SIGKILL and adds what the child had said.
func (r *rig) kill(p *process) {
	r.t.Helper()
	p.signal()
	lines, dead, err := p.bury()
	r.history.add(lines, dead)
	if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != -1 {
		r.history.troubled("a child ended by itself: %v: %s", err, p.lastWords())
	}
	r.kills++
}

func (p *process) lastWords() string {
	const most = 2_000
	s := strings.TrimSpace(p.stderr.String())
	return s[:min(len(s), most)]
}

// await waits for a child's channel, or gives the test up.
func (r *rig) await(p *process, done <-chan struct{}, what string) {
	r.t.Helper()
	select {
	case <-done:
	case <-time.After(patience):
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGQUIT) // where does it hang?
		select {
		case <-p.ended:
		case <-time.After(10 * time.Second):
		}
		p.signal()
		_, _, err := p.bury()
		r.t.Fatalf("a child hung: %s: %v: %s", what, err, p.stderr.String())
	}
}

// finish reads everything that is left, and closes the store as it should be.
func (r *rig) finish() {
	r.t.Helper()
	l := r.life()
	l.Finish, l.Watches = true, l.Watches[:1]
	p := r.launch(l)
	r.await(p, p.ended, "reading all that is left")
	lines, dead, err := p.bury()
	r.history.add(lines, dead)
	if err != nil {
		r.history.troubled("the store cannot be read: %v: %s", err, p.lastWords())
	}
}

// round kills that often and returns what broke a promise.
func (r *rig) round(kills int) []string {
	r.t.Helper()
	for range kills {
		r.killOne()
		if len(r.history.trouble) > 0 {
			break // the store does not open: more kills tell nothing new
		}
	}
	r.finish()
	found := r.history.check()
	ok, refused, open := r.history.counts()
	r.t.Logf("%d kills so far; this history: %d calls answered, %d refused, %d without effect or answer, %d revisions watched",
		r.kills, ok, refused, open, len(r.history.watches[everything]))
	if len(found) > 0 && !r.expected {
		r.keep()
	}
	r.history = r.history.next()
	return found
}

// keep writes the history beside the test, for whoever looks for the cause.
func (r *rig) keep() {
	r.t.Helper()
	path := filepath.Join(os.TempDir(), fmt.Sprintf("crashtest-%d-%d.jsonl", os.Getpid(), r.lives))
	f, err := os.Create(path)
	if err != nil {
		r.t.Log(err)
		return
	}
	defer f.Close()
	enc := json.NewEncoder(f)
	for _, e := range r.history.order {
		_ = enc.Encode(map[string]any{"id": e.id, "from": e.from, "to": e.to, "outcome": e.outcome, "call": e.call, "result": e.result})
	}
	for name, batches := range r.history.watches {
		for _, b := range batches {
			_ = enc.Encode(map[string]any{"watch": name, "batch": b})
		}
	}
	r.t.Logf("the history is in %s", path)
}
