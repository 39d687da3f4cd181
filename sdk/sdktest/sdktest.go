// The trust domain of a test: who is in it, what is allowed, what changes.

package sdktest

import (
	"context"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"merlon.dev/policy"
	"merlon.dev/sdk"
	"merlon.dev/sdk/svid"
)

// TrustDomain is the name of every trust domain that New makes.
const TrustDomain = "sdktest.test"

// TD is a trust domain in memory: its authority, its workloads, each with an
// agent of its own, its policy and its revocations. It is safe for concurrent
// use. Mistakes in its use end the test.
type TD struct {
	t      testing.TB
	dir    string  // of the agents' sockets
	memory *memory // the network; nil: real sockets
	name   string

	mu        sync.Mutex // guards all below
	root      *authority
	roots     []*authority // the trust bundle
	tainted   []string     // IDs of those of them that are tainted
	serial    uint64       // of roots, for their names
	revision  uint64       // as the CA's store would count
	policyGen uint64
	ttl       time.Duration
	workloads map[string]*agent
	rules     []rule
	decide    func(*policy.Input) policy.Decision
	compiled  bool          // rules are sent to the workloads
	maxAge    time.Duration // of the policy; 0: any
	revoked   []svid.Revocation
	changed   chan struct{} // closed at the next change
	partners  []*TD         // whose trust bundles the workloads have
	trustees  []*TD         // whose workloads have this one's
}

type rule struct {
	from, to string
	allow    bool
}

// New makes a trust domain that lasts as long as the test. Its policy denies
// every call.
func New(t testing.TB) *TD {
	t.Helper()
	return newTD(t, TrustDomain, nil)
}

// NewInMemory is New without any socket, for tests in a testing/synctest bubble, in
// which time goes on only while nobody waits for the kernel. Agents are reached in
// memory, and so are servers: they serve on [TD.Listen], and the workloads' clients,
// by httpauth, grpcauth and sdk.Identity.DialTLS, connect to them by the addresses
// given there. An hour's sleep then takes no time, and X509-SVIDs expire in it:
// nothing renews them but Rotate and RotateRoot.
//
// Programs are not tested from outside in this way, and there is no plaintext beside
// TLS (sdk.WithPlaintextUntil).
func NewInMemory(t testing.TB) *TD {
	t.Helper()
	return newTD(t, TrustDomain, &memory{listeners: make(map[address]*listener)})
}

func newTD(t testing.TB, name string, net *memory) *TD {
	t.Helper()
	dir := ""
	if net == nil {
		var err error
		// t.TempDir has the test's name in it, and socket paths have to be short.
		if dir, err = os.MkdirTemp("", "sdktest"); err != nil { //nolint:usetesting // see above
			t.Fatalf("sdktest: %v", err)
		}
	}
	td := &TD{
		t:         t,
		dir:       dir,
		memory:    net,
		name:      name,
		revision:  1,
		policyGen: 1,
		ttl:       time.Hour,
		workloads: make(map[string]*agent),
		changed:   make(chan struct{}),
	}
	td.newRoot()
	t.Cleanup(td.close)
	return td
}

func (td *TD) close() {
	td.mu.Lock()
	agents := make([]*agent, 0, len(td.workloads))
	for _, a := range td.workloads {
		agents = append(agents, a)
	}
	td.mu.Unlock()
	for _, a := range agents {
		a.stop()
	}
	if td.dir == "" {
		return
	}
	if err := os.RemoveAll(td.dir); err != nil {
		td.t.Errorf("sdktest: %v", err)
	}
}

// Workload opens the identity of the workload with this name, "orders" for
// spiffe://sdktest.test/orders, as sdk.Open does in a process of its own. It
// is closed at the end of the test. Each call opens another.
func (td *TD) Workload(name string, opts ...sdk.Option) *sdk.Identity {
	td.t.Helper()
	opts = slices.Concat([]sdk.Option{td.As(name), sdk.WithLogger(slog.New(slog.DiscardHandler))}, opts)
	id, err := sdk.Open(context.Background(), opts...)
	if err != nil {
		td.t.Fatalf("sdktest: open workload %s: %v", name, err)
	}
	td.t.Cleanup(id.Close)
	return id
}

// As is the option with which sdk.Open opens the identity of the workload with this
// name, for programs that open it themselves.
func (td *TD) As(name string) sdk.Option {
	td.t.Helper()
	return td.agentOf(name).reached
}

