// Package faults breaks a running trust domain and holds what its clients saw
// against the invariants of SECURITY.md. A World is the processes and the clients, a
// row of the matrix (rows_test.go) is what is done to it; README.md says how to run
// them, and what came out.
package faults

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"merlon.dev/ca/capb"
	"merlon.dev/integration/faults/history"
	"merlon.dev/integration/stage"
	"merlon.dev/policy/bundle"
	"merlon.dev/sdk/unixsock"
)

// cutWithin is how long a denied peer may still succeed (I4). It is 1 s on a quiet
// machine; results say what was measured.
const cutWithin = 5 * time.Second

// Setup says with which binaries a world is made; what is empty is as released.
type Setup struct {
	CA, Agent, Peer string
	// Settings are further lines of the CA's configuration, AgentSettings of the agent's.
	Settings, AgentSettings []string
	Env                     []string // of all
	// Every is how long workloads and writers rest between two calls; zero: 20 ms,
	// and not at all.
	Every time.Duration
	// Disk is where the CA keeps its data, with 4 MiB free; empty: a folder of its own.
	Disk string
	// Slow lets the agent reach the CA by a way that can be slow and be cut: World.Way.
	Slow bool
	// Wide has a second agent, with billing and ledger under it, and front, an app behind
	// a sidecar, which web calls.
	Wide bool
	// Decide has orders decide that often a second, beside its calls: web may call it,
	// stranger and Former may not.
	Decide int
}

// World is a trust domain in use: CA, agent, workloads that call each other, an
// agent that the harness plays itself, and writers. Its methods are for one
// goroutine, but Rec.
type World struct {
	*stage.Domain
	tb  testing.TB
	Rec *history.Recorder
	Rng *rand.Rand
	// Way is between agent and CA, if Setup.Slow asked for it.
	Way *stage.Gate
	// Second is the second agent, and Sidecar that of front, if Setup.Wide asked for them.
	Second  *stage.Domain
	Sidecar *stage.Process

	setup  Setup
	seed   uint64
	cas    []replica
	peers  []*peer
	node   *node
	policy []byte
	tries  int // of TryWrite
	shift  int // of Work
	before map[string]history.Size
	stop   func() // ends writers and node
}

// replica is one CA as the harness uses it.
type replica struct {
	name, data, health string
	admin              capb.AdminClient
	process            *stage.Process
}

// Seed is MERLON_SEED, or a new one; each test says its own.
func Seed(tb testing.TB) uint64 {
	tb.Helper()
	seed := rand.Uint64()
	if text := os.Getenv("MERLON_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			tb.Fatalf("MERLON_SEED: %v", err)
		}
	}
	tb.Logf("MERLON_SEED=%d", seed)
	return seed
}

// New starts a world with one CA on a store of its own.
func New(tb testing.TB, setup Setup) *World {
	tb.Helper()
	ca := setup.CA
	if ca == "" {
		ca = "merlon-ca"
	}
	d := stage.CAAlone(tb, ca, setup.Env, setup.Settings...)
	w := around(tb, d, setup)
	data := d.CAData()
	if setup.Disk != "" {
		data = w.moveTo(setup.Disk)
	}
	w.cas = []replica{{"ca", data, d.Health, w.adminOf(d.Admin), d.CA}}
	w.ready()
	token := d.Token("--agent", "one")
	grpc := d.GRPC
	if setup.Slow {
		w.Way = stage.NewGate(tb, "https://"+d.GRPC)
		d.GRPC = w.Way.Address()
	}
	w.startAgent(token.RootHash, "join_token: "+token.Token)
	d.GRPC = grpc
	if setup.Wide {
		w.startSecond()
	}
	w.begin()
	return w
}

// startSecond starts the second agent, which has folders of its own.
func (w *World) startSecond() {
	w.tb.Helper()
	token := w.Token("--agent", "two")
	second := *w.Domain
	second.SetDir(stage.Dir(w.tb))
	second.Agent = stage.Start(w.tb, "merlon-agent", w.setup.Env, "-config", second.AgentConfig(token.RootHash, "join_token: "+token.Token))
	w.Second = &second
}

// moveTo restarts the CA with its data on another disk.
func (w *World) moveTo(disk string) (data string) {
	w.tb.Helper()
	w.CA.Stop()
	data = filepath.Join(disk, "ca-data")
	// As it is: the CA looks at modes.
	if out, err := exec.Command("cp", "-a", w.CAData(), data).CombinedOutput(); err != nil {
		w.tb.Fatalf("%v: %s", err, out)
	}
	w.CA.Args = append(w.CA.Args, "-data-dir", data, "-disk-reserve-mib", "4")
	w.CA.Restart()
	return data
}

// OnReplicas makes a world of a cluster whose replicas run.
func OnReplicas(tb testing.TB, c *stage.Cluster, setup Setup) *World {
	tb.Helper()
	w := around(tb, c.Domain, setup)
	for _, r := range c.Replicas {
		w.cas = append(w.cas, replica{r.ID, r.Data, r.Health, w.adminOf(r.Admin), r.Process})
	}
	c.Join()
	w.begin()
	return w
}

func around(tb testing.TB, d *stage.Domain, setup Setup) *World {
	seed := Seed(tb)
	return &World{
		Domain: d, tb: tb, Rec: new(history.Recorder), Rng: rand.New(rand.NewPCG(seed, 0)),
		setup: setup, seed: seed, before: make(map[string]history.Size), stop: func() {},
	}
}

