// Keys that stay with the workload, over the real CA: who may hold one, what comes
// of a CSR, and what the standard call says then.

package agent_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	"merlon.dev/agent/agentpb"
	"merlon.dev/agent/internal/endpoint"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

// keyHolder is a workload with a HoldKeys stream.
type keyHolder struct {
	t      testing.TB
	stream agentpb.Local_HoldKeysClient
	last   *agentpb.HoldKeysResponse
	wish   uint64
}

func (n *node) holdKeys(t testing.TB) *keyHolder {
	t.Helper()
	cc, ctx := conn(t, n.socket)
	stream, err := agentpb.NewLocalClient(cc).HoldKeys(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return &keyHolder{t: t, stream: stream}
}

// until receives until the first identity is as wanted.
func (h *keyHolder) until(what string, ok func(*agentpb.HeldIdentity) bool) *agentpb.HeldIdentity {
	h.t.Helper()
	for {
		m, err := h.stream.Recv()
		if err != nil {
			h.t.Fatalf("%s: %v", what, err)
		}
		if h.last = m; len(m.GetIdentities()) > 0 && ok(m.GetIdentities()[0]) {
			return m.GetIdentities()[0]
		}
	}
}

func (h *keyHolder) wanted() *agentpb.HeldIdentity {
	h.t.Helper()
	identity := h.until("a CSR is wanted", func(i *agentpb.HeldIdentity) bool { return i.GetCsrWanted() > h.wish })
	h.wish = identity.GetCsrWanted()
	return identity
}

func (h *keyHolder) send(id string, csr []byte) {
	h.t.Helper()
	if err := h.stream.Send(&agentpb.HoldKeysRequest{SpiffeId: id, Csr: csr}); err != nil {
		h.t.Fatal(err)
	}
}

// svid obtains an X509-SVID for key and verifies it.
func (h *keyHolder) svid(id string, key crypto.Signer) *svid.Peer {
	h.t.Helper()
	h.send(id, csrOf(h.t, key, &x509.CertificateRequest{}))
	held := h.until("the X509-SVID", func(i *agentpb.HeldIdentity) bool { return len(i.GetX509Svid()) > 0 && i.GetCsrWanted() <= h.wish })
	certs, err := x509.ParseCertificates(held.GetX509Svid())
	if err != nil {
		h.t.Fatal(err)
	}
	bundle, err := x509bundle.ParseRaw(spiffeid.RequireTrustDomainFromString(td), h.last.GetBundles()["spiffe://"+td])
	if err != nil {
		h.t.Fatal(err)
	}
	peer, err := svid.VerifyChain(certs, bundle, time.Now())
	if err != nil {
		h.t.Fatal(err)
	}
	if peer.ID.String() != id || !peer.Leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool }).Equal(key.Public()) {
		h.t.Fatalf("the X509-SVID is of %s, or another key; want %s with the own", peer.ID, id)
	}
	return peer
}

