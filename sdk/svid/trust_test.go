// What a Trust remembers, and for how long. That it judges as VerifyChain does is
// tested with the forged chains of x509_test.go.

package svid_test

import (
	"crypto/x509"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"pgregory.net/rapid"

	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

func trustIn(issuers ...*forge.Authority) *svid.Trust {
	set := x509bundle.NewSet()
	for _, ca := range issuers {
		set.Add(ca.Bundle().X509Bundle())
	}
	return svid.NewTrust(set)
}

func lives(from, until time.Time) forge.Change {
	return func(c *x509.Certificate) { c.NotBefore, c.NotAfter = from, until }
}

// At every time and in every order a Trust gives the answer of VerifyChain, though it
// remembers: leaf, intermediate and either of two roots begin and end.
func TestTrustAnswersAsVerifyChainAtEveryTime(t *testing.T) {
	now := time.Now().Truncate(time.Second)
	at := func(n int) time.Time { return now.Add(time.Duration(n) * time.Minute) }
	rapid.Check(t, func(rt *rapid.T) {
		life := func(label string) forge.Change {
			from := rapid.IntRange(0, 3).Draw(rt, label+" from")
			return lives(at(from), at(from+rapid.IntRange(1, 9).Draw(rt, label+" lives")))
		}
		ca := forge.New(t, "example.org", life("root"))
		bundle := ca.Bundle().X509Bundle()
		intermediate := ca.Intermediate(life("intermediate"))
		// Both keys again in another certificate, for another time: the same chain has
		// several paths.
		other := func(c *x509.Certificate) { c.SubjectKeyId = []byte("other") }
		chain := append(intermediate.Leaf("/a", life("leaf")).Chain, intermediate.Again(life("second intermediate"), other))
		bundle.AddX509Authority(ca.Again(life("second root"), other))
		trust := svid.NewTrust(x509bundle.NewSet(bundle))
		for range 8 {
			when := at(rapid.IntRange(-1, 13).Draw(rt, "when")).Add(time.Duration(rapid.IntRange(-1, 1).Draw(rt, "nearly")))
			want, wantErr := svid.VerifyChain(chain, bundle, when)
			got, err := trust.VerifyChain(chain, when)
			if (err == nil) != (wantErr == nil) {
				rt.Fatalf("at %s: %v; VerifyChain says %v", when, err, wantErr)
			}
			if err == nil && (got.ID != want.ID || !got.NotAfter.Equal(want.NotAfter) || !slices.Equal(got.AuthorityIDs, want.AuthorityIDs)) {
				rt.Fatalf("at %s: %+v; VerifyChain says %+v", when, got, want)
			}
		}
	})
}

// A further path that begins later counts from then on: whoever revokes its
// authority means this peer, too.
func TestTrustSeesPathsThatBeginLater(t *testing.T) {
	now := time.Now().Truncate(time.Second)
	later := func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter, c.SubjectKeyId = now.Add(time.Minute), now.Add(time.Hour), []byte("later")
	}
	ca := forge.New(t, "example.org")
	intermediate := ca.Intermediate()
	leaf := intermediate.Leaf("/a")
	twoRoots := ca.Bundle().X509Bundle()
	twoRoots.AddX509Authority(ca.Again(later))
	for name, tt := range map[string]struct {
		chain  []*x509.Certificate
		bundle *x509bundle.Bundle
	}{
		"a root":          {leaf.Chain, twoRoots},
		"an intermediate": {append(leaf.Chain, intermediate.Again(later)), ca.Bundle().X509Bundle()},
	} {
		trust := svid.NewTrust(x509bundle.NewSet(tt.bundle))
		for after, want := range map[time.Duration]int{0: 2, time.Minute - 1: 2, time.Minute: 3} {
			for range 2 {
				peer, err := trust.VerifyChain(tt.chain, now.Add(after))
				if err != nil || len(peer.AuthorityIDs) != want {
					t.Errorf("%s, %v later: %+v, %v; want %d authorities", name, after, peer, err, want)
				}
			}
		}
	}
}

