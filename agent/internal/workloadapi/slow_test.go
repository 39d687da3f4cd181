// A reader that reads nothing.

package workloadapi

import (
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/agent/internal/endpoint"
	attested "merlon.dev/agent/internal/workload"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid/forge"
	"merlon.dev/sdk/unixsock"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var td = spiffeid.RequireTrustDomainFromString("example.test")

// serve serves the Workload API for this very process, which has an entry, and
// returns the picture that feeds it.
func serve(t *testing.T, patience time.Duration) (*cache.Cache, string) {
	t.Helper()
	return serveBy(t, nil, patience)
}

// serveBy is serve with a CA.
func serveBy(t *testing.T, ca cache.Authority, patience time.Duration) (*cache.Cache, string) {
	t.Helper()
	c := cache.New(cache.Options{TrustDomain: td, Authority: ca, Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
	attestor, err := attested.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { attestor.Close() })
	api := New(&endpoint.Callers{Attestor: attestor, Cache: c}, td, slog.New(slog.DiscardHandler))
	api.patience = patience
	dir, err := os.MkdirTemp("", "mw") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	lis, err := unixsock.Listen(filepath.Join(dir, "s", "api.sock"), unixsock.Public)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.Creds(unixsock.ServerCredentials()))
	workload.RegisterSpiffeWorkloadAPIServer(s, api)
	go s.Serve(lis)
	t.Cleanup(s.Stop)
	return c, "unix://" + lis.Addr().String()
}

// apply makes the trust bundle with this sequence number the cache's: each has
// another root, so that each is a message.
func apply(t *testing.T, c *cache.Cache, sequence uint64, entries ...*capb.Entry) {
	t.Helper()
	jwks, err := forge.New(t, td.Name()).Bundle().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	err = c.Apply(t.Context(), &capb.SyncResponse{
		Revision: sequence, Synced: true, Entries: entries,
		TrustBundle: &capb.TrustBundle{TrustDomain: td.Name(), Sequence: sequence, Jwks: jwks},
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Whoever reads nothing holds up neither the acknowledgement of a trust bundle
// nor memory for ever (SECURITY.md T38, T39).
func TestReaderThatReadsNothingLosesHisConnection(t *testing.T) {
	c, socket := serve(t, 300*time.Millisecond)
	apply(t, c, 1, &capb.Entry{
		EntryId: "e1", SpiffeId: "spiffe://example.test/web", Revision: 1,
		Selectors: []*capb.Selector{{Type: "unix", Value: "path:" + program(t)}},
	})
	closed := make(chan struct{})
	dial := func(ctx context.Context, path string) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", strings.TrimPrefix(path, "unix://"))
		return watchedConn{Conn: conn, closed: closed}, err
	}
	cc, err := grpc.NewClient("passthrough:///"+socket, grpc.WithContextDialer(dial),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithStaticStreamWindowSize(64<<10))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	ctx := metadata.AppendToOutgoingContext(t.Context(), endpoint.Header, "true")
	stream, err := workload.NewSpiffeWorkloadAPIClient(cc).FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	// It never reads again. Some 128 KiB are under way before anybody waits.
	sequence := uint64(1)
	for deadline := time.Now().Add(30 * time.Second); ; {
		sequence++
		apply(t, c, sequence)
		select {
		case <-closed:
		default:
			if time.Now().After(deadline) {
				t.Fatalf("the connection is still open after %d trust bundles", sequence)
			}
			continue
		}
		break
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, acknowledged := c.Ack(false); acknowledged == sequence && c.State().Streams == 0 {
			return
		} else if time.Now().After(deadline) {
			t.Fatalf("trust bundle %d is acknowledged with %d streams open; want %d and none", acknowledged, c.State().Streams, sequence)
		}
	}
}

// watchedConn says when the other end closed it.
type watchedConn struct {
	net.Conn
	closed chan struct{}
}

func (c watchedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err != nil {
		select {
		case <-c.closed:
		default:
			close(c.closed)
		}
	}
	return n, err
}

func program(t *testing.T) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return exe
}
