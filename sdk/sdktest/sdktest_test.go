// The trust domain in memory behaves as Merlon does.

package sdktest_test

import (
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"go.uber.org/goleak"

	"merlon.dev/policy"
	"merlon.dev/sdk/sdktest"
	"merlon.dev/sdk/svid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestEveryX509SVIDPassesTheStrictVerifier(t *testing.T) {
	td := sdktest.New(t)
	own := td.SVID("ns/shop/orders")
	peer, err := svid.VerifyChain(own.Certificates, td.Bundle(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if peer.ID != td.ID("ns/shop/orders") || !peer.OurSerial || peer.Serial.Revision == 0 {
		t.Errorf("peer %+v", peer)
	}
}

func TestProgramsOfOthersGetTheirIdentity(t *testing.T) {
	td := sdktest.New(t)
	source, err := workloadapi.NewX509Source(t.Context(), workloadapi.WithClientOptions(workloadapi.WithAddr(td.Address("orders"))))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	own, err := source.GetX509SVID()
	if err != nil || own.ID != td.ID("orders") {
		t.Errorf("go-spiffe got %v, %v", own, err)
	}
}

func TestPolicyDeniesUnlessAllowedAndDenyWins(t *testing.T) {
	td := sdktest.New(t)
	orders := td.Workload("orders")
	for _, step := range []struct {
		change func()
		want   policy.Reason
	}{
		{func() {}, policy.NoGrant},
		{func() { td.Allow("other", "orders"); td.Allow("web", "other") }, policy.NoGrant},
		{func() { td.Allow("web", "orders") }, policy.Allowed},
		{func() { td.Deny("web", "orders") }, policy.DenyRule},
		{func() { td.Allow("web", "orders") }, policy.DenyRule},
		{func() { td.Forget("web", "orders") }, policy.NoGrant},
		{func() { td.Allow("spiffe://sdktest.test/web", "spiffe://sdktest.test/orders") }, policy.Allowed},
	} {
		step.change()
		d := orders.Authorize(t.Context(), &policy.Input{Source: td.ID("web").String(), Protocol: policy.TCP})
		if d.Reason != step.want || d.Allow != (step.want == policy.Allowed) || d.DecisionID.IsZero() || d.Revision == 0 {
			t.Errorf("%+v; want %s", d, step.want)
		}
	}
}

func TestRotateRootKeepsTheOldOneTrustedAndRemoveRootDoesNot(t *testing.T) {
	td := sdktest.New(t)
	old := td.SVID("web")
	trusted := func() bool {
		_, err := svid.VerifyChain(old.Certificates, td.Bundle(), time.Now())
		return err == nil
	}
	td.RotateRoot()
	if n := len(td.Bundle().X509Authorities()); n != 2 || !trusted() {
		t.Errorf("after RotateRoot: %d roots, old X509-SVID trusted: %v", n, trusted())
	}
	td.RemoveRoot()
	if n := len(td.Bundle().X509Authorities()); n != 1 || trusted() {
		t.Errorf("after RemoveRoot: %d roots, old X509-SVID trusted: %v", n, trusted())
	}
}

func TestRotateMakesUpForRevoke(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	before := td.SVID("web")
	td.Revoke("web")
	after := td.SVID("web")
	set := svid.NewRevocations([]svid.Revocation{{SPIFFEID: td.ID("web").String(), BeforeRevision: 2}})
	for want, own := range map[bool]*svid.Peer{true: peer(t, td, before.Certificates[0].Raw), false: peer(t, td, after.Certificates[0].Raw)} {
		if _, got := set.Concerning(own); got != want {
			t.Errorf("X509-SVID of revision %d: revoked %v; want %v", own.Serial.Revision, got, want)
		}
	}
}

func peer(t *testing.T, td *sdktest.TD, der []byte) *svid.Peer {
	t.Helper()
	p, err := svid.VerifyRawChain([][]byte{der}, td.Bundle(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// Two trust domains know each other as the agents of both would say, to programs of
// others too.
func TestPartnersKnowEachOther(t *testing.T) {
	td := sdktest.New(t)
	partner := td.Partner("partner.test")
	for _, way := range []struct{ has, of *sdktest.TD }{{td, partner}, {partner, td}} {
		source, err := workloadapi.NewX509Source(t.Context(), workloadapi.WithClientOptions(workloadapi.WithAddr(way.has.Address("orders"))))
		if err != nil {
			t.Fatal(err)
		}
		defer source.Close()
		other := way.of.ID("x").TrustDomain()
		if got, err := source.GetX509BundleForTrustDomain(other); err != nil || !got.Equal(way.of.Bundle()) {
			t.Errorf("%s has %v of %s, %v", way.has.ID("orders"), got, other, err)
		}
		way.of.RotateRoot()
		deadline := time.Now().Add(30 * time.Second)
		for {
			if got, err := source.GetX509BundleForTrustDomain(other); err == nil && len(got.X509Authorities()) == 2 {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("the new root of %s does not arrive", other)
			}
			time.Sleep(time.Millisecond)
		}
	}
}
