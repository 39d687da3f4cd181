// A CA whose clock has jumped, by an hour or by years: what it signs then is of use to
// nobody whose clock is right, before or after, and nothing outlives its issuer
// (SECURITY.md T41).

package authority_test

import (
	"testing"
	"time"

	"merlon.dev/ca/internal/authority"
	"merlon.dev/sdk/svid/forge"
)

func TestWhatAClockThatJumpedSignsIsRefused(t *testing.T) {
	const year = 365 * 24 * time.Hour
	root := forge.New(t, "example.org")
	ca := root.Intermediate()
	a := authorityOf(ca)
	now := time.Now()
	for _, off := range []time.Duration{-5 * year, -time.Hour - authority.Backdate, time.Hour, 5 * year} {
		leaf, err := a.Issue(request(func(r *authority.LeafRequest) { r.Now = now.Add(off); r.TTL = 30 * time.Minute }))
		if err != nil {
			t.Logf("off by %s: %v", off, err)
			continue
		}
		if leaf.NotBefore.Before(ca.Cert.NotBefore) || leaf.NotAfter.After(a.NotAfter()) {
			t.Errorf("off by %s: valid %s to %s, outside its issuer", off, leaf.NotBefore, leaf.NotAfter)
		}
		if peer, err := verify(root, a, leaf, now); err == nil {
			t.Errorf("off by %s: %s to %s is taken now, as %s", off, leaf.NotBefore, leaf.NotAfter, peer.ID)
		}
	}
	// And by a verifier whose clock has jumped what is good now is refused, however far.
	leaf, err := a.Issue(request(func(r *authority.LeafRequest) { r.Now = now; r.TTL = 30 * time.Minute }))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := verify(root, a, leaf, now); err != nil {
		t.Errorf("with a clock that is right: %v", err)
	}
	for _, off := range []time.Duration{-5 * year, -time.Hour, time.Hour, 5 * year} {
		if _, err := verify(root, a, leaf, now.Add(off)); err == nil {
			t.Errorf("a verifier whose clock is off by %s takes it", off)
		}
	}
}
