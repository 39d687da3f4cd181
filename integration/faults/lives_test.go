package faults_test

// What a process leaks is found although it is started again before the end.

import (
	"testing"
	"time"

	"merlon.dev/integration/faults"
	"merlon.dev/integration/faults/history"
	"merlon.dev/integration/faults/invariant"
)

func TestLivesFindWhatARestartHides(t *testing.T) {
	t.Parallel()
	w := faults.New(t, faults.Setup{CA: brokenCA(t), Env: []string{brokenEnv + "=I6"}})
	w.Peers()
	lives := w.Lives(0)
	w.Work(4)
	until(t, "the CA has signed", func() bool {
		n := w.Snapshot().Count()
		return n["sign ok"]+n["sign failed"] > 40
	})
	lives.End(w.CA)
	w.Kill("SIGKILL of the CA", readyWithin)
	lives.Begin()
	if len(lives.Growths) != 1 {
		t.Fatalf("lives that were judged: %d, want that of the CA alone", len(lives.Growths))
	}
	if found := invariant.Sizes(&history.History{Growths: lives.Growths}); len(found) != 1 {
		t.Errorf("nobody noticed a goroutine for each SVID: %+v", lives.Growths)
	}
	lives.Worth = time.Hour
	if lives.End(); len(lives.Growths) != 1 {
		t.Error("lives that are too short were judged")
	}
}
