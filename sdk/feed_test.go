// What the agent streams is read strictly, and what it no longer says is
// withdrawn (SECURITY.md E10-E18).

package sdk_test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/agent/agentpb"
	"merlon.dev/sdk"
	"merlon.dev/sdk/sdktest"
	"merlon.dev/sdk/svid/forge"
)

// script is an agent that sends what the test tells it to.
type script struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	agentpb.UnimplementedLocalServer
	svids   chan any // *workload.X509SVIDResponse, or an error that ends the stream
	watch   chan *agentpb.WatchResponse
	headers chan metadata.MD
}

func newScript(t *testing.T) (*script, sdk.Option) {
	t.Helper()
	dir, err := os.MkdirTemp("", "sdk") //nolint:usetesting // t.TempDir is too long for a socket path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := &script{svids: make(chan any, 8), watch: make(chan *agentpb.WatchResponse, 8), headers: make(chan metadata.MD, 64)}
	s.watch <- &agentpb.WatchResponse{Reset_: true, RevocationsAsOf: timestamppb.Now()}
	path := serve(t, filepath.Join(dir, "api.sock"), func(server *grpc.Server) {
		workload.RegisterSpiffeWorkloadAPIServer(server, s)
		agentpb.RegisterLocalServer(server, s)
	})
	return s, sdk.WithAgentAddress("unix://" + path)
}

func (s *script) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	md, _ := metadata.FromIncomingContext(stream.Context())
	s.headers <- md
	for {
		select {
		case <-stream.Context().Done():
			return nil
		case next := <-s.svids:
			switch next := next.(type) {
			case error:
				return next
			case *workload.X509SVIDResponse:
				if err := stream.Send(next); err != nil {
					return err
				}
			}
		}
	}
}

func (s *script) Watch(_ *agentpb.WatchRequest, stream grpc.ServerStreamingServer[agentpb.WatchResponse]) error {
	for {
		select {
		case <-stream.Context().Done():
			return nil
		case next := <-s.watch:
			if err := stream.Send(next); err != nil {
				return err
			}
		}
	}
}

// message is a good one for an X509-SVID of td.
func message(t *testing.T, td *sdktest.TD, own *x509svid.SVID) *workload.X509SVIDResponse {
	t.Helper()
	chain, key, err := own.MarshalRaw()
	if err != nil {
		t.Fatal(err)
	}
	return &workload.X509SVIDResponse{Svids: []*workload.X509SVID{{
		SpiffeId: own.ID.String(), X509Svid: chain, X509SvidKey: key, Bundle: td.Bundle().X509Authorities()[0].Raw,
	}}}
}

func TestMalformedAnswersGiveNoIdentity(t *testing.T) {
	td, other := sdktest.New(t), sdktest.New(t)
	for name, change := range map[string]func(*workload.X509SVIDResponse){
		"no X509-SVID":         func(m *workload.X509SVIDResponse) { m.Svids = nil },
		"another SPIFFE ID":    func(m *workload.X509SVIDResponse) { m.Svids[0].SpiffeId = "spiffe://sdktest.test/admin" },
		"no SPIFFE ID":         func(m *workload.X509SVIDResponse) { m.Svids[0].SpiffeId = "" },
		"no certificate":       func(m *workload.X509SVIDResponse) { m.Svids[0].X509Svid = nil },
		"broken certificate":   func(m *workload.X509SVIDResponse) { m.Svids[0].X509Svid = []byte("x") },
		"no key":               func(m *workload.X509SVIDResponse) { m.Svids[0].X509SvidKey = nil },
		"another key":          func(m *workload.X509SVIDResponse) { m.Svids[0].X509SvidKey = otherKey(t, td) },
		"no trust bundle":      func(m *workload.X509SVIDResponse) { m.Svids[0].Bundle = nil },
		"broken trust bundle":  func(m *workload.X509SVIDResponse) { m.Svids[0].Bundle = []byte("x") },
		"another trust bundle": func(m *workload.X509SVIDResponse) { m.Svids[0].Bundle = other.Bundle().X509Authorities()[0].Raw },
	} {
		t.Run(name, func(t *testing.T) {
			s, address := newScript(t)
			m := message(t, td, td.SVID("web"))
			change(m)
			s.svids <- m
			_, err := sdk.Open(t.Context(), address, quiet, sdk.WithStartupTimeout(300*time.Millisecond))
			var notReady *sdk.NotReadyError
			if !errors.As(err, &notReady) || notReady.Reason != sdk.BadAnswer {
				t.Errorf("Open = %v; want BAD_ANSWER", err)
			}
		})
	}
}