func TestTrustKnowsAChainAgain(t *testing.T) {
	ca := forge.New(t, "example.org")
	leaf, trust := ca.Intermediate().Leaf("/a"), trustIn(ca)
	first, err := trust.VerifyChain(leaf.Chain, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if again, err := trust.VerifyChain(leaf.Chain, time.Now()); err != nil || again != first {
		t.Errorf("the chain was verified again: %v", err)
	}
	trust.Forget()
	if again, err := trust.VerifyChain(leaf.Chain, time.Now()); err != nil || again == first {
		t.Errorf("Forget had no effect: %v", err)
	}
	// All of the chain is what is known, not its leaf, and not its lengths.
	same := forge.New(t, "example.org").Intermediate()
	for range 1000 {
		if len(same.Cert.Raw) == len(leaf.Chain[1].Raw) {
			break
		}
		same = same.Parent.Intermediate()
	}
	_, err = trust.VerifyChain(append(leaf.Chain[:1:1], same.Cert), time.Now())
	checkRule(t, err, "X13")
	_, err = trust.VerifyChain(leaf.Chain[:1], time.Now())
	checkRule(t, err, "X13")
	_, err = trust.VerifyChain(append(leaf.Chain[:1:1], forge.New(t, "example.org").Cert), time.Now())
	checkRule(t, err, "X13")
}

func TestTrustIsOfOneMoment(t *testing.T) {
	a, b := forge.New(t, "a.org"), forge.New(t, "b.org")
	set := x509bundle.NewSet(a.Bundle().X509Bundle())
	trust := svid.NewTrust(set)
	set.Add(b.Bundle().X509Bundle())
	_, err := trust.VerifyChain(b.Leaf("/web").Chain, time.Now())
	checkRule(t, err, "X17")
	_, err = new(svid.Trust).VerifyChain(a.Leaf("/web").Chain, time.Now())
	checkRule(t, err, "X17")
	// X17: a root speaks for its own trust domain.
	_, err = trustIn(a, b).VerifyChain(a.Leaf("/", forge.URIs("spiffe://b.org/web")).Chain, time.Now())
	checkRule(t, err, "X13")
}

// X7, as in TestX7CertificatesOfTheBundleAuthenticateNobody.
func TestTrustHoldsX7(t *testing.T) {
	ca := forge.New(t, "example.org")
	leaf, bundle := ca.Leaf("/a"), ca.Bundle().X509Bundle()
	bundle.AddX509Authority(leaf.Chain[0])
	_, err := svid.NewTrust(x509bundle.NewSet(bundle)).VerifyChain(leaf.Chain, time.Now())
	checkRule(t, err, "X7")
}

func TestSame(t *testing.T) {
	a, b, other := forge.New(t, "a.org"), forge.New(t, "b.org"), forge.New(t, "a.org")
	own := a.Bundle().X509Bundle()
	trust := svid.NewTrust(x509bundle.NewSet(own, b.Bundle().X509Bundle()))
	own.AddX509Authority(other.Cert)
	for name, tt := range map[string]struct {
		set  *x509bundle.Set
		want bool
	}{
		"the same":            {x509bundle.NewSet(b.Bundle().X509Bundle(), a.Bundle().X509Bundle()), true},
		"one is missing":      {x509bundle.NewSet(a.Bundle().X509Bundle()), false},
		"another root":        {x509bundle.NewSet(b.Bundle().X509Bundle(), other.Bundle().X509Bundle()), false},
		"a root was added":    {x509bundle.NewSet(own, b.Bundle().X509Bundle()), false},
		"a further domain":    {x509bundle.NewSet(a.Bundle().X509Bundle(), b.Bundle().X509Bundle(), forge.New(t, "c.org").Bundle().X509Bundle()), false},
		"nothing":             {x509bundle.NewSet(), false},
		"another domain, two": {x509bundle.NewSet(a.Bundle().X509Bundle(), forge.New(t, "c.org").Bundle().X509Bundle()), false},
	} {
		if got := trust.Same(tt.set); got != tt.want {
			t.Errorf("%s: Same() = %v", name, got)
		}
	}
}

func TestTrustIsSafeForConcurrentUse(t *testing.T) {
	ca := forge.New(t, "example.org")
	trust := trustIn(ca)
	var wg sync.WaitGroup
	for range 4 {
		leaf := ca.Leaf("/a")
		wg.Go(func() {
			for i := range 50 {
				if _, err := trust.VerifyChain(leaf.Chain, time.Now()); err != nil {
					t.Error(err)
					return
				}
				if i%10 == 0 {
					trust.Forget()
				}
			}
		})
	}
	wg.Wait()
}