func csrOf(t testing.TB, key crypto.Signer, template *x509.CertificateRequest) []byte {
	t.Helper()
	csr, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// createDelivery registers this process under a path, or another, with a way of
// the key.
func createDelivery(t testing.TB, admin capb.AdminClient, path, selector string, d capb.KeyDelivery) string {
	t.Helper()
	e := &capb.Entry{
		SpiffeId: "spiffe://" + td + path, ParentId: "spiffe://" + td + "/agent/n1", KeyDelivery: d,
		Selectors: []*capb.Selector{{Type: "unix", Value: strings.TrimPrefix(selector, "unix:")}},
	}
	created, err := admin.CreateEntry(t.Context(), &capb.CreateEntryRequest{Entry: e})
	if err != nil {
		t.Fatal(err)
	}
	if created.GetEntry().GetKeyDelivery() != d {
		t.Fatalf("the entry says %s; want %s", created.GetEntry().GetKeyDelivery(), d)
	}
	return created.GetEntry().GetEntryId()
}

func TestKeyThatStaysWithTheWorkload(t *testing.T) {
	srv, admin := startRealCA(t)
	n := startRealNode(t, srv, admin, testLogger(t))
	const id = "spiffe://" + td + "/web"
	entryID := createDelivery(t, admin, "/web", uidSelector, capb.KeyDelivery_KEY_DELIVERY_WORKLOAD)
	eventually(t, "the entry arrives", func() bool {
		_, err := n.x509Stream(t).Recv()
		return reason(err) == endpoint.ByWorkload
	})
	// The standard's call gives no key out, and says where to go.
	_, err := n.x509Stream(t).Recv()
	wantError(t, err, codes.PermissionDenied, endpoint.ByWorkload)
	if err == nil || !strings.Contains(err.Error(), "HoldKeys") {
		t.Errorf("error = %v; want it to name the call that there is", err)
	}

	h := n.holdKeys(t)
	if got := h.wanted(); got.GetSpiffeId() != id || got.GetByAgent() || len(got.GetX509Svid()) > 0 {
		t.Fatalf("identity = %v; want %s without an X509-SVID", got, id)
	}
	first := h.svid(id, newKey(t))

	// Withdrawn, it is asked for another key at once, on the same stream.
	if _, err := admin.Revoke(t.Context(), &capb.RevokeRequest{Subject: &capb.RevokeRequest_SpiffeId{SpiffeId: id}}); err != nil {
		t.Fatal(err)
	}
	if got := h.wanted(); len(got.GetX509Svid()) > 0 {
		t.Error("the revoked X509-SVID is shown still")
	}
	if second := h.svid(id, newKey(t)); second.SerialHex == first.SerialHex {
		t.Error("the new X509-SVID is the old one")
	}
	// The JWT profile has no key of the workload, so nothing changes there.
	cc, ctx := conn(t, n.socket)
	if _, err := workload.NewSpiffeWorkloadAPIClient(cc).FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"a"}}); err != nil {
		t.Errorf("FetchJWTSVID() = %v", err)
	}
	// The entry goes, and with it the stream.
	if _, err := admin.DeleteEntry(t.Context(), &capb.DeleteEntryRequest{EntryId: entryID}); err != nil {
		t.Fatal(err)
	}
	for {
		if _, err = h.stream.Recv(); err != nil {
			break
		}
	}
	wantError(t, err, codes.PermissionDenied, endpoint.NoMatchingEntry)
}

func TestWhoHoldsItsKeyIsUpToTheEntry(t *testing.T) {
	srv, admin := startRealCA(t)
	n := startRealNode(t, srv, admin, testLogger(t))
	entryID := createDelivery(t, admin, "/web", uidSelector, capb.KeyDelivery_KEY_DELIVERY_AGENT)
	n.firstSVID(t, "/web")
	_, err := n.holdKeys(t).stream.Recv()
	wantError(t, err, codes.PermissionDenied, endpoint.ByAgent)

	both := createDelivery(t, admin, "/both", uidSelector, capb.KeyDelivery_KEY_DELIVERY_BOTH)
	eventually(t, "the entry arrives", func() bool {
		m, err := n.x509Stream(t).Recv()
		return err == nil && len(m.GetSvids()) == 2
	})
	// Its default identity is by the agent, the other it may hold.
	h := n.holdKeys(t)
	h.until("both identities", func(i *agentpb.HeldIdentity) bool { return i.GetByAgent() && len(h.last.GetIdentities()) == 2 })
	if second := h.last.GetIdentities()[1]; second.GetByAgent() || second.GetCsrWanted() == 0 || second.GetSpiffeId() != "spiffe://"+td+"/both" {
		t.Errorf("second identity = %v; want /both, and a CSR wanted", second)
	}
	h.send("spiffe://"+td+"/both", csrOf(t, newKey(t), &x509.CertificateRequest{}))
	for len(h.last.GetIdentities()[1].GetX509Svid()) == 0 {
		h.until("its X509-SVID", func(*agentpb.HeldIdentity) bool { return true })
	}

	// The way is taken away: what was made the other way is not shown any more.
	for _, gone := range []string{entryID, both} {
		if _, err := admin.DeleteEntry(t.Context(), &capb.DeleteEntryRequest{EntryId: gone}); err != nil {
			t.Fatal(err)
		}
	}
	for err = nil; err == nil; {
		_, err = h.stream.Recv()
	}
	wantError(t, err, codes.PermissionDenied, endpoint.NoMatchingEntry)
}