func otherKey(t *testing.T, td *sdktest.TD) []byte {
	t.Helper()
	_, key, err := td.SVID("web").MarshalRaw()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// opened is an identity over a script whose first message was good.
func opened(t *testing.T, td *sdktest.TD) (*script, *sdk.Identity) {
	t.Helper()
	s, address := newScript(t)
	s.svids <- message(t, td, td.SVID("web"))
	id, err := sdk.Open(t.Context(), address, quiet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(id.Close)
	if got := (<-s.headers).Get("workload.spiffe.io"); len(got) != 1 || got[0] != "true" {
		t.Errorf("metadata workload.spiffe.io = %q; want true", got)
	}
	return s, id
}

func TestFirstOfSeveralIdentitiesIsUsed(t *testing.T) {
	td := sdktest.New(t)
	s, id := opened(t, td)
	m := message(t, td, td.SVID("first"))
	m.Svids = append(m.Svids, message(t, td, td.SVID("second")).GetSvids()...)
	s.svids <- m
	eventually(t, "the first identity", func() bool { return id.ID() == td.ID("first") })
}

func TestFederatedTrustIsWhatTheLastMessageSays(t *testing.T) {
	td, other := sdktest.New(t), sdktest.New(t)
	s, id := opened(t, td)
	foreign := spiffeid.RequireTrustDomainFromString("foreign.test")
	trusted := func() bool {
		bundle, err := id.GetX509BundleForTrustDomain(foreign)
		return err == nil && len(bundle.X509Authorities()) == 1
	}
	m := message(t, td, td.SVID("web"))
	m.FederatedBundles = map[string][]byte{
		"spiffe://foreign.test": other.Bundle().X509Authorities()[0].Raw,
		"spiffe://broken.test":  []byte("x"),
		"spiffe://sdktest.test": other.Bundle().X509Authorities()[0].Raw, // T22
	}
	s.svids <- m
	eventually(t, "foreign.test trusted", trusted)
	if _, err := id.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString("broken.test")); err == nil {
		t.Error("a trust domain with a broken trust bundle is trusted")
	}
	if own, err := id.GetX509BundleForTrustDomain(id.ID().TrustDomain()); err != nil || !own.Equal(td.Bundle()) {
		t.Errorf("the own trust bundle was replaced by a federated one: %v, %v", own, err)
	}
	s.svids <- message(t, td, td.SVID("web"))
	eventually(t, "foreign.test not trusted any more", func() bool { return !trusted() })
}

func TestWithdrawnTrustIsNotKeptForTheSakeOfTheOwnIdentity(t *testing.T) {
	td, other := sdktest.New(t), sdktest.New(t)
	for name, bundle := range map[string][]byte{"empty": nil, "other root": other.Bundle().X509Authorities()[0].Raw} {
		t.Run(name, func(t *testing.T) {
			s, id := opened(t, td)
			m := message(t, td, td.SVID("web"))
			m.Svids[0].Bundle = bundle
			s.svids <- m
			eventually(t, "the old root not trusted any more", func() bool {
				now, err := id.GetX509BundleForTrustDomain(td.ID("web").TrustDomain())
				return err != nil || !now.Equal(td.Bundle())
			})
			if _, err := id.GetX509SVID(); err == nil {
				t.Error("an X509-SVID that nobody trusts is presented")
			}
		})
	}
}

// A clock that is set wrong, here or at the CA, is waited out on the stream that is open:
// each new one would have the agent prove and give all anew, and keys of this process
// would have the CA sign, time after time.
func TestIdentityThatHasNotBegunIsNotAskedForAgain(t *testing.T) {
	ca := forge.New(t, "sdktest.test")
	for name, times := range map[string]forge.Change{
		"not begun": func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) },
		"ended":     func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) },
	} {
		s, address := newScript(t)
		own := ca.Leaf("/web", times).X509SVID()
		chain, key, err := own.MarshalRaw()
		if err != nil {
			t.Fatal(err)
		}
		s.svids <- &workload.X509SVIDResponse{Svids: []*workload.X509SVID{{
			SpiffeId: own.ID.String(), X509Svid: chain, X509SvidKey: key, Bundle: ca.Cert.Raw,
		}}}
		_, err = sdk.Open(t.Context(), address, quiet, sdk.WithStartupTimeout(2*time.Second))
		if notReady, ok := errors.AsType[*sdk.NotReadyError](err); !ok || notReady.Reason != sdk.BadAnswer || !strings.Contains(err.Error(), "clocks") {
			t.Errorf("%s: Open = %v; want BAD_ANSWER, about clocks", name, err)
		}
		if n := len(s.headers); n != 1 {
			t.Errorf("%s: asked %d times; want once", name, n)
		}
	}
}

