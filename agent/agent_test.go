// The agent as its neighbours see it: go-spiffe clients on its socket, a CA in
// memory at the other end of real TLS.

package agent_test

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"merlon.dev/agent"
	"merlon.dev/agent/internal/fakeca"
	"merlon.dev/ca/capb"
)

// This binary is also a workload, for the tests of exec.
func TestMain(m *testing.M) {
	if socket := os.Getenv("MERLON_TEST_WORKLOAD"); socket != "" {
		if err := actWorkload(socket, os.Getenv("MERLON_TEST_EXEC")); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

const td = "example.test"

// uidSelector is what this test process proves.
var uidSelector = "unix:uid:" + strconv.Itoa(os.Geteuid())

type node struct {
	*agent.Agent
	cfg    agent.Config
	socket string
	stop   func()
}

// newConfig is for an agent of ca in directories of its own.
func newConfig(t testing.TB, ca *fakeca.CA) agent.Config {
	t.Helper()
	dir, err := os.MkdirTemp("", "merlon") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return agent.Config{
		TrustDomain: td, CAAddress: agent.Addresses{ca.Address}, CAHTTPSAddress: agent.Addresses{ca.HTTPSAddress},
		DataDir: filepath.Join(dir, "data"), HealthAddress: "127.0.0.1:0",
		PublicSocket: filepath.Join(dir, "pub", "api.sock"), AdminSocket: filepath.Join(dir, "adm", "admin.sock"),
		JoinToken: fakeca.Token, RootHash: ca.RootHash(), Logger: testLogger(t),
	}
}

// testLogger logs into the test until the test ends.
func testLogger(t testing.TB) *slog.Logger {
	w := &testWriter{t: t}
	t.Cleanup(w.close)
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

type testWriter struct {
	mu sync.Mutex
	t  testing.TB
}

func (w *testWriter) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.t != nil {
		w.t.Log(strings.TrimSuffix(string(b), "\n"))
	}
	return len(b), nil
}

func (w *testWriter) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.t = nil
}

// start runs an agent until the test ends or stop is called.
func start(t testing.TB, cfg agent.Config) *node {
	t.Helper()
	a, err := agent.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run() = %v", err)
		}
	})
	t.Cleanup(stop)
	for _, socket := range []string{cfg.PublicSocket, cfg.AdminSocket} {
		eventually(t, socket+" takes connections", func() bool { // it is there a moment before
			conn, err := net.Dial("unix", socket)
			if err == nil {
				conn.Close()
			}
			return err == nil
		})
	}
	return &node{Agent: a, cfg: cfg, socket: "unix://" + cfg.PublicSocket, stop: stop}
}

func (n *node) waitReady(t testing.TB) {
	t.Helper()
	select {
	case <-n.Ready():
	case <-time.After(10 * time.Second):
		t.Fatal("the agent did not become ready")
	}
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within 10 s: %s", what)
		}
	}
}

// conn is a plain gRPC connection to a socket, with the security header.
func conn(t testing.TB, socket string) (*grpc.ClientConn, context.Context) {
	t.Helper()
	cc, err := grpc.NewClient(socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return cc, metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

func (n *node) x509Stream(t testing.TB) workload.SpiffeWorkloadAPI_FetchX509SVIDClient {
	t.Helper()
	cc, ctx := conn(t, n.socket)
	stream, err := workload.NewSpiffeWorkloadAPIClient(cc).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return stream
}

// receive expects exactly these SPIFFE IDs, in this order.
func receive(t testing.TB, stream workload.SpiffeWorkloadAPI_FetchX509SVIDClient, want ...string) *workload.X509SVIDResponse {
	t.Helper()
	m, err := stream.Recv()
	if err != nil {
		t.Fatalf("Recv() = %v; want %q", err, want)
	}
	var got []string
	for _, s := range m.Svids {
		got = append(got, strings.TrimPrefix(s.SpiffeId, "spiffe://"+td))
	}
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Fatalf("SPIFFE IDs = %q; want %q", got, want)
	}
	return m
}

// quiet expects no message for a while.
func quiet(t *testing.T, stream workload.SpiffeWorkloadAPI_FetchX509SVIDClient) (next func() (*workload.X509SVIDResponse, error)) {
	t.Helper()
	type result struct {
		m   *workload.X509SVIDResponse
		err error
	}
	got := make(chan result, 1)
	go func() {
		m, err := stream.Recv()
		got <- result{m, err}
	}()
	select {
	case r := <-got:
		t.Fatalf("Recv() = %v, %v; want the stream to be held", r.m, r.err)
	case <-time.After(300 * time.Millisecond):
	}
	return func() (*workload.X509SVIDResponse, error) {
		r := <-got
		return r.m, r.err
	}
}

func reason(err error) string {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return info.GetReason()
		}
	}
	return ""
}

