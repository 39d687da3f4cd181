// What an SVID is worth: the CA's own records must agree with its name.

package api

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/role"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
	"merlon.dev/sdk/svid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var td = spiffeid.RequireTrustDomainFromString("shop.test")

// newService is a service over a real store with one agent, without keys.
func newService(t testing.TB) (*Service, *attest.Agent) {
	t.Helper()
	return newServiceIn(t, t.TempDir())
}

// newServiceIn is one whose store and log are in dir.
func newServiceIn(t testing.TB, dir string) (*Service, *attest.Agent) {
	t.Helper()
	st, err := badger.Open(filepath.Join(dir, "store"), badger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	log, err := audit.Open(filepath.Join(dir, "audit.jsonl"), audit.Options{})
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	token, err := attest.CreateJoinToken(t.Context(), st, "n1", now.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	agent, err := attest.RedeemJoinToken(t.Context(), st, td, token, now, now.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	reg, err := registry.Open(t.Context(), st, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- reg.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		for _, err := range []error{<-done, log.Close(), st.Close()} {
			if err != nil {
				t.Error(err)
			}
		}
	})
	return New(Options{TrustDomain: td, Store: st, Registry: reg, Audit: log, Log: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry()}), agent
}

func peerOf(t testing.TB, id string, handle, revision uint64) *svid.Peer {
	t.Helper()
	serial, err := svid.NewSerial(handle, revision)
	if err != nil {
		t.Fatal(err)
	}
	return &svid.Peer{
		ID: spiffeid.RequireFromString(id), Serial: serial, OurSerial: true, SerialHex: serial.String(),
		NotAfter: time.Now().Add(time.Hour),
	}
}

// SECURITY.md T8.
func TestNameAloneMakesNobodyAnAgent(t *testing.T) {
	s, agent := newService(t)
	good := peerOf(t, agent.ID.String(), agent.Handle, agent.Revision)
	if c := s.PeerCaller(good); !c.Is(capb.Caller_CALLER_AGENT) || c.Agent.Handle != agent.Handle {
		t.Fatalf("the live agent is %+v", c)
	}
	foreign := peerOf(t, agent.ID.String(), agent.Handle, agent.Revision)
	foreign.OurSerial = false
	expired := peerOf(t, agent.ID.String(), agent.Handle, agent.Revision)
	expired.NotAfter = time.Now()
	for name, p := range map[string]*svid.Peer{
		"another handle":       peerOf(t, agent.ID.String(), agent.Handle^1, agent.Revision),
		"foreign serial":       foreign,
		"expired":              expired,
		"no record":            peerOf(t, "spiffe://shop.test/agent/n2", agent.Handle, agent.Revision),
		"below an agent":       peerOf(t, agent.ID.String()+"/x", agent.Handle, agent.Revision),
		"a workload of agents": peerOf(t, "spiffe://shop.test/agents/n1", agent.Handle, agent.Revision),
		"the CA":               peerOf(t, "spiffe://shop.test/ca", 0, agent.Revision),
	} {
		c := s.PeerCaller(p)
		if c.Is(capb.Caller_CALLER_AGENT) || c.Is(capb.Caller_CALLER_ADMIN) || c.Agent != nil {
			t.Errorf("%s: %+v; want nobody", name, c)
		}
	}
}

// An entry that gives a role to an ID that Merlon gives out by itself, as no RPC
// stores and who can write the store might, makes nobody an administrator.
func TestReservedNamesHaveNoRole(t *testing.T) {
	s, agent := newService(t)
	for path, want := range map[string]bool{"/ops": true, "/agents/ops": true, "/agent": false, "/agent/n1/ops": false, "/agent/n1": false, "/ca": false} {
		id, entryID := spiffeid.RequireFromPath(td, path), entry.NewID()
		value, err := entry.Encode(&entry.Entry{
			ID: entryID, SPIFFEID: id, ParentID: agent.ID, Selectors: []entry.Selector{{Type: "unix", Value: "uid:1"}},
			Role: role.Role{Name: role.Operator}, CreatedAt: time.Now(),
		})
		if err != nil {
			t.Fatal(err)
		}
		res, err := s.opts.Store.Txn(t.Context(), nil, []store.Op{store.Put(registry.EntryPrefix+entryID, value)}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.registry.Wait(t.Context(), res.Revision); err != nil {
			t.Fatal(err)
		}
		if got := s.registry.Role(id, time.Now()); got.Name != role.Operator {
			t.Fatalf("the entry of %s gives it the role %q", id, got)
		}
		c := s.PeerCaller(peerOf(t, id.String(), agent.Handle, agent.Revision))
		if c.Is(capb.Caller_CALLER_ADMIN) != want || (len(c.Roles) > 0) != want {
			t.Errorf("%s is an administrator: %v; want %v", id, c.Is(capb.Caller_CALLER_ADMIN), want)
		}
	}
}

// The access table was asked before; a revocation that came since still counts
// for what is issued.
func TestIssuanceRestsOnAPictureWithoutRevocation(t *testing.T) {
	s, agent := newService(t)
	caller := s.PeerCaller(peerOf(t, agent.ID.String(), agent.Handle, agent.Revision))
	if _, err := s.grounds(t.Context(), caller, "sign"); err != nil {
		t.Fatal(err)
	}
	op, _, err := revocation.Put(0, svid.Revocation{AgentID: agent.ID.String(), AgentHandle: agent.Handle, ExpiresAt: time.Now().Add(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	res, err := s.opts.Store.Txn(t.Context(), nil, []store.Op{op}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.registry.Wait(t.Context(), res.Revision); err != nil {
		t.Fatal(err)
	}
	if _, err := s.grounds(t.Context(), caller, "sign"); status.Code(err) != codes.Unauthenticated {
		t.Errorf("after the revocation: %v; want Unauthenticated", err)
	}
}

// An entry issues to its own agent until its end, and to nobody at or after it.
func TestEntryIssuesUntilItsEndAndToItsAgent(t *testing.T) {
	s, agent := newService(t)
	g := s.registry.Grounds(peerOf(t, agent.ID.String(), agent.Handle, agent.Revision))
	now := time.Now()
	other := spiffeid.RequireFromPath(td, "/agent/n2")
	for name, tt := range map[string]struct {
		e    *entry.Entry
		want codes.Code
	}{
		"without an end":    {&entry.Entry{ParentID: agent.ID}, codes.OK},
		"before its end":    {&entry.Entry{ParentID: agent.ID, ExpiresAt: now.Add(1)}, codes.OK},
		"at its end":        {&entry.Entry{ParentID: agent.ID, ExpiresAt: now}, codes.PermissionDenied},
		"below another":     {&entry.Entry{ParentID: other}, codes.PermissionDenied},
		"that is not there": {nil, codes.PermissionDenied},
	} {
		if err := mayIssue(tt.e, &g, now); status.Code(err) != tt.want {
			t.Errorf("an entry %s: %v; want %s", name, err, tt.want)
		}
	}
}

func TestOnlyRootOwnUserAndConfiguredUIDsAdminister(t *testing.T) {
	s, _ := newService(t)
	s.opts.UIDs = map[uint32]role.Role{4242: {Name: role.Viewer}, 0: {Name: role.Viewer}}
	for uid, want := range map[uint32]string{0: "operator", uint32(os.Geteuid()): "operator", 4242: "viewer", 4243: "none", 1<<32 - 1: "none"} {
		if got := role.List(s.rolesOfUID(uid)); got != want {
			t.Errorf("rolesOfUID(%d) = %s; want %s", uid, got, want)
		}
	}
}