// Address is the SPIFFE_ENDPOINT_SOCKET of the workload with this name, for
// programs that are tested from outside. Whoever connects there is that
// workload.
func (td *TD) Address(name string) string {
	td.t.Helper()
	if td.memory != nil {
		td.t.Fatalf("sdktest: the agent of %s is in memory: programs that are tested from outside need sdktest.New", name)
	}
	return "unix://" + td.agentOf(name).path
}

// Listen listens at "name:port" in the network of NewInMemory: any name, which needs
// no relation to a workload's.
func (td *TD) Listen(nameAndPort string) net.Listener {
	td.t.Helper()
	if td.memory == nil {
		td.t.Fatal("sdktest: Listen is for NewInMemory: use net.Listen")
	}
	if _, _, err := net.SplitHostPort(nameAndPort); err != nil {
		td.t.Fatalf("sdktest: listen: %v", err)
	}
	lis, err := td.memory.listen(address{"tcp", nameAndPort})
	if err != nil {
		td.t.Fatalf("sdktest: %v", err)
	}
	return lis
}

// agentOf gives the running agent of a workload, new if need be.
func (td *TD) agentOf(name string) *agent {
	td.t.Helper()
	td.mu.Lock()
	defer td.mu.Unlock()
	if a, ok := td.workloads[name]; ok {
		return a
	}
	a := &agent{
		td:   td,
		id:   td.mustID(name),
		path: filepath.Join(td.dir, fmt.Sprintf("%d.sock", len(td.workloads))),
	}
	a.svid = td.mint(a.id)
	if err := a.start(); err != nil {
		td.t.Fatalf("sdktest: start the agent of %s: %v", name, err)
	}
	td.workloads[name] = a
	return a
}

// ID is the SPIFFE ID that name stands for: itself, or a path in this trust
// domain.
func (td *TD) ID(name string) spiffeid.ID { return td.mustID(name) }

func (td *TD) mustID(name string) spiffeid.ID {
	if !strings.HasPrefix(name, "spiffe://") {
		name = "spiffe://" + td.name + "/" + name
	}
	id, err := spiffeid.FromString(name)
	if err != nil {
		td.t.Fatalf("sdktest: workload %q: %v", name, err)
	}
	return id
}

// Allow lets from call to, by any protocol, unless a Deny says otherwise. Both
// are names or SPIFFE IDs.
func (td *TD) Allow(from, to string) { td.addRule(from, to, true) }

// Deny denies calls from from to to; it wins over Allow.
func (td *TD) Deny(from, to string) { td.addRule(from, to, false) }

func (td *TD) addRule(from, to string, allow bool) {
	td.change(func() {
		td.rules = append(td.rules, rule{td.mustID(from).String(), td.mustID(to).String(), allow})
		td.policyGen++
	})
}

// Forget removes every rule that Allow and Deny have made about this pair.
func (td *TD) Forget(from, to string) {
	td.change(func() {
		source, destination := td.mustID(from).String(), td.mustID(to).String()
		td.rules = slices.DeleteFunc(td.rules, func(r rule) bool { return r.from == source && r.to == destination })
		td.policyGen++
	})
}

// Decide replaces the rules by a function, which is called for each decision,
// concurrently; nil brings the rules back. A decision without an ID gets one.
func (td *TD) Decide(f func(*policy.Input) policy.Decision) {
	td.change(func() { td.decide = f; td.policyGen++ })
}

// CompilePolicy sends the rules to the workloads, which decide by them in process,
// as they do with a real agent; a change then takes effect within milliseconds
// instead of at once. A function given to Decide is still asked for each call.
func (td *TD) CompilePolicy() { td.change(func() { td.compiled = true; td.policyGen++ }) }

// Revoke withdraws every X509-SVID that the workload has now. Rotate gives it
// a good one again.
func (td *TD) Revoke(name string) {
	td.change(func() {
		td.revision++
		td.revoked = append(td.revoked, svid.Revocation{
			SPIFFEID:       td.mustID(name).String(),
			BeforeRevision: td.revision,
			ExpiresAt:      time.Now().Add(td.ttl),
			Note:           "sdktest",
		})
	})
}

// Rotate gives the workload a new X509-SVID, also after Withdraw.
func (td *TD) Rotate(name string) {
	a := td.agentOf(name)
	td.change(func() { a.svid = td.mint(a.id) })
}