func wantError(t testing.TB, err error, code codes.Code, why string) {
	t.Helper()
	if status.Code(err) != code || reason(err) != why {
		t.Fatalf("error = %v (reason %q); want %v with reason %q", err, reason(err), code, why)
	}
}

func TestGoSPIFFEClientGetsEverything(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	n := start(t, newConfig(t, ca))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	client, err := workloadapi.New(ctx, workloadapi.WithAddr(n.socket))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	x509Context, err := client.FetchX509Context(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if got := x509Context.DefaultSVID().ID.String(); got != "spiffe://"+td+"/web" {
		t.Errorf("X509-SVID is of %s; want /web", got)
	}
	if _, err := client.FetchX509Bundles(ctx); err != nil {
		t.Errorf("FetchX509Bundles() = %v", err)
	}
	token, err := client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "db"})
	if err != nil {
		t.Fatal(err)
	}
	bundles, err := client.FetchJWTBundles(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := jwtsvid.ParseAndValidate(token.Marshal(), bundles, []string{"db"}); err != nil {
		t.Errorf("go-spiffe refuses the JWT-SVID: %v", err)
	}
	if _, err := client.ValidateJWTSVID(ctx, token.Marshal(), "db"); err != nil {
		t.Errorf("ValidateJWTSVID() = %v", err)
	}
	if _, err := client.ValidateJWTSVID(ctx, token.Marshal(), "other"); status.Code(err) != codes.InvalidArgument {
		t.Errorf("ValidateJWTSVID() for another audience = %v; want InvalidArgument", err)
	}
}

func TestEntryReachesOpenStreamAndItsDeletionEndsIt(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	n := start(t, newConfig(t, ca))
	stream := n.x509Stream(t)
	receive(t, stream, "/web")
	ca.PutEntry(ca.Entry("e2", "/more", uidSelector))
	receive(t, stream, "/web", "/more")
	ca.PutEntry(ca.Entry("e3", "/other", "unix:uid:99999")) // not ours: no message
	ca.DeleteEntry("e1")
	receive(t, stream, "/more")
	ca.DeleteEntry("e2")
	_, err := stream.Recv()
	wantError(t, err, codes.PermissionDenied, "NO_MATCHING_ENTRY")
}

func TestStreamIsHeldUntilFirstSync(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.HoldSync(true)
	n := start(t, newConfig(t, ca))
	next := quiet(t, n.x509Stream(t))
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	ca.HoldSync(false)
	if m, err := next(); err != nil || len(m.Svids) != 1 {
		t.Fatalf("Recv() = %v, %v; want one SVID", m, err)
	}
}

func TestNoEntryIsPermissionDeniedOnlyInSync(t *testing.T) {
	ca := fakeca.New(t, td)
	n := start(t, newConfig(t, ca))
	_, err := n.x509Stream(t).Recv()
	wantError(t, err, codes.PermissionDenied, "NO_MATCHING_ENTRY")
	cc, ctx := conn(t, n.socket)
	for call, err := range everyRPC(ctx, cc) {
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s = %v; want PermissionDenied", call, err)
		}
	}
	// Nor is anything judged for it.
	_, err = workload.NewSpiffeWorkloadAPIClient(cc).ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: "a.b.c"})
	wantError(t, err, codes.PermissionDenied, "NO_MATCHING_ENTRY")

	ca.Stop()
	eventually(t, "the agent notices", func() bool {
		cc, ctx := conn(t, n.socket)
		ctx, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
		defer cancel()
		_, err := workload.NewSpiffeWorkloadAPIClient(cc).FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"a"}})
		return status.Code(err) == codes.DeadlineExceeded
	})
	next := quiet(t, n.x509Stream(t))
	ca.Start()
	_, err = next()
	wantError(t, err, codes.PermissionDenied, "NO_MATCHING_ENTRY")
}

