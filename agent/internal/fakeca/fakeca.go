// Package fakeca is for tests: a CA in memory that speaks node.proto over real
// TLS on a real port, with keys of package forge. It does what it is told, also
// to stop, to come back, and to answer badly.
package fakeca

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/ca/capb"
	"merlon.dev/policy/bundle"
	"merlon.dev/sdk/possession"
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
	}})
}

// SetTTL sets how long SVIDs live that are issued from now on.
func (ca *CA) SetTTL(workloads, agents time.Duration) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.svidTTL, ca.agentTTL = workloads, agents
}

// HoldSync makes new streams say nothing until called with false.
func (ca *CA) HoldSync(hold bool) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.holdSync = hold
}

// FailSign makes requests to sign fail with err; nil ends it.
func (ca *CA) FailSign(err error) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.signErr = err
}

// Counts says how often evidence arrived, how many requests to sign X509-SVIDs,
// and how many of those were signed.
func (ca *CA) Counts() (attests, signs, signed int) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	return ca.attests, ca.signs, ca.signed
}

// LastAck is the newest acknowledgement.
func (ca *CA) LastAck() *capb.SyncAck {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	if len(ca.acks) == 0 {
		return &capb.SyncAck{}
	}
	return ca.acks[len(ca.acks)-1]
}

// Resumes lists the resume revisions of all streams so far.
func (ca *CA) Resumes() []uint64 {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	return append([]uint64(nil), ca.resumes...)
}

// PutEntry creates or replaces an entry and pushes it.
func (ca *CA) PutEntry(e *capb.Entry) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.revision++
	e = proto.Clone(e).(*capb.Entry)
	e.Revision = ca.revision
	if e.CreatedAt == nil {
		e.CreatedAt = timestamppb.New(time.Unix(int64(ca.revision), 0))
	}
	ca.entries[e.EntryId] = e
	delete(ca.removed, e.EntryId)
	ca.push(&capb.SyncResponse{Entries: []*capb.Entry{e}})
}

// Entry makes an entry of this trust domain; selectors are "type:value".
func (ca *CA) Entry(id, path string, selectors ...string) *capb.Entry {
	e := &capb.Entry{EntryId: id, SpiffeId: ca.td.IDString() + path}
	for _, s := range selectors {
		for i := range s {
			if s[i] == ':' {
				e.Selectors = append(e.Selectors, &capb.Selector{Type: s[:i], Value: s[i+1:]})
				break
			}
		}
	}
	return e
}

// DeleteEntry deletes an entry and pushes that.
func (ca *CA) DeleteEntry(id string) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.revision++
	delete(ca.entries, id)
	ca.removed[id] = ca.revision
	ca.push(&capb.SyncResponse{RemovedEntryIds: []string{id}})
}

// Revoke adds a record, filling in its revision, and pushes it.
func (ca *CA) Revoke(r *capb.Revocation) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.revision++
	r = proto.Clone(r).(*capb.Revocation)
	r.BeforeRevision = ca.revision
	ca.revocations = append(ca.revocations, r)
	ca.push(&capb.SyncResponse{Revocations: []*capb.Revocation{r}})
}

// PublishPolicy serves a signed policy bundle and announces it.
func (ca *CA) PublishPolicy(raw []byte, pb *capb.PolicyBundle) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.revision++
	ca.published = &bundle.Published{Raw: raw, ETag: fmt.Sprintf(`"%d"`, pb.Generation), Generation: pb.Generation}
	ca.policy = pb
	ca.push(&capb.SyncResponse{PolicyBundle: pb})
}

// RaiseTrust pushes the trust bundle under the next sequence number.
func (ca *CA) RaiseTrust() uint64 {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.revision++
	ca.sequence++
	ca.push(&capb.SyncResponse{TrustBundle: ca.trustBundle()})
	return ca.sequence
}

// Federate makes these the trust bundles of all other trust domains, and pushes
// them.
func (ca *CA) Federate(others ...*forge.Authority) {
	ca.tb.Helper()
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.revision++
	ca.federated = &capb.FederatedBundles{}
	for _, other := range others {
		jwks, err := other.Bundle().Marshal()
		if err != nil {
			ca.tb.Fatal(err)
		}
		ca.federated.TrustBundles = append(ca.federated.TrustBundles, &capb.TrustBundle{TrustDomain: other.TrustDomain.Name(), Jwks: jwks})
	}
	ca.push(&capb.SyncResponse{FederatedBundles: ca.federated})
}

// push sends a change to the streams of all replicas that would hear of it.
// mu is held.
func (ca *CA) push(m *capb.SyncResponse) {
	m.Revision, m.Synced, m.SentAt = ca.revision, true, timestamppb.Now()
	for _, replica := range ca.replicas {
		if replica.cutOff {
			continue
		}
		for ch := range replica.streams {
			ch <- m
		}
	}
}

