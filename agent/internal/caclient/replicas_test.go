// One agent and several replicas of its CA: some die, some fall silent, some
// lose their store, and some are not what they were.

package caclient

import (
	"bytes"
	"context"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/agent/internal/attest"
	"merlon.dev/agent/internal/cache"
	"merlon.dev/agent/internal/datadir"
	"merlon.dev/agent/internal/fakeca"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/seal"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const td = "example.test"

// agent is a running client with its picture and its log.
type agent struct {
	*Client
	t       *testing.T
	picture *cache.Cache
	log     *logBuffer
	stop    func()
}

type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

// lines returns those that contain all the words.
func (b *logBuffer) lines(words ...string) (found []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
next:
	for line := range strings.Lines(b.buf.String()) {
		for _, w := range words {
			if !strings.Contains(line, w) {
				continue next
			}
		}
		found = append(found, line)
	}
	return found
}

func newDir(t *testing.T) *datadir.Dir {
	t.Helper()
	dir, err := datadir.Open(filepath.Join(t.TempDir(), "data"), td, seal.Source{}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// run starts an agent that keeps its files in dir, until the test ends or stop
// is called.
func run(t *testing.T, dir *datadir.Dir, ca *fakeca.CA, addresses ...string) *agent {
	t.Helper()
	a := &agent{t: t, log: &logBuffer{}}
	log := slog.New(slog.NewTextHandler(a.log, nil))
	reg := prometheus.NewRegistry()
	var err error
	a.Client, err = New(Config{
		TrustDomain: spiffeid.RequireTrustDomainFromString(td), Addresses: addresses, DataDir: dir,
		Attestor: &attest.JoinToken{Token: fakeca.Token}, RootHash: ca.RootHash(),
		Logger: log, Registerer: reg,
	})
	if err != nil {
		t.Fatal(err)
	}
	a.firstWord, a.lookAgain = 500*time.Millisecond, 50*time.Millisecond
	a.picture = cache.New(cache.Options{TrustDomain: a.cfg.TrustDomain, Authority: a.Client, Logger: log, Registerer: reg})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx, a.picture) }()
	a.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run() = %v", err)
		}
		a.WriteSeen(context.Background(), a.picture)
		if t.Failed() {
			t.Log(strings.Join(a.log.lines(), ""))
		}
	})
	t.Cleanup(a.stop)
	return a
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(25 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 25 s: %s", what)
		}
	}
}

// follows waits until changes arrive, and returns the address they come from.
func (a *agent) follows() string {
	a.t.Helper()
	eventually(a.t, "changes arrive", func() bool { return a.Following(a.picture) == nil })
	return a.Address()
}

// followed returns the replica that a follows, and another one.
func (a *agent) followed(replicas ...*fakeca.CA) (this, other *fakeca.CA) {
	a.t.Helper()
	a.follows()
	return a.among(replicas...)
}

// among is the replica that calls go to, and another one.
func (a *agent) among(replicas ...*fakeca.CA) (this, other *fakeca.CA) {
	address := a.Address()
	for _, r := range replicas {
		if r.Address == address {
			this = r
		} else {
			other = r
		}
	}
	return this, other
}

// sign asks for a JWT-SVID of entry e1.
func (a *agent) sign() error {
	_, err := a.SignJWT(a.t.Context(), []*capb.SignJWTItem{{EntryId: "e1", Audience: []string{"x"}}})
	return err
}

func twoReplicas(t *testing.T) (ca, second *fakeca.CA) {
	t.Helper()
	ca = fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/web", "unix:uid:1"))
	return ca, ca.Replica()
}

func TestCallsOutliveTheLossOfAReplica(t *testing.T) {
	ca, second := twoReplicas(t)
	a := run(t, newDir(t), ca, ca.Address, second.Address)
	a.follows()
	ctx, cancel := context.WithCancel(t.Context())
	var calling sync.WaitGroup
	var answered atomic.Int64
	for range 4 {
		calling.Go(func() {
			for ctx.Err() == nil {
				if err := a.sign(); err != nil {
					t.Errorf("a call during the loss of a replica: %v", err)
				}
				answered.Add(1)
			}
		})
	}
	for range 5 {
		before := answered.Load()
		eventually(t, "calls are answered", func() bool { return answered.Load() > before+20 })
		this, other := a.followed(ca, second)
		this.Stop()
		eventually(t, "the other replica is followed", func() bool { return a.follows() == other.Address })
		this.Start()
	}
	cancel()
	calling.Wait()
}