func (w *World) startAgent(rootHash string, evidence ...string) {
	w.tb.Helper()
	binary := w.setup.Agent
	if binary == "" {
		binary = "merlon-agent"
	}
	config := w.AgentConfig(rootHash, append(evidence, w.setup.AgentSettings...)...)
	w.Agent = stage.Start(w.tb, binary, w.setup.Env, "-config", config)
}

// AgentID is the SPIFFE ID of the agent.
func (w *World) AgentID() string {
	if id := w.Domain.AgentID(); id != "" {
		return id
	}
	return w.ID("/agent/one")
}

// begin lets the policy apply.
func (w *World) begin() {
	w.tb.Helper()
	w.policy = w.build(false)
	w.push(w.cas[0].admin)
}

// The peers. Each is called by those that are named, and calls them.
const (
	web, orders, doomed, stranger = "/web", "/orders", "/doomed", "/stranger"
	billing, ledger               = "/billing", "/ledger" // under the second agent
	front                         = "/front"              // behind the sidecar
)

// Former is who could call orders by an earlier policy. It is nobody.
const Former = "/former"

// FormerPolicy is the earlier policy, unsigned: it lets Former call orders.
func (w *World) FormerPolicy() []byte {
	w.tb.Helper()
	return w.build(true)
}

// build makes the policy: web and orders call each other, doomed calls orders until
// it is denied, and stranger is in no grant.
func (w *World) build(former bool) []byte {
	w.tb.Helper()
	dir := w.tb.TempDir()
	grant := func(id, to string, from ...string) string {
		for i := range from {
			from[i] = w.ID(from[i])
		}
		return fmt.Sprintf("  - id: %s\n    from: [%s]\n    to: [%s]\n    http: {}\n", id, strings.Join(from, ", "), w.ID(to))
	}
	text := "grants:\n" + grant("to-orders", orders, web, doomed) + grant("to-web", web, orders)
	if former {
		text += grant("former", orders, Former)
	}
	if w.setup.Wide {
		text += grant("to-front", front, web) + grant("to-ledger", ledger, billing) + grant("to-billing", billing, ledger)
	}
	if err := os.WriteFile(filepath.Join(dir, "grants.yaml"), []byte(text), 0o600); err != nil {
		w.tb.Fatal(err)
	}
	raw, err := bundle.Build(dir)
	if err != nil {
		w.tb.Fatal(err)
	}
	return raw
}

// dial connects to a Unix socket, and comes back quickly when that was away.
func dial(tb testing.TB, path string) *grpc.ClientConn {
	tb.Helper()
	cc, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(unixsock.ClientCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: 2 * patience, Backoff: backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1.2, MaxDelay: 100 * time.Millisecond}}))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { cc.Close() })
	return cc
}

func (w *World) adminOf(socket string) capb.AdminClient {
	w.tb.Helper()
	return capb.NewAdminClient(dial(w.tb, socket))
}

// ready waits until each CA says so.
func (w *World) ready() {
	w.tb.Helper()
	for _, ca := range w.cas {
		stage.Eventually(w.tb, ca.name+" is ready", func() error { return stage.Ready(ca.health) })
	}
}

// Kill ends the CA with SIGKILL, starts it again, and notes how long it took to be
// ready.
func (w *World) Kill(fault string, bound time.Duration) {
	w.tb.Helper()
	mended := w.Rec.Break(fault)
	w.CA.Kill()
	mended()
	w.RestartCA(bound)
}

// RestartCA starts the CA that was ended, and notes how long it took to be ready.
func (w *World) RestartCA(bound time.Duration) {
	w.tb.Helper()
	w.CA.Restart()
	w.Until("the CA is ready", bound, w.CAReady)
}

// CAReady is nil when the CA says that it is.
func (w *World) CAReady() error { return stage.Ready(w.cas[0].health) }

// Admin is the admin API of a CA.
func (w *World) Admin(ca int) capb.AdminClient { return w.cas[ca].admin }

// Data is the data folder of the CA.
func (w *World) Data() string { return w.cas[0].data }

// PeerIDs are the SPIFFE IDs of the workloads.
func (w *World) PeerIDs() (ids []string) {
	for _, p := range w.peers {
		ids = append(ids, p.id)
	}
	return ids
}

// PeerPID is the process of a workload.
func (w *World) PeerPID(path string) int {
	for _, p := range w.peers {
		if p.path == path {
			return p.cmd.Process.Pid
		}
	}
	w.tb.Fatalf("there is no peer %s", path)
	return 0
}

// Snapshot is what is known by now, without what the CA has and wrote down.
func (w *World) Snapshot() *history.History {
	h := w.Rec.History()
	h.Seed, h.Allowed, h.CutWithin = w.seed, w.allowed(), cutWithin
	return h
}

// Until waits for what must work again (I7); for half a minute, however short the
// bound is.
func (w *World) Until(what string, bound time.Duration, check func() error) {
	w.tb.Helper()
	begun := time.Now()
	for err := check(); err != nil; err = check() {
		if time.Since(begun) > max(30*time.Second, 2*bound) {
			w.tb.Errorf("%s: still %v", what, err)
			w.Rec.Recovered(what, -1, bound)
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	w.Rec.Recovered(what, time.Since(begun), bound)
}
