// A compromised agent: it has a good certificate, speaks raw gRPC, and tries
// everything else. Each attempt is refused with a reason and leaves a record, costs
// a bounded amount of memory, and no other node notices.

package ca_test

import (
	"context"
	"crypto/x509"
	"fmt"
	"net/http"
	"net/url"
	"runtime"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
)

// attempt is something that the agent must not succeed with.
type attempt struct {
	do func() error
	// want and reason are code and a word of the refusal; detail a word of its
	// record's.
	want           codes.Code
	reason, detail string
}

func TestCompromisedAgentGetsNothingOfOthers(t *testing.T) {
	c := startCA(t, tempDir(t))
	evil, other := c.agent("n1"), c.agent("n2")
	own, others := c.entry("n1", "web"), c.entry("n2", "orders")
	otherStream := other.sync(0)
	at := until(t, otherStream, synced).GetRevision()
	ownKey, _ := evil.svid(own)
	reader, err := c.admin.CreateToken(t.Context(), &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_BUNDLE_READER})
	if err != nil {
		t.Fatal(err)
	}
	before := len(c.issuances())

	_, csr := newCSR(t)
	named := csrOf(t, evil.key, &x509.CertificateRequest{URIs: []*url.URL{{Scheme: "spiffe", Host: "shop.test", Path: "/agent/n2"}}})
	sign := func(entryID string, csr []byte) func() error {
		return func() error {
			resp, err := evil.node.Sign(t.Context(), &capb.SignRequest{Items: []*capb.SignItem{{EntryId: entryID, Csr: csr}}})
			if err != nil {
				return err
			}
			r := resp.GetResults()[0]
			if len(r.GetX509Svid()) > 0 {
				t.Errorf("an SVID for entry %.40q", entryID)
			}
			return status.Error(codes.Code(r.GetCode()), r.GetMessage())
		}
	}
	jwt := func(entryID string, audience ...string) func() error {
		return func() error {
			resp, err := evil.node.SignJWT(t.Context(), &capb.SignJWTRequest{Items: []*capb.SignJWTItem{{EntryId: entryID, Audience: audience}}})
			if err != nil {
				return err
			}
			r := resp.GetResults()[0]
			if r.GetToken() != "" {
				t.Errorf("a JWT-SVID for entry %.40q", entryID)
			}
			return status.Error(codes.Code(r.GetCode()), r.GetMessage())
		}
	}
	attest := func(req *capb.AttestRequest) func() error {
		return func() error { _, err := evil.node.Attest(t.Context(), req); return err }
	}
	syncs := func(requests ...*capb.SyncRequest) func() error {
		return func() error {
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			stream, err := evil.node.Sync(ctx)
			if err != nil {
				return err
			}
			for _, req := range requests {
				if err := stream.Send(req); err != nil {
					break // Recv says why
				}
			}
			_, err = ended(t, stream)
			return err
		}
	}
	oversized := func(method string) func() error {
		return func() error {
			req := &capb.SignRequest{Items: []*capb.SignItem{{EntryId: own.GetEntryId(), Csr: make([]byte, 6<<20)}}}
			return evil.conn.Invoke(t.Context(), method, req, &capb.SignResponse{})
		}
	}
	foreign := "no registration entry with this ID below the calling agent"
	for name, a := range map[string]attempt{
		"another's entry":               {sign(others.GetEntryId(), csr), codes.PermissionDenied, foreign, "sign"},
		"an entry that is none":         {sign(strings.Repeat("0", 32), csr), codes.PermissionDenied, foreign, "sign"},
		"a path for an entry":           {sign("../agent/n2", csr), codes.PermissionDenied, foreign, "sign"},
		"a megabyte for an entry":       {sign(strings.Repeat("a", 1<<20), csr), codes.PermissionDenied, foreign, "sign"},
		"another's JWT-SVID":            {jwt(others.GetEntryId(), "x"), codes.PermissionDenied, foreign, "sign JWT"},
		"a JWT-SVID for everybody":      {jwt(own.GetEntryId(), "a", "b"), codes.InvalidArgument, "jwt_max_audiences", "sign JWT"},
		"a JWT-SVID for nobody":         {jwt(own.GetEntryId()), codes.InvalidArgument, "audience", "sign JWT"},
		"nothing to sign":               {func() error { _, err := evil.node.Sign(t.Context(), &capb.SignRequest{}); return err }, codes.InvalidArgument, "items", "sign"},
		"too much to sign":              {func() error { return tooMuch(t, evil, own) }, codes.InvalidArgument, "1 to 500", "sign"},
		"renew in another's name":       {func() error { _, err := evil.node.Renew(t.Context(), &capb.RenewRequest{Csr: named}); return err }, codes.InvalidArgument, "/agent/n2", "renew"},
		"renew with a workload's key":   {func() error { return renewWith(t, evil, csrOf(t, ownKey, &x509.CertificateRequest{})) }, codes.InvalidArgument, "another SPIFFE ID", "renew"},
		"attest with the own SVID":      {attest(&capb.AttestRequest{Csr: csrOf(t, evil.key, &x509.CertificateRequest{})}), codes.InvalidArgument, "has an SVID already", "attest"},
		"attest without evidence":       {attest(&capb.AttestRequest{Csr: csr}), codes.InvalidArgument, "evidence", "attest"},
		"attest with a made-up token":   {attest(&capb.AttestRequest{Csr: csr, Evidence: &capb.AttestRequest_JoinToken{JoinToken: "mjt_" + strings.Repeat("a", 43)}}), codes.PermissionDenied, "token", "attest"},
		"attest with a reader's token":  {attest(&capb.AttestRequest{Csr: csr, Evidence: &capb.AttestRequest_JoinToken{JoinToken: reader.GetToken()}}), codes.PermissionDenied, "token", "attest"},
		"resume from the future":        {syncs(&capb.SyncRequest{ResumeRevision: 1 << 31}), codes.FailedPrecondition, "put back", "Sync"},
		"acknowledge the future":        {syncs(&capb.SyncRequest{Ack: &capb.SyncAck{TrustBundleSequence: 1 << 40}}), codes.FailedPrecondition, "put back", "Sync"},
		"acknowledge it later":          {syncs(&capb.SyncRequest{}, &capb.SyncRequest{Ack: &capb.SyncAck{Revision: at, TrustBundleSequence: 1 << 40}}), codes.FailedPrecondition, "put back", "Sync"},
		"acknowledge a policy of later": {syncs(&capb.SyncRequest{}, &capb.SyncRequest{Ack: &capb.SyncAck{PolicyGeneration: 1 << 40}}), codes.FailedPrecondition, "put back", "Sync"},
		"a request of 6 MiB":            {oversized(capb.Node_Sign_FullMethodName), codes.ResourceExhausted, "larger than max", "Node/Sign"},
		"an administrator's of 6 MiB":   {oversized(capb.Admin_CreateEntry_FullMethodName), codes.ResourceExhausted, "larger than max", "Admin/CreateEntry"},
		"the list of entries":           {func() error { _, err := evil.admin.ListEntries(t.Context(), &capb.ListEntriesRequest{}); return err }, codes.PermissionDenied, "may not call", "ListEntries"},
		"a ban of another": {func() error {
			_, err := evil.admin.BanAgent(t.Context(), &capb.BanAgentRequest{Agent: "n2"})
			return err
		}, codes.PermissionDenied, "may not call", "BanAgent"},
		"certificates for a replica": {func() error {
			_, err := capb.NewReplicaClient(evil.conn).Certify(t.Context(), &capb.ReplicaCertifyRequest{})
			return err
		}, codes.PermissionDenied, "may not call", "Certify"},
	} {
		t.Run(name, func(t *testing.T) {
			recorded := c.refusalsOf(evil.id, a.detail)
			err := a.do()
			if st := status.Convert(err); st.Code() != a.want || !strings.Contains(st.Message(), a.reason) {
				t.Errorf("%v; want %s with %q", err, a.want, a.reason)
			}
			eventually(t, "its record", func() bool { return c.refusalsOf(evil.id, a.detail) > recorded })
		})
	}
	// Whoever calls anonymously has no name; the rest was this agent's.
	if got := c.issuances(); len(got) != before {
		t.Errorf("what was refused is recorded as issued: %v", got[before:])
	}
	code, _, _ := do(t, httpClient(t, evil.key, evil.chain), http.MethodGet, "https://"+c.srv.HTTPSAddress().String()+"/log/ca/checkpoint", nil, nil)
	if code != http.StatusForbidden {
		t.Errorf("the log answers an agent %d; want 403", code)
	}

	// The other node never noticed, and what it has stayed its own.
	c.entry("n2", "orders2")
	until(t, otherStream, func(m *capb.SyncResponse) bool { return len(m.GetEntries()) == 1 })
	for _, resume := range []uint64{0, 1, at} {
		if msg := until(t, evil.sync(resume), synced); len(msg.GetEntries()) > 1 || len(msg.GetEntries()) == 1 && msg.GetEntries()[0].GetEntryId() != own.GetEntryId() || len(msg.GetRemovedEntryIds()) > 0 {
			t.Errorf("resumed from %d the agent is told %v; want its own entry at most", resume, msg)
		}
	}
}

