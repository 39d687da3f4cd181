package faults_test

// The durable steps of the CA, and a build that dies at each: R1. Before and after
// each write, sync and rename lies a point; what is not durable yet at one of them is
// what a SIGKILL there must not have let anybody believe.

import (
	"context"
	"fmt"
	"path"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"merlon.dev/ca/capb"
	"merlon.dev/integration/faults"
	"merlon.dev/integration/faults/failpoint"
	"merlon.dev/integration/stage"
)

// point is a place in the CA's code: before or, if so said, after a snippet that is in
// its file once.
type point struct {
	name          string
	file, snippet string
	after         bool
	passed        moment
}

// moment says when a CA comes by a point.
type moment string

const (
	atWork     moment = "at work"    // writers and agents see to it
	preparing  moment = "preparing"  // a root is made, and one that nobody wants removed
	activating moment = "activating" // a root is replaced
	starting   moment = "starting"   // on the data of before
	beginning  moment = "beginning"  // in an empty data_dir
)

// points in the order of the steps. Snippets follow the sources; the build fails when
// one is not found.
var points = []point{
	// A transaction, from the batch to the answer.
	{"store: batch taken, not run", "ca/internal/store/badger/commit.go", "\t\t\ts.commit(&done)\n", false, atWork},
	{"store: batch run, not in Badger's log", "ca/internal/store/badger/commit.go", "\tif err := s.commitAt(txn, b.revision); err != nil {\n", false, atWork},
	{"store: batch in Badger's log, head not written", "ca/internal/store/badger/commit.go", "\ts.tip, s.compacted = tip, compacted\n\treturn nil\n", false, atWork},
	{"head: written, not synced", "ca/internal/store/badger/head.go", "\tif err := h.sync(); err != nil {\n", false, atWork},
	{"head: synced", "ca/internal/store/badger/head.go", "\t\treturn fmt.Errorf(\"sync %s: %w\", headName, err)\n\t}\n", true, atWork},
	{"store: head synced, nothing published", "ca/internal/store/badger/publish.go", "\tfailed := s.failed.Load()\n", false, atWork},
	{"store: published, nobody answered", "ca/internal/store/badger/publish.go", "\tfor _, b := range batches {\n\t\trefused := b.refused\n", false, atWork},
	{"store: answered", "ca/internal/store/badger/publish.go", "\t\tb.answer(refused)\n\t}\n", true, atWork},

	// What is recorded: acts, and SVIDs before they leave.
	{"audit log: written, not synced", "ca/internal/audit/writer.go", "\tif err := l.sync(w.file); err != nil {\n", false, atWork},
	{"audit log: synced, nobody answered", "ca/internal/audit/writer.go", "\tw.end, w.ahead.end = next, w.ahead.end+int64(n)\n", false, atWork},
	{"audit log: next file made, not linked", "ca/internal/audit/segment.go", "\tif err := os.Link(l.path, name); err != nil {\n", false, atWork},
	{"audit log: file has both names", "ca/internal/audit/segment.go", "\tif err := os.Rename(next.Name(), l.path); err != nil {\n", false, atWork},
	{"audit log: next file in place, not in use", "ca/internal/audit/segment.go", "\tl.turn(w, next)\n", false, atWork},
	{"act: begun in the log, not done", "ca/internal/api/acts.go", "\terr = do(ctx)\n\tif a.ended {\n", false, atWork},
	{"entry: stored, not in the log", "ca/internal/api/admin.go", "\te.Revision = res.Revision\n\tif err := s.done(ctx, audit.Record{Detail: \"create entry\"", false, atWork},
	{"SVID: signed, not in the log", "ca/internal/api/node.go", "\t// No SVID leaves before all records are on disk", false, atWork},
	{"SVID: in the log, not sent", "ca/internal/api/node.go", "\treturn resp, nil\n}\n\n// signing is one Sign call", false, atWork},

	// A policy bundle.
	{"policy: content stored, no head", "ca/internal/release/release.go", "\tput, err := next.put()\n\tif err != nil {\n\t\treturn nil, err\n\t}\n\tres, err :=", false, atWork},
	{"policy: head stored, content of before not dropped", "ca/internal/release/release.go", "\tunnamed, kept := before.blobs(), next.blobs()\n", false, atWork},

	// A rotation: keys folder and store.
	{"key: files synced, no name", "ca/internal/upstream/keydir.go", "\t// Fails when the generation exists: a folder", false, preparing},
	{"key: has its name, not synced", "ca/internal/upstream/keydir.go", "\tif err := os.Rename(temp, d.folder(what, number)); err != nil {\n\t\treturn err\n\t}\n", true, preparing},
	{"rotation: key put away, not in the store", "ca/authorities.go", "\tif _, _, err := a.take(ctx, rotation.Command{Verb: rotation.Prepare, New: made}); err != nil {\n", false, preparing},
	{"rotation: prepared, not published", "ca/authorities.go", "\t_, revision, err := a.take(ctx, rotation.Command{Verb: rotation.Publish, ID: made.ID})\n", false, preparing},
	{"rotation: step judged, not stored", "ca/internal/trust/step.go", "\t\tres, err := d.Store.Txn(ctx, step.Cmps, step.Ops, nil)\n\t\tif err != nil {\n\t\t\treturn nil, 0, fmt.Errorf(\"write the authorities", false, preparing},
	{"rotation: step stored, not followed", "ca/internal/trust/step.go", "\t\tif res.Succeeded {\n\t\t\treturn step, res.Revision, nil\n", false, preparing},
	{"rotation: signs under another root, not in the log", "ca/authorities.go", "\tca := a.keys.X509()\n\ta.log.LogAttrs(ctx, slog.LevelInfo, \"CA signs under another root\"", false, activating},
	{"key: to be removed", "ca/internal/upstream/keydir.go", "\tif err := os.Rename(d.folder(what, number), gone); err != nil {\n", false, preparing},
	{"key: has lost its name, is there", "ca/internal/upstream/keydir.go", "\tif name != \"\" && d.kms != nil {\n\t\terr = d.kms.remove(name)\n", false, preparing},

	// A start: the store is examined in a copy and opened, the tree of the log saved.
	{"store: copied, not examined", "ca/internal/store/badger/scratch.go", "\tif err := dropUseless(scratch); err != nil {\n", false, starting},
	{"store: examined, not opened", "ca/internal/store/badger/open.go", "\tif err := errors.Join(dropUseless(dir), dropStaged(dir)); err != nil {\n", false, starting},
	{"store: opened, head not written", "ca/internal/store/badger/open.go", "\tif err := s.head.write(s.tip, false); err != nil {\n", false, starting},
	{"store: next log made, not synced", "ca/internal/store/badger/wal.go", "\tif err := durable.SyncDir(g.dir); err != nil { // Badger does not\n", false, starting},
	{"tree: tiles synced, no checkpoint", "ca/internal/merkle/save.go", "\tif err := state(size); err != nil {\n", false, starting},
	{"tree: checkpoint in place, tiles of before not removed", "ca/internal/merkle/save.go", "\treturn t.removePartial(t.saved(size, tiles), size)\n", false, starting},
	{"file: written, not synced", "sdk/durable/durable.go", "\tif err == nil {\n\t\terr = tmp.Sync()\n", false, starting},
	{"file: synced, not renamed", "sdk/durable/durable.go", "\tif err := os.Rename(tmp.Name(), filepath.Join(dir, name)); err != nil {\n", false, starting},
	{"file: renamed, not synced", "sdk/durable/durable.go", "\treturn SyncDir(dir)\n}\n\n// RemoveUnfinished", false, starting},

	// The first start.
	{"new store: head written, nothing else", "ca/internal/store/badger/open.go", "\tf.head, f.headErr = headSlot{serial: h.serial}, nil\n", false, beginning},
	{"new store: first revision not written", "ca/internal/store/badger/open.go", "\treturn txn.CommitAt(1, nil)\n", false, beginning},
	{"new store: first revision written, not in the head", "ca/internal/store/badger/open.go", "\tif s.head, err = openHead(s.dir, found.head); err != nil {\n", false, beginning},
	{"epoch: not noted", "ca/internal/opening/epoch.go", "\tif err := durable.WriteFile(cfg.DataDir, EpochFile", false, beginning},
	{"tree: a folder made, no tile", "ca/internal/merkle/save.go", "\t\tif err := writeSynced(path, content); err != nil {\n", false, beginning},
}

