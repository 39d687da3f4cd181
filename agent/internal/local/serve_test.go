// The API over a socket, for this very process: who may watch, and how many CSRs
// go to the CA.

package local

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"merlon.dev/agent/agentpb"
	"merlon.dev/agent/internal/cache"
	"merlon.dev/agent/internal/endpoint"
	"merlon.dev/agent/internal/workload"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid/forge"
	"merlon.dev/sdk/unixsock"
)

// This binary is also a workload, for the test of one whose program moves.
func TestMain(m *testing.M) {
	if socket := os.Getenv("MERLON_TEST_WORKLOAD"); socket != "" {
		if err := actWorkload(socket); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

// serve serves s for the processes of this node, and gives this one a client.
func serve(t *testing.T, s *Server) agentpb.LocalClient {
	t.Helper()
	cc, err := grpc.NewClient("unix://"+listen(t, s), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	return agentpb.NewLocalClient(cc)
}

// listen serves s and gives its socket.
func listen(t *testing.T, s *Server) string {
	t.Helper()
	attestor, err := workload.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { attestor.Close() })
	s.o.Callers.Attestor = attestor
	s.o.PolicyChanged = func() <-chan struct{} { return nil }
	s.o.AgentID = func() spiffeid.ID { return spiffeid.ID{} }
	dir, err := os.MkdirTemp("", "ml") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	lis, err := unixsock.Listen(filepath.Join(dir, "s", "api.sock"), unixsock.Public)
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer(grpc.Creds(unixsock.ServerCredentials()))
	agentpb.RegisterLocalServer(g, s)
	go g.Serve(lis)
	t.Cleanup(g.Stop)
	return lis.Addr().String()
}

// ownEntry is for this very process.
func ownEntry(revision uint64) *capb.Entry {
	return &capb.Entry{
		EntryId: "e1", SpiffeId: "spiffe://example.test/web", Revision: revision, KeyDelivery: capb.KeyDelivery_KEY_DELIVERY_WORKLOAD,
		Selectors: []*capb.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", os.Geteuid())}},
	}
}

func apply(t *testing.T, c *cache.Cache, m *capb.SyncResponse) {
	t.Helper()
	m.Synced = true
	if err := c.Apply(t.Context(), m); err != nil {
		t.Fatal(err)
	}
}

func wantEnd(t *testing.T, err error, code codes.Code, reason string) {
	t.Helper()
	st := status.Convert(err)
	for _, d := range st.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && st.Code() == code && info.GetReason() == reason {
			return
		}
	}
	t.Errorf("the stream ended with %v; want %s with reason %s", err, code, reason)
}

// What is revoked, and the operators' words about it, are for who has an identity.
// Who loses it hears of what was revoked with it, and no more.
func TestWatchIsForWhoHasAnIdentity(t *testing.T) {
	s, c := newServer(t, false)
	api := serve(t, s)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	watch := func() agentpb.Local_WatchClient {
		t.Helper()
		stream, err := api.Watch(ctx, &agentpb.WatchRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return stream
	}
	revoked := func(id string, before uint64) []*capb.Revocation {
		return []*capb.Revocation{{Subject: &capb.Revocation_SpiffeId{SpiffeId: "spiffe://example.test" + id}, BeforeRevision: before, Note: "secret"}}
	}
	held := watch() // the agent cannot tell yet
	apply(t, c, &capb.SyncResponse{Revision: 1, Revocations: revoked("/other", 1)})
	_, err := held.Recv()
	wantEnd(t, err, codes.PermissionDenied, endpoint.NoMatchingEntry)
	_, err = watch().Recv()
	wantEnd(t, err, codes.PermissionDenied, endpoint.NoMatchingEntry)

	apply(t, c, &capb.SyncResponse{Revision: 2, Entries: []*capb.Entry{ownEntry(2)}})
	stream := watch()
	m, err := stream.Recv()
	if err != nil || len(m.GetRevocations()) != 1 {
		t.Fatalf("Watch() = %v, %v; want one revocation", m, err)
	}
	apply(t, c, &capb.SyncResponse{Revision: 3, RemovedEntryIds: []string{"e1"}, Revocations: revoked("/web", 3)})
	last := ""
	for {
		m, err := stream.Recv()
		if err != nil {
			wantEnd(t, err, codes.PermissionDenied, endpoint.NoMatchingEntry)
			break
		}
		for _, r := range m.GetRevocations() {
			last = r.GetSpiffeId()
		}
	}
	if last != "spiffe://example.test/web" {
		t.Errorf("the last revocation is of %q; want that of the entry that was taken away", last)
	}
}

// Services hear which authorities are tainted, and once none is.
func TestWatchNamesTaintedAuthorities(t *testing.T) {
	s, c := newServer(t, false)
	api := serve(t, s)
	jwks, err := forge.New(t, "example.test").Bundle().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	apply(t, c, &capb.SyncResponse{Revision: 1, Entries: []*capb.Entry{ownEntry(1)}})
	stream, err := api.Watch(ctx, &agentpb.WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for i, tainted := range [][]string{nil, {"aa", "bb"}, nil} {
		apply(t, c, &capb.SyncResponse{Revision: uint64(i + 2), TrustBundle: &capb.TrustBundle{
			TrustDomain: "example.test", Sequence: uint64(i + 1), Jwks: jwks, TaintedAuthorityIds: tainted,
		}})
		for got := []string{"nothing yet"}; !slices.Equal(got, tainted); {
			m, err := stream.Recv()
			if err != nil {
				t.Fatalf("no message with the tainted authorities %q: %v", tainted, err)
			}
			got = m.GetTaintedAuthorityIds()
		}
	}
}

// Each new stream wants a CSR, so a user could have any number signed.
func TestCSRsOfOneUserAreLimited(t *testing.T) {
	s, c := newServer(t, false)
	s.csrs = endpoint.NewRate(0, 1)
	api := serve(t, s)
	jwks, err := forge.New(t, "example.test").Bundle().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	apply(t, c, &capb.SyncResponse{
		Revision: 1, Entries: []*capb.Entry{ownEntry(1)},
		TrustBundle: &capb.TrustBundle{TrustDomain: "example.test", Sequence: 1, Jwks: jwks},
	})
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var last error
	for range 2 { // the second stream is refused its first
		stream, err := api.HoldKeys(ctx)
		if err != nil {
			t.Fatal(err)
		}
		m, err := stream.Recv()
		if err != nil || m.GetIdentities()[0].GetCsrWanted() == 0 {
			t.Fatalf("HoldKeys() = %v, %v; want a CSR wanted", m, err)
		}
		for range 2 {
			if err := stream.Send(&agentpb.HoldKeysRequest{SpiffeId: "spiffe://example.test/web", Csr: csr}); err != nil {
				break // Recv says why
			}
		}
		for last = nil; last == nil; {
			_, last = stream.Recv()
		}
	}
	wantEnd(t, last, codes.ResourceExhausted, endpoint.RateLimited)
}