func tooMuch(t *testing.T, a *testClient, e *capb.Entry) error {
	req := &capb.SignRequest{}
	for range 501 {
		req.Items = append(req.Items, &capb.SignItem{EntryId: e.GetEntryId()})
	}
	_, err := a.node.Sign(t.Context(), req)
	return err
}

func renewWith(t *testing.T, a *testClient, csr []byte) error {
	_, err := a.node.Renew(t.Context(), &capb.RenewRequest{Csr: csr})
	return err
}

// refusalsOf counts the audit records of refusals of an actor whose detail has a
// word. Attest is called by whoever shows its evidence, so it counts by name as well.
func (c *testCA) refusalsOf(actor, detail string) (n int) {
	c.t.Helper()
	for _, r := range c.auditRecords() {
		said, _ := r["detail"].(string)
		if r["type"] == "refuse" && r["actor"] == actor && strings.Contains(said, detail) && r["reason"] != "" {
			n++
		}
	}
	return n
}

// It opens more streams than it may, and reads none of them.
func TestCompromisedAgentCannotFillTheCA(t *testing.T) {
	c := startCA(t, tempDir(t))
	evil, other := c.agent("n1"), c.agent("n2")
	const entries, conns, streams = 15, 30, 50
	for i := range entries { // a listing of 3 MiB
		e := newEntry("n1", fmt.Sprintf("w%d", i))
		for j := range 63 {
			e.Selectors = append(e.Selectors, &capb.Selector{Type: "unix", Value: fmt.Sprintf("%s%d", longPath(0), j)})
		}
		if _, err := c.admin.CreateEntry(t.Context(), &capb.CreateEntryRequest{Entry: e}); err != nil {
			t.Fatal(err)
		}
	}
	otherStream := other.syncFor(2*time.Minute, 0)
	until(t, otherStream, synced)
	before := heapMiB()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	outcomes := make(chan error, conns*streams)
	for range conns {
		conn := c.client(evil.key, evil.chain)
		for range streams {
			stream, err := conn.node.Sync(ctx)
			if err != nil {
				outcomes <- err
				continue
			}
			go func() {
				_ = stream.Send(&capb.SyncRequest{}) // Recv would say why; it is never called
				<-stream.Context().Done()
				outcomes <- stream.Context().Err()
			}()
		}
	}
	eventually(t, "the record of what was too much", func() bool { return c.refusalsOf(evil.id, "Sync") > 0 && c.refusalsOf(evil.id, "connect") > 0 })
	eventually(t, "few of its streams are left", func() bool {
		_, _, text := do(t, httpClient(t, nil, nil), http.MethodGet, "http://"+c.srv.HealthAddress().String()+"/metrics", nil, nil)
		for n := 1; n <= 5; n++ {
			if strings.Contains(text, fmt.Sprintf("\nmerlon_sync_streams %d\n", n)) {
				return true
			}
		}
		return false
	})
	if grown := heapMiB() - before; grown > 150 {
		t.Errorf("%d streams of an agent that reads nothing take %d MiB", conns*streams, grown)
	}
	began := time.Now()
	c.entry("n2", "orders")
	until(t, otherStream, func(m *capb.SyncResponse) bool { return len(m.GetEntries()) == 1 })
	t.Logf("another node's entry came within %s; heap grew by %d MiB", time.Since(began), heapMiB()-before)
	cancel()
	for range conns * streams {
		<-outcomes
	}
	// Another connection, and it is served as before.
	until(t, c.client(evil.key, evil.chain).syncFor(2*time.Minute, 0), synced)
}

