// Trust bundles of other trust domains: who gets which, in virtual time.

package cache

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid/forge"
)

func bundleOf(t *testing.T, a *forge.Authority) *capb.TrustBundle {
	t.Helper()
	jwks, err := a.Bundle().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return &capb.TrustBundle{TrustDomain: a.TrustDomain.Name(), Sequence: 1, Jwks: jwks}
}

func federation(bundles ...*capb.TrustBundle) *capb.SyncResponse {
	return &capb.SyncResponse{FederatedBundles: &capb.FederatedBundles{TrustBundles: bundles}}
}

func federating(id, path string, with []string, selectors ...string) *capb.Entry {
	e := newEntry(id, path, selectors...)
	e.FederatesWith = with
	return e
}

// domains are those of a view.
func domains(v View) string {
	var names []string
	for _, f := range v.Federated {
		names = append(names, f.TrustDomain.Name())
	}
	return strings.Join(names, " ")
}

func TestWorkloadHasTheTrustBundlesThatItsEntriesFederateWith(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		one, two := forge.New(t, "one.test"), forge.New(t, "two.test")
		f.sync(
			federating("e1", "/a", []string{"one.test"}, "unix:uid:1"), federating("e2", "/b", []string{"one.test", "two.test", "none.test"}, "unix:uid:2"),
			newEntry("e3", "/c", "unix:uid:3"),
		)
		views := func() (out []string) {
			for _, uid := range []string{"1", "2", "3", "4"} {
				s := f.Subscribe()
				out = append(out, domains(s.View(proves("unix:uid:"+uid), false)))
				s.Close()
			}
			return append(out, domains(f.viewOf(t, "unix:uid:1", "unix:uid:2")))
		}
		expect := func(when string, want ...string) {
			t.Helper()
			if got := views(); !slices.Equal(got, want) {
				t.Errorf("%s: %q; want %q", when, got, want)
			}
		}
		expect("before any", "", "", "", "", "")
		f.apply(federation(bundleOf(t, one)))
		expect("one.test came", "one.test", "one.test", "", "", "one.test")
		f.apply(federation(bundleOf(t, one), bundleOf(t, two)))
		expect("two.test came", "one.test", "one.test two.test", "", "", "one.test two.test")
		f.apply(&capb.SyncResponse{})
		expect("nothing was said", "one.test", "one.test two.test", "", "", "one.test two.test")
		f.apply(federation(bundleOf(t, two)))
		expect("one.test went", "", "two.test", "", "", "two.test")
		f.apply(&capb.SyncResponse{RemovedEntryIds: []string{"e2"}})
		expect("the entry went", "", "", "", "", "")
		f.apply(&capb.SyncResponse{Reset_: true, Entries: []*capb.Entry{federating("e1", "/a", []string{"two.test"}, "unix:uid:1")}})
		expect("a listing without any", "", "", "", "", "")
	})
}

func (f *fixture) viewOf(t *testing.T, proved ...string) View {
	t.Helper()
	s := f.Subscribe()
	defer s.Close()
	return s.View(proves(proved...), false)
}

func TestChangeOfAFederationWakesStreams(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		one := bundleOf(t, forge.New(t, "one.test"))
		f.sync(federating("e1", "/a", []string{"one.test"}, "unix:uid:1"))
		s := f.Subscribe()
		defer s.Close()
		take(t, f.first(s), "unix:uid:1")
		f.apply(federation(one))
		if v := take(t, s, "unix:uid:1"); domains(v) != "one.test" {
			t.Errorf("federated = %q", domains(v))
		}
		f.apply(federation(one))
		asleep(t, s) // the same again
		f.apply(federation())
		if v := take(t, s, "unix:uid:1"); domains(v) != "" {
			t.Errorf("federated = %q after the removal", domains(v))
		}
	})
}

// first makes s one that waits for what View orders.
func (f *fixture) first(s *Subscription) *Subscription {
	s.View(proves("unix:uid:1"), true)
	return s
}

// A message takes effect as a whole, over all of its parts.
func TestFederationOfSeveralMessages(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		f.sync(federating("e1", "/a", []string{"one.test", "two.test"}, "unix:uid:1"))
		for _, name := range []string{"one.test", "two.test"} {
			m := federation(bundleOf(t, forge.New(t, name)))
			if err := f.Apply(t.Context(), m); err != nil {
				t.Fatal(err)
			}
			if got := domains(f.viewOf(t, "unix:uid:1")); got != "" {
				t.Errorf("%q before the update is complete", got)
			}
		}
		f.apply(&capb.SyncResponse{})
		if got := domains(f.viewOf(t, "unix:uid:1")); got != "one.test two.test" {
			t.Errorf("federated = %q", got)
		}
	})
}

