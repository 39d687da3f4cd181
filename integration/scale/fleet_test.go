// The fleet: all agents of a trust domain in this process, and the administrator
// beside them.

package scale_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"merlon.dev/ca/capb"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/unixsock"
)

// fleet is every agent of one CA.
type fleet struct {
	tb     testing.TB
	d      *stage.Domain
	admins []capb.AdminClient // over connections of their own
	agents []*agent

	trust atomic.Pointer[svid.Trust]
	mu    sync.Mutex // guards bundle
	// bundle is the trust bundle of the highest sequence number that any agent got.
	bundle *capb.TrustBundle

	// coming holds those that are about to be in sync. Ten thousand machines begin their
	// handshakes at the same moment, and each ends its own within milliseconds; this one
	// would end none within the 5 s that a handshake may take.
	coming  chan struct{}
	stop    context.CancelFunc // of the agents that are connected
	running sync.WaitGroup

	// news counts messages that said more than how fresh they are, attempts the
	// connections that were begun, renewed the SVIDs of agents that were replaced.
	news, attempts, renewed atomic.Int64
	received, sent          atomic.Int64 // bytes
}

// callers is how many calls of the administrator are under way at a time, and how
// many agents do something at a time where they do not do it of themselves.
const callers = 64

// newFleet attests n agents with join tokens.
func newFleet(tb testing.TB, d *stage.Domain, n int) *fleet {
	tb.Helper()
	f := &fleet{tb: tb, d: d, stop: func() {}, coming: make(chan struct{}, 2*callers)}
	tb.Cleanup(func() { f.disconnect() })
	for range 4 {
		cc, err := grpc.NewClient("unix:"+d.Admin, grpc.WithTransportCredentials(unixsock.ClientCredentials()))
		if err != nil {
			tb.Fatal(err)
		}
		tb.Cleanup(func() { cc.Close() })
		f.admins = append(f.admins, capb.NewAdminClient(cc))
	}
	resp, err := f.admin(0).GetTrustBundle(tb.Context(), &capb.GetTrustBundleRequest{})
	if err != nil {
		tb.Fatal(err)
	}
	f.trusts(resp.GetTrustBundle())
	f.agents = make([]*agent, n)
	for i := range f.agents {
		const each = 2000 // of an address: the kernel gives it some 28 000 ports
		f.agents[i] = &agent{fleet: f, name: fmt.Sprintf("node-%05d", i), from: &net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(1+i/each))}}
	}
	nobody := &agent{fleet: f, from: f.agents[0].from}
	cc, err := nobody.dial()
	if err != nil {
		tb.Fatal(err)
	}
	defer cc.Close()
	f.each(n, func(ctx context.Context, i int) error { return f.attest(ctx, capb.NewNodeClient(cc), f.agents[i], i) })
	return f
}

// admin is one of the administrator's connections.
func (f *fleet) admin(i int) capb.AdminClient { return f.admins[i%len(f.admins)] }

// each does something n times, callers at a time.
func (f *fleet) each(n int, do func(ctx context.Context, i int) error) {
	f.tb.Helper()
	if err := f.try(n, do); err != nil {
		f.tb.Fatal(err)
	}
}

// try is each for another goroutine than the test's.
func (f *fleet) try(n int, do func(ctx context.Context, i int) error) error {
	all, ctx := errgroup.WithContext(f.tb.Context())
	all.SetLimit(callers)
	for i := range n {
		if ctx.Err() != nil {
			break
		}
		all.Go(func() error { return do(ctx, i) })
	}
	return all.Wait()
}

func (f *fleet) attest(ctx context.Context, node capb.NodeClient, a *agent, i int) error {
	token, err := f.admin(i).CreateToken(ctx, &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_JOIN, AgentName: a.name})
	if err != nil {
		return err
	}
	key, csr, err := newKey()
	if err != nil {
		return err
	}
	resp, err := node.Attest(ctx, &capb.AttestRequest{Evidence: &capb.AttestRequest_JoinToken{JoinToken: token.GetToken()}, Csr: csr})
	if err != nil {
		return fmt.Errorf("attest %s: %w", a.name, err)
	}
	a.key, a.chain = key, resp.GetX509Svid()
	return nil
}

