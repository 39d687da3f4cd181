// What the CA does by itself, at times that a test can wait for only by naming
// them.

package ca

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/authority"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/release"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/store"
	"merlon.dev/policy/bundle"
	"merlon.dev/sdk/svid"
)

// openParts opens a CA that serves nothing; its registry runs.
func openParts(t *testing.T) (*parts, string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "data")
	s, err := New(Config{
		TrustDomain: "shop.test", DataDir: dir, AdminSocket: filepath.Join(dir, "a.sock"), DNSNames: []string{"ca.shop.test"},
		Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	p, err := s.open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.registry.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := errors.Join(<-done, p.close()); err != nil {
			t.Error(err)
		}
	})
	return p, filepath.Join(dir, "audit.jsonl")
}

// put writes to the store and waits until the registry has it.
func (p *parts) put(t *testing.T, ops ...store.Op) {
	t.Helper()
	res, err := p.store.Txn(t.Context(), nil, ops, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.registry.Wait(t.Context(), res.Revision); err != nil {
		t.Fatal(err)
	}
}

// everything does all chores there are, as the leader.
func (p *parts) everything(t *testing.T, now time.Time) {
	t.Helper()
	l := p.leads(t)
	p.upkeep(t.Context(), now)
	p.chores(t.Context(), now, l)
	if err := l.Resign(t.Context()); err != nil {
		t.Error(err)
	}
}

func (p *parts) leads(t *testing.T) store.Leadership {
	t.Helper()
	l, err := p.store.Campaign(t.Context(), upkeepLeader, store.CampaignTTL)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func recorded(t *testing.T, path, what string) int {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Count(b, []byte(what))
}

func TestIntermediateIsRenewedAtHalfLife(t *testing.T) {
	p, log := openParts(t)
	first, now := p.keys.X509(), time.Now()
	p.everything(t, now.Add(11*time.Hour))
	if p.keys.X509() != first {
		t.Fatal("renewed before half of 24 h")
	}
	p.everything(t, now.Add(13*time.Hour))
	second := p.keys.X509()
	if second.ID() == first.ID() || !second.NotAfter().After(first.NotAfter()) {
		t.Fatalf("after 13 h: authority %s until %s; want another than %s, and longer", second.ID(), second.NotAfter(), first.ID())
	}
	if n := recorded(t, log, second.ID()); n != 1 {
		t.Errorf("%d audit records of the new authority; want 1", n)
	}
	// The next own SVID comes from it.
	if err := p.own.renew(t.Context(), now.Add(13*time.Hour)); err != nil {
		t.Fatal(err)
	}
	own, _ := p.own.GetX509SVID()
	if !own.Certificates[1].Equal(second.Chain[0]) {
		t.Error("the own SVID is still of the old intermediate")
	}
	if err := p.checkAuthority(now.Add(13 * time.Hour)); err != nil {
		t.Errorf("checkAuthority: %v", err)
	}
	if err := p.checkAuthority(second.NotAfter()); err == nil {
		t.Error("checkAuthority has nothing to say at the end of the chain")
	}
}

func newStoredEntry(t *testing.T, expires time.Time) (*entry.Entry, store.Op) {
	t.Helper()
	e := &entry.Entry{
		ID: entry.NewID(), SPIFFEID: spiffeid.RequireFromString("spiffe://shop.test/web"), ParentID: spiffeid.RequireFromString("spiffe://shop.test/agent/n1"),
		Selectors: []entry.Selector{{Type: "unix", Value: "uid:1"}}, ExpiresAt: expires, CreatedAt: time.Now(),
	}
	value, err := entry.Encode(e)
	if err != nil {
		t.Fatal(err)
	}
	return e, store.Put(registry.EntryPrefix+e.ID, value)
}

func TestWhatHasExpiredIsRemoved(t *testing.T) {
	p, log := openParts(t)
	now := time.Now()
	ctx := t.Context()
	short, putShort := newStoredEntry(t, now.Add(time.Hour))
	long, putLong := newStoredEntry(t, now.Add(3*time.Hour))
	endless, putEndless := newStoredEntry(t, time.Time{})
	revoke := func(id string, expires time.Time) store.Op {
		op, _, err := revocation.Put(0, svid.Revocation{SPIFFEID: id, ExpiresAt: expires})
		if err != nil {
			t.Fatal(err)
		}
		return op
	}
	p.put(t, putShort, putLong, putEndless,
		revoke("spiffe://shop.test/old", now.Add(time.Hour)), revoke("spiffe://shop.test/new", now.Add(3*time.Hour)))
	for _, end := range []time.Time{now.Add(time.Hour), now.Add(3 * time.Hour)} {
		if _, err := attest.CreateJoinToken(ctx, p.store, "n1", end); err != nil {
			t.Fatal(err)
		}
	}
	p.everything(t, now.Add(90*time.Minute))
	if kvs, _, _, err := p.store.List(ctx, revocation.Prefix, "", 10, 0); err != nil || len(kvs) != 2 {
		t.Errorf("%d revocations, %v; want both: the clock may be ahead", len(kvs), err)
	}
	p.everything(t, now.Add(150*time.Minute)) // the life of the first once more

	for e, want := range map[*entry.Entry]bool{short: false, long: true, endless: true} {
		if _, _, err := p.store.Get(ctx, registry.EntryPrefix+e.ID); (err == nil) != want {
			t.Errorf("entry that expires %s: %v; want kept=%t", e.ExpiresAt, err, want)
		}
	}
	if n := recorded(t, log, short.ID); n != 1 {
		t.Errorf("%d audit records of the expired entry; want 1", n)
	}
	for prefix, want := range map[string]int{revocation.Prefix: 1, attest.TokenPrefix: 1} {
		if kvs, _, _, err := p.store.List(ctx, prefix, "", 10, 0); err != nil || len(kvs) != want {
			t.Errorf("%d records below %s, %v; want %d", len(kvs), prefix, err, want)
		}
	}
	p.put(t, store.Put("other", nil)) // whoever sees this sees what was before it
	if left := p.registry.Revocations(now); len(left) != 1 {
		t.Errorf("%d revocations in memory; want 1", len(left))
	}
}

// The entry changed since the registry was asked: nothing is removed, and no
// record says so.
func TestEntryThatChangedIsNotRemoved(t *testing.T) {
	p, log := openParts(t)
	e, put := newStoredEntry(t, time.Now().Add(time.Hour))
	p.put(t, put)
	stale := p.registry.ExpiredEntries(time.Now().Add(2 * time.Hour))
	p.put(t, put)
	for _, old := range stale {
		if err := p.removeEntry(t.Context(), time.Now(), old, p.leads(t).Fence()); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := p.store.Get(t.Context(), registry.EntryPrefix+e.ID); err != nil || len(stale) != 1 {
		t.Errorf("entry: %v; want it kept", err)
	}
	if n := recorded(t, log, e.ID); n != 0 {
		t.Errorf("%d audit records of a removal that was none", n)
	}
}

func pushBundle(t *testing.T, p *parts) *release.Head {
	t.Helper()
	dir := t.TempDir()
	grants := "grants:\n  - id: all\n    from: [spiffe://shop.test]\n    to: [spiffe://shop.test/orders]\n    tcp: {}\n"
	if err := os.WriteFile(filepath.Join(dir, "grants.yaml"), []byte(grants), 0o600); err != nil {
		t.Fatal(err)
	}
	unsigned, err := bundle.Build(dir)
	if err != nil {
		t.Fatal(err)
	}
	head, err := p.releases.Publish(t.Context(), "main", unsigned)
	if err != nil {
		t.Fatal(err)
	}
	return head
}

func (p *parts) contents(t *testing.T) *bundle.Contents {
	t.Helper()
	signed, _, err := p.releases.Current(t.Context(), "main")
	if err != nil {
		t.Fatal(err)
	}
	kid, signer := p.keys.Policy()
	public, _ := signer.Public().(*ecdsa.PublicKey)
	c, err := bundle.Verify(signed, []bundle.Key{{KID: kid, PublicKey: public}}, bundle.Expect{Name: "main", TrustDomain: "shop.test"})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// How long an intermediate lives its own certificate says: that of a nested CA is made
// by the CA above, in that one's intermediate_ttl.
func TestUpkeepIsInTimeForTheIntermediate(t *testing.T) {
	for life, want := range map[time.Duration]time.Duration{
		24 * time.Hour: time.Minute, 40 * time.Second: 5 * time.Second, 2 * time.Second: time.Second,
	} {
		now := time.Now()
		ca := &authority.X509Authority{Chain: []*x509.Certificate{{NotBefore: now, NotAfter: now.Add(life)}}}
		if got := upkeepEvery(24*time.Hour, ca); got != want {
			t.Errorf("every %s with a life of %s; want %s", got, life, want)
		}
	}
	if got := upkeepEvery(20*time.Second, nil); got != 2500*time.Millisecond {
		t.Errorf("every %s for 20 s that are asked for; want 2.5s", got)
	}
	if got := upkeepEvery(24*time.Hour, nil); got != time.Minute {
		t.Errorf("every %s without an intermediate; want 1m", got)
	}
	if p, _ := openParts(t); upkeepEvery(p.intermediateTTL, p.keys.X509()) != time.Minute {
		t.Error("another interval for the default life")
	}
}

func TestPolicyIsSignedAgainAtHalfOfItsValidity(t *testing.T) {
	p, log := openParts(t)
	head := pushBundle(t, p)
	before := p.contents(t)
	half := head.NotAfter.Sub(head.IssuedAt) / 2
	for _, early := range []time.Duration{0, half} {
		if err := p.renewPolicies(t.Context(), head.IssuedAt.Add(early)); err != nil || p.contents(t).Metadata.Generation != 1 {
			t.Fatalf("%s after the push: %v, generation %d; want 1", early, err, p.contents(t).Metadata.Generation)
		}
	}
	now := head.IssuedAt.Add(half + time.Minute)
	p.everything(t, now)
	after := p.contents(t)
	if md := after.Metadata; md.Generation != 2 || !md.IssuedAt.Equal(now) || md.NotAfter.Sub(md.IssuedAt) != 2*half {
		t.Errorf("metadata = %+v; want generation 2, issued %s", md, now)
	}
	before.Metadata, after.Metadata = bundle.Metadata{}, bundle.Metadata{}
	if d := cmp.Diff(before, after); d != "" {
		t.Errorf("the content changed (-before +after):\n%s", d)
	}
	if n := recorded(t, log, "policy bundle main, generation 2"); n != 1 {
		t.Errorf("%d audit records; want 1", n)
	}
	p.everything(t, now.Add(time.Minute))
	if g := p.contents(t).Metadata.Generation; g != 2 {
		t.Errorf("generation %d a minute later; want still 2", g)
	}
}

// A head that leads to foreign bytes, by somebody who can write the store and
// has no key: the CA must not lend him its own.
func TestForeignPolicyIsNotSignedAgain(t *testing.T) {
	p, _ := openParts(t)
	head := pushBundle(t, p)
	other, _ := openParts(t)
	foreign := pushBundle(t, other)
	kvs, _, _, err := other.store.List(t.Context(), "policy/", "", 10, 0)
	if err != nil || len(kvs) < 2 {
		t.Fatal(kvs, err)
	}
	for _, kv := range kvs {
		p.put(t, store.Put(kv.Key, kv.Value))
	}
	err = p.renewPolicies(t.Context(), head.NotAfter)
	if _, now, headErr := p.releases.Current(t.Context(), "main"); err == nil || headErr != nil || now.Generation != foreign.Generation {
		t.Errorf("renewPolicies: %v, generation %d, %v; want a refusal", err, now.Generation, headErr)
	}
}
