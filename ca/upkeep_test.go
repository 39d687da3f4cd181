// Replicas in one process: who leads, what a leader of before can still do, and
// when a replica says that it is no good any more.

package ca

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/rotation"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
)

// What a leader of before had begun does not come through.
func TestChoresOfAFormerLeaderAreFenced(t *testing.T) {
	p, log := openParts(t)
	e, put := newStoredEntry(t, time.Now().Add(time.Hour))
	p.put(t, put)
	if _, err := attest.CreateJoinToken(t.Context(), p.store, "n1", time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	tokens := func() int {
		kvs, _, _, err := p.store.List(t.Context(), attest.TokenPrefix, "", 10, 0)
		if err != nil {
			t.Fatal(err)
		}
		return len(kvs)
	}
	head := pushBundle(t, p)
	former := p.leads(t)
	if err := former.Resign(t.Context()); err != nil {
		t.Fatal(err)
	}
	next := p.leads(t)
	later := time.Now().Add(2 * time.Hour)
	p.chores(t.Context(), later, former)
	if _, _, err := p.store.Get(t.Context(), registry.EntryPrefix+e.ID); err != nil {
		t.Errorf("a former leader removed the entry: %v", err)
	}
	if n := recorded(t, log, e.ID); n != 0 {
		t.Errorf("%d audit records of a removal that was none", n)
	}
	if tokens() != 1 {
		t.Error("a former leader removed the token")
	}
	if err := p.renewPolicies(t.Context(), head.NotAfter, former.Fence()); err != nil || p.contents(t).Metadata.Generation != 1 {
		t.Errorf("a former leader signed generation %d, %v; want 1 still", p.contents(t).Metadata.Generation, err)
	}
	p.chores(t.Context(), later, next)
	if tokens() != 0 {
		t.Error("the leader left the token")
	}
	if err := p.renewPolicies(t.Context(), head.NotAfter, next.Fence()); err != nil || p.contents(t).Metadata.Generation != 2 {
		t.Errorf("the leader signed generation %d, %v; want 2", p.contents(t).Metadata.Generation, err)
	}
	if _, _, err := p.store.Get(t.Context(), registry.EntryPrefix+e.ID); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("the leader left the entry: %v", err)
	}
}

// Somebody removed the leader's key: nobody leads until it is campaigned for.
func TestLeaderWhoseKeyIsGoneCampaignsAgain(t *testing.T) {
	p, _ := openParts(t)
	l := p.leads(t)
	p.put(t, store.Delete(store.LeaderPrefix+upkeepLeader))
	done := make(chan struct{})
	go func() { p.leadUntilLost(t.Context(), l); close(done) }()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatal("it still leads")
	}
	next := p.leads(t)
	if !p.holds(t.Context(), next.Fence()) || p.holds(t.Context(), l.Fence()) {
		t.Error("want the fence of the next term to hold, and not that of the one before")
	}
}

