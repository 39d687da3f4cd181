// The seam to the real CA: both doors in one process, real store, real TLS.

package agent_test

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"merlon.dev/agent"
	"merlon.dev/ca"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/unixsock"
)

// startRealCA runs a CA and returns it with a client of its admin socket.
func startRealCA(t *testing.T) (*ca.Server, capb.AdminClient) {
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

func TestAgentOfTheRealCA(t *testing.T) {
	srv, admin := startRealCA(t)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	token, err := admin.CreateToken(ctx, &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_JOIN, AgentName: "n1"})
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "merlon") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	n := start(t, agent.Config{
		TrustDomain: td, CAAddress: srv.Address().String(), CAHTTPSAddress: srv.HTTPSAddress().String(),
		DataDir: filepath.Join(dir, "data"), HealthAddress: "off",
		PublicSocket: filepath.Join(dir, "pub", "api.sock"), AdminSocket: filepath.Join(dir, "adm", "admin.sock"),
		JoinToken: token.GetToken(), RootHash: token.GetRootHash(), Logger: testLogger(t),
	})
	n.waitReady(t)
	stream := n.x509Stream(t)
	_, err = stream.Recv()
	wantError(t, err, codes.PermissionDenied, "NO_MATCHING_ENTRY")

	created, err := admin.CreateEntry(ctx, &capb.CreateEntryRequest{Entry: &capb.Entry{
		SpiffeId: "spiffe://" + td + "/web", ParentId: "spiffe://" + td + "/agent/n1",
		Selectors: []*capb.Selector{{Type: "unix", Value: uidSelector[len("unix:"):]}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	client, err := workloadapi.New(ctx, workloadapi.WithAddr(n.socket))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	svids, err := client.FetchX509Context(ctx)
	if err != nil || svids.DefaultSVID().ID.Path() != "/web" {
		t.Fatalf("FetchX509Context() = %v, %v; want /web", svids, err)
	}
	jwt, err := client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "db"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.ValidateJWTSVID(ctx, jwt.Marshal(), "db"); err != nil {
		t.Errorf("ValidateJWTSVID() = %v", err)
	}
	stream = n.x509Stream(t)
	receive(t, stream, "/web")
	if _, err := admin.DeleteEntry(ctx, &capb.DeleteEntryRequest{EntryId: created.GetEntry().GetEntryId()}); err != nil {
		t.Fatal(err)
	}
	_, err = stream.Recv()
	wantError(t, err, codes.PermissionDenied, "NO_MATCHING_ENTRY")
}