// Where no replica is left calls fail at once, as callers have something to
// fall back on.
func TestCallsFailAtOnceWithoutAReplica(t *testing.T) {
	ca, second := twoReplicas(t)
	a := run(t, newDir(t), ca, ca.Address, second.Address)
	a.follows()
	ca.Stop()
	second.Stop()
	eventually(t, "the agent notices", func() bool { return a.Address() == "" })
	eventually(t, "calls do not wait", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		_, err := a.SignJWT(ctx, []*capb.SignJWTItem{{EntryId: "e1", Audience: []string{"x"}}})
		return status.Code(err) == codes.Unavailable && ctx.Err() == nil
	})
	text := a.Following(a.picture).Error()
	if !strings.Contains(text, ca.Address) || !strings.Contains(text, second.Address) {
		t.Errorf("Following() = %q; want all addresses", text)
	}
}

// A path that swallows everything is found out when the CA does not answer, as is a
// process that hangs; a call that is on it then is made again on the other.
func TestPathThatSwallowsEverythingIsLeft(t *testing.T) {
	t.Parallel()
	ca, second := twoReplicas(t)
	paths := []*fakeca.Path{fakeca.NewPath(t, ca.Address), fakeca.NewPath(t, second.Address)}
	a := run(t, newDir(t), ca, paths[0].Address, paths[1].Address)
	first := a.follows()
	if a.links.current().reads.Load() == 0 {
		t.Error("what comes on the connection is not noticed")
	}
	for _, p := range paths {
		if p.Address == first {
			p.Swallow()
		}
	}
	if err := a.sign(); err != nil {
		t.Errorf("a call that was on its way: %v", err)
	}
	eventually(t, "the other path is used", func() bool {
		now := a.Address()
		return now != "" && now != first
	})
	if err := a.sign(); err != nil {
		t.Errorf("a call on the other path: %v", err)
	}
}

func TestReplicaThatLosesItsStoreIsLeft(t *testing.T) {
	ca, second := twoReplicas(t)
	a := run(t, newDir(t), ca, ca.Address, second.Address)
	this, other := a.followed(ca, second)
	this.CutOff(true)
	eventually(t, "the other replica is followed", func() bool { return a.Address() == other.Address })
	a.follows()
	ca.PutEntry(ca.Entry("e2", "/new", "unix:uid:1"))
	eventually(t, "a change arrives", func() bool { return a.picture.State().Entries == 2 })
	if got := a.log.lines("level=WARN", "cannot reach its store", this.Address); len(got) != 1 {
		t.Errorf("the log says %d times that the store is out of reach; want once", len(got))
	}
}

func TestAgentStaysWithAStaleReplicaWhereAllAre(t *testing.T) {
	ca, second := twoReplicas(t)
	a := run(t, newDir(t), ca, ca.Address, second.Address)
	a.follows()
	ca.CutOff(true)
	second.CutOff(true)
	eventually(t, "the agent knows", func() bool { return a.picture.State().Stale })
	heard := a.picture.Heard()
	// Many looks around: calls go on, the picture grows no fresher.
	for looked := len(ca.Resumes()) + len(second.Resumes()); len(ca.Resumes())+len(second.Resumes()) < looked+10; {
		if err := a.sign(); err != nil {
			t.Fatalf("a call while all replicas are cut off from the store: %v", err)
		}
		ca.Beat()
		second.Beat()
	}
	if got := a.picture.Heard(); !got.Equal(heard) {
		t.Errorf("heard at %v, then at %v, of replicas that cannot reach their store", heard, got)
	}
	eventually(t, "/ready says why", func() bool {
		err := a.Following(a.picture)
		return err != nil && strings.Contains(err.Error(), "cannot reach its store") &&
			strings.Contains(err.Error(), ca.Address) && strings.Contains(err.Error(), second.Address)
	})
	if got := a.log.lines("level=WARN", "cannot reach its store"); len(got) > 2 {
		t.Errorf("the log says so %d times; want once for each replica", len(got))
	}
	// The store comes back for the one that is not followed.
	_, other := a.among(ca, second)
	other.CutOff(false)
	eventually(t, "the replica with a store is followed", func() bool {
		return a.Following(a.picture) == nil && a.Address() == other.Address && a.picture.Heard().After(heard)
	})
}

func TestTheOnlyCAIsKeptWhenItLosesItsStore(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/web", "unix:uid:1"))
	a := run(t, newDir(t), ca, ca.Address)
	a.follows()
	ca.CutOff(true)
	eventually(t, "the agent knows", func() bool { return a.picture.State().Stale })
	if err := a.sign(); err != nil {
		t.Errorf("a call: %v", err)
	}
	ca.CutOff(false)
	a.follows()
	if got := len(ca.Resumes()); got != 1 {
		t.Errorf("%d streams; want the first one still", got)
	}
	if got := len(a.log.lines("reaches its store again")); got != 1 {
		t.Errorf("the log says %d times that the store is back; want once", got)
	}
}