// A copied keys folder: of two CAs under one name one ends, and says why; a name
// that was let go of is taken.
func TestOneNameIsOneCAs(t *testing.T) {
	p, _ := openParts(t)
	ctx, stop := context.WithCancel(t.Context())
	held, err := p.store.Campaign(t.Context(), "replica-ca", time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.holdName(ctx, time.Second/4); !errors.Is(err, errOtherHolder) || !strings.Contains(Hint(err), "stop one of the two") {
		t.Errorf("holdName = %v, hint %q; want errOtherHolder", err, Hint(err))
	}
	if err := held.Resign(t.Context()); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- p.holdName(ctx, time.Second/4) }()
	for {
		if _, _, err := p.store.Get(t.Context(), store.LeaderPrefix+"replica-ca"); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	select {
	case err := <-done:
		t.Errorf("holdName = %v; want it to hold the name", err)
	case <-time.After(time.Second):
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestReadyEndsBeforeTheAuthorityDoes(t *testing.T) {
	p, _ := openParts(t)
	end := p.keys.X509().NotAfter()
	for before, want := range map[time.Duration]bool{12 * time.Hour: true, 61 * time.Minute: true, 59 * time.Minute: false, 0: false} {
		if err := p.checkAuthority(end.Add(-before)); (err == nil) != want {
			t.Errorf("%s before the end: %v; want ready=%t", before, err, want)
		}
	}
}

func TestReadyEndsWhereNobodyVerifiesJWTSVIDs(t *testing.T) {
	p, _ := openParts(t)
	before := p.keys.JWT().KeyID
	published, _, err := p.store.Get(t.Context(), trust.Key)
	if err != nil {
		t.Fatal(err)
	}
	unpublished, err := trust.Without(published, before)
	if err != nil {
		t.Fatal(err)
	}
	p.put(t, store.Put(trust.Key, unpublished.Value))
	if err := p.checkAuthority(time.Now()); err == nil || !strings.Contains(err.Error(), "not in the trust bundle") {
		t.Errorf("its JWT key is not in the trust bundle: %v", err)
	}
	p.put(t, store.Put(trust.Key, published.Value))
	if err := p.checkAuthority(time.Now()); err != nil {
		t.Error(err)
	}
	stored, _, err := p.store.Get(t.Context(), trust.AuthoritiesKey)
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct{ old, new, want string }{
		"another is active": {`"` + before + `"`, `"elsewhere"`, "the active one, elsewhere, is missing"},
		"none is active":    {`"state":"active"`, `"state":"old"`, "no JWT key of this replica is active"},
	} {
		p.put(t, store.Put(trust.AuthoritiesKey, []byte(strings.ReplaceAll(string(stored.Value), test.old, test.new))))
		if err := p.checkAuthority(time.Now()); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v; want %q", name, err, test.want)
		}
	}
	p.put(t, store.Put(trust.AuthoritiesKey, stored.Value))
	// One that is active and here is about to sign: nothing is wrong.
	next, _, err := p.authorities.Prepare(t.Context(), rotation.JWT)
	if err != nil {
		t.Fatal(err)
	}
	revision, err := p.authorities.takeHere(t.Context(), rotation.Command{Verb: rotation.Activate, ID: next, Force: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.registry.Wait(t.Context(), revision); err != nil {
		t.Fatal(err)
	}
	if err := p.checkAuthority(time.Now()); err != nil || p.keys.JWT().KeyID != before {
		t.Errorf("%s signs, and %s is to: %v", p.keys.JWT().KeyID, next, err)
	}
}

// A root that is about to end with nobody to follow is in the log, with the
// command that helps.
func TestUpkeepNamesWhatKeepsTheNextRootWaiting(t *testing.T) {
	p, _ := openParts(t)
	var log logged
	p.log = slog.New(slog.NewTextHandler(&log, nil))
	next, revision, err := p.authorities.Prepare(t.Context(), rotation.Root)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.registry.Wait(t.Context(), revision); err != nil {
		t.Fatal(err)
	}
	root := p.registry.Authorities().Root()
	now := root.NotAfter.Add(-2 * time.Hour)
	if err := p.authorities.endangered(now); err != nil {
		t.Errorf("nothing is waited for: %v", err)
	}
	agent, err := json.Marshal(map[string]any{
		"v": 1, "spiffe_id": "spiffe://shop.test/agent/n7", "handle": 7, "attestation": "join_token",
		"attested_at": now, "not_after": now.Add(2 * time.Hour), "trust_sequence": 1,
	})
	if err != nil {
		t.Fatal(err)
	}
	p.put(t, store.Put(attest.AgentPrefix+"n7", agent))
	if err := p.authorities.endangered(time.Now()); err != nil {
		t.Errorf("the root is new: %v", err)
	}
	p.each(t.Context(), map[string]func(context.Context) error{
		"replace the root": func(context.Context) error { return p.authorities.endangered(now) },
	})
	for _, want := range []string{"upkeep failed", "1 agents have not acknowledged: spiffe://shop.test/agent/n7", "merlon authority activate " + next + " --force"} {
		if !log.holds(want) {
			t.Errorf("log = %s; want %q in it", log.text.String(), want)
		}
	}
}

// The root holder's record comes back by itself: nobody can evict it.
func TestRootHolderRegistersAgain(t *testing.T) {
	p, _ := openParts(t)
	rec, ok := p.registry.Replica("ca")
	if !ok || !rec.RootHolder || rec.JWTKeyID != p.keys.JWT().KeyID || !rec.Holds(p.keys.X509().ID()) {
		t.Fatalf("record = %+v, %t", rec, ok)
	}
	revision := p.registry.Revision()
	p.upkeep(t.Context(), time.Now())
	if now, err := p.store.Revision(t.Context()); err != nil || now != revision {
		t.Errorf("upkeep wrote revision %d after %d, %v; want nothing new", now, revision, err)
	}
	p.put(t, store.Delete("replica/ca"))
	p.upkeep(t.Context(), time.Now())
	p.put(t, store.Put("other", nil))
	if again, ok := p.registry.Replica("ca"); !ok || again.JWTKeyID != rec.JWTKeyID {
		t.Errorf("record = %+v, %t; want it back", again, ok)
	}
	if err := p.service.Standing(); err != nil {
		t.Error(err)
	}
	first := p.keys.X509().ID()
	p.upkeep(t.Context(), time.Now().Add(13*time.Hour))
	p.put(t, store.Put("other", nil))
	if rec, _ := p.registry.Replica("ca"); rec.Current().ID != p.keys.X509().ID() || !rec.Holds(first) {
		t.Errorf("record = %+v; want both authorities, %s last", rec, p.keys.X509().ID())
	}
}

// logged collects a log.
type logged struct {
	mu sync.Mutex
	// guarded by mu
	text bytes.Buffer
}

func (l *logged) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *logged) holds(text string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Contains(l.text.String(), text)
}

func TestCAWaitsForAnEtcdThatIsNotThereYet(t *testing.T) {
	dir := t.TempDir()
	log := &logged{}
	s, err := New(Config{
		TrustDomain: "shop.test", DataDir: filepath.Join(dir, "data"), AdminSocket: filepath.Join(dir, "a.sock"),
		Store: "etcd", EtcdEndpoints: []string{"http://127.0.0.1:1"}, Logger: slog.New(slog.NewTextHandler(log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	for !log.holds("store cannot be reached yet") {
		select {
		case err := <-done:
			t.Fatalf("Run = %v; want it to wait", err)
		case <-time.After(10 * time.Millisecond):
		}
	}
	cancel()
	if err := <-done; err == nil {
		t.Error("Run = nil; the CA never served")
	}
	if hint := Hint(store.ErrUnavailable); !strings.Contains(hint, "etcd_endpoints") {
		t.Errorf("hint = %q", hint)
	}
}
