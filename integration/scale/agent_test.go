// One agent as the CA sees it: its own key and SVID, mutual TLS, a Sync stream that
// comes back by itself, acknowledgements, the renewal of its SVID. Of what a real
// agent does with all that (agent/internal/caclient) it only keeps count.

package scale_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid"
)

// agent is one of a fleet.
type agent struct {
	fleet *fleet
	name  string
	from  *net.TCPAddr // a loopback address that it shares with some others
	owed  atomic.Int64 // entries that were registered for it

	mu       sync.Mutex // guards what follows
	key      *ecdsa.PrivateKey
	chain    [][]byte
	raw      net.Conn // the open connection
	entryID  string   // one of its entries
	opening  []byte
	log      *capb.LogState
	renewing bool

	// What it holds.
	revision, sequence   atomic.Uint64
	acked                atomic.Uint64 // sequence of the trust bundle that it serves
	entries, revocations atomic.Int64
	// synced is whether its stream has everything up to revision, and joined counts
	// the streams that came so far.
	synced atomic.Bool
	joined atomic.Int64
	// banned is set when the CA says so, and it does not come back.
	banned atomic.Bool
	// lastEntry is the entry that came last, and when.
	lastEntry atomic.Pointer[arrival]
}

type arrival struct {
	entryID string
	at      time.Time
}

// The pauses of agent/internal/caclient before an agent comes again.
const (
	firstRetry = 50 * time.Millisecond
	lastRetry  = 10 * time.Second
)

func retryIn(failures int) time.Duration {
	d := firstRetry
	for range failures {
		d = min(d*13/10, lastRetry)
	}
	return time.Duration(float64(d) * (0.7 + 0.6*mathrand.Float64()))
}

// run keeps a stream open until ctx ends, or the agent is banned.
func (a *agent) run(ctx context.Context) {
	for failures := 0; ctx.Err() == nil; {
		a.fleet.attempts.Add(1)
		err := a.come(ctx)
		if a.synced.Swap(false) {
			failures = 0
		}
		if reasonOf(err) == "AGENT_BANNED" {
			a.banned.Store(true)
			return
		}
		if errors.Is(err, errRenewed) {
			continue
		}
		select {
		case <-ctx.Done():
		case <-time.After(retryIn(failures)):
		}
		failures++
	}
}

// come is follow, once this process has the time to play the agent's machine.
func (a *agent) come(ctx context.Context) error {
	select {
	case a.fleet.coming <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	return a.follow(ctx, sync.OnceFunc(func() { <-a.fleet.coming }))
}

// reasonOf is why the CA refuses, for programs.
func reasonOf(err error) string {
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			return info.GetReason()
		}
	}
	return ""
}

// dial opens a connection with the SVID that the agent has, or none: as
// agent/internal/caclient does, but for smaller buffers.
func (a *agent) dial() (*grpc.ClientConn, error) {
	cfg := &tls.Config{
		MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, // VerifyConnection takes its place
		VerifyConnection: func(cs tls.ConnectionState) error {
			_, err := a.fleet.trust.Load().VerifyChain(cs.PeerCertificates, time.Now())
			return err
		},
	}
	a.mu.Lock()
	if a.chain != nil {
		cfg.Certificates = []tls.Certificate{{Certificate: a.chain, PrivateKey: a.key}}
	}
	a.mu.Unlock()
	dialer := &net.Dialer{LocalAddr: a.from, KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 3 * time.Second, Interval: time.Second, Count: 3}}
	return grpc.NewClient("passthrough:///"+a.fleet.d.GRPC,
		grpc.WithTransportCredentials(credentials.NewTLS(cfg)), grpc.WithDisableServiceConfig(),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: firstRetry, Multiplier: 1.3, Jitter: 0.3, MaxDelay: lastRetry},
			MinConnectTimeout: svid.HandshakeTimeout,
		}),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			raw, err := dialer.DialContext(ctx, "tcp", address)
			if err != nil {
				return nil, err
			}
			a.mu.Lock()
			a.raw = raw
			a.mu.Unlock()
			return &counted{raw, a.fleet}, nil
		}),
		grpc.WithInitialWindowSize(1<<20), grpc.WithInitialConnWindowSize(1<<20),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 75 * time.Second, Timeout: 3 * time.Second}),
		grpc.WithReadBufferSize(4<<10), grpc.WithWriteBufferSize(4<<10))
}

// follow has one connection and its Sync stream, until either ends; came is called
// once the agent is in sync, or failed.
func (a *agent) follow(ctx context.Context, came func()) error {
	defer came()
	cc, err := a.dial()
	if err != nil {
		return err
	}
	defer cc.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stream, err := capb.NewNodeClient(cc).Sync(ctx)
	if err != nil {
		return err
	}
	if err := stream.Send(a.hello()); err != nil {
		_, err = stream.Recv() // says why
		return err
	}
	for {
		m, err := stream.Recv()
		if err != nil {
			if cause := context.Cause(ctx); cause != nil {
				return cause
			}
			return err
		}
		a.take(m)
		if !m.GetSynced() {
			continue
		}
		if !a.synced.Swap(true) {
			a.joined.Add(1)
			came()
		}
		if a.fleet.tainted(a) {
			a.renewSoon(ctx, cc, cancel)
			continue // it still serves what the tainted authority signed
		}
		if now := a.sequence.Load(); now > a.acked.Load() {
			a.acked.Store(now)
			if stream.Send(&capb.SyncRequest{Ack: a.ack()}) != nil {
				continue // Recv says why
			}
		}
	}
}

