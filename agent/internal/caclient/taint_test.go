// The agent's part in the rotation of the CA's root, over the real CA.

package caclient

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"merlon.dev/agent/internal/attest"
	"merlon.dev/agent/internal/cache"
	"merlon.dev/agent/internal/workload"
	"merlon.dev/ca"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
	"merlon.dev/sdk/unixsock"
)

// A pinned root counts at first, and again where nothing that is held vouches for
// anybody; never against a trust bundle that holds.
func TestPinnedRootCountsOnlyWithoutALiveTrustBundle(t *testing.T) {
	pinned := forge.New(t, td)
	live := forge.New(t, td)
	ended := forge.New(t, td, func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
	})
	chain := append(slices.Clone(pinned.Leaf("/ca").Chain), pinned.Cert)
	for name, test := range map[string]struct {
		held *forge.Authority
		want bool
	}{"nothing is held": {nil, true}, "the held root is alive": {live, false}, "the held root has ended": {ended, true}} {
		log := slog.New(slog.DiscardHandler)
		c, err := New(Config{
			TrustDomain: spiffeid.RequireTrustDomainFromString(td), Addresses: []string{"ca:1"}, DataDir: newDir(t),
			RootHash: svid.KeyHash(pinned.Cert), Logger: log, Registerer: prometheus.NewRegistry(),
		})
		if err != nil {
			t.Fatal(err)
		}
		picture := cache.New(cache.Options{TrustDomain: c.cfg.TrustDomain, Authority: c, Logger: log, Registerer: prometheus.NewRegistry()})
		if test.held != nil {
			jwks, err := test.held.Bundle().Marshal()
			if err != nil {
				t.Fatal(err)
			}
			held, err := cache.ParseTrust(&capb.TrustBundle{TrustDomain: td, Sequence: 1, Jwks: jwks}, td)
			if err != nil {
				t.Fatal(err)
			}
			picture.SetTrust(t.Context(), held)
		}
		if err := c.firstContact(picture).VerifyConnection(tls.ConnectionState{PeerCertificates: chain}); (err == nil) != test.want {
			t.Errorf("%s: %v; want accepted = %t", name, err, test.want)
		}
	}
}

// TAINTED is how many workloads the test below has; 10 000 take some minutes.
func tainted(t *testing.T) int {
	t.Helper()
	n, err := strconv.Atoi(os.Getenv("TAINTED"))
	if err != nil {
		return 200
	}
	return n
}

func TestTaintIsOverWithinAMinute(t *testing.T) {
	t.Parallel()
	n := tainted(t)
	address, admin := realCA(t)
	picture := realNode(t, address, admin)
	var making errgroup.Group
	making.SetLimit(64)
	for i := range n {
		making.Go(func() error {
			_, err := admin.CreateEntry(t.Context(), &capb.CreateEntryRequest{Entry: &capb.Entry{
				SpiffeId: fmt.Sprintf("spiffe://%s/w/%d", td, i), ParentId: "spiffe://" + td + "/agent/n1",
				Selectors: []*capb.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", i)}},
			}})
			return err
		})
	}
	if err := making.Wait(); err != nil {
		t.Fatal(err)
	}
	subs := make([]*cache.Subscription, n)
	for i := range subs {
		subs[i] = picture.Subscribe()
		defer subs[i].Close()
	}
	await(t, "every workload has an SVID", func() bool { return holding(subs, "") == n })
	old := listed(t, admin, "active").GetAuthorityId()
	next, err := admin.PrepareAuthority(t.Context(), &capb.PrepareAuthorityRequest{Kind: "x509-root"})
	if err != nil {
		t.Fatal(err)
	}
	id := next.GetAuthority().GetAuthorityId()
	await(t, "the agent has acknowledged, and the hints are over", func() bool {
		holding(subs, "") // delivers
		_, err := admin.ActivateAuthority(t.Context(), &capb.ActivateAuthorityRequest{AuthorityId: id})
		return err == nil
	})
	begun := time.Now()
	if _, err := admin.TaintAuthority(t.Context(), &capb.TaintAuthorityRequest{AuthorityId: old}); err != nil {
		t.Fatal(err)
	}
	await(t, "every SVID is replaced", func() bool { return holding(subs, id) == n })
	took := time.Since(begun)
	t.Logf("%d SVIDs were replaced in %s", n, took.Round(10*time.Millisecond))
	if took > time.Minute {
		t.Errorf("%d SVIDs were replaced in %s; want a minute at most", n, took)
	}
	await(t, "the agent says so, and the old root goes", func() bool {
		holding(subs, id)
		_, err := admin.RevokeAuthority(t.Context(), &capb.RevokeAuthorityRequest{AuthorityId: old})
		return err == nil
	})
}

