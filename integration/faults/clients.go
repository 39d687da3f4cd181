// The clients of a world: writers at the admin API, one who pushes policy, and an
// agent of a node that the harness plays, which also asks for what is not its own.

package faults

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"merlon.dev/agent/agentpb"
	"merlon.dev/ca/capb"
	"merlon.dev/integration/faults/history"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk/unixsock"
)

// patience bounds one call of a client.
const patience = 5 * time.Second

// maxOwn is how many entries a writer has at most.
const maxOwn = 100

// outcome is what a client knows after an answer. UNAVAILABLE may come from a
// connection that broke after the CA had acted, so it says nothing.
func outcome(err error) (history.Outcome, error) {
	switch status.Code(err) {
	case codes.OK:
		return history.OK, nil
	case codes.InvalidArgument, codes.NotFound, codes.AlreadyExists, codes.PermissionDenied,
		codes.FailedPrecondition, codes.ResourceExhausted, codes.Unauthenticated, codes.Unimplemented:
		return history.Failed, err
	}
	return history.Unknown, err
}

// create registers path for whoever has the selector, under an agent.
func (w *World) create(admin capb.AdminClient, client, path, under, selector string) history.Op {
	return w.Rec.Do(client, history.Create, w.ID(path), func(op *history.Op) (history.Outcome, error) {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		op.Under = under
		resp, err := admin.CreateEntry(ctx, &capb.CreateEntryRequest{Entry: &capb.Entry{
			SpiffeId: op.Key, ParentId: under, Selectors: []*capb.Selector{{Type: "unix", Value: selector}},
		}})
		op.Value, op.Number = resp.GetEntry().GetEntryId(), resp.GetEntry().GetRevision()
		return outcome(err)
	})
}

// remove deletes what create made.
func (w *World) remove(admin capb.AdminClient, client string, made history.Op) history.Op {
	return w.Rec.Do(client, history.Delete, made.Key, func(op *history.Op) (history.Outcome, error) {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		op.Value = made.Value
		resp, err := admin.DeleteEntry(ctx, &capb.DeleteEntryRequest{EntryId: made.Value})
		op.Number = resp.GetRevocation().GetBeforeRevision()
		return outcome(err)
	})
}

// read looks an entry up.
func (w *World) read(admin capb.AdminClient, client string, made history.Op) history.Op {
	return w.Rec.Do(client, history.Read, made.Value, func(op *history.Op) (history.Outcome, error) {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		resp, err := admin.GetEntry(ctx, &capb.GetEntryRequest{EntryId: made.Value})
		if status.Code(err) == codes.NotFound {
			return history.OK, nil
		}
		op.Value = resp.GetEntry().GetSpiffeId()
		return outcome(err)
	})
}

// push uploads the policy.
func (w *World) push(admin capb.AdminClient) history.Op {
	return w.Rec.Do("pusher", history.Push, "main", func(op *history.Op) (history.Outcome, error) {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		resp, err := admin.PushPolicy(ctx, &capb.PushPolicyRequest{Bundle: w.policy})
		op.Number = resp.GetGeneration()
		return outcome(err)
	})
}

// Work lets n writers, one who pushes policy and the played agent work until Rest or
// the end of the world.
func (w *World) Work(n int) {
	w.tb.Helper()
	if w.node == nil {
		w.node = w.join("played")
		w.node.own = w.Register("/ns/played/own", w.node.id, "uid:4500")
		w.node.follow()
	}
	w.shift++
	ctx, cancel := context.WithCancel(context.Background())
	var working sync.WaitGroup
	seeds := make([]uint64, n)
	for i := range seeds {
		seeds[i] = w.Rng.Uint64()
		admin := w.cas[i%len(w.cas)].admin
		working.Go(func() {
			w.write(ctx, admin, fmt.Sprintf("writer-%d-%d", w.shift, i), mathrand.New(mathrand.NewPCG(seeds[i], 1)))
		})
	}
	working.Go(func() {
		for i := 0; wait(ctx, time.Second); i++ {
			w.push(w.cas[i%len(w.cas)].admin)
		}
	})
	foreign := w.created(web)
	working.Go(func() {
		for i := 0; wait(ctx, 50*time.Millisecond); i++ {
			w.node.sign(w.Rec, w.node.own.Value)
			if i%4 == 0 && foreign != "" {
				w.node.sign(w.Rec, foreign)
			}
		}
	})
	w.stop = sync.OnceFunc(func() {
		cancel()
		working.Wait()
	})
	w.tb.Cleanup(w.stop)
}