// fatalCA is a CA with all points, whose audit log turns to the next file early.
func fatalCA(t testing.TB) string {
	changes := []stage.Change{{File: "ca/internal/audit/segment.go", Old: "maxSegment = 64 << 20", New: "maxSegment = 16 << 10"}}
	imported := make(map[string]bool)
	for _, p := range points {
		if !imported[p.file] {
			imported[p.file] = true
			clause := "package " + path.Base(path.Dir(p.file)) + "\n"
			changes = append(changes, stage.Change{File: p.file, Old: clause, New: clause + "\nimport \"merlon.dev/integration/faults/failpoint\"\n"})
		}
		call := fmt.Sprintf("\tfailpoint.At(%q)\n", p.name)
		changed := call + p.snippet
		if p.after {
			changed = p.snippet + call
		}
		changes = append(changes, stage.Change{File: p.file, Old: p.snippet, New: changed})
	}
	return stage.Changed(t, "merlon-ca-fatal", "ca/cmd/merlon-ca", changes...)
}

// killAtPoints has the CA, as fatalCA builds it, die at each durable step, rounds times.
func killAtPoints(r *run, w *faults.World, fatal string, rounds int) {
	armed := filepath.Join(r.TempDir(), "point")
	released := w.CA.Name
	w.CA.Name, w.CA.Env = fatal, append(w.CA.Env, failpoint.Env+"="+armed)
	w.Kill("SIGKILL of the CA", r.bound(readyWithin))
	for round := range rounds {
		for _, p := range points {
			if p.passed == beginning {
				dieBeginning(r, fatal, p)
			} else {
				dieAt(r, w, p, armed, round)
			}
		}
	}
	w.CA.Name = released
	w.Kill("SIGKILL of the CA", r.bound(readyWithin))
	r.number("kills at durable steps", fmt.Sprintf("%d, %d at each of %d", rounds*len(points), rounds, len(points)))
}