func heapMiB() int {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapInuse >> 20)
}

// Messages without end: each is read when the one before is dealt with, and hardly
// any of it is written down.
func TestEndlessAcknowledgementsAreSlowedDown(t *testing.T) {
	c := startCA(t, tempDir(t), quick)
	a := c.agent("n1")
	stream := a.sync(0)
	until(t, stream, synced)
	next := c.prepare(rootKind) // from now on acknowledgements matter
	sequence := until(t, stream, func(m *capb.SyncResponse) bool { return m.GetTrustBundle() != nil }).GetTrustBundle().GetSequence()
	before := c.revision()
	go func() {
		for i := range 20_000 {
			if stream.Send(&capb.SyncRequest{Ack: &capb.SyncAck{TrustBundleSequence: sequence - uint64(i%2)}}) != nil {
				return
			}
		}
	}()
	time.Sleep(2 * time.Second)
	if written := c.revision() - before; written > 20 {
		t.Errorf("acknowledgements that go up and down wrote the store %d times in 2 s (of %s)", written, next)
	}
}

// revision is that of the store.
func (c *testCA) revision() uint64 {
	c.t.Helper()
	resp, err := c.admin.CreateEntry(c.t.Context(), &capb.CreateEntryRequest{Entry: newEntry("n9", fmt.Sprintf("r%d", time.Now().UnixNano()))})
	if err != nil {
		c.t.Fatal(err)
	}
	return resp.GetEntry().GetRevision()
}

