// Agents whose own SVID ended while they could not reach the CA: who comes back,
// how often, and who does not.

package ca_test

import (
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"merlon.dev/ca"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/possession"
)

func ownRequest(t testing.TB, conn tls.ConnectionState, key *ecdsa.PrivateKey, chain [][]byte, csr []byte) *capb.AttestRequest {
	t.Helper()
	statement, err := possession.Statement(conn, csr)
	if err != nil {
		t.Fatal(err)
	}
	signature, err := possession.Sign(key, statement)
	if err != nil {
		t.Fatal(err)
	}
	return &capb.AttestRequest{Evidence: &capb.AttestRequest_OwnSvid{OwnSvid: &capb.OwnSvid{Chain: chain, Signature: signature}}, Csr: csr}
}

// recover asks for a new SVID by that of a, for the key of csr.
func (c *testCA) recover(a *testClient, csr []byte) ([][]byte, error) {
	c.t.Helper()
	node, conn := c.bound()
	resp, err := node.Attest(c.t.Context(), ownRequest(c.t, conn, a.key, a.chain, csr))
	return resp.GetX509Svid(), err
}

func (c *testCA) cannotRecover(a *testClient, words string) {
	c.t.Helper()
	_, csr := newCSR(c.t)
	if _, err := c.recover(a, csr); err == nil || !strings.Contains(err.Error(), words) {
		c.t.Errorf("the agent came back: %v; want a refusal that says %q", err, words)
	}
}

// renewed is a after a renewal.
func (c *testCA) renewed(a *testClient) *testClient {
	c.t.Helper()
	key, csr := newCSR(c.t)
	resp, err := a.node.Renew(c.t.Context(), &capb.RenewRequest{Csr: csr})
	if err != nil {
		c.t.Fatal(err)
	}
	next := c.client(key, resp.GetX509Svid())
	next.id = a.id
	return next
}

func TestAgentComesBackByItsEndedSVID(t *testing.T) {
	c := startCA(t, tempDir(t), func(cfg *ca.Config) { cfg.AgentSVIDTTL = time.Second })
	a := c.agent("n1")
	time.Sleep(1100 * time.Millisecond)
	if _, err := a.node.Renew(t.Context(), &capb.RenewRequest{}); err == nil {
		t.Fatal("an ended SVID renews")
	}
	key, csr := newCSR(t)
	var chain [][]byte
	var err error
	for range 3 { // the answer was lost: the same again, on another connection
		if chain, err = c.recover(a, csr); err != nil {
			t.Fatal(err)
		}
	}
	if cert, err := x509.ParseCertificate(chain[0]); err != nil || cert.URIs[0].String() != a.id || !key.PublicKey.Equal(cert.PublicKey) {
		t.Errorf("the agent came back with %v, %v", cert, err)
	}
	back := c.client(key, chain)
	time.Sleep(1100 * time.Millisecond)
	key, csr = newCSR(t)
	if chain, err = c.recover(back, csr); err != nil {
		t.Fatalf("the last SVID, after its end: %v", err)
	}
	// Who has a copy of an older one does not get another, and since nobody can tell
	// who is right, the node has to attest anew.
	last := c.client(key, chain)
	c.cannotRecover(a, copied)
	refusals := 0
	for _, r := range c.auditRecords() {
		if r["type"] == "refuse" && strings.Contains(r["reason"].(string), copied) {
			refusals++
		}
	}
	if refusals != 1 {
		t.Errorf("%d records of the copy; want 1", refusals)
	}
	c.cannotRecover(last, "was evicted")
}

const copied = "two agents share this identity"

func TestOneOfManyComesBack(t *testing.T) {
	c := startCA(t, tempDir(t))
	a := c.agent("n1")
	var wins atomic.Int32
	var wg sync.WaitGroup
	for range 20 {
		_, csr := newCSR(t)
		node, conn := c.bound()
		req := ownRequest(t, conn, a.key, a.chain, csr)
		wg.Go(func() {
			if _, err := node.Attest(t.Context(), req); err == nil {
				wins.Add(1)
			}
		})
	}
	wg.Wait()
	if wins.Load() != 1 {
		t.Errorf("%d of 20 with one key came back; want 1", wins.Load())
	}
}