// Expire lets the workload's identity run out: its next X509-SVID, which it has from
// now on, ends within 2 s, and Expire returns when it has ended. There is no other
// until Rotate. Connections that showed an earlier one are not concerned; the clients
// of httpauth make new ones, as after each rotation.
func (td *TD) Expire(name string) {
	a := td.agentOf(name)
	end := time.Now().Add(2 * time.Second).Truncate(time.Second) // as certificates have it
	td.change(func() { a.svid = td.mintUntil(a.id, end) })
	time.Sleep(time.Until(end))
}

// Withdraw takes the workload's identity away, as when its registration entry
// is deleted: the Workload API answers PermissionDenied.
func (td *TD) Withdraw(name string) {
	a := td.agentOf(name)
	td.change(func() { a.svid = nil })
}

// AddRoot makes a new root, which signs from now on: Rotate gives a workload an
// X509-SVID under it.
func (td *TD) AddRoot() { td.change(td.newRoot) }

// RotateRoot makes a new root and reissues every X509-SVID under it. The old
// roots stay in the trust bundle.
func (td *TD) RotateRoot() {
	td.change(func() {
		td.newRoot()
		td.reissue()
	})
}

// RemoveRoot makes a new root, reissues every X509-SVID under it, and takes
// all older roots out of the trust bundle, as after a compromise.
func (td *TD) RemoveRoot() {
	td.change(func() {
		td.roots, td.tainted = nil, nil
		td.newRoot()
		td.reissue()
	})
}

// TaintOldRoots has the agents name every root but the newest as tainted, after AddRoot
// or RotateRoot, as the CA does some time before it withdraws one: connections that
// hang on one run out within some seconds, where another X509-SVID is there.
// RemoveOldRoots then takes those roots out of the trust bundle.
func (td *TD) TaintOldRoots() {
	td.change(func() {
		td.tainted = nil
		for _, old := range td.roots[:len(td.roots)-1] {
			td.tainted = append(td.tainted, hex.EncodeToString(old.cert.SubjectKeyId))
		}
	})
}

// RemoveOldRoots takes every root but the newest out of the trust bundle. Workloads
// that still have an X509-SVID under one are nobody from then on.
func (td *TD) RemoveOldRoots() {
	td.change(func() { td.roots, td.tainted = td.roots[len(td.roots)-1:], nil })
}

func (td *TD) reissue() {
	for _, a := range td.workloads {
		if a.svid != nil {
			a.svid = td.mint(a.id)
		}
	}
}

// SetTTL is how long X509-SVIDs live that are issued from now on; at first 1 h.
func (td *TD) SetTTL(ttl time.Duration) {
	td.mu.Lock()
	defer td.mu.Unlock()
	td.ttl = ttl
}

// SetPolicyMaxAge is how old the policy of a workload may be, when its agent is away,
// before its calls are denied with STALE_POLICY: the agent's policy_max_age with
// policy_on_stale: deny. 0, as at first, is for ever.
func (td *TD) SetPolicyMaxAge(age time.Duration) { td.change(func() { td.maxAge = age }) }

// StopAgent stops the agent of the workload, as if it had crashed. StartAgent
// starts it again.
func (td *TD) StopAgent(name string) { td.agentOf(name).stop() }

// StartAgent starts the agent of the workload after StopAgent.
func (td *TD) StartAgent(name string) {
	td.t.Helper()
	if err := td.agentOf(name).start(); err != nil {
		td.t.Fatalf("sdktest: start the agent of %s: %v", name, err)
	}
}

// SVID issues an X509-SVID that no workload has, for tests which make their
// TLS by hand.
func (td *TD) SVID(name string) *x509svid.SVID {
	td.mu.Lock()
	defer td.mu.Unlock()
	return td.mint(td.mustID(name))
}

// Bundle is the trust bundle as it is now.
func (td *TD) Bundle() *x509bundle.Bundle {
	td.mu.Lock()
	defer td.mu.Unlock()
	bundle := x509bundle.New(spiffeid.RequireTrustDomainFromString(td.name))
	for _, root := range td.roots {
		bundle.AddX509Authority(root.cert)
	}
	return bundle
}

// change does something to the trust domain and tells the agents, also those of the
// trust domains that trust it.
func (td *TD) change(f func()) {
	td.mu.Lock()
	f()
	td.tell()
	trustees := slices.Clone(td.trustees)
	td.mu.Unlock()
	for _, other := range trustees { // one lock at a time: trust goes both ways
		other.mu.Lock()
		other.tell()
		other.mu.Unlock()
	}
}

// tell wakes the agents. td.mu is held.
func (td *TD) tell() {
	close(td.changed)
	td.changed = make(chan struct{})
}