func TestWorkloadDoesNotNoticeRestartOfCA(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	n := start(t, newConfig(t, ca))
	stream := n.x509Stream(t)
	receive(t, stream, "/web")
	ca.Stop()
	next := quiet(t, stream)
	// A new stream is served from what is held.
	receive(t, n.x509Stream(t), "/web")
	ca.PutEntry(ca.Entry("e2", "/new", uidSelector)) // while the agent is not connected
	ca.Start()
	began := time.Now()
	if m, err := next(); err != nil || len(m.Svids) != 2 {
		t.Fatalf("Recv() = %v, %v; want two SVIDs", m, err)
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("the CA was found again after %v; want about 1 s", took)
	}
	resumes := ca.Resumes()
	if last := resumes[len(resumes)-1]; last == 0 {
		t.Errorf("resume revisions = %d; want the last to resume", resumes)
	}
}

func TestRestartedAgentNeedsNoToken(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	cfg := newConfig(t, ca)
	n := start(t, cfg)
	receive(t, n.x509Stream(t), "/web")
	n.stop()
	cfg.JoinToken, cfg.RootHash = "", ""
	cfg.Logger = testLogger(t)
	n = start(t, cfg)
	receive(t, n.x509Stream(t), "/web")
	if attests, _, _ := ca.Counts(); attests != 1 {
		t.Errorf("attestations = %d; want 1", attests)
	}
	for _, name := range []string{"agent_svid.sealed", "trust_bundle.sealed", "cache.sealed", "kek"} {
		fi, err := os.Stat(filepath.Join(cfg.DataDir, name))
		if err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v, %v; want 0600", name, fi, err)
		}
	}
}

func TestAgentStartsBeforeCA(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	ca.Stop()
	n := start(t, newConfig(t, ca))
	next := quiet(t, n.x509Stream(t))
	ca.Start()
	if m, err := next(); err != nil || len(m.Svids) != 1 {
		t.Fatalf("Recv() = %v, %v; want one SVID", m, err)
	}
}

func TestWrongRootHashSendsNoEvidence(t *testing.T) {
	ca, other := fakeca.New(t, td), fakeca.New(t, td)
	elsewhere := fakeca.New(t, "elsewhere.test")
	workloadOfCA := fakeca.New(t, td)
	workloadOfCA.Stop()
	workloadOfCA.OwnPath = "/web"
	workloadOfCA.Start()
	tests := map[string]func(*agent.Config){
		"the hash of another CA": func(c *agent.Config) { c.RootHash = other.RootHash() },
		"the CA is another":      func(c *agent.Config) { c.CAAddress = agent.Addresses{other.Address} },
		"another trust domain's": func(c *agent.Config) {
			c.CAAddress, c.RootHash = agent.Addresses{elsewhere.Address}, elsewhere.RootHash()
		},
		"a workload below the right root": func(c *agent.Config) {
			c.CAAddress, c.RootHash = agent.Addresses{workloadOfCA.Address}, workloadOfCA.RootHash()
		},
		"another digit at the end": func(c *agent.Config) {
			last := "0"
			if strings.HasSuffix(c.RootHash, "0") {
				last = "1"
			}
			c.RootHash = c.RootHash[:63] + last
		},
	}
	for name, change := range tests {
		t.Run(name, func(t *testing.T) {
			cfg := newConfig(t, ca)
			change(&cfg)
			refused := make(chan string, 100)
			cfg.Logger = slog.New(slog.NewTextHandler(lineWriter(refused), nil))
			start(t, cfg)
			for line := range refused {
				if strings.Contains(line, "no connection to the CA") {
					break
				}
			}
			for _, c := range []*fakeca.CA{ca, other, elsewhere, workloadOfCA} {
				if attests, _, _ := c.Counts(); attests != 0 {
					t.Errorf("the CA got evidence %d times; want none", attests)
				}
			}
		})
	}
}

type lineWriter chan string

func (w lineWriter) Write(b []byte) (int, error) {
	select {
	case w <- string(b):
	default:
	}
	return len(b), nil
}