// The log keeps so many bytes: an agent must not be able to push out of it what it
// says about itself.
func TestRefusalsOfAnAgentAreBounded(t *testing.T) {
	c := startCA(t, tempDir(t))
	a := c.agent("n1")
	req := &capb.SignRequest{}
	for range 500 {
		req.Items = append(req.Items, &capb.SignItem{EntryId: strings.Repeat("0", 32)})
	}
	began := time.Now()
	const calls = 10
	for range calls {
		if _, err := a.node.Sign(t.Context(), req); err != nil {
			t.Fatal(err)
		}
	}
	if n, most := c.refusalsOf(a.id, "sign"), 1000+20*int(time.Since(began)/time.Second+2); n > most || n < 1000 {
		t.Errorf("%d of %d refusals are in the audit log; want 1000 and 20 a second", n, calls*500)
	}
	_, _, text := do(t, httpClient(t, nil, nil), http.MethodGet, "http://"+c.srv.HealthAddress().String()+"/metrics", nil, nil)
	if !strings.Contains(text, "merlon_audit_unrecorded_refusals_total 3") && !strings.Contains(text, "merlon_audit_unrecorded_refusals_total 4") {
		t.Error("/metrics does not count the others")
	}
}

// Whoever took an agent's certificate has it until it is renewed twice; then two
// agents show one identity, and neither goes on.
func TestCopiedSVIDEndsBoth(t *testing.T) {
	for name, thiefFirst := range map[string]bool{"the thief is faster": true, "the agent is faster": false} {
		t.Run(name, func(t *testing.T) {
			c := startCA(t, tempDir(t))
			agent, thief := c.agent("n1"), (*testClient)(nil)
			web := c.entry("n1", "web")
			_, held := agent.svid(web)
			thief = c.client(agent.key, agent.chain)
			renew := func(who *testClient) *testClient {
				t.Helper()
				key, csr := newCSR(t)
				resp, err := who.node.Renew(t.Context(), &capb.RenewRequest{Csr: csr})
				if err != nil {
					t.Fatal(err)
				}
				return c.client(key, resp.GetX509Svid())
			}
			first, second := agent, thief
			if thiefFirst {
				first, second = thief, agent
			}
			first = renew(first)
			second = renew(second) // with what was replaced: as if the answer had got lost
			err := renewWith(t, first, func() []byte { _, csr := newCSR(t); return csr }())
			wantRefusal(t, "the other's next renewal", err, codes.Unauthenticated, "AGENT_EVICTED")
			second.refusedEverywhere("AGENT_EVICTED", web.GetEntryId())
			if c.revokedNow(held) {
				t.Error("what the workload holds is revoked, too")
			}
			if got := c.state("n1"); got.GetState() != "evicted" || !strings.Contains(got.GetStateNote(), "share this identity") {
				t.Errorf("state = %v; want it evicted, and why", got)
			}
			if c.refusalsOf("spiffe://shop.test/agent/n1", "copied") == 0 {
				t.Error("the audit log does not say so")
			}
			key, attested, err := c.attest(c.joinToken("n1"))
			if err != nil {
				t.Fatal(err)
			}
			renew(c.client(key, attested.GetX509Svid()))
		})
	}
}
