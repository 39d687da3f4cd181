// Agents that have seen more than the store holds, and backups over the wire.

package ca_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/store/snapshot"
)

// firstAnswer opens a Sync stream with what the agent says to have seen.
func firstAnswer(t *testing.T, a *testClient, seen *capb.Seen) (*capb.SyncResponse, error) {
	t.Helper()
	stream, err := a.node.Sync(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&capb.SyncRequest{Seen: seen}); err != nil && !errors.Is(err, io.EOF) { // Recv says why
		t.Fatal(err)
	}
	return stream.Recv()
}

// SECURITY.md T43.
func TestAgentThatHasSeenMoreIsRefusedAndNobodyElse(t *testing.T) {
	c := startCA(t, tempDir(t))
	a, other := c.agent("n1"), c.agent("n2")
	generation := pushPolicy(t, c)
	last := c.entry("n1", "web").GetRevision()
	for name, seen := range map[string]*capb.Seen{
		"nothing": nil,
		"all":     {Revision: last, TrustBundleSequence: 1, PolicyGeneration: generation},
	} {
		if _, err := firstAnswer(t, a, seen); err != nil {
			t.Errorf("an agent that has seen %s: %v", name, err)
		}
	}
	evidence := map[string]*capb.Seen{
		"revision":     {Revision: last + 1000},
		"trust bundle": {Revision: last, TrustBundleSequence: 2},
		"policy":       {Revision: last, TrustBundleSequence: 1, PolicyGeneration: generation + 1},
	}
	for name, seen := range evidence {
		_, err := firstAnswer(t, a, seen)
		wantCode(t, err, codes.FailedPrecondition)
		if message := status.Convert(err).Message(); !strings.Contains(message, "earlier state") || !strings.Contains(message, "-accept-older-store=") {
			t.Errorf("a later %s: %q; want what happened and what to do", name, message)
		}
	}
	if _, err := firstAnswer(t, other, &capb.Seen{Revision: last, TrustBundleSequence: 1, PolicyGeneration: generation}); err != nil {
		t.Errorf("another agent suffers: %v", err)
	}
	refused := 0
	for _, r := range c.auditRecords() {
		if r["type"] == "refuse" && r["actor"] == a.id && strings.Contains(r["reason"].(string), "earlier state") {
			refused++
		}
	}
	if refused != len(evidence) {
		t.Errorf("%d refusals in the audit log; want %d", refused, len(evidence))
	}
	_, _, metrics := do(t, httpClient(t, nil, nil), "GET", "http://"+c.srv.HealthAddress().String()+"/metrics", nil, nil)
	if !strings.Contains(metrics, "merlon_ca_rollback_evidence_total 3") {
		t.Error("/metrics does not count the evidence")
	}
}

// A store that was put back and has gone on since holds more than was seen, and
// not the same.
func TestStoreThatWentOnSinceItWasPutBackIsNoticed(t *testing.T) {
	dir := tempDir(t)
	c := startCA(t, dir)
	a := c.agent("n1")
	first, err := firstAnswer(t, a, nil)
	if err != nil {
		t.Fatal(err)
	}
	store, copied := filepath.Join(dir, "data", "store"), filepath.Join(dir, "copied")
	if err := os.CopyFS(copied, os.DirFS(store)); err != nil { // as a snapshot of the disk has it
		t.Fatal(err)
	}
	seen := &capb.Seen{Revision: c.entry("n1", "lost").GetRevision(), Opening: first.GetOpening()}
	c.stop()

	// An orderly start is none: what was seen is there.
	c = startCA(t, dir)
	answer, err := firstAnswer(t, a.at(c), seen)
	if err != nil || len(answer.GetOpening()) == 0 || bytes.Equal(answer.GetOpening(), seen.GetOpening()) {
		t.Fatalf("after a restart: %v, %v; want another opening", answer, err)
	}
	c.entry("n1", "web")
	if _, err := firstAnswer(t, a.at(c), &capb.Seen{Revision: c.entry("n1", "web2").GetRevision(), Opening: answer.GetOpening()}); err != nil {
		t.Errorf("what was seen under this opening: %v", err)
	}
	c.stop()

	if err := errors.Join(os.RemoveAll(store), os.Rename(copied, store)); err != nil {
		t.Fatal(err)
	}
	c = startCA(t, dir)
	for c.entry("n1", "web").GetRevision() <= seen.GetRevision() {
	}
	_, err = firstAnswer(t, a.at(c), seen)
	wantCode(t, err, codes.FailedPrecondition)
	if message := status.Convert(err).Message(); !strings.Contains(message, "when it was opened") || !strings.Contains(message, "-accept-older-store=") {
		t.Errorf("the agent is told %q; want what happened and what to do", message)
	}
	if _, err := firstAnswer(t, a.at(c), &capb.Seen{Revision: seen.GetRevision()}); err != nil {
		t.Errorf("an agent that names no opening, as older ones: %v", err)
	}
}

func TestBackupComesOverTheAdminSocket(t *testing.T) {
	c := startCA(t, tempDir(t))
	e := c.entry("n1", "web")
	stream, err := c.admin.BackupStore(t.Context(), &capb.BackupStoreRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var file bytes.Buffer
	for {
		msg, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		file.Write(msg.GetData())
	}
	r, err := snapshot.NewReader(&file)
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for kv, err := range r.All() {
		if err != nil {
			t.Fatal(err)
		}
		found = found || kv.Key == "entry/"+e.GetEntryId() && kv.ModRevision == e.GetRevision()
	}
	if !found || r.Header().Store != "badger" || r.Header().Revision < e.GetRevision() {
		t.Errorf("backup %+v; want it to hold the entry of revision %d", r.Header(), e.GetRevision())
	}
	records := c.auditRecords()
	if last := records[len(records)-1]; last["type"] != "admin" || last["detail"] != "back up the store" {
		t.Errorf("last audit record %v; want that of the backup", last)
	}
	// An agent is no administrator.
	refused, err := c.agent("n1").admin.BackupStore(t.Context(), &capb.BackupStoreRequest{})
	if err == nil {
		_, err = refused.Recv()
	}
	wantCode(t, err, codes.PermissionDenied)
}