func TestMetadataHeaderIsRequired(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	tests := map[string]struct {
		md   []string
		want codes.Code
	}{
		"exact":        {[]string{"workload.spiffe.io", "true"}, codes.OK},
		"absent":       {nil, codes.InvalidArgument},
		"capital":      {[]string{"workload.spiffe.io", "True"}, codes.InvalidArgument},
		"capitals":     {[]string{"workload.spiffe.io", "TRUE"}, codes.InvalidArgument},
		"one":          {[]string{"workload.spiffe.io", "1"}, codes.InvalidArgument},
		"blank after":  {[]string{"workload.spiffe.io", "true,true"}, codes.InvalidArgument},
		"two values":   {[]string{"workload.spiffe.io", "true", "workload.spiffe.io", "true"}, codes.InvalidArgument},
		"other key":    {[]string{"workload-spiffe-io", "true"}, codes.InvalidArgument},
		"broker's key": {[]string{"broker.spiffe.io", "true"}, codes.InvalidArgument},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			cc, _ := conn(t, n.socket)
			ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), tt.md...), 10*time.Second)
			defer cancel()
			for call, err := range everyRPC(ctx, cc) {
				if status.Code(err) != tt.want && (tt.want != codes.OK || status.Code(err) == codes.InvalidArgument) {
					t.Errorf("%s = %v; want %v", call, err, tt.want)
				}
			}
		})
	}
}

// everyRPC makes each call of the Workload API once, up to its first answer.
func everyRPC(ctx context.Context, cc *grpc.ClientConn) map[string]error {
	c := workload.NewSpiffeWorkloadAPIClient(cc)
	out := map[string]error{}
	if s, err := c.FetchX509SVID(ctx, &workload.X509SVIDRequest{}); err == nil {
		_, out["FetchX509SVID"] = s.Recv()
	}
	if s, err := c.FetchX509Bundles(ctx, &workload.X509BundlesRequest{}); err == nil {
		_, out["FetchX509Bundles"] = s.Recv()
	}
	if s, err := c.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{}); err == nil {
		_, out["FetchJWTBundles"] = s.Recv()
	}
	_, out["FetchJWTSVID"] = c.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"a"}})
	// Valid but for the header.
	var fetched *workload.JWTSVIDResponse
	fetched, err := c.FetchJWTSVID(metadata.NewOutgoingContext(ctx, metadata.Pairs("workload.spiffe.io", "true")), &workload.JWTSVIDRequest{Audience: []string{"a"}})
	if err == nil {
		_, out["ValidateJWTSVID"] = c.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: fetched.Svids[0].Svid})
	}
	return out
}

func TestRevokedSVIDIsReplacedAtOnce(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	n := start(t, newConfig(t, ca))
	stream := n.x509Stream(t)
	before := receive(t, stream, "/web")
	ca.Revoke(&capb.Revocation{Subject: &capb.Revocation_SpiffeId{SpiffeId: "spiffe://" + td + "/web"}})
	after := receive(t, stream, "/web")
	if string(before.Svids[0].X509Svid) == string(after.Svids[0].X509Svid) {
		t.Error("the revoked SVID was sent again")
	}
}

func TestTrustBundleIsAcknowledgedWhenStreamsHaveIt(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	n := start(t, newConfig(t, ca))
	stream := n.x509Stream(t)
	receive(t, stream, "/web")
	sequence := ca.RaiseTrust()
	eventually(t, "the new trust bundle is acknowledged", func() bool { return ca.LastAck().GetTrustBundleSequence() == sequence })
}

func TestAgentRenewsItsOwnSVIDAndReconnects(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.SetTTL(time.Hour, 3*time.Second)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	n := start(t, newConfig(t, ca))
	stream := n.x509Stream(t)
	receive(t, stream, "/web")
	eventually(t, "three Sync streams, one after the other", func() bool { return len(ca.Resumes()) >= 3 })
	ca.PutEntry(ca.Entry("e2", "/more", uidSelector))
	receive(t, stream, "/web", "/more")
	if attests, _, _ := ca.Counts(); attests != 1 {
		t.Errorf("attestations = %d; want 1: the SVID is renewed", attests)
	}
}

func TestSVIDIsRenewedAtHalfLifeOnOpenStream(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.SetTTL(4*time.Second, time.Hour)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	n := start(t, newConfig(t, ca))
	stream := n.x509Stream(t)
	receive(t, stream, "/web")
	began := time.Now()
	receive(t, stream, "/web")
	if took := time.Since(began); took < 1300*time.Millisecond || took > 2300*time.Millisecond { // NotAfter has whole seconds
		t.Errorf("renewed after %v of 3 to 4 s; want half ± 10 %%", took)
	}
}