func TestWhatWasSeenIsToldAlsoAfterARestart(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.Jump(499)
	ca.Reopen("first")
	ca.PutEntry(ca.Entry("e1", "/web", "unix:uid:1"))
	sequence := ca.RaiseTrust()
	dir := newDir(t)
	a := run(t, dir, ca, ca.Address)
	a.follows()
	eventually(t, "the first revision is on disk", func() bool { got, err := a.loadSeen(); return err == nil && got.Revision > 0 })
	// Too soon for the next write, but for the end.
	ca.PutEntry(ca.Entry("e2", "/more", "unix:uid:1"))
	eventually(t, "the change arrives", func() bool { return a.picture.Seen() == ca.Revision() })
	a.stop()
	ca.Reopen("second")
	a = run(t, dir, ca, ca.Address)
	a.follows()
	if now := string(a.seen(a.picture).GetOpening()); now != "second" {
		t.Errorf("opening = %q; want the one that the CA has named last", now)
	}
	all := ca.Seen()
	if first := all[0]; first.GetRevision() != 0 || first.GetPolicyGeneration() != 0 || len(first.GetOpening()) != 0 {
		t.Errorf("a new agent has seen %v; want nothing", first)
	}
	if last := all[len(all)-1]; last.GetRevision() != ca.Revision() || last.GetTrustBundleSequence() != sequence || string(last.GetOpening()) != "first" {
		t.Errorf("seen after a restart = %v; want revision %d, trust bundle %d, under the first opening", last, ca.Revision(), sequence)
	}
	if resumes := ca.Resumes(); resumes[len(resumes)-1] != 0 {
		t.Errorf("resumes = %d; want a full listing after a restart: what was seen is not held", resumes)
	}
}

// The cache on the disk can hold a later revision than the file does: one of the
// present opening, which an earlier one would make evidence against the CA.
func TestRevisionOfTheCacheHasNoEarlierOpening(t *testing.T) {
	c := &Client{remembered: storedSeen{Revision: 7, Opening: []byte("first")}}
	for _, said := range []string{"", "second"} {
		c.noteOpening([]byte(said))
		of := map[uint64]string{7: "first", 8: ""}
		if said != "" {
			of = map[uint64]string{7: said, 8: said}
		}
		for revision, want := range of {
			if got := string(c.opening(revision)); got != want {
				t.Errorf("after %q the opening of revision %d = %q; want %q", said, revision, got, want)
			}
		}
	}
}

func TestRevisionIsSavedWhileTheAgentRuns(t *testing.T) {
	t.Parallel()
	ca := fakeca.New(t, td)
	a := run(t, newDir(t), ca, ca.Address)
	a.follows()
	ca.PutEntry(ca.Entry("e1", "/web", "unix:uid:1"))
	want := ca.Revision()
	// Not at the end only: a machine can lose power.
	eventually(t, "the revision is on disk", func() bool {
		got, err := a.loadSeen()
		return err == nil && got.Revision == want
	})
}

func TestDamagedMemoryIsAnError(t *testing.T) {
	for name, content := range map[string]string{
		"garbled": "{", "of another trust domain": `{"trust_domain":"other.test","revision":7}`,
	} {
		dir := newDir(t)
		if err := dir.Write(seenFile, []byte(content)); err != nil {
			t.Fatal(err)
		}
		_, err := New(Config{
			TrustDomain: spiffeid.RequireTrustDomainFromString(td), Addresses: []string{"ca:1"}, DataDir: dir,
			Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
		})
		if err == nil || !strings.Contains(err.Error(), seenFile) {
			t.Errorf("%s: New() = %v; want an error that names %s", name, err, seenFile)
		}
	}
}

func TestCAThatRefusesIsQuotedOnce(t *testing.T) {
	ca, second := twoReplicas(t)
	dir := newDir(t)
	a := run(t, dir, ca, ca.Address, second.Address)
	a.follows()
	a.stop()
	const words = "the store is at revision 3, this agent has seen 7"
	ca.Refuse(status.Error(codes.FailedPrecondition, words))
	second.Refuse(status.Error(codes.FailedPrecondition, words))
	a = run(t, dir, ca, ca.Address, second.Address)
	eventually(t, "both are tried several times", func() bool { return len(ca.Seen()) > 4 && len(second.Seen()) > 4 })
	for _, r := range []*fakeca.CA{ca, second} {
		if got := a.log.lines("level=ERROR", words, r.Address); len(got) != 1 {
			t.Errorf("the log quotes %s %d times; want once", r.Address, len(got))
		}
	}
	if err := a.Following(a.picture); err == nil || !strings.Contains(err.Error(), words) || strings.Contains(err.Error(), "rpc error") {
		t.Errorf("Following() = %v; want the CA's words", err)
	}
	if err := a.sign(); status.Code(err) != codes.Unavailable {
		t.Errorf("a call to a CA that refuses the agent: %v; want none", err)
	}
	// One of them is put right.
	second.Refuse(nil)
	if got := a.follows(); got != second.Address {
		t.Errorf("followed is %s; want %s", got, second.Address)
	}
}