func (ca *CA) trustBundle() *capb.TrustBundle {
	jwks, err := ca.Root.Bundle().Marshal()
	if err != nil {
		ca.tb.Error(err)
	}
	return &capb.TrustBundle{TrustDomain: ca.td.Name(), Sequence: ca.sequence, Jwks: jwks}
}

// Attest implements capb.NodeServer.
func (ca *CA) Attest(ctx context.Context, req *capb.AttestRequest) (*capb.AttestResponse, error) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.attests++
	if own := req.GetOwnSvid(); own != nil {
		return ca.recover(ctx, req)
	}
	if req.GetJoinToken() != Token || ca.tokenUsed {
		return nil, status.Error(codes.PermissionDenied, "the join token is unknown or was used")
	}
	ca.tokenUsed = true
	if ca.loseAttest {
		return nil, status.Error(codes.Unavailable, "killed between consume and reply")
	}
	chain, err := ca.sign(req.GetCsr(), ca.td.IDString()+"/agent/n1", ca.agentTTL)
	if err != nil {
		return nil, err
	}
	ca.lastAgent = chain[0]
	return &capb.AttestResponse{X509Svid: chain, TrustBundle: ca.trustBundle()}, nil
}

// recover takes the last SVID that the agent got, ended or not. mu is held.
func (ca *CA) recover(ctx context.Context, req *capb.AttestRequest) (*capb.AttestResponse, error) {
	chain := req.GetOwnSvid().GetChain()
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, err
	}
	p, _ := peer.FromContext(ctx)
	statement, err := possession.Statement(p.AuthInfo.(credentials.TLSInfo).State, req.GetCsr())
	if err != nil {
		return nil, err
	}
	if !possession.Verify(leaf.PublicKey, statement, req.GetOwnSvid().GetSignature()) || !bytes.Equal(chain[0], ca.lastAgent) {
		return nil, status.Error(codes.PermissionDenied, "this one was copied")
	}
	answer, err := ca.sign(req.GetCsr(), ca.td.IDString()+"/agent/n1", ca.agentTTL)
	if err != nil {
		return nil, err
	}
	ca.lastAgent, ca.recovered = answer[0], ca.recovered+1
	return &capb.AttestResponse{X509Svid: answer, TrustBundle: ca.trustBundle()}, nil
}

// Recovered says how often the agent came back by its own SVID.
func (ca *CA) Recovered() int {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	return ca.recovered
}

// Renew implements capb.NodeServer.
func (ca *CA) Renew(ctx context.Context, req *capb.RenewRequest) (*capb.RenewResponse, error) {
	if err := requireAgent(ctx); err != nil {
		return nil, err
	}
	ca.mu.Lock()
	defer ca.mu.Unlock()
	chain, err := ca.sign(req.GetCsr(), ca.td.IDString()+"/agent/n1", ca.agentTTL)
	if err != nil {
		return nil, err
	}
	ca.lastAgent = chain[0]
	return &capb.RenewResponse{X509Svid: chain, TrustBundle: ca.trustBundle()}, nil
}

