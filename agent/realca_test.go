// The seam to the real CA: both doors in one process, real store, real TLS.

package agent_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"merlon.dev/agent"
	"merlon.dev/agent/agentpb"
	"merlon.dev/ca"
	"merlon.dev/ca/capb"
	"merlon.dev/policy/bundle"
	"merlon.dev/sdk/seal"
	"merlon.dev/sdk/unixsock"
)

// startRealCA runs a CA and returns it with a client of its admin socket.
func startRealCA(t testing.TB) (*ca.Server, capb.AdminClient) {
	t.Helper()
	dir, err := os.MkdirTemp("", "merlon") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "s", "a.sock")
	srv, err := ca.New(ca.Config{
		TrustDomain: td, DataDir: filepath.Join(dir, "data"), AdminSocket: socket, Development: true,
		Address: "127.0.0.1:0", HTTPSAddress: "127.0.0.1:0", HealthAddress: "127.0.0.1:0",
		Logger: slog.New(slog.DiscardHandler),
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
	select {
	case <-srv.Ready():
	case <-time.After(20 * time.Second):
		t.Fatal("the CA did not become ready")
	}
	cc, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(unixsock.ClientCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	return srv, capb.NewAdminClient(cc)
}

// startRealNode runs an agent of the real CA.
func startRealNode(t testing.TB, srv *ca.Server, admin capb.AdminClient, logger *slog.Logger, changes ...func(*agent.Config)) *node {
	t.Helper()
	token, err := admin.CreateToken(t.Context(), &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_JOIN, AgentName: "n1"})
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "merlon") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	cfg := agent.Config{
		TrustDomain: td, CAAddress: agent.Addresses{srv.Address().String()}, CAHTTPSAddress: agent.Addresses{srv.HTTPSAddress().String()},
		DataDir: filepath.Join(dir, "data"), HealthAddress: "off",
		PublicSocket: filepath.Join(dir, "pub", "api.sock"), AdminSocket: filepath.Join(dir, "adm", "admin.sock"),
		JoinToken: token.GetToken(), RootHash: token.GetRootHash(), Logger: logger,
	}
	for _, change := range changes {
		change(&cfg)
	}
	n := start(t, cfg)
	n.waitReady(t)
	return n
}