// A CA that was set back and does not notice.
func TestCAThatWasSetBackIsNotFollowed(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.Jump(500)
	ca.PutEntry(ca.Entry("e1", "/web", "unix:uid:1"))
	dir := newDir(t)
	a := run(t, dir, ca, ca.Address)
	a.follows()
	signed := a.sign()
	if signed != nil {
		t.Fatal(signed)
	}
	ca.Stop()
	ca.Jump(300)
	ca.Start()
	refused := func() bool {
		err := a.Following(a.picture)
		return err != nil && strings.Contains(err.Error(), "revision 300") && strings.Contains(err.Error(), "revision 501")
	}
	eventually(t, "the agent that runs refuses it", refused)
	if s := a.picture.State(); s.Entries != 1 || s.Revision != 501 || a.Address() != "" {
		t.Errorf("state = %+v, calls go to %q; want what was held, and no calls", s, a.Address())
	}
	a.stop()
	a = run(t, dir, ca, ca.Address)
	eventually(t, "a restarted agent refuses it", refused)
	if a.picture.State().Synced {
		t.Error("a restarted agent took the older listing")
	}
	// The operator accepts the loss: the CA goes on in the next epoch.
	ca.Jump(1<<32 | 5)
	a.follows()
	if s := a.picture.State(); s.Revision != 1<<32|5 {
		t.Errorf("revision %d; want that of the new epoch", s.Revision)
	}
}

// The token is used up, and no replica takes it again: the log says what to do.
func TestLostAnswerToEvidence(t *testing.T) {
	ca, second := twoReplicas(t)
	ca.LoseAttest()
	a := run(t, newDir(t), ca, ca.Address, second.Address)
	eventually(t, "the log says to make another token", func() bool {
		return len(a.log.lines("refuses the join token", "merlon token create")) > 0
	})
}

// A replica that is behind must not bring back what was distrusted, neither
// now nor after a restart.
func TestOlderTrustBundleWithARenewalIsNotKept(t *testing.T) {
	ca := fakeca.New(t, td)
	old := ca.RaiseTrust()
	dir := newDir(t)
	a := run(t, dir, ca, ca.Address)
	a.follows()
	for range 3 {
		ca.RaiseTrust()
	}
	eventually(t, "the new trust bundle is held", func() bool { return a.picture.Trust().Sequence == old+3 })
	ca.SetSequence(old)
	if err := a.renew(t.Context(), a.picture); err != nil {
		t.Fatal(err)
	}
	stored, err := a.loadTrust()
	if err != nil || stored.Sequence != old+3 || a.picture.Trust().Sequence != old+3 {
		t.Errorf("after a renewal with an older trust bundle: on disk %v, %v; want %d", stored.Sequence, err, old+3)
	}
}

func TestSVIDUnderARootThatWasRemovedIsRefused(t *testing.T) {
	old, now := fakeca.New(t, td), fakeca.New(t, td)
	old.SetSequence(4)
	jwks, err := now.Root.Bundle().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	held, err := cache.ParseTrust(&capb.TrustBundle{TrustDomain: td, Sequence: 5, Jwks: jwks}, td)
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	c, err := New(Config{
		TrustDomain: spiffeid.RequireTrustDomainFromString(td), Addresses: []string{"ca:1"}, DataDir: newDir(t),
		Logger: log, Registerer: prometheus.NewRegistry(),
	})
	if err != nil {
		t.Fatal(err)
	}
	picture := cache.New(cache.Options{TrustDomain: c.cfg.TrustDomain, Authority: c, Logger: log, Registerer: prometheus.NewRegistry()})
	picture.SetTrust(t.Context(), held)
	key, csr, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	answer, err := old.Attest(t.Context(), &capb.AttestRequest{Evidence: &capb.AttestRequest_JoinToken{JoinToken: fakeca.Token}, Csr: csr})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.adopt(t.Context(), picture, answer.GetX509Svid(), answer.GetTrustBundle(), key); err == nil || !c.ID().IsZero() {
		t.Errorf("adopt() = %v; want the SVID to be judged by the newer trust bundle", err)
	}
}

// A replica that accepts connections and says nothing holds nobody up.
func TestReplicaWithoutAWordIsLeft(t *testing.T) {
	t.Parallel()
	ca, second := twoReplicas(t)
	ca.HoldSync(true)
	// Whichever is tried first: several agents, so that some begin with it.
	for range 6 {
		a := run(t, newDir(t), ca, ca.Address, second.Address)
		ca.RenewToken()
		eventually(t, "the replica that speaks is followed", func() bool { return a.Address() == second.Address })
	}
}
