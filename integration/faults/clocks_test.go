package faults_test

// R7: processes that stand still, and clocks that are set wrong and right again, of one
// process while all others go on.

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"merlon.dev/integration/faults"
	"merlon.dev/integration/faults/history"
	"merlon.dev/integration/stage"
)

const (
	// wrongFor is how long a clock is wrong, at least: by then what is denied is cut.
	wrongFor = 6 * time.Second
	// perJump is how many SVIDs the two agents may get while a clock is wrong, and until
	// all is well: each has at most six, and its own, and tries again ever more rarely.
	perJump = 80
	year    = 365 * 24 * time.Hour
)

// haltAndJump is R7.
func haltAndJump(r *run) {
	// By a CA whose clock is an hour off the agents' SVIDs are still good. Nobody hurries: it
	// is clocks that are looked at, not load.
	w := faults.New(r, faults.Setup{Wide: true, Every: 100 * time.Millisecond, Settings: []string{"x509_svid_ttl: 5m", "agent_svid_ttl: 4h"}})
	w.Peers()
	w.Work(4)
	time.Sleep(500 * time.Millisecond)
	w.Deny()
	halt := time.Duration(r.size(1, 30)) * time.Second
	stop := func(what string, pid int, sick ...string) {
		mended := w.Rec.Break(what+" stands still", sick...)
		signal(r, pid, syscall.SIGSTOP)
		time.Sleep(halt)
		signal(r, pid, syscall.SIGCONT)
		since := history.Now()
		w.Until("peers call each other after "+what+" stood still", r.bound(5*time.Second), func() error { return w.PeersCall(since) })
		mended()
	}
	stop("the CA", w.CA.PID())
	r.must("writes go on", func() error { return w.TryWrite(0) })
	stop("the agent", w.Agent.PID())
	stop("a workload", w.PeerPID("/orders"), w.ID("/orders"))
	r.number("stood still", halt)
	jumpClocks(r, w)
	r.verdict(w)
}

// clockOwner is a process whose clock jumps.
type clockOwner struct {
	name string
	pid  int
	// sick are those who may not be served while it is far off; judges: who must then
	// let nobody in, nor be let in, as nothing is valid by their clock.
	sick, judges []string
	// alarm is the agent that says that the clocks differ; nil: nobody can. Of a CA that
	// takes its SVID for one that has ended, it says that it is not let in.
	alarm *stage.Process
	says  []string
	// bound is how long all may take to work again.
	bound time.Duration
}

const (
	differ   = "clocks of CA and node differ"
	notLetIn = "no connection to the CA"
)

// jumpClocks has each clock jump, one after the other.
func jumpClocks(r *run, w *faults.World) {
	under := []string{w.ID("/web"), w.ID("/orders"), w.ID("/doomed"), w.ID("/stranger"), w.ID("/front")}
	owners := []clockOwner{
		{"a service", w.PeerPID("/orders"), []string{w.ID("/orders")}, []string{w.ID("/orders")}, nil, nil, 15 * time.Second},
		{"a sidecar", w.Sidecar.PID(), []string{w.ID("/front")}, []string{w.ID("/front")}, nil, nil, 15 * time.Second},
		{"an agent", w.Agent.PID(), under, nil, w.Agent, []string{differ}, 30 * time.Second},
		{"the CA", w.CA.PID(), nil, nil, w.Second.Agent, []string{differ, notLetIn}, 75 * time.Second},
	}
	offs := []time.Duration{10 * time.Second, -10 * time.Second, time.Hour, -time.Hour, year, -year}
	if !r.full {
		owners, offs = owners[:1], []time.Duration{time.Hour}
	}
	most, jumps := 0, 0
	for _, owner := range owners {
		for _, off := range offs {
			most = max(most, jump(r, w, owner, off))
			jumps++
		}
	}
	r.number("clocks set wrong and right", jumps)
	r.number("SVIDs for agents and their workloads in one jump, at most", most)
	if r.full {
		w.Kill("SIGKILL of the CA with a clock that is right", r.bound(readyWithin))
		r.must("both agents are connected", w.Connected)
		r.number("tests of the SDK and of bans", goTest(r, "integration", "TestBanDoesNotDependOnClocks|TestServicesWhenClocksJump", "MERLON_CLOCKS=1"))
	}
}

// jump has one clock be off for a while, and says how many SVIDs it took.
func jump(r *run, w *faults.World, owner clockOwner, off time.Duration) (issued int) {
	r.Helper()
	far := off.Abs() > time.Minute
	what := fmt.Sprintf("the clock of %s is off by %v", owner.name, off)
	var sick []string
	if far {
		sick = owner.sick
	}
	before, alarms := issuedTo(r, w), owner.alarms()
	mended := w.Rec.Break(what, sick...)
	begun := history.Now()
	stage.SetClock(r, owner.pid, off)
	if far && owner.alarm != nil {
		r.must(what+": an alarm", func() error {
			if owner.alarms() == alarms {
				return errors.New("no agent says that the clocks differ")
			}
			return nil
		})
	}
	time.Sleep(wrongFor - time.Duration(history.Now()-begun))
	if far {
		nobodyIsLetIn(r, w, what, owner.judges, begun+(5*time.Second).Nanoseconds())
	}
	stage.SetClock(r, owner.pid, 0)
	since := history.Now()
	w.Until("peers call each other when the clock of "+owner.name+" is right again", r.bound(owner.bound), func() error { return w.PeersCall(since) })
	w.Until("the agent is connected when the clock of "+owner.name+" is right again", r.bound(owner.bound), w.Connected)
	mended()
	w.Until("writes go on when the clock of "+owner.name+" is right again", r.bound(5*time.Second), func() error { return w.TryWrite(0) })
	issued = issuedTo(r, w) - before
	if issued > perJump {
		r.Errorf("%s: %d SVIDs were issued; want at most %d, as more is a storm", what, issued, perJump)
	}
	return issued
}

// nobodyIsLetIn waits until each of those by whose clock no SVID is valid has refused
// a new connection, or was refused one, and looks for any that was not.
func nobodyIsLetIn(r *run, w *faults.World, what string, judges []string, since int64) {
	r.Helper()
	r.must(what+": new connections are refused", func() error {
		refused := make(map[string]bool)
		for _, op := range w.Rec.History().Ops {
			if op.Kind != history.Connect || op.Begin < since {
				continue
			}
			for _, judge := range judges {
				if op.Client != judge && op.Key != judge {
					continue
				}
				if op.Outcome == history.OK {
					r.Fatalf("%s, so no SVID is valid by it; but %s connects to %s", what, op.Client, op.Key)
				}
				refused[judge] = true
			}
		}
		if len(refused) < len(judges) {
			return errors.New("nobody has tried")
		}
		return nil
	})
}

// alarms counts how often the agent has said so.
func (o clockOwner) alarms() (n int) {
	for _, text := range o.says {
		n += strings.Count(o.alarm.Log(), text)
	}
	return n
}

// issuedTo counts the SVIDs that the real agents got, for themselves and workloads, by
// the audit log.
func issuedTo(r *run, w *faults.World) (n int) {
	r.Helper()
	log, err := os.ReadFile(filepath.Join(w.Data(), "audit.jsonl"))
	if err != nil {
		r.Fatal(err)
	}
	for line := range bytes.Lines(log) {
		var record history.Record
		if err := json.Unmarshal(line, &record); err != nil {
			continue // it is being written
		}
		real := record.Actor == w.ID("/agent/one") || record.Actor == w.ID("/agent/two")
		if real && (record.Type == "issue" || record.Type == "renew") {
			n++
		}
	}
	return n
}