func TestOnlyPermissionDeniedTakesTheIdentityAway(t *testing.T) {
	td := sdktest.New(t)
	s, id := opened(t, td)
	for _, end := range []error{
		status.Error(codes.Unavailable, "restarting"), status.Error(codes.Internal, "bug"), status.Error(codes.ResourceExhausted, "later"),
	} {
		s.svids <- end
		<-s.headers // it came back
		if _, err := id.GetX509SVID(); err != nil {
			t.Errorf("after %v: %v", end, err)
		}
	}
	s.svids <- &workload.X509SVIDResponse{} // malformed, so discarded
	<-s.headers
	if _, err := id.GetX509SVID(); err != nil {
		t.Errorf("after a malformed message: %v", err)
	}
	s.svids <- status.Error(codes.PermissionDenied, "no entry")
	eventually(t, "no identity", func() bool { _, err := id.GetX509SVID(); return err != nil })
}

func TestInvalidArgumentIsNotRepeated(t *testing.T) {
	s, address := newScript(t)
	s.svids <- status.Error(codes.InvalidArgument, "no")
	_, err := sdk.Open(t.Context(), address, quiet, sdk.WithStartupTimeout(500*time.Millisecond))
	if err == nil || len(s.headers) != 1 {
		t.Errorf("Open = %v after %d attempts; want an error after 1 (E6)", err, len(s.headers))
	}
}

func TestForgetfulAgentDoesNotLiftRevocations(t *testing.T) {
	td := sdktest.New(t)
	s, id := opened(t, td)
	td.Allow("web", "web")
	server := td.Workload("orders")
	td.Allow("web", "orders")
	address := listen(t, server)
	dial := func() error {
		conn, err := id.DialTLS(sdk.Service("orders"))(context.Background(), "tcp", address)
		if err == nil {
			conn.Close()
		}
		return err
	}
	if err := dial(); err != nil {
		t.Fatal(err)
	}
	revoked := []*agentpb.Revocation{{Subject: &agentpb.Revocation_SpiffeId{SpiffeId: "spiffe://sdktest.test/orders"}}}
	s.watch <- &agentpb.WatchResponse{Revocations: revoked}
	eventually(t, "orders refused", func() bool { return dial() != nil })
	// An agent that has just started and not heard from the CA.
	s.watch <- &agentpb.WatchResponse{Reset_: true, Revocations: []*agentpb.Revocation{
		{Subject: &agentpb.Revocation_SpiffeId{SpiffeId: "spiffe://sdktest.test/marker"}},
		{Subject: &agentpb.Revocation_SpiffeId{SpiffeId: "not an ID"}},
		{},
	}}
	s.watch <- &agentpb.WatchResponse{}
	eventually(t, "the messages read", func() bool { return len(s.watch) == 0 })
	if err := dial(); err == nil {
		t.Error("orders was let in again")
	}
	s.watch <- &agentpb.WatchResponse{Reset_: true, RevocationsAsOf: timestamppb.Now()}
	eventually(t, "a complete list lifts it", func() bool { return dial() == nil })
}

// Whom an identity lets in before it knows who is revoked could be one of these.
func TestNobodyIsLetInBeforeRevocationsAreKnown(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	server := listen(t, td.Workload("orders"))
	s, address := newScript(t)
	known := <-s.watch // it is not sent yet
	s.svids <- message(t, td, td.SVID("web"))
	id, err := sdk.Open(t.Context(), address, quiet, sdk.WithoutWaiting())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(id.Close)
	dial := func() error {
		conn, err := id.DialTLS(sdk.Service("orders"))(t.Context(), "tcp", server)
		if err == nil {
			conn.Close()
		}
		return err
	}
	eventually(t, "an identity", func() bool { _, err := id.GetX509SVID(); return err == nil })
	if err := dial(); err == nil || !strings.Contains(err.Error(), "revoked") {
		t.Errorf("dial = %v; want that nobody has said who is revoked", err)
	}
	s.watch <- known
	if err := id.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := dial(); err != nil {
		t.Error(err)
	}
}

// The first message about revocations has all of them, however many there are.
func TestAnyNumberOfRevocations(t *testing.T) {
	td := sdktest.New(t)
	for i := range 100_000 {
		td.Revoke(fmt.Sprintf("job/%d", i))
	}
	id, err := sdk.Open(t.Context(), td.As("orders"), quiet, sdk.WithStartupTimeout(30*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	id.Close()
}