// Rest ends Work.
func (w *World) Rest() { w.stop() }

// wait says whether ctx is alive after d.
func wait(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// write makes, reads and deletes entries until ctx ends.
func (w *World) write(ctx context.Context, admin capb.AdminClient, name string, rng *mathrand.Rand) {
	var own []history.Op
	for i := 0; ctx.Err() == nil; i++ {
		var op history.Op
		switch n := rng.IntN(10); {
		case len(own) < maxOwn && n < 6 || len(own) == 0:
			op = w.create(admin, name, fmt.Sprintf("/ns/%s/%d", name, i), w.AgentID(), "uid:4500")
			if op.Outcome == history.OK {
				own = append(own, op)
			}
		case n < 8:
			op = w.read(admin, name, own[rng.IntN(len(own))])
		default:
			k := rng.IntN(len(own))
			op = w.remove(admin, name, own[k])
			own = append(own[:k], own[k+1:]...)
		}
		pause := w.setup.Every
		if op.Outcome != history.OK {
			pause = max(pause, 5*time.Millisecond)
		}
		wait(ctx, pause)
	}
}

// Register makes an entry that the world needs to begin.
func (w *World) Register(path, under, selector string) (made history.Op) {
	w.tb.Helper()
	stage.Eventually(w.tb, "create "+path, func() error {
		made = w.create(w.cas[0].admin, "world", path, under, selector)
		if made.Outcome != history.OK {
			return errors.New(made.Detail)
		}
		return nil
	})
	return made
}

// created is the entry ID of a path; empty: it has none.
func (w *World) created(path string) (entryID string) {
	for _, op := range w.Rec.History().Ops {
		if op.Kind == history.Create && op.Key == w.ID(path) && op.Outcome == history.OK {
			entryID = op.Value
		}
	}
	return entryID
}

// node is an agent that the harness plays by the letter of the node API.
type node struct {
	tb testing.TB
	id string
	ca string // its address
	// to is the connection by the node's own SVID, another one with each SVID.
	to atomic.Pointer[grpc.ClientConn]
	// keys are of entry IDs: the CA refuses one key for two identities.
	keys map[string]*ecdsa.PrivateKey
	own  history.Op // its own entry
	// These are of the goroutine that follows. outdated: an authority was tainted, and
	// the own SVID, which it may have signed, was not renewed since.
	outdated  bool
	ack       capb.SyncAck
	onMessage func(*capb.SyncResponse)
}

// join attests a node with a token of its own.
func (w *World) join(name string) *node {
	w.tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 6*patience)
	defer cancel()
	token, err := w.cas[0].admin.CreateToken(ctx, &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_JOIN, AgentName: name}, grpc.WaitForReady(true))
	if err != nil {
		w.tb.Fatalf("make a token for %s: %v", name, err)
	}
	n := &node{tb: w.tb, id: w.ID("/agent/" + name), ca: w.GRPC, keys: make(map[string]*ecdsa.PrivateKey)}
	key := newKey(w.tb)
	anonymous := dialTLS(w.tb, w.GRPC, nil)
	defer anonymous.Close()
	var chain [][]byte
	op := w.Rec.Do(n.id, history.Join, token.GetToken(), func(op *history.Op) (history.Outcome, error) {
		ctx, cancel := context.WithTimeout(context.Background(), 6*patience)
		defer cancel()
		resp, err := capb.NewNodeClient(anonymous).Attest(ctx, &capb.AttestRequest{
			Evidence: &capb.AttestRequest_JoinToken{JoinToken: token.GetToken()}, Csr: csr(w.tb, key),
		}, grpc.WaitForReady(true))
		chain = resp.GetX509Svid()
		op.Value = serialOf(chain)
		return outcome(err)
	})
	if op.Outcome != history.OK {
		w.tb.Fatalf("attest %s: %s", n.id, op.Detail)
	}
	n.connect(chain, key)
	w.tb.Cleanup(func() { n.to.Load().Close() })
	return n
}

