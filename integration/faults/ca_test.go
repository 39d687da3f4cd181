package faults_test

// Rows about a CA that dies or is away: R1, R4, R11.

import (
	"errors"
	"fmt"
	"strconv"
	"time"

	"merlon.dev/integration/faults"
	"merlon.dev/integration/faults/history"
	"merlon.dev/integration/stage"
)

// readyWithin is the promise for a CA that starts again.
const readyWithin = 2 * time.Second

// killCA is R1.
func killCA(r *run) {
	fatal := fatalCA(r)
	w := faults.New(r, faults.Setup{Settings: []string{"trust_refresh_hint: 1s"}})
	w.Peers()
	w.Work(r.size(8, 32))
	w.Merlon("authority", "prepare", "--kind", "x509-root")
	kills := r.kills(3, 1000)
	for i := range kills {
		time.Sleep(time.Duration(50+w.Rng.IntN(450)) * time.Millisecond)
		w.Kill("SIGKILL of the CA", r.bound(readyWithin))
		if i == 1 {
			denyInForce(r, w)
		}
	}
	next, err := stage.AuthorityIn(w.Domain, "x509-root", "published")
	if err != nil {
		r.Errorf("the root that was prepared before the kills: %v", err)
	} else {
		stage.Done(w.Domain, "authority", "activate", next.ID)
	}
	killAtPoints(r, w, fatal, r.size(1, 5))
	r.number("kills", kills)
	r.verdict(w)
}

// denyInForce denies doomed, and waits until that shows: an agent that the CA does not
// live long enough to tell cannot know.
func denyInForce(r *run, w *faults.World) {
	r.Helper()
	r.must("the agent follows", w.Connected)
	since := history.Now()
	w.Deny()
	r.must("doomed is let in no more", func() error {
		for _, op := range w.Rec.History().Ops {
			if op.Kind == history.Connect && op.Client == w.ID("/doomed") && op.Outcome == history.Failed && op.Begin > since {
				return nil
			}
		}
		return errors.New("no connection was refused")
	})
}

// kills is KILLS where that is set.
func (r *run) kills(short, full int) int {
	r.Helper()
	n := r.size(short, full)
	if text := env("KILLS"); text != "" && r.full {
		var err error
		if n, err = strconv.Atoi(text); err != nil {
			r.Fatalf("KILLS: %v", err)
		}
	}
	return n
}

// loseCA is R4: for less than SVIDs live and, in the full form, until they have ended.
func loseCA(r *run) {
	const ttl = 16 * time.Second
	w := faults.New(r, faults.Setup{Settings: []string{"x509_svid_ttl: " + ttl.String()}})
	w.Peers()
	w.Work(4)
	time.Sleep(time.Second)
	w.Deny()
	outage := func(away time.Duration) {
		mended := w.Rec.Break("the CA is away")
		w.CA.Kill()
		time.Sleep(away)
		mended()
		w.RestartCA(r.bound(readyWithin))
	}
	for range r.size(1, 20) {
		outage(4 * time.Second) // of the 8 s before an SVID ends that are left when it is renewed
		time.Sleep(ttl / 4)
	}
	if r.full {
		outliveSVIDs(r, w, ttl)
	}
	r.number("outage", fmt.Sprint("4 s of ", ttl))
	r.verdict(w)
}

// outliveSVIDs lets the CA be away until all SVIDs have ended.
func outliveSVIDs(r *run, w *faults.World, ttl time.Duration) {
	pid := w.Agent.PID()
	began := history.Now()
	// From the earliest end of an SVID on, calls may fail; from the last on, none may succeed.
	ended := w.Rec.Break("SVIDs end while the CA is away", w.PeerIDs()...)
	w.CA.Kill()
	r.must("calls end", func() error {
		if err := w.PeersCall(history.Now() - time.Second.Nanoseconds()); err == nil {
			return errors.New("peers still call each other")
		}
		return nil
	})
	r.number("calls ended after", time.Duration(history.Now()-began).Round(time.Second))
	time.Sleep(time.Second)
	for _, op := range w.Rec.History().Ops {
		if (op.Kind == history.Beat || op.Kind == history.Call || op.Kind == history.Connect) && op.Outcome == history.OK && op.Begin > began+(ttl+2*time.Second).Nanoseconds() {
			r.Errorf("with an SVID that has ended: %+v", op)
		}
	}
	if now := w.Agent.PID(); now != pid {
		r.Errorf("the agent was started anew")
	}
	w.RestartCA(r.bound(readyWithin))
	back := history.Now()
	// By then the agent asks every 10 s, more or less (agent/internal/caclient/tour.go).
	w.Until("peers call each other again", r.bound(20*time.Second), func() error { return w.PeersCall(back) })
	ended()
}

// rotate is R11.
func rotate(r *run) {
	w := faults.New(r, faults.Setup{Settings: []string{"trust_refresh_hint: 1s"}, Slow: true})
	w.Peers()
	w.Work(2)
	time.Sleep(300 * time.Millisecond)
	w.Deny()
	steps := 0
	rounds := r.size(1, 20)
	for range rounds {
		stage.RotateRoot(w.Domain, func() {
			switch steps++; steps % 3 {
			case 0:
				w.Kill("SIGKILL of the CA", r.bound(readyWithin))
			case 1:
				mended := w.Rec.Break("the agent is cut off")
				w.Way.Shut()
				time.Sleep(500 * time.Millisecond)
				w.Way.Open()
				mended()
			case 2:
				mended := w.Rec.Break("the way to the CA is slow")
				w.Way.Delay(200 * time.Millisecond)
				time.Sleep(500 * time.Millisecond)
				w.Way.Delay(0)
				mended()
			}
		})
	}
	since := history.Now()
	r.must("peers call each other under the new root", func() error { return w.PeersCall(since) })
	r.number("rotations", rounds)
	if r.full {
		r.number("at full load", goTest(r, "integration", "TestRootRotatesUnderHandshakes|TestRootOfTwoReplicasRotates", "ROTATIONS=20", "HANDSHAKES=500", "WORKLOADS=200"))
	}
	r.verdict(w)
}