// hello is the first message of a stream.
func (a *agent) hello() *capb.SyncRequest {
	a.mu.Lock()
	defer a.mu.Unlock()
	first := &capb.SyncRequest{
		ResumeRevision: a.revision.Load(), Ack: a.ack(),
		Seen: &capb.Seen{Revision: a.revision.Load(), TrustBundleSequence: a.sequence.Load(), Opening: a.opening},
	}
	if a.log != nil {
		first.Seen.Logs = []*capb.LogState{a.log}
	}
	return first
}

func (a *agent) ack() *capb.SyncAck {
	return &capb.SyncAck{Revision: a.revision.Load(), TrustBundleSequence: a.acked.Load()}
}

// take counts what a message has.
func (a *agent) take(m *capb.SyncResponse) {
	if m.GetReset_() {
		a.entries.Store(0)
	}
	a.entries.Add(int64(len(m.GetEntries()) - len(m.GetRemovedEntryIds())))
	a.revocations.Add(int64(len(m.GetRevocations())))
	if n := len(m.GetEntries()); n > 0 {
		a.lastEntry.Store(&arrival{m.GetEntries()[n-1].GetEntryId(), time.Now()})
	}
	if len(m.GetEntries())+len(m.GetRemovedEntryIds())+len(m.GetRevocations()) > 0 || m.GetTrustBundle() != nil {
		a.fleet.news.Add(1)
	}
	if b := m.GetTrustBundle(); b != nil {
		a.fleet.trusts(b)
		a.sequence.Store(b.GetSequence())
	}
	if m.GetSynced() {
		a.revision.Store(m.GetRevision())
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if n := len(m.GetEntries()); n > 0 {
		a.entryID = m.GetEntries()[n-1].GetEntryId()
	}
	if len(m.GetOpening()) > 0 {
		a.opening = m.GetOpening()
	}
	if c := m.GetLogCheckpoint(); c != nil {
		a.log = logState(c.GetCheckpoint())
	}
}

var errRenewed = errors.New("the agent has a new SVID")

// renewSoon replaces the agent's SVID some time within the spread that the CA asks
// for, and ends the stream, so that it comes back with the new one.
func (a *agent) renewSoon(ctx context.Context, cc *grpc.ClientConn, done context.CancelCauseFunc) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.renewing {
		return
	}
	a.renewing = true
	go func() {
		defer func() {
			a.mu.Lock()
			a.renewing = false
			a.mu.Unlock()
		}()
		for wait := mathrand.N(a.fleet.renewSpread() + 1); ctx.Err() == nil; wait = time.Second {
			select {
			case <-ctx.Done():
				return
			case <-time.After(wait):
			}
			if a.renew(ctx, capb.NewNodeClient(cc)) == nil && !a.fleet.tainted(a) {
				a.fleet.renewed.Add(1)
				done(errRenewed)
				return
			}
		}
	}()
}

func (a *agent) renew(ctx context.Context, node capb.NodeClient) error {
	key, csr, err := newKey()
	if err != nil {
		return err
	}
	resp, err := node.Renew(ctx, &capb.RenewRequest{Csr: csr})
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.key, a.chain = key, resp.GetX509Svid()
	return nil
}

// sign has an X509-SVID issued for one of its entries, and returns its serial number.
func (a *agent) sign(ctx context.Context, node capb.NodeClient) (serial string, err error) {
	_, csr, err := newKey()
	if err != nil {
		return "", err
	}
	a.mu.Lock()
	entryID := a.entryID
	a.mu.Unlock()
	resp, err := node.Sign(ctx, &capb.SignRequest{Items: []*capb.SignItem{{EntryId: entryID, Csr: csr}}})
	if err != nil {
		return "", err
	}
	if r := resp.GetResults()[0]; r.GetCode() != 0 {
		return "", fmt.Errorf("sign for %s: %s", entryID, r.GetMessage())
	}
	leaf, err := x509.ParseCertificate(resp.GetResults()[0].GetX509Svid()[0])
	if err != nil {
		return "", err
	}
	return leaf.SerialNumber.Text(16), nil
}

// newKey is a key with the CSR for it.
func newKey() (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	return key, csr, err
}

// signedBy says whether one of the authorities signed the agent's SVID, or what is
// above it.
func (a *agent) signedBy(authorities []string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.ContainsFunc(a.chain, func(der []byte) bool {
		cert, err := x509.ParseCertificate(der)
		return err == nil && slices.Contains(authorities, hex.EncodeToString(cert.AuthorityKeyId))
	})
}

// cut closes the open connection, as a network that goes away.
func (a *agent) cut() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.raw != nil {
		a.raw.Close()
	}
}

// counted adds up what goes over a connection.
type counted struct {
	net.Conn
	fleet *fleet
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.fleet.received.Add(int64(n))
	return n, err
}

func (c *counted) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.fleet.sent.Add(int64(n))
	return n, err
}
