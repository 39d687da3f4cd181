package faults_test

// R5: an agent that dies.

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"merlon.dev/integration/faults"
	"merlon.dev/integration/faults/failpoint"
	"merlon.dev/integration/faults/history"
	"merlon.dev/integration/stage"
)

// halfSaid is where an agent has announced a policy, and has not sent it to services.
const halfSaid = "policy announced, not sent"

// mortalAgent is an agent that can die there.
func mortalAgent(r *run) string {
	const file, snippet = "agent/internal/local/programs.go", "\t\tif m := s.programs(ctx, view.Entries); len(view.Entries) > 0 && !proto.Equal(m, last) {\n"
	return stage.Changed(r, "merlon-agent-mortal", "agent/cmd/merlon-agent",
		stage.Change{File: file, Old: snippet, New: snippet +
			"\t\t\tif armed, _ := os.ReadFile(os.Getenv(failpoint.Env)); last != nil && len(armed) > 0 {\n" +
			"\t\t\t\ttime.Sleep(300 * time.Millisecond) // what is announced gets there meanwhile\n" +
			"\t\t\t\tfailpoint.At(\"" + halfSaid + "\")\n\t\t\t}\n"},
		stage.Change{File: file, Old: "import (\n", New: "import (\n\t\"os\"\n\t\"merlon.dev/integration/faults/failpoint\"\n"},
	)
}

// killAgent is R5.
func killAgent(r *run) {
	armed := filepath.Join(r.TempDir(), "point")
	w := faults.New(r, faults.Setup{Agent: mortalAgent(r), Env: []string{failpoint.Env + "=" + armed}})
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
	dieHalfSaid(r, w, armed)
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

// dieHalfSaid has the agent die between the announcement of a policy, of which one comes
// each second, and its content. Services go on by the last, as without an agent.
func dieHalfSaid(r *run, w *faults.World, armed string) {
	const said = "agent went before it sent the policy that it had announced"
	r.Helper()
	for heard := w.PeersSaid(said); w.PeersSaid(said) == heard; { // it may die before they have heard
		mended := w.Rec.Break("SIGKILL of the agent, " + halfSaid)
		if err := failpoint.Arm(armed, halfSaid, 1); err != nil {
			r.Fatal(err)
		}
		r.must("the agent dies, "+halfSaid, func() error {
			by, ended := w.Agent.Ended()
			if ended && by != syscall.SIGKILL {
				r.Fatalf("the agent ended by itself:\n%s", w.Agent.Log())
			}
			if !ended {
				return errors.New("it lives")
			}
			return nil
		})
		if err := failpoint.Disarm(armed); err != nil {
			r.Fatal(err)
		}
		time.Sleep(3 * time.Second) // for longer than an agent that is there has to send it
		since := history.Now()
		r.must("peers call each other without an agent", func() error { return w.PeersCall(since) })
		w.Agent.Restart()
		mended()
		w.Until("the agent serves again", r.bound(time.Second), func() error { _, err := fetch(w); return err })
	}
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
