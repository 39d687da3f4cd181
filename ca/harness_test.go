// What the tests of the door share: a CA in process on real sockets, store and
// TLS, and an agent that speaks raw gRPC to it.

package ca_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"merlon.dev/ca"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/unixsock"
)

// testCA is a running CA.
type testCA struct {
	t     testing.TB
	dir   string
	srv   *ca.Server
	admin capb.AdminClient
	stop  func()
	// address is where a CA serves that is another process, without a srv.
	address string
}

// startCA runs a CA in dir until the test ends or stop is called.
func startCA(t testing.TB, dir string, changes ...func(*ca.Config)) *testCA {
	t.Helper()
	cfg := ca.Config{
		TrustDomain: "shop.test", DataDir: filepath.Join(dir, "data"), AdminSocket: filepath.Join(dir, "s", "a.sock"),
		Address: "127.0.0.1:0", HTTPSAddress: "127.0.0.1:0", HealthAddress: "127.0.0.1:0", Development: true,
		Logger: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn})),
	}
	for _, change := range changes {
		change(&cfg)
	}
	srv, err := ca.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Run(ctx) }()
	select {
	case <-srv.Ready():
	case err := <-done:
		cancel()
		t.Fatalf("Run: %v", err)
	}
	conn, err := grpc.NewClient("unix://"+cfg.AdminSocket, grpc.WithTransportCredentials(unixsock.ClientCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	c := &testCA{t: t, dir: dir, srv: srv, admin: capb.NewAdminClient(conn)}
	stopped := false
	c.stop = func() {
		if stopped {
			return
		}
		stopped = true
		conn.Close()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v; want a clean stop", err)
		}
	}
	t.Cleanup(c.stop)
	return c
}

// tempDir is short enough for a socket path.
func tempDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ca") //nolint:usetesting // t.TempDir's names are too long
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func (c *testCA) joinToken(name string) string {
	c.t.Helper()
	resp, err := c.admin.CreateToken(c.t.Context(), &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_JOIN, AgentName: name})
	if err != nil {
		c.t.Fatal(err)
	}
	return resp.GetToken()
}

func (c *testCA) entry(parent, id string) *capb.Entry {
	c.t.Helper()
	resp, err := c.admin.CreateEntry(c.t.Context(), &capb.CreateEntryRequest{Entry: newEntry(parent, id)})
	if err != nil {
		c.t.Fatal(err)
	}
	return resp.GetEntry()
}

func newEntry(parent, id string) *capb.Entry {
	return &capb.Entry{
		SpiffeId: "spiffe://shop.test/" + id, ParentId: "spiffe://shop.test/agent/" + parent,
		Selectors: []*capb.Selector{{Type: "unix", Value: "uid:1000"}},
	}
}

// admins makes a client of a workload whose entry has a role.
func (c *testCA) admins(a *testClient, id string, role capb.Role, prefix string) *testClient {
	c.t.Helper()
	e := newEntry("n1", id)
	e.Role, e.RolePrefix = role, prefix
	created, err := c.admin.CreateEntry(c.t.Context(), &capb.CreateEntryRequest{Entry: e})
	if err != nil {
		c.t.Fatal(err)
	}
	client := c.client(a.svid(created.GetEntry()))
	client.id = e.GetSpiffeId()
	return client
}

// entriesOf are the entries of a workload.
func (c *testCA) entriesOf(id string) []*capb.Entry {
	c.t.Helper()
	resp, err := c.admin.ListEntries(c.t.Context(), &capb.ListEntriesRequest{SpiffeId: "spiffe://shop.test/" + id})
	if err != nil {
		c.t.Fatal(err)
	}
	return resp.GetEntries()
}

// bearer makes a client that shows a token with each call.
func (c *testCA) bearer(token string) *testClient {
	c.t.Helper()
	return c.clientWith(nil, nil, grpc.WithPerRPCCredentials(bearer(token)))
}

type bearer string

func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(b)}, nil
}

func (bearer) RequireTransportSecurity() bool { return true }

// testClient calls the TLS port with an SVID or none.
type testClient struct {
	t     testing.TB
	id    string
	key   *ecdsa.PrivateKey
	chain [][]byte
	conn  *grpc.ClientConn
	node  capb.NodeClient
	admin capb.AdminClient
}

func (c *testCA) client(key *ecdsa.PrivateKey, chain [][]byte) *testClient {
	c.t.Helper()
	return c.clientWith(key, chain)
}

func (c *testCA) clientWith(key *ecdsa.PrivateKey, chain [][]byte, opts ...grpc.DialOption) *testClient {
	c.t.Helper()
	opts = append(opts, grpc.WithTransportCredentials(credentials.NewTLS(clientTLS(key, chain))))
	address := c.address
	if c.srv != nil {
		address = c.srv.Address().String()
	}
	conn, err := grpc.NewClient(address, opts...)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { conn.Close() })
	return &testClient{t: c.t, key: key, chain: chain, conn: conn, node: capb.NewNodeClient(conn), admin: capb.NewAdminClient(conn)}
}