// dieAt has the CA of a world die at a point, and come back: the first time that it
// passes that, in later rounds at work the third at the latest.
func dieAt(r *run, w *faults.World, p point, armed string, round int) {
	r.Helper()
	mended := w.Rec.Break("SIGKILL of the CA, " + p.name)
	times := 1
	if p.passed == atWork && round > 0 {
		times += w.Rng.IntN(3)
	}
	if p.passed == starting {
		w.CA.Kill()
	}
	if err := failpoint.Arm(armed, p.name, times); err != nil {
		r.Fatal(err)
	}
	if p.passed == starting {
		w.CA.Restart()
	}
	diesAt(r, w.CA, p, armed, func() {
		switch p.passed {
		case preparing:
			prepareOrRevoke(w)
		case activating:
			activateOrPrepare(w)
		}
	})
	mended()
	w.RestartCA(r.bound(readyWithin))
}

// dieBeginning has a CA of its own die at its first start, and start again.
func dieBeginning(r *run, fatal string, p point) {
	r.Helper()
	dir := stage.Dir(r)
	armed, data := filepath.Join(dir, "point"), filepath.Join(dir, "data")
	if err := failpoint.Arm(armed, p.name, 1); err != nil {
		r.Fatal(err)
	}
	health := fmt.Sprintf("127.0.0.1:%d", stage.FreePort(r))
	ca := stage.Start(r, fatal, []string{failpoint.Env + "=" + armed}, "-trust-domain", "shop.test", "-data-dir", data,
		"-admin-socket", filepath.Join(dir, "ca", "admin.sock"), "-address", "127.0.0.1:0", "-https-address", "127.0.0.1:0", "-health-address", health)
	diesAt(r, ca, p, armed, func() {})
	ca.Restart()
	r.must("the CA is ready after "+p.name, func() error { return stage.Ready(health) })
	ca.Stop()
	if stdout, stderr, err := stage.Run(r.Context(), r, nil, "merlon", "log", "verify", "--data-dir", data); err != nil {
		r.Errorf("after %s: %v\n%s%s", p.name, err, stdout, stderr)
	}
}

// diesAt waits until a CA is dead by the point that is armed, and by nothing else.
func diesAt(r *run, ca *stage.Process, p point, armed string, meanwhile func()) {
	r.Helper()
	by, ended := ca.Ended()
	const patience = 4 * time.Minute // agents have to acknowledge a root before it may sign
	for deadline := time.Now().Add(patience); !ended; by, ended = ca.Ended() {
		if time.Now().After(deadline) {
			r.Fatalf("the CA has not come by %q within %s", p.name, patience)
		}
		meanwhile()
		time.Sleep(5 * time.Millisecond)
	}
	if died := failpoint.Died(armed); by != syscall.SIGKILL || died != p.name {
		r.Fatalf("the CA was to die at %q; it ended by %v, at %q:\n%s", p.name, by, died, ca.Log())
	}
	if err := failpoint.Disarm(armed); err != nil {
		r.Fatal(err)
	}
}

// prepareOrRevoke prepares a root, and revokes one that is not in use yet. What is
// refused, or not answered, comes again.
func prepareOrRevoke(w *faults.World) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if next := rootIDs(ctx, w, "published"); len(next) > 0 {
		w.Admin(0).RevokeAuthority(ctx, &capb.RevokeAuthorityRequest{AuthorityId: next[0]})
	} else {
		w.Admin(0).PrepareAuthority(ctx, &capb.PrepareAuthorityRequest{Kind: "x509-root"})
	}
}

// activateOrPrepare lets the next root sign.
func activateOrPrepare(w *faults.World) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if next := rootIDs(ctx, w, "published"); len(next) > 0 {
		w.Admin(0).ActivateAuthority(ctx, &capb.ActivateAuthorityRequest{AuthorityId: next[0]})
	} else {
		w.Admin(0).PrepareAuthority(ctx, &capb.PrepareAuthorityRequest{Kind: "x509-root"})
	}
	time.Sleep(100 * time.Millisecond) // refusals are recorded, too
}

// rootIDs are the roots in a state; none, too, where the CA is away.
func rootIDs(ctx context.Context, w *faults.World, state string) (ids []string) {
	resp, err := w.Admin(0).ListAuthorities(ctx, &capb.ListAuthoritiesRequest{})
	if err != nil {
		return nil
	}
	for _, a := range resp.GetAuthorities() {
		if a.GetKind() == "x509-root" && a.GetState() == state {
			ids = append(ids, a.GetAuthorityId())
		}
	}
	return ids
}