// Sync implements capb.NodeServer.
func (ca *CA) Sync(stream capb.Node_SyncServer) error {
	if err := requireAgent(stream.Context()); err != nil {
		return err
	}
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	if err := ca.look(first.GetSeen()); err != nil {
		return err
	}
	var receiving sync.WaitGroup
	defer receiving.Wait()
	receiving.Go(func() {
		for m := first; ; {
			ca.mu.Lock()
			ca.acks = append(ca.acks, m.GetAck())
			ca.mu.Unlock()
			if m, err = stream.Recv(); err != nil {
				return
			}
		}
	})
	for ca.holding() {
		select {
		case <-stream.Context().Done():
			return stream.Context().Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
	changes, listing := ca.subscribe(first.GetResumeRevision())
	defer func() {
		ca.mu.Lock()
		defer ca.mu.Unlock()
		delete(ca.streams, changes)
	}()
	for _, m := range listing {
		if err := stream.Send(m); err != nil {
			return err
		}
	}
	for {
		select {
		case <-stream.Context().Done():
			return stream.Context().Err()
		case m := <-changes:
			if err := stream.Send(m); err != nil {
				return err
			}
		}
	}
}

// look notes what an agent has seen, and answers as it was told.
func (ca *CA) look(seen *capb.Seen) error {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.seen = append(ca.seen, seen)
	return ca.refusal
}

func (ca *CA) holding() bool {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	return ca.holdSync
}

// subscribe returns everything above a revision, or everything for 0, in
// several messages, and a channel of what comes.
func (ca *CA) subscribe(resume uint64) (chan *capb.SyncResponse, []*capb.SyncResponse) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.resumes = append(ca.resumes, resume)
	changes := make(chan *capb.SyncResponse, 1000)
	ca.streams[changes] = struct{}{}
	revision := ca.revision
	if ca.cutOff {
		revision = ca.frozen
	}
	return changes, ca.messages(resume, revision)
}

// messages says what changed between two revisions; everything from 0. mu is
// held.
func (ca *CA) messages(resume, revision uint64) []*capb.SyncResponse {
	out := []*capb.SyncResponse{{
		Reset_: resume == 0 || resume > revision, TrustBundle: ca.trustBundle(), PolicyBundle: ca.policy, FederatedBundles: ca.federated,
		SentAt: timestamppb.Now(), Stale: ca.cutOff, Opening: ca.opening,
	}}
	if out[0].Reset_ {
		resume = 0
	}
	for _, e := range ca.entries {
		if e.Revision > resume && e.Revision <= revision {
			out = append(out, &capb.SyncResponse{Entries: []*capb.Entry{e}, Stale: ca.cutOff})
		}
	}
	last := &capb.SyncResponse{Revision: revision, Synced: true, SentAt: timestamppb.Now(), Stale: ca.cutOff}
	for _, r := range ca.revocations {
		if r.BeforeRevision > resume && r.BeforeRevision <= revision {
			last.Revocations = append(last.Revocations, r)
		}
	}
	for id, removed := range ca.removed {
		if resume > 0 && removed > resume && removed <= revision {
			last.RemovedEntryIds = append(last.RemovedEntryIds, id)
		}
	}
	return append(out, last)
}

// Sign implements capb.NodeServer.
func (ca *CA) Sign(ctx context.Context, req *capb.SignRequest) (*capb.SignResponse, error) {
	if err := requireAgent(ctx); err != nil {
		return nil, err
	}
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.signs++
	if ca.signErr != nil {
		return nil, ca.signErr
	}
	m := &capb.SignResponse{}
	for _, item := range req.GetItems() {
		e := ca.entries[item.GetEntryId()]
		if e == nil {
			m.Results = append(m.Results, &capb.SignResult{Code: int32(codes.NotFound), Message: "no such entry"})
			continue
		}
		chain, err := ca.sign(item.GetCsr(), e.GetSpiffeId(), ca.svidTTL)
		if err != nil {
			return nil, err
		}
		ca.signed++
		m.Results = append(m.Results, &capb.SignResult{X509Svid: chain})
	}
	return m, nil
}

// SignJWT implements capb.NodeServer.
func (ca *CA) SignJWT(ctx context.Context, req *capb.SignJWTRequest) (*capb.SignJWTResponse, error) {
	if err := requireAgent(ctx); err != nil {
		return nil, err
	}
	ca.mu.Lock()
	defer ca.mu.Unlock()
	if ca.signErr != nil {
		return nil, ca.signErr
	}
	m := &capb.SignJWTResponse{}
	for _, item := range req.GetItems() {
		e := ca.entries[item.GetEntryId()]
		if e == nil {
			m.Results = append(m.Results, &capb.SignJWTResult{Code: int32(codes.NotFound), Message: "no such entry"})
			continue
		}
		serial, err := svid.NewSerial(7, ca.revision)
		if err != nil {
			return nil, err
		}
		m.Results = append(m.Results, &capb.SignJWTResult{Token: ca.Root.JWT(ca.Root.Header(nil), ca.Root.Claims("", forge.Fields{
			"sub": e.GetSpiffeId(), "aud": item.GetAudience(), "jti": serial.String(),
		}))})
	}
	return m, nil
}

// sign issues for a CSR. ca.mu is held.
func (ca *CA) sign(csr []byte, id string, ttl time.Duration) ([][]byte, error) {
	req, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, err
	}
	if err := req.CheckSignature(); err != nil {
		return nil, err
	}
	serial, err := svid.NewSerial(7, ca.revision)
	if err != nil {
		return nil, err
	}
	uri, err := url.Parse(id)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	template := ca.inter.Leaf("/x").Chain[0]
	template.SerialNumber, template.URIs = serial.Big(), []*url.URL{uri}
	template.NotBefore, template.NotAfter = now.Add(-time.Minute), now.Add(ttl)
	template.ExtraExtensions = nil
	ski := sha256.Sum256(csr)
	template.SubjectKeyId = ski[:20]
	der, err := x509.CreateCertificate(rand.Reader, template, ca.inter.Cert, req.PublicKey, ca.inter.Key)
	if err != nil {
		return nil, err
	}
	return [][]byte{der, ca.inter.Cert.Raw}, nil
}

// requireAgent refuses callers without the agent's SVID.
func requireAgent(ctx context.Context) error {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return errors.New("no peer")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return status.Error(codes.Unauthenticated, "an agent's SVID is needed")
	}
	id, err := x509svid.IDFromCert(info.State.PeerCertificates[0])
	if err != nil || id.Path() != "/agent/n1" {
		return status.Error(codes.PermissionDenied, fmt.Sprintf("%v is no agent", id))
	}
	return nil
}
