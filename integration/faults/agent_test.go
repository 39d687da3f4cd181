package faults_test

// R5: an agent that dies.

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"merlon.dev/integration/faults"
	"merlon.dev/integration/faults/history"
)

// killAgent is R5.
func killAgent(r *run) {
	w := faults.New(r, faults.Setup{})
	registerMe(r, w)
	w.Peers()
	w.Work(4)
	var before *x509svid.SVID
	r.must("an SVID is served", func() (err error) { before, err = fetch(w); return err })
	for i := range r.size(3, 200) {
		time.Sleep(time.Duration(w.Rng.IntN(500)) * time.Millisecond)
		restartAgent(r, w, "the agent serves again")
		if i == 0 {
			w.Deny()
		}
	}
	// The same while nobody can issue anything: what is served was kept. It is written down
	// the more rarely the longer that takes (agent/internal/keeper).
	r.must("the agent holds what it served", func() (err error) { before, err = fetch(w); return err })
	served := time.Now()
	r.must("the agent has written down what it served", func() error { return w.Saved(served) })
	away := w.Rec.Break("the CA is away")
	w.CA.Kill()
	restartAgent(r, w, "the agent serves what it has kept")
	if now, err := fetch(w); err != nil || now.Certificates[0].SerialNumber.Cmp(before.Certificates[0].SerialNumber) != 0 {
		r.Errorf("while the CA is away the restarted agent serves %v, %v; want the SVID that it had", now, err)
	}
	noKeyIn(r, w.AgentData(), before)
	w.RestartCA(r.bound(readyWithin))
	away()
	back := history.Now()
	r.must("peers call each other", func() error { return w.PeersCall(back) })
	r.verdict(w)
}

// registerMe makes this very process a workload.
func registerMe(r *run, w *faults.World) {
	r.Helper()
	exe, err := os.Executable()
	if err != nil {
		r.Fatal(err)
	}
	w.Register("/me", w.AgentID(), "path:"+exe)
}

// restartAgent kills the agent and notes how long its Workload API was away.
func restartAgent(r *run, w *faults.World, what string) {
	mended := w.Rec.Break("SIGKILL of the agent")
	w.Agent.Kill()
	w.Agent.Restart()
	mended()
	w.Until(what, r.bound(time.Second), func() error { _, err := fetch(w); return err })
}

// fetch asks the Workload API for the SVID of this very process.
func fetch(w *faults.World) (*x509svid.SVID, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
	defer cancel()
	return workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr(w.WorkloadAPI))
}

// noKeyIn looks for the SVID's private key in all files of a folder, as the number
// that it is.
func noKeyIn(r *run, dir string, svid *x509svid.SVID) {
	key, ok := svid.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		r.Fatalf("the key is a %T", svid.PrivateKey)
	}
	secret, err := key.Bytes()
	if err != nil {
		r.Fatal(err)
	}
	files := 0
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		text, err := os.ReadFile(path)
		if err == nil && bytes.Contains(text, secret) {
			err = fmt.Errorf("%s holds the private key of %s", path, svid.ID)
		}
		files++
		return err
	})
	if err != nil || files == 0 {
		r.Errorf("look for the key in %d files: %v", files, err)
	}
}