func clientTLS(key *ecdsa.PrivateKey, chain [][]byte) *tls.Config {
	cfg := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}
	if chain != nil {
		cfg.Certificates = []tls.Certificate{{Certificate: chain, PrivateKey: key}}
	}
	return cfg
}

// agent attests a node.
func (c *testCA) agent(name string) *testClient {
	c.t.Helper()
	key, csr := newCSR(c.t)
	anonymous := c.client(nil, nil)
	resp, err := anonymous.node.Attest(c.t.Context(), &capb.AttestRequest{Evidence: &capb.AttestRequest_JoinToken{JoinToken: c.joinToken(name)}, Csr: csr})
	if err != nil {
		c.t.Fatal(err)
	}
	a := c.client(key, resp.GetX509Svid())
	a.id = "spiffe://shop.test/agent/" + name
	return a
}

// svid obtains a workload's X509-SVID through the agent.
func (a *testClient) svid(e *capb.Entry) (*ecdsa.PrivateKey, [][]byte) {
	a.t.Helper()
	key, csr := newCSR(a.t)
	resp, err := a.node.Sign(a.t.Context(), &capb.SignRequest{Items: []*capb.SignItem{{EntryId: e.GetEntryId(), Csr: csr}}})
	if err != nil {
		a.t.Fatal(err)
	}
	if r := resp.GetResults()[0]; r.GetCode() != 0 {
		a.t.Fatalf("Sign: %s %s", codes.Code(r.GetCode()), r.GetMessage())
	}
	return key, resp.GetResults()[0].GetX509Svid()
}

func newCSR(t testing.TB) (*ecdsa.PrivateKey, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key, csrOf(t, key, &x509.CertificateRequest{})
}

func csrOf(t testing.TB, key crypto.Signer, template *x509.CertificateRequest) []byte {
	t.Helper()
	csr, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

// sync opens a Sync stream.
func (a *testClient) sync(resume uint64) grpc.BidiStreamingClient[capb.SyncRequest, capb.SyncResponse] {
	a.t.Helper()
	return a.syncFor(20*time.Second, resume)
}

// syncFor opens a Sync stream that lasts no longer.
func (a *testClient) syncFor(timeout time.Duration, resume uint64) grpc.BidiStreamingClient[capb.SyncRequest, capb.SyncResponse] {
	a.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	a.t.Cleanup(cancel)
	stream, err := a.node.Sync(ctx)
	if err != nil {
		a.t.Fatal(err)
	}
	// Where the stream is refused at once, Recv says why.
	if err := stream.Send(&capb.SyncRequest{ResumeRevision: resume}); err != nil && !errors.Is(err, io.EOF) {
		a.t.Fatal(err)
	}
	return stream
}

// until receives messages until match holds for one, and returns it.
func until(t testing.TB, stream grpc.BidiStreamingClient[capb.SyncRequest, capb.SyncResponse], match func(*capb.SyncResponse) bool) *capb.SyncResponse {
	t.Helper()
	for {
		msg, err := stream.Recv()
		if err != nil {
			t.Fatalf("Sync: %v", err)
		}
		if match(msg) {
			return msg
		}
	}
}

func synced(msg *capb.SyncResponse) bool { return msg.GetSynced() }

func wantCode(t testing.TB, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Errorf("error = %v; want %s", err, want)
	}
}

// auditRecords reads the audit log.
func (c *testCA) auditRecords() []map[string]any {
	c.t.Helper()
	b, err := os.ReadFile(filepath.Join(c.dir, "data", "audit.jsonl"))
	if err != nil {
		c.t.Fatal(err)
	}
	var records []map[string]any
	for line := range bytes.Lines(b) {
		var r map[string]any
		if err := json.Unmarshal(line, &r); err != nil {
			c.t.Fatalf("audit line %q: %v", line, err)
		}
		if inner, ok := r["record"].(map[string]any); ok {
			r = inner
		}
		records = append(records, r)
	}
	return records
}

// jwt asks for one JWT-SVID.
func (a *testClient) jwt(entryID string, audience []string) (*capb.SignJWTResult, error) {
	a.t.Helper()
	resp, err := a.node.SignJWT(a.t.Context(), &capb.SignJWTRequest{Items: []*capb.SignJWTItem{{EntryId: entryID, Audience: audience}}})
	if err != nil {
		return nil, err
	}
	r := resp.GetResults()[0]
	return r, status.Error(codes.Code(r.GetCode()), r.GetMessage())
}

// outcomes are the records but those with which acts begin.
func (c *testCA) outcomes() []map[string]any {
	c.t.Helper()
	return slices.DeleteFunc(c.auditRecords(), func(r map[string]any) bool { return r["pending"] == true })
}

// httpClient calls the HTTPS port.
func httpClient(t testing.TB, key *ecdsa.PrivateKey, chain [][]byte) *http.Client {
	t.Helper()
	tr := &http.Transport{TLSClientConfig: clientTLS(key, chain), ForceAttemptHTTP2: true}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 20 * time.Second}
}

// withHeaders adds metadata to each call.
func withHeaders(kv ...string) grpc.UnaryClientInterceptor {
	return func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		return invoke(metadata.AppendToOutgoingContext(ctx, kv...), method, req, reply, cc, opts...)
	}
}