// trusts takes a trust bundle, if it is newer.
func (f *fleet) trusts(b *capb.TrustBundle) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.bundle != nil && b.GetSequence() <= f.bundle.GetSequence() {
		return
	}
	doc, err := spiffebundle.Parse(spiffeid.RequireTrustDomainFromString(b.GetTrustDomain()), b.GetJwks())
	if err != nil {
		f.tb.Errorf("trust bundle %d: %v", b.GetSequence(), err)
		return
	}
	f.bundle = b
	f.trust.Store(svid.NewTrust(x509bundle.NewSet(doc.X509Bundle())))
}

// tainted says whether the newest trust bundle taints what signed the agent's SVID.
func (f *fleet) tainted(a *agent) bool {
	f.mu.Lock()
	ids := f.bundle.GetTaintedAuthorityIds()
	f.mu.Unlock()
	return len(ids) > 0 && a.signedBy(ids)
}

func (f *fleet) renewSpread() time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.bundle.GetRenewSpread().AsDuration()
}

// connect starts the first n agents, and waits until all are in sync.
func (f *fleet) connect(n int) {
	f.tb.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	f.stop = cancel
	for _, a := range f.agents[:n] {
		f.running.Go(func() { a.run(ctx) })
	}
	f.await("all agents are in sync", func() (done, of int) { return f.synced(n), n })
}

// disconnect ends all of them, and leaves what they hold.
func (f *fleet) disconnect() {
	f.stop()
	f.running.Wait()
	for _, a := range f.agents {
		if a != nil {
			a.synced.Store(false)
		}
	}
}

// forget empties the caches of the first n agents.
func (f *fleet) forget(n int) {
	for _, a := range f.agents[:n] {
		a.revision.Store(0)
		a.entries.Store(0)
		a.revocations.Store(0)
	}
}

// synced counts those of the first n agents whose stream is up to date.
func (f *fleet) synced(n int) int {
	return f.count(n, func(a *agent) bool { return a.synced.Load() })
}

// count is how many of the first n agents are so.
func (f *fleet) count(n int, is func(*agent) bool) (found int) {
	for _, a := range f.agents[:n] {
		if is(a) {
			found++
		}
	}
	return found
}

// entries is how many the first n agents hold together.
func (f *fleet) entries(n int) (sum int) {
	for _, a := range f.agents[:n] {
		sum += int(a.entries.Load())
	}
	return sum
}

// patience is how long anything may take, on a machine that has other work too.
const patience = 20 * time.Minute

// await waits until everything of something is done.
func (f *fleet) await(what string, progress func() (done, of int)) {
	f.tb.Helper()
	for begun := time.Now(); ; time.Sleep(2 * time.Millisecond) {
		done, of := progress()
		if done >= of {
			return
		}
		if time.Since(begun) > patience {
			f.tb.Fatalf("%s: %d of %d after %v\nthe CA says:\n%s", what, done, of, patience, lastOf(f.d.CA.Log(), 4000))
		}
	}
}

func lastOf(text string, n int) string { return text[max(0, len(text)-n):] }

// logState reads what a checkpoint says, without verifying it: origin, size and
// root, a line each (C2SP tlog-checkpoint).
func logState(note []byte) *capb.LogState {
	lines := bytes.SplitN(note, []byte("\n"), 4)
	if len(lines) < 4 {
		return nil
	}
	size, err := strconv.ParseInt(string(lines[1]), 10, 64)
	if err != nil {
		return nil
	}
	root, err := base64.StdEncoding.DecodeString(string(lines[2]))
	if err != nil {
		return nil
	}
	return &capb.LogState{Origin: string(lines[0]), Size: size, Root: root}
}