func TestAgentDoesNotComeBack(t *testing.T) {
	c := startCA(t, tempDir(t))
	t.Run("by one that was renewed since", func(t *testing.T) {
		old := c.agent("renewed")
		newer := c.renewed(old)
		_, csr := newCSR(t)
		if _, err := c.recover(newer, csr); err != nil {
			t.Errorf("by its last: %v", err)
		}
		c.cannotRecover(old, copied)
	})
	t.Run("evicted", func(t *testing.T) {
		a := c.agent("evicted")
		if _, err := c.admin.EvictAgent(t.Context(), &capb.EvictAgentRequest{Agent: "evicted"}); err != nil {
			t.Fatal(err)
		}
		c.cannotRecover(a, "was evicted")
	})
	t.Run("banned", func(t *testing.T) {
		a := c.agent("banned")
		if _, err := c.admin.BanAgent(t.Context(), &capb.BanAgentRequest{Agent: "banned"}); err != nil {
			t.Fatal(err)
		}
		c.cannotRecover(a, "is banned")
	})
	t.Run("revoked", func(t *testing.T) {
		a := c.agent("revoked")
		if _, err := c.admin.Revoke(t.Context(), &capb.RevokeRequest{Subject: &capb.RevokeRequest_SpiffeId{SpiffeId: a.id}}); err != nil {
			t.Fatal(err)
		}
		c.cannotRecover(a, "is revoked")
	})
	t.Run("as a workload", func(t *testing.T) {
		a := c.agent("n1")
		key, chain := a.svid(c.entry("n1", "web"))
		c.cannotRecover(&testClient{key: key, chain: chain}, "is not an agent's")
	})
	t.Run("of another CA", func(t *testing.T) {
		c.cannotRecover(startCA(t, tempDir(t)).agent("n1"), "is not one of this trust domain")
	})
	t.Run("without the key", func(t *testing.T) {
		a := c.agent("keyless")
		other, _ := newCSR(t)
		c.cannotRecover(&testClient{key: other, chain: a.chain}, "the signature is not by the SVID's key")
	})
	t.Run("with a proof of another connection or CSR", func(t *testing.T) {
		a := c.agent("replayed")
		_, csr := newCSR(t)
		_, stolen := newCSR(t)
		_, conn := c.bound()
		req := ownRequest(t, conn, a.key, a.chain, csr)
		node, own := c.bound()
		_, err := node.Attest(t.Context(), req)
		wantCode(t, err, codes.PermissionDenied)
		req = ownRequest(t, own, a.key, a.chain, csr)
		req.Csr = stolen
		_, err = node.Attest(t.Context(), req)
		wantCode(t, err, codes.PermissionDenied)
	})
	t.Run("with a chain that is none", func(t *testing.T) {
		a := c.agent("garbled")
		for _, chain := range [][][]byte{nil, {{1, 2, 3}}, {make([]byte, 70_000)}, {a.chain[0], a.chain[0], a.chain[0], a.chain[0], a.chain[0], a.chain[0], a.chain[0], a.chain[0], a.chain[0]}} {
			c.cannotRecover(&testClient{key: a.key, chain: chain}, "attest by own_svid")
		}
	})
}

func TestRecoveryHasAnEnd(t *testing.T) {
	off := startCA(t, tempDir(t), func(cfg *ca.Config) { cfg.AgentSVIDTTL, cfg.AgentRecovery = time.Hour, time.Hour })
	off.cannotRecover(off.agent("n1"), "agent_recovery")
	c := startCA(t, tempDir(t), func(cfg *ca.Config) { cfg.AgentSVIDTTL, cfg.AgentRecovery = time.Second, 2*time.Second })
	a := c.agent("n1")
	time.Sleep(3 * time.Second)
	c.cannotRecover(a, "brings it back for 2s")
}
