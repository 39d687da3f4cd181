// Package fakeca is for tests: a CA in memory that speaks node.proto over real
// TLS on a real port, with keys of package forge. It does what it is told, also
// to stop, to come back, and to answer badly.
package fakeca

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"merlon.dev/ca/capb"
	"merlon.dev/policy/bundle"
	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

// Token is the join token that works, once.
const Token = "the-token"

// CA is one replica of a CA; those made by Replica share everything that a
// store would hold. It is safe for concurrent use.
type CA struct {
	capb.UnimplementedNodeServer
	*shared

	Root *forge.Authority
	// Address and HTTPSAddress stay the same over Stop and Start.
	Address, HTTPSAddress string
	// OwnPath is the path of the SPIFFE ID that it serves as after Start; that
	// of a CA is /ca.
	OwnPath string

	tb    testing.TB
	td    spiffeid.TrustDomain
	inter *forge.Authority

	// guarded by shared.mu
	streams       map[chan *capb.SyncResponse]struct{}
	signs, signed int
	signErr       error
	acks          []*capb.SyncAck
	resumes       []uint64
	seen          []*capb.Seen
	opening       []byte // of its store
	holdSync      bool
	refusal       error  // of Sync
	cutOff        bool   // from the store; then
	frozen        uint64 // is the revision that it knows
	upstreamAge   time.Duration
	server        *grpc.Server
	https         *http.Server
	fetches       int
	serving       sync.WaitGroup
}

// shared is what the replicas have in common.
type shared struct {
	mu sync.Mutex
	// guarded by mu
	svidTTL, agentTTL time.Duration
	revision          uint64
	sequence          uint64
	entries           map[string]*capb.Entry
	removed           map[string]uint64
	revocations       []*capb.Revocation
	federated         *capb.FederatedBundles
	policy            *capb.PolicyBundle
	published         *bundle.Published
	candidate         *bundle.Published
	reports           []*capb.PolicyReport
	tokenUsed         bool
	attests           int
	loseAttest        bool
	lastAgent         []byte // SVID that the agent got
	recovered         int
	replicas          []*CA
}

// New starts a CA for a trust domain. It stops with the test.
func New(tb testing.TB, td string) *CA {
	tb.Helper()
	root := forge.New(tb, td)
	return start(tb, root, &shared{
		svidTTL: time.Hour, agentTTL: time.Hour, revision: 1, sequence: 1,
		entries: map[string]*capb.Entry{}, removed: map[string]uint64{},
	})
}

// Replica starts another replica, with an intermediate of its own. It stops
// with the test.
func (ca *CA) Replica() *CA {
	ca.tb.Helper()
	return start(ca.tb, ca.Root, ca.shared)
}

func start(tb testing.TB, root *forge.Authority, common *shared) *CA {
	tb.Helper()
	ca := &CA{
		shared: common, Root: root, inter: root.Intermediate(), tb: tb, td: root.TrustDomain,
		streams: map[chan *capb.SyncResponse]struct{}{},
		Address: "127.0.0.1:0", HTTPSAddress: "127.0.0.1:0", OwnPath: "/ca",
	}
	common.mu.Lock()
	common.replicas = append(common.replicas, ca)
	common.mu.Unlock()
	ca.Start()
	tb.Cleanup(ca.Stop)
	return ca
}

// RootHash is what an agent pins.
func (ca *CA) RootHash() string {
	sum := sha256.Sum256(ca.Root.Cert.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:])
}

// Start serves; again after Stop, with everything kept.
func (ca *CA) Start() {
	ca.tb.Helper()
	own := ca.inter.Leaf(ca.OwnPath)
	creds := svid.TLS{
		SVIDs: own.X509SVID(), Bundles: ca.Root.Bundle(), Admit: func(*svid.Peer) error { return nil },
		AnonymousPeers: true, IncludeRoot: true,
	}
	lis := ca.listen(&ca.Address)
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(creds.Server())),
		// That of a CA.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}))
	capb.RegisterNodeServer(s, ca)
	creds.AnonymousPeers, creds.NextProtos = false, []string{"h2", "http/1.1"}
	httpsLis := ca.listen(&ca.HTTPSAddress)
	h := &http.Server{Handler: ca.policyHandler(), TLSConfig: creds.Server(), ReadHeaderTimeout: time.Second}
	ca.mu.Lock()
	ca.server, ca.https = s, h
	ca.mu.Unlock()
	ca.serving.Go(func() { _ = s.Serve(lis) })
	ca.serving.Go(func() { _ = h.ServeTLS(httpsLis, "", "") })
}

func (ca *CA) listen(address *string) net.Listener {
	ca.tb.Helper()
	lis, err := net.Listen("tcp", *address)
	if err != nil {
		ca.tb.Fatal(err)
	}
	*address = lis.Addr().String()
	return lis
}

// Stop cuts every connection.
func (ca *CA) Stop() {
	ca.mu.Lock()
	s, h := ca.server, ca.https
	ca.server, ca.https = nil, nil
	ca.mu.Unlock()
	if s != nil {
		s.Stop()
		h.Close()
	}
	ca.serving.Wait()
}

func (ca *CA) policyHandler() http.Handler {
	return bundle.NewServer(bundle.Source{Load: func(context.Context, string) (*bundle.Published, <-chan struct{}, error) {
		ca.mu.Lock()
		defer ca.mu.Unlock()
		ca.fetches++
		if ca.published == nil {
			return nil, nil, bundle.ErrNotFound
		}
		return ca.published, make(chan struct{}), nil
	}, LoadCandidate: func(context.Context, string) (*bundle.Published, <-chan struct{}, error) {
		ca.mu.Lock()
		defer ca.mu.Unlock()
		if ca.candidate == nil {
			return nil, nil, bundle.ErrNotFound
		}
		return ca.candidate, make(chan struct{}), nil
	}})
}