// connect has the node come by another SVID.
func (n *node) connect(chain [][]byte, key *ecdsa.PrivateKey) {
	before := n.to.Swap(dialTLS(n.tb, n.ca, &tls.Certificate{Certificate: chain, PrivateKey: key}))
	if before != nil {
		before.Close()
	}
}

// api is for one call each.
func (n *node) api() capb.NodeClient { return capb.NewNodeClient(n.to.Load()) }

// follow keeps a Sync stream open, acknowledges what comes on it, and comes back at
// once when it ends, until the test does.
func (n *node) follow() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for wait(ctx, 20*time.Millisecond) {
			n.session(ctx)
		}
	}()
	n.tb.Cleanup(func() {
		cancel()
		<-done
	})
}

// session is one Sync stream, from the first listing to its end.
func (n *node) session(ctx context.Context) {
	if n.outdated && n.renew(ctx) != nil {
		return
	}
	ctx, cancel := context.WithCancel(ctx) // of this session
	defer cancel()
	stream, err := n.api().Sync(ctx)
	if err != nil || stream.Send(&capb.SyncRequest{}) != nil {
		return
	}
	for {
		resp, err := stream.Recv()
		if err != nil {
			return
		}
		n.received(resp)
		if !resp.GetSynced() {
			continue
		}
		if n.outdated || stream.Send(&capb.SyncRequest{Ack: &n.ack}) != nil {
			return // and an SVID that is about to count no more is acknowledged by nobody
		}
	}
}

// renew gets the node another SVID of its own, as agents do before what signed the one
// that they have is revoked.
func (n *node) renew(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	key := newKey(n.tb)
	resp, err := n.api().Renew(ctx, &capb.RenewRequest{Csr: csr(n.tb, key)})
	if err != nil {
		return err
	}
	n.connect(resp.GetX509Svid(), key)
	n.outdated = false
	return nil
}

// received notes what a message brings.
func (n *node) received(resp *capb.SyncResponse) {
	n.ack.Revision = resp.GetRevision()
	if b := resp.GetTrustBundle(); b != nil {
		n.outdated = n.outdated || b.GetSequence() != n.ack.GetTrustBundleSequence() && len(b.GetTaintedAuthorityIds()) > 0
		n.ack.TrustBundleSequence = b.GetSequence()
	}
	if b := resp.GetPolicyBundle(); b != nil {
		n.ack.PolicyGeneration = b.GetGeneration()
	}
	if n.onMessage != nil {
		n.onMessage(resp)
	}
}

// sign asks for an SVID of an entry. It is for one goroutine.
func (n *node) sign(rec *history.Recorder, entryID string) history.Op {
	return rec.Do(n.id, history.Sign, entryID, func(op *history.Op) (history.Outcome, error) {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if n.keys[entryID] == nil {
			n.keys[entryID] = newKey(n.tb)
		}
		request := csr(n.tb, n.keys[entryID])
		resp, err := n.api().Sign(ctx, &capb.SignRequest{Items: []*capb.SignItem{{EntryId: entryID, Csr: request}}})
		if err != nil {
			return outcome(err)
		}
		result := resp.GetResults()[0]
		if code := codes.Code(result.GetCode()); code != codes.OK {
			return history.Failed, errors.New(code.String() + ": " + result.GetMessage())
		}
		op.Value = serialOf(result.GetX509Svid())
		return history.OK, nil
	})
}

