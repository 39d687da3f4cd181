// The root is replaced under the whole fleet: what each step waits for, and what it
// costs.

package scale_test

import (
	"errors"
	"fmt"
	"time"

	"merlon.dev/ca/capb"
	"merlon.dev/integration/measure"
)

// rotation is a root that is replaced, in seconds from the beginning of each step.
type rotation struct {
	cost
	// Published is when every agent had acknowledged the trust bundle with the next
	// root, Activated when that signed.
	Published float64 `json:"acknowledged_by_all_seconds"`
	Activated float64 `json:"activated_seconds"`
	// Spread is over how long the CA asks agents to renew, Renewed when all had, with
	// new keys, and acknowledged that nothing of the old root is served any more.
	Spread  float64 `json:"renew_spread_seconds"`
	Renewed float64 `json:"renewed_by_all_seconds"`
	// Renewals are what that took of the CA.
	Renewals cost `json:"renewals"`
}

// rotate takes a new root through all its states, and the one before out.
func (b *bench) rotate() rotation {
	b.t.Helper()
	f, n, admin, ctx := b.f, len(b.f.agents), b.f.admin(0), b.t.Context()
	var r rotation
	begun, used := time.Now(), measure.CPUOf(b.t, f.d.CA.PID())
	old := b.authority("active")
	if _, err := admin.PrepareAuthority(ctx, &capb.PrepareAuthorityRequest{Kind: "x509-root"}); err != nil {
		b.t.Fatal(err)
	}
	b.done("the new root is published", func() error { return b.find("published", new(string)) })
	next, with := b.authority("published"), b.sequence()
	f.await("all agents acknowledge the next root", func() (int, int) {
		return f.count(n, func(a *agent) bool { return a.acked.Load() >= with }), n
	})
	r.Published = time.Since(begun).Seconds()
	b.done("the next root signs", func() error {
		_, err := admin.ActivateAuthority(ctx, &capb.ActivateAuthorityRequest{AuthorityId: next})
		return err
	})
	b.done("the CA's intermediate is under it", func() error { return b.intermediateUnder(next) })
	r.Activated = time.Since(begun).Seconds()

	tainting, renewed := time.Now(), f.renewed.Load()
	r.Renewals = b.take(n, func() {
		if _, err := admin.TaintAuthority(ctx, &capb.TaintAuthorityRequest{AuthorityId: old}); err != nil {
			b.t.Fatal(err)
		}
		tainted := b.sequence()
		f.await("all agents serve nothing of the old root", func() (int, int) {
			return f.count(n, func(a *agent) bool { return a.acked.Load() >= tainted && a.synced.Load() }), n
		})
	})
	r.Renewed, r.Spread = time.Since(tainting).Seconds(), f.renewSpread().Seconds()
	if got := f.renewed.Load() - renewed; got != int64(n) {
		b.t.Errorf("%d agents replaced their SVID; want %d", got, n)
	}
	b.done("the old root is revoked", func() error {
		_, err := admin.RevokeAuthority(ctx, &capb.RevokeAuthorityRequest{AuthorityId: old})
		return err
	})
	gone := b.sequence()
	f.await("all agents are without the old root", func() (int, int) {
		return f.count(n, func(a *agent) bool { return a.acked.Load() >= gone && a.synced.Load() }), n
	})
	r.cost = spent(b.t, f.d, begun, used, n)
	b.t.Logf("a root is replaced: acknowledged by %d agents after %.1f s, it signs after %.1f s; tainted, all had renewed %.1f s later (spread %.0f s, %.0f µs of CPU each); in all %v",
		n, r.Published, r.Activated, r.Renewed, r.Spread, r.Renewals.each(), r.cost)
	return r
}

// done repeats a step until it can be taken.
func (b *bench) done(what string, step func() error) {
	b.t.Helper()
	var err error
	for begun := time.Now(); time.Since(begun) < patience; time.Sleep(20 * time.Millisecond) {
		if err = step(); err == nil {
			return
		}
	}
	b.t.Fatalf("%s: still %v after %v", what, err, patience)
}

// authority is the ID of the root in a state.
func (b *bench) authority(state string) (id string) {
	b.t.Helper()
	if err := b.find(state, &id); err != nil {
		b.t.Fatal(err)
	}
	return id
}

func (b *bench) find(state string, id *string) error {
	resp, err := b.f.admin(0).ListAuthorities(b.t.Context(), &capb.ListAuthoritiesRequest{})
	for _, a := range resp.GetAuthorities() {
		if a.GetKind() == "x509-root" && a.GetState() == state {
			*id = a.GetAuthorityId()
			return nil
		}
	}
	return errors.Join(err, fmt.Errorf("no root is %s", state))
}

func (b *bench) intermediateUnder(root string) error {
	resp, err := b.f.admin(0).ListAuthorities(b.t.Context(), &capb.ListAuthoritiesRequest{})
	for _, a := range resp.GetAuthorities() {
		if a.GetKind() == "x509-intermediate" && a.GetState() == "active" && a.GetRootAuthorityId() == root {
			return nil
		}
	}
	return errors.Join(err, errors.New("no active intermediate is under "+root))
}

// sequence is that of the CA's trust bundle.
func (b *bench) sequence() uint64 {
	b.t.Helper()
	resp, err := b.f.admin(0).GetTrustBundle(b.t.Context(), &capb.GetTrustBundleRequest{})
	if err != nil {
		b.t.Fatal(err)
	}
	return resp.GetTrustBundle().GetSequence()
}