// holding counts the workloads with a valid SVID below an authority (empty: any),
// and delivers what they have.
func holding(subs []*cache.Subscription, authority string) (n int) {
	for i, s := range subs {
		v := s.View(workload.Proof{Selectors: []string{fmt.Sprintf("unix:uid:%d", i)}}, true)
		if len(v.SVIDs) == 1 && (authority == "" || slices.Contains(v.SVIDs[0].Peer.AuthorityIDs, authority)) {
			n++
		}
		if v.Trust != nil {
			s.Delivered(v.Trust.Sequence)
		}
	}
	return n
}

func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(3 * time.Minute); !ok(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it never came to this: %s", what)
		}
	}
}

// listed is the root in a state.
func listed(t *testing.T, admin capb.AdminClient, state string) *capb.CAAuthority {
	t.Helper()
	resp, err := admin.ListAuthorities(t.Context(), &capb.ListAuthoritiesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range resp.GetAuthorities() {
		if a.GetKind() == "x509-root" && a.GetState() == state {
			return a
		}
	}
	t.Fatalf("no root is %s", state)
	return nil
}

// realCA runs the real CA with short refresh hints.
func realCA(t *testing.T) (address string, admin capb.AdminClient) {
	t.Helper()
	dir := t.TempDir()
	srv, err := ca.New(ca.Config{
		TrustDomain: td, DataDir: filepath.Join(dir, "data"), AdminSocket: filepath.Join(dir, "s", "a.sock"), Development: true,
		Address: "127.0.0.1:0", HTTPSAddress: "127.0.0.1:0", HealthAddress: "127.0.0.1:0", TrustRefreshHint: time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the CA's Run() = %v", err)
		}
	})
	<-srv.Ready()
	cc, err := grpc.NewClient("unix://"+srv.AdminSocket(), grpc.WithTransportCredentials(unixsock.ClientCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	return srv.Address().String(), capb.NewAdminClient(cc)
}

// realNode is agent n1 of the CA, in sync.
func realNode(t *testing.T, address string, admin capb.AdminClient) *cache.Cache {
	t.Helper()
	token, err := admin.CreateToken(t.Context(), &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_JOIN, AgentName: "n1"})
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	c, err := New(Config{
		TrustDomain: spiffeid.RequireTrustDomainFromString(td), Addresses: []string{address}, DataDir: newDir(t),
		Attestor: &attest.JoinToken{Token: token.GetToken()}, RootHash: token.GetRootHash(),
		Logger: log, Registerer: prometheus.NewRegistry(),
	})
	if err != nil {
		t.Fatal(err)
	}
	picture := cache.New(cache.Options{TrustDomain: c.cfg.TrustDomain, Authority: c, Logger: log, Registerer: prometheus.NewRegistry()})
	ctx, cancel := context.WithCancel(context.Background())
	var running errgroup.Group
	running.Go(func() error { return picture.Run(ctx) })
	running.Go(func() error { return c.Run(ctx, picture) })
	t.Cleanup(func() {
		cancel()
		if err := running.Wait(); err != nil {
			t.Error(err)
		}
	})
	await(t, "the agent is in sync", func() bool { return picture.State().Synced })
	return picture
}
