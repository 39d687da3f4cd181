// Whom a replica gives its token, and which answer it believes.

package ca

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/authority"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/trust"
	"merlon.dev/ca/internal/upstream"
	"merlon.dev/sdk/svid"
)

// taker takes tokens, and gives nothing for them.
type taker struct {
	capb.UnimplementedReplicaServer
	tokens atomic.Int32
}

func (s *taker) Join(_ context.Context, req *capb.ReplicaJoinRequest) (*capb.ReplicaJoinResponse, error) {
	if req.GetToken() != "" {
		s.tokens.Add(1)
	}
	return nil, status.Error(codes.Unavailable, "thank you")
}

// servesAs runs a taker under an SVID of the CA's own authority for id, as who
// has that SVID could, at the address that is returned.
func (p *parts) servesAs(t *testing.T, id spiffeid.ID) (*taker, string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial, err := svid.NewSerial(1, 1)
	if err != nil {
		t.Fatal(err)
	}
	ca := p.keys.X509()
	leaf, err := ca.Issue(authority.LeafRequest{SPIFFEID: id, PublicKey: key.Public(), Serial: serial, TTL: time.Hour, Now: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	chain := [][]byte{leaf.DER, ca.Chain[0].Raw, ca.Root.Raw}
	srv := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{{Certificate: chain, PrivateKey: key}},
	})))
	s := &taker{}
	capb.RegisterReplicaServer(srv, s)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(lis) }()
	t.Cleanup(func() {
		srv.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return s, lis.Addr().String()
}

// A workload under the pinned root, at the address of the CA, is not the CA.
func TestTokenGoesToTheCAAlone(t *testing.T) {
	p, _ := openParts(t)
	td := spiffeid.RequireTrustDomainFromString("shop.test")
	root := p.keys.X509().Root
	for id, want := range map[spiffeid.ID]int32{
		entry.CAID(td): 1,
		spiffeid.RequireFromString("spiffe://shop.test/web"):      0,
		spiffeid.RequireFromString("spiffe://shop.test/agent/n1"): 0,
	} {
		server, address := p.servesAs(t, id)
		h := &rootHolder{
			cfg: Config{JoinAddress: address, JoinToken: "mrt-token", RootHash: svid.KeyHash(root)}, td: td, log: slog.New(slog.DiscardHandler),
			published: &trust.Bundle{Keys: spiffebundle.FromX509Authorities(td, []*x509.Certificate{root})},
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		_, err := h.Join(ctx, upstream.KeyRequests{})
		cancel()
		if got := server.tokens.Load(); err == nil || got != want {
			t.Errorf("%s: %d tokens, %v; want %d and an error", id, got, err, want)
		}
	}
}

// The root of an answer is one that the connection was verified with.
func TestAnswerHoldsARootThatWasShown(t *testing.T) {
	p, _ := openParts(t)
	other, _ := openParts(t)
	ca, someRoot := p.keys.X509(), other.keys.X509().Root
	answer := &capb.ReplicaCertificates{Intermediate: [][]byte{ca.Chain[0].Raw}, PolicyCertificate: p.keys.PolicyCertificate(), Root: ca.Root.Raw}
	if got, err := certificates(answer, []*x509.Certificate{someRoot, ca.Root}); err != nil || !got.Root.Equal(ca.Root) || !got.Intermediate.Equal(ca.Chain[0]) {
		t.Errorf("certificates = %+v, %v", got, err)
	}
	for name, roots := range map[string][]*x509.Certificate{"none": nil, "another": {someRoot}} {
		if _, err := certificates(answer, roots); err == nil {
			t.Errorf("with the shown roots %s: taken", name)
		}
	}
	answer.Intermediate = append(answer.Intermediate, ca.Chain[0].Raw)
	if _, err := certificates(answer, []*x509.Certificate{ca.Root}); err == nil {
		t.Error("two intermediates: taken")
	}
}