func TestCSRsOfWorkloadsAreJudged(t *testing.T) {
	srv, admin := startRealCA(t)
	n := startRealNode(t, srv, admin, testLogger(t))
	const id, foreign = "spiffe://" + td + "/web", "spiffe://" + td + "/root"
	workloadKeys := capb.KeyDelivery_KEY_DELIVERY_WORKLOAD
	createDelivery(t, admin, "/web", uidSelector, workloadKeys)
	createDelivery(t, admin, "/second", uidSelector, workloadKeys)
	createDelivery(t, admin, "/root", "unix:path:/usr/bin/another", workloadKeys)
	eventually(t, "the entries arrive", func() bool {
		h := n.holdKeys(t)
		m, err := h.stream.Recv()
		return err == nil && len(m.GetIdentities()) == 2
	})
	used := newKey(t)
	flipped := csrOf(t, newKey(t), &x509.CertificateRequest{})
	flipped[len(flipped)-1] ^= 1
	otherURI := csrOf(t, newKey(t), &x509.CertificateRequest{URIs: []*url.URL{{Scheme: "spiffe", Host: td, Path: "/root"}}})

	// These end the stream: no honest client sends them.
	for name, test := range map[string]struct {
		id     string
		csr    []byte
		code   codes.Code
		reason string
	}{
		"an identity of another process": {foreign, csrOf(t, newKey(t), &x509.CertificateRequest{}), codes.PermissionDenied, endpoint.NotEntitled},
		"an identity that is none":       {"web", csrOf(t, newKey(t), &x509.CertificateRequest{}), codes.InvalidArgument, ""},
		"noise":                          {id, []byte("noise"), codes.InvalidArgument, ""},
		"nothing":                        {id, nil, codes.InvalidArgument, ""},
		"too long":                       {id, make([]byte, 9<<10), codes.InvalidArgument, ""},
		"RSA of 16384 bits":              {id, csrOf(t, forge.NewRSAKey(t, 16384, 65537), &x509.CertificateRequest{}), codes.InvalidArgument, ""},
	} {
		h := n.holdKeys(t)
		h.wanted()
		h.send(test.id, test.csr)
		var err error
		for err == nil {
			_, err = h.stream.Recv()
		}
		t.Log(name, err)
		wantError(t, err, test.code, test.reason)
	}

	// These the CA refuses; the stream goes on, says why, and asks again.
	h := n.holdKeys(t)
	h.wanted()
	h.svid(id, used)
	second := n.holdKeys(t)
	second.wanted()
	for name, test := range map[string]struct {
		csr  []byte
		want string
	}{
		"signed by another key": {flipped, "not signed by its own key"},
		"another URI":           {otherURI, "/root"},
		"RSA of 1024 bits":      {csrOf(t, forge.NewRSAKey(t, 1024, 65537), &x509.CertificateRequest{}), "1024 bits"},
	} {
		second.send(id, test.csr)
		got := second.until(name, func(i *agentpb.HeldIdentity) bool { return i.GetRefusal() != "" && i.GetCsrWanted() > second.wish })
		second.wish = got.GetCsrWanted()
		if !strings.Contains(got.GetRefusal(), test.want) || len(got.GetX509Svid()) > 0 {
			t.Errorf("%s: %v; want a refusal with %q", name, got, test.want)
		}
	}
	second.svid(id, newKey(t)) // and a good one is good

	// T12: a key is one identity's.
	third := n.holdKeys(t)
	third.wanted()
	third.send("spiffe://"+td+"/second", csrOf(t, used, &x509.CertificateRequest{}))
	for refusal := ""; !strings.Contains(refusal, "another SPIFFE ID"); {
		third.until("the key of another identity is refused", func(*agentpb.HeldIdentity) bool { return true })
		refusal = third.last.GetIdentities()[1].GetRefusal()
		if len(third.last.GetIdentities()[1].GetX509Svid()) > 0 {
			t.Fatal("the key of another identity got an X509-SVID")
		}
	}

	// Nobody is asked twice, so nobody can send without end.
	h.send(id, csrOf(t, newKey(t), &x509.CertificateRequest{}))
	var err error
	for err == nil {
		_, err = h.stream.Recv()
	}
	wantError(t, err, codes.FailedPrecondition, "")
}