// dialTLS connects to a CA without looking at whom it meets, which agents do.
func dialTLS(tb testing.TB, address string, cert *tls.Certificate) *grpc.ClientConn {
	tb.Helper()
	config := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}
	if cert != nil {
		config.Certificates = []tls.Certificate{*cert}
	}
	cc, err := grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(config)),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: 2 * patience, Backoff: backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.2, MaxDelay: 200 * time.Millisecond}}))
	if err != nil {
		tb.Fatal(err)
	}
	return cc
}

func newKey(tb testing.TB) *ecdsa.PrivateKey {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

func csr(tb testing.TB, key *ecdsa.PrivateKey) []byte {
	tb.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		tb.Fatal(err)
	}
	return der
}

// serialOf is the serial number of a chain's leaf as the audit log has it.
func serialOf(chain [][]byte) string {
	if len(chain) == 0 {
		return ""
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return "malformed: " + err.Error()
	}
	return leaf.SerialNumber.Text(16)
}

// Deny deletes the entry of doomed, so that it is let in no more.
func (w *World) Deny() {
	w.tb.Helper()
	for _, op := range w.Rec.History().Ops {
		if op.Kind == history.Create && op.Key == w.ID(doomed) {
			stage.Eventually(w.tb, "doomed is denied", func() error {
				if done := w.remove(w.cas[0].admin, "world", op); done.Outcome != history.OK && status.Code(errors.New(done.Detail)) != codes.NotFound {
					return errors.New(done.Detail)
				}
				return nil
			})
			return
		}
	}
	w.tb.Fatal("there is no doomed peer")
}

// TryWrite registers one more entry, and says how that was answered.
func (w *World) TryWrite(ca int) error {
	w.tries++
	op := w.create(w.cas[ca].admin, "prober", fmt.Sprintf("/ns/prober/%d", w.tries), w.AgentID(), "uid:4500")
	if op.Outcome != history.OK {
		return errors.New(op.Detail)
	}
	return nil
}

// TrySign has the played agent ask for an SVID. Work must have been called, and Rest.
func (w *World) TrySign() error {
	if op := w.node.sign(w.Rec, w.node.own.Value); op.Outcome != history.OK {
		return errors.New(op.Detail)
	}
	return nil
}

// PeersCall says whether those who are always healthy have called each other since, by
// new connections.
func (w *World) PeersCall(since int64) error {
	missing := make(map[history.Pair]bool)
	for _, pair := range w.healthy() {
		missing[pair] = true
	}
	for _, op := range w.Rec.History().Ops {
		if op.Kind == history.Connect && op.Outcome == history.OK && op.Begin > since {
			delete(missing, history.Pair{From: op.Client, To: op.Key})
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("no call of %v", missing)
	}
	return nil
}

// Answers asks the CA anything.
func (w *World) Answers() error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	_, err := w.cas[0].admin.ListAgents(ctx, &capb.ListAgentsRequest{})
	return err
}

// Entries are those that the CA has: entry ID to SPIFFE ID.
func (w *World) Entries() map[string]string { return w.final().Entries }

// Connected says whether the agent follows the CA.
func (w *World) Connected() error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	resp, err := w.cas[0].admin.GetAgent(ctx, &capb.GetAgentRequest{Agent: w.AgentID()})
	if err == nil && !resp.GetAgent().GetConnected() {
		err = errors.New("the agent is not connected")
	}
	return err
}

// Saved says whether what the agent served at some time is on its disk.
func (w *World) Saved(served time.Time) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cc, err := grpc.NewClient("unix:"+w.AgentAdmin, grpc.WithTransportCredentials(unixsock.ClientCredentials()))
	if err != nil {
		return err
	}
	defer cc.Close()
	resp, err := agentpb.NewDebugClient(cc).Status(ctx, &agentpb.StatusRequest{})
	if at := resp.GetCacheSavedAt(); err == nil && (at == nil || !at.AsTime().After(served)) {
		err = fmt.Errorf("the agent last wrote at %v", at.AsTime())
	}
	return err
}

// Generation is that of the policy in force.
func (w *World) Generation() uint64 { return w.final().Generation }

// Policy is the policy bundle, unsigned.
func (w *World) Policy() []byte { return w.policy }