// What a CA sends that makes no sense is trusted by nobody, and does not take the
// rest along.
func TestSenselessFederationIsLeftOut(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		good, own := forge.New(t, "good.test"), forge.New(t, td)
		f.sync(federating("e1", "/a", []string{"good.test", "bad.test", td, "empty.test"}, "unix:uid:1"))
		before := f.Trust()
		f.apply(federation(
			bundleOf(t, own), // T22
			&capb.TrustBundle{TrustDomain: "bad.test", Jwks: []byte(`{"keys":`)},
			&capb.TrustBundle{TrustDomain: "spiffe://", Jwks: []byte(`{"keys":[]}`)},
			&capb.TrustBundle{TrustDomain: "empty.test", Jwks: []byte(`{"keys":[]}`)},
			bundleOf(t, good),
		))
		v := f.viewOf(t, "unix:uid:1")
		if domains(v) != "empty.test good.test" || v.Trust != before {
			t.Errorf("federated = %q, own %v; want the good one, the empty one, and the own as before", domains(v), v.Trust)
		}
		if f := v.Federated[0]; len(f.X509)+len(f.JWKS) != 0 {
			t.Errorf("of nothing: %+v", f)
		}
	})
}

// A replica that is behind the picture changes nothing.
func TestFederationOfAnOlderPictureIsNotTaken(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		f.sync(federating("e1", "/a", []string{"one.test"}, "unix:uid:1"))
		f.apply(federation())
		old := federation(bundleOf(t, forge.New(t, "one.test")))
		old.Revision, old.Synced = f.revision-1, true
		if err := f.Apply(t.Context(), old); err != nil {
			t.Fatal(err)
		}
		if got := domains(f.viewOf(t, "unix:uid:1")); got != "" {
			t.Errorf("federated = %q; want what was removed to stay so", got)
		}
	})
}

func TestFederationComesBackFromTheDisk(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		one := forge.New(t, "one.test")
		f.sync(federating("e1", "/a", []string{"one.test"}, "unix:uid:1"))
		f.apply(federation(bundleOf(t, one)))
		f2, _ := restarted(t, f)
		if err := f2.Restore(context.Background(), onDisk(t, f.Snapshot("", false))); err != nil {
			t.Fatal(err)
		}
		v := f2.viewOf(t, "unix:uid:1")
		if domains(v) != "one.test" || !slices.Equal(v.Federated[0].X509, one.Cert.Raw) {
			t.Errorf("federated = %q after a restart", domains(v))
		}
		bad := onDisk(t, f.Snapshot("", false))
		bad.Federated = [][]byte{[]byte("x")}
		f3, _ := restarted(t, f)
		if err := f3.Restore(context.Background(), bad); err == nil {
			t.Error("a damaged one was taken up")
		}
	})
}

// JWT-SVIDs of another trust domain are for those who federate with it, and each
// is verified by its own trust domain's keys (E19).
func TestJWTBundlesAreTheCallers(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		one, two := forge.New(t, "one.test"), forge.New(t, "two.test")
		f.sync(federating("e1", "/a", []string{"one.test"}, "unix:uid:1"), newEntry("e2", "/b", "unix:uid:2"), federating("e3", "/c", []string{"two.test", "one.test"}, "unix:uid:3"))
		f.apply(federation(bundleOf(t, one), bundleOf(t, two)))
		both, _ := f.Entitled(proves("unix:uid:3"))
		if got, err := f.JWTBundles(both).GetJWTBundleForTrustDomain(two.TrustDomain); err != nil || !got.HasJWTAuthority(two.KeyID) {
			t.Errorf("of two: %v, %v; want two.test's", got, err)
		}
		for uid, want := range map[string]bool{"1": true, "2": false} {
			entries, _ := f.Entitled(proves("unix:uid:" + uid))
			source := f.JWTBundles(entries)
			got, err := source.GetJWTBundleForTrustDomain(one.TrustDomain)
			if (err == nil) != want || want && !got.HasJWTAuthority(one.KeyID) {
				t.Errorf("uid %s: %v, %v; want it = %t", uid, got, err, want)
			}
			own, err := source.GetJWTBundleForTrustDomain(spiffeid.RequireTrustDomainFromString(td))
			if err != nil || own.HasJWTAuthority(one.KeyID) || !own.HasJWTAuthority(f.ca.root.KeyID) {
				t.Errorf("uid %s: own = %v, %v", uid, own, err)
			}
		}
	})
}
