package faults_test

// R18: everything at random, in turn, for as long as somebody likes: make soak.

import (
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"merlon.dev/integration/faults"
	"merlon.dev/integration/faults/history"
	"merlon.dev/integration/stage"
)

// soakEvery is what workloads and writers rest between two calls: a day of their
// history must fit into memory.
const soakEvery = 250 * time.Millisecond

// worthJudging is how old a process must be for its size to be compared with what it was
// (I6), and rarely that only one in so many restarts that are drawn is done, so that
// most come to be that old.
const (
	worthJudging = 30 * time.Second
	rarely       = 4
)

func TestSoak(t *testing.T) {
	text := env("MERLON_SOAK")
	if text == "" {
		t.Skip("takes as long as it is told: make soak DURATION=8h")
	}
	lasts, err := time.ParseDuration(text)
	if err != nil {
		t.Fatalf("MERLON_SOAK: %v", err)
	}
	needsRoot(t)
	r := begin(t, "R18", "everything at random, in turn", true)
	w := faults.New(r, faults.Setup{Settings: []string{"trust_refresh_hint: 1s", "x509_svid_ttl: 2m"}, Every: soakEvery, Slow: true, Wide: true})
	w.Peers()
	w.Work(4)
	w.Deny()
	all := w.Lives(worthJudging)
	done := 0
	for ; time.Since(r.begun) < lasts && !t.Failed(); done++ {
		s := drawn(w)
		if s.ends != nil {
			all.End(s.ends(w)...)
		}
		s.do(r, w)
		since := history.Now()
		w.Until("peers call each other after a fault", 20*time.Second, func() error { return w.PeersCall(since) })
		w.Until("writes go on after a fault", 20*time.Second, func() error { return w.TryWrite(0) })
		time.Sleep(time.Duration(w.Rng.IntN(5000)) * time.Millisecond)
		all.Begin()
	}
	all.End()
	r.number("lasted", time.Since(r.begun).Round(time.Second))
	r.number("faults", done)
	r.number("lives judged", len(all.Growths))
	h := w.Finish()
	h.Growths = append(h.Growths, all.Growths...)
	r.result.Seconds = time.Since(r.begun).Seconds()
	r.result = faults.Report(r, r.result, h)
}

// soaking is something that a soak does.
type soaking struct {
	do   func(*run, *faults.World)
	ends func(*faults.World) []*stage.Process // whose life ends; nil: nobody's
}

// drawn is what comes next.
func drawn(w *faults.World) soaking {
	for {
		s := soakings[w.Rng.IntN(len(soakings))]
		if s.ends == nil || w.Rng.IntN(rarely) == 0 {
			return s
		}
	}
}

func theCA(w *faults.World) []*stage.Process    { return []*stage.Process{w.CA} }
func theAgent(w *faults.World) []*stage.Process { return []*stage.Process{w.Agent} }
func both(w *faults.World) []*stage.Process     { return append(theCA(w), w.Agent) }

// soakings are what a soak draws from.
var soakings = []soaking{
	{do: func(_ *run, w *faults.World) { w.Kill("SIGKILL of the CA", readyWithin) }, ends: theCA},
	{do: func(_ *run, w *faults.World) {
		mended := w.Rec.Break("SIGKILL of the agent")
		w.Agent.Kill()
		w.Agent.Restart()
		mended()
	}, ends: theAgent},
	{do: func(_ *run, w *faults.World) {
		for _, p := range both(w) {
			p.Stop()
			p.Restart()
		}
	}, ends: both},
	{do: func(_ *run, w *faults.World) { soakWindow(w, "the CA stands still", w.CA.Pause, w.CA.Resume) }},
	{do: func(_ *run, w *faults.World) { soakWindow(w, "the agent stands still", w.Agent.Pause, w.Agent.Resume) }},
	{do: func(_ *run, w *faults.World) { soakWindow(w, "the agent is cut off", w.Way.Shut, w.Way.Open) }},
	{do: func(_ *run, w *faults.World) {
		soakWindow(w, "the way to the CA is slow", func() { w.Way.Delay(200 * time.Millisecond) }, func() { w.Way.Delay(0) })
	}},
	{do: func(r *run, w *faults.World) {
		mended := w.Rec.Break("a workload stands still", w.ID("/orders"))
		signal(r, w.PeerPID("/orders"), syscall.SIGSTOP)
		time.Sleep(time.Duration(w.Rng.IntN(5000)) * time.Millisecond)
		signal(r, w.PeerPID("/orders"), syscall.SIGCONT)
		time.Sleep(time.Second) // what it had not answered
		mended()
	}},
	{do: func(r *run, w *faults.World) {
		undo := stage.Limit(r, w.CA.PID(), unix.RLIMIT_NOFILE, uint64(openFiles(r, w.CA.PID())+2))
		soakWindow(w, "no files are left to the CA", func() {}, undo)
	}},
	{do: func(r *run, w *faults.World) {
		group := confine(r, w, readyWithin)
		soakWindow(w, "the CA has 128 MiB and a tenth of a processor", func() {}, func() {
			lives(r, w.CA)
			group.Leave()
		})
	}, ends: theCA},
	{do: func(_ *run, w *faults.World) { stage.RotateRoot(w.Domain, func() {}) }},
}

// soakWindow breaks something for up to 5 s.
func soakWindow(w *faults.World, fault string, begin, end func()) {
	mended := w.Rec.Break(fault)
	begin()
	time.Sleep(time.Duration(w.Rng.IntN(5000)) * time.Millisecond)
	end()
	mended()
}