// createEntry registers this process under a path.
func createEntry(t testing.TB, admin capb.AdminClient, path string) (entryID string) {
	t.Helper()
	created, err := admin.CreateEntry(t.Context(), &capb.CreateEntryRequest{Entry: &capb.Entry{
		SpiffeId: "spiffe://" + td + path, ParentId: "spiffe://" + td + "/agent/n1",
		Selectors: []*capb.Selector{{Type: "unix", Value: uidSelector[len("unix:"):]}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	return created.GetEntry().GetEntryId()
}

func TestAgentOfTheRealCA(t *testing.T) {
	srv, admin := startRealCA(t)
	n := startRealNode(t, srv, admin, testLogger(t))
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	stream := n.x509Stream(t)
	_, err := stream.Recv()
	wantError(t, err, codes.PermissionDenied, "NO_MATCHING_ENTRY")

	entryID := createEntry(t, admin, "/web")
	client, err := workloadapi.New(ctx, workloadapi.WithAddr(n.socket))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	eventually(t, "the entry arrives", func() bool {
		svids, err := client.FetchX509Context(ctx)
		return err == nil && svids.DefaultSVID().ID.Path() == "/web"
	})
	jwt, err := client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "db"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.ValidateJWTSVID(ctx, jwt.Marshal(), "db"); err != nil {
		t.Errorf("ValidateJWTSVID() = %v", err)
	}
	eventually(t, "the CA's log is remembered", func() bool {
		key, err := seal.Read(seal.Source{}, n.cfg.DataDir)
		if err != nil {
			t.Fatal(err)
		}
		sealed, err := os.ReadFile(filepath.Join(n.cfg.DataDir, "logs.sealed"))
		if err != nil {
			return false
		}
		seen, err := key.Open(sealed, "merlon agent file", td, "logs")
		return err == nil && strings.Contains(string(seen), `"`+td+`/log/ca/`)
	})
	stream = n.x509Stream(t)
	receive(t, stream, "/web")
	if _, err := admin.DeleteEntry(ctx, &capb.DeleteEntryRequest{EntryId: entryID}); err != nil {
		t.Fatal(err)
	}
	_, err = stream.Recv()
	wantError(t, err, codes.PermissionDenied, "NO_MATCHING_ENTRY")
}

// The node has the grants of its services and no others, and gets those of a service
// that comes to it without anybody pushing; also after a restart while the CA is away
// it decides for the services that it had.
func TestPolicyFollowsTheServicesOfTheNode(t *testing.T) {
	srv, admin := startRealCA(t)
	n := startRealNode(t, srv, admin, testLogger(t))
	createEntry(t, admin, "/orders")
	text := "grants:\n"
	for _, to := range []string{"orders", "stock", "elsewhere"} {
		text += fmt.Sprintf("  - {id: to-%[1]s, to: [spiffe://%[2]s/%[1]s], tcp: {}}\n", to, td)
	}
	folder := t.TempDir()
	if err := os.WriteFile(filepath.Join(folder, "grants.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	unsigned, err := bundle.Build(folder)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := admin.PushPolicy(t.Context(), &capb.PushPolicyRequest{Bundle: unsigned}); err != nil {
		t.Fatal(err)
	}
	decides := func(n *node, what, destination, rule string) {
		t.Helper()
		eventually(t, what, func() bool {
			d, err := n.authorize(t, &agentpb.AuthorizeRequest{Destination: "spiffe://" + td + destination, Source: "spiffe://" + td + "/x", Protocol: "tcp"})
			return err == nil && d.GetRuleId() == rule
		})
	}
	decides(n, "the first service", "/orders", "to-orders")
	createEntry(t, admin, "/stock")
	decides(n, "a service that came later", "/stock", "to-stock")
	decides(n, "the first one again", "/orders", "to-orders")
	n.stop()
	sealKey, err := seal.Read(seal.Source{}, n.cfg.DataDir)
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := os.ReadFile(filepath.Join(n.cfg.DataDir, "policy_bundle.sealed"))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := sealKey.Open(sealed, "merlon agent file", td, "policy_bundle")
	if err != nil {
		t.Fatal(err)
	}
	head, err := admin.GetPolicy(t.Context(), &capb.GetPolicyRequest{})
	if err != nil {
		t.Fatal(err)
	}
	key := head.GetPolicyBundle().GetKeys()[0]
	pub, err := x509.ParsePKIXPublicKey(key.GetPublicKey())
	if err != nil {
		t.Fatal(err)
	}
	share, err := bundle.Verify(raw, []bundle.Key{{KID: key.GetKid(), PublicKey: pub.(*ecdsa.PublicKey)}}, bundle.Expect{})
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, g := range share.Grants {
		ids = append(ids, g.ID)
	}
	if !slices.Equal(ids, []string{"to-orders", "to-stock"}) {
		t.Errorf("the node keeps %q; want the grants of its two services", ids)
	}
	cfg := n.cfg
	cfg.CAAddress, cfg.CAHTTPSAddress = agent.Addresses{"127.0.0.1:1"}, agent.Addresses{"127.0.0.1:1"} // where nobody is
	decides(start(t, cfg), "after a restart without the CA", "/stock", "to-stock")
}

// BenchmarkEntryToSVID measures from the request that creates an entry to the
// SVID on a stream that is open, over the real CA.
func BenchmarkEntryToSVID(b *testing.B) {
	srv, admin := startRealCA(b)
	n := startRealNode(b, srv, admin, slog.New(slog.DiscardHandler))
	createEntry(b, admin, "/first")
	stream := n.x509Stream(b)
	if _, err := stream.Recv(); err != nil {
		b.Fatal(err)
	}
	var took []time.Duration
	for i := 0; b.Loop(); i++ {
		began := time.Now()
		id := createEntry(b, admin, fmt.Sprintf("/w%d", i))
		m, err := stream.Recv()
		if err != nil || len(m.Svids) != 2 {
			b.Fatalf("Recv() = %v, %v; want two SVIDs", m, err)
		}
		took = append(took, time.Since(began))
		if _, err := admin.DeleteEntry(b.Context(), &capb.DeleteEntryRequest{EntryId: id}); err != nil {
			b.Fatal(err)
		}
		if m, err := stream.Recv(); err != nil || len(m.Svids) != 1 {
			b.Fatalf("Recv() = %v, %v; want one SVID", m, err)
		}
	}
	slices.Sort(took)
	at := func(q float64) float64 { return float64(took[int(q*float64(len(took)-1))].Microseconds()) / 1000 }
	b.ReportMetric(at(0.5), "p50-ms")
	b.ReportMetric(at(0.9), "p90-ms")
	b.ReportMetric(at(0.99), "p99-ms")
	b.ReportMetric(at(1), "max-ms")
}
