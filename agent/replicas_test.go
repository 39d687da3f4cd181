// What workloads notice of the CA's replicas: nothing.

package agent_test

import (
	"crypto/x509"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/agent"
	"merlon.dev/agent/internal/fakeca"
)

// newReplicaConfig is for an agent that knows all replicas.
func newReplicaConfig(t testing.TB, replicas ...*fakeca.CA) agent.Config {
	t.Helper()
	cfg := newConfig(t, replicas[0])
	cfg.CAAddress, cfg.CAHTTPSAddress = nil, nil
	for _, r := range replicas {
		cfg.CAAddress = append(cfg.CAAddress, r.Address)
		cfg.CAHTTPSAddress = append(cfg.CAHTTPSAddress, r.HTTPSAddress)
	}
	return cfg
}

// followed waits until one replica is followed, and returns it and another.
func followed(t testing.TB, a, b *fakeca.CA) (this, other *fakeca.CA) {
	t.Helper()
	eventually(t, "one replica is followed", func() bool { return a.Streams()+b.Streams() == 1 })
	if a.Streams() == 1 {
		return a, b
	}
	return b, a
}

// health returns what a path of the health port says.
func (n *node) health(t testing.TB, path string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+n.HealthAddress()+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	probe := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := probe.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

func notAfter(t testing.TB, m *workload.X509SVIDResponse) time.Time {
	t.Helper()
	certs, err := x509.ParseCertificates(m.GetSvids()[0].GetX509Svid())
	if err != nil {
		t.Fatal(err)
	}
	return certs[0].NotAfter
}

func TestLossOfAReplicaIsInvisible(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.SetTTL(3*time.Second, 5*time.Second)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	second := ca.Replica()
	n := start(t, newReplicaConfig(t, ca, second))
	stream := n.x509Stream(t)
	held := receive(t, stream, "/web")
	cc, ctx := conn(t, n.socket)
	api := workload.NewSpiffeWorkloadAPIClient(cc)
	for round, audience := range []string{"a", "b", "c"} {
		this, other := followed(t, ca, second)
		this.Stop()
		// At once, and nothing of the kind is held: it has to be signed.
		if _, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{audience}}); err != nil {
			t.Errorf("round %d: FetchJWTSVID() = %v", round, err)
		}
		// The stream goes on, and the next SVID comes before the last one ends.
		next := receive(t, stream, "/web")
		if time.Now().After(notAfter(t, held)) {
			t.Errorf("round %d: the next SVID came after the end of the last", round)
		}
		held = next
		followed(t, this, other)
		this.Start()
	}
	// Changes arrive too. Renewals may come before them.
	ca.PutEntry(ca.Entry("e2", "/more", uidSelector))
	for {
		m, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if len(m.Svids) == 2 {
			break
		}
	}
	if attests, _, _ := ca.Counts(); attests != 1 {
		t.Errorf("attestations = %d; want 1", attests)
	}
}

func TestPolicyComesFromWhoeverServesIt(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/orders", uidSelector))
	second := ca.Replica()
	cfg := newReplicaConfig(t, ca, second)
	n := start(t, cfg)
	n.waitReady(t)
	this, other := followed(t, ca, second)
	key := newPolicyKey(t)
	ca.PublishPolicy(key.bundle(grants, 1), key.announcement(1))
	n.policyIs(t, 1)
	if this.Fetches() == 0 || other.Fetches() != 0 {
		t.Errorf("fetched %d times from the replica that is followed, %d times from the other; want only there",
			this.Fetches(), other.Fetches())
	}
	n.stop()
	// Its HTTPS port is out of order.
	for i := range cfg.CAHTTPSAddress {
		if cfg.CAAddress[i] == this.Address {
			cfg.CAHTTPSAddress[i] = "127.0.0.1:1"
		}
	}
	other.Refuse(status.Error(codes.Unavailable, "not this one"))
	// Nor is the bundle on disk any more; that there was one is not forgotten.
	if err := os.Remove(filepath.Join(cfg.DataDir, "policy_bundle.sealed")); err != nil {
		t.Fatal(err)
	}
	cfg.Logger = testLogger(t)
	before := len(this.Seen())
	n = start(t, cfg)
	eventually(t, "the agent is there again", func() bool { return len(this.Seen()) > before })
	if got := this.Seen()[before].GetPolicyGeneration(); got != 1 {
		t.Errorf("policy generation seen = %d after a restart; want 1", got)
	}
	ca.PublishPolicy(key.bundle(grants, 2), key.announcement(2))
	n.policyIs(t, 2)
	if other.Fetches() == 0 {
		t.Error("the other replica was not asked")
	}
}

// The replica that announces a bundle may not serve it yet.
func TestPolicyIsAskedForUntilTheAnnouncedOneComes(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/orders", uidSelector))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	key := newPolicyKey(t)
	ca.PublishPolicy(key.bundle(grants, 2), key.announcement(3))
	n.policyIs(t, 2)
	ca.ServePolicy(key.bundle(grants, 3), 3)
	n.policyIs(t, 3)
}

func TestWhatIsHeldOutlivesACAThatWasSetBack(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	second := ca.Replica()
	cfg := newReplicaConfig(t, ca, second)
	cfg.Logger = slog.New(slog.DiscardHandler)
	n := start(t, cfg)
	stream := n.x509Stream(t)
	receive(t, stream, "/web")
	const words = "the store was put back to an earlier state"
	for _, r := range []*fakeca.CA{ca, second} {
		r.Refuse(status.Error(codes.FailedPrecondition, words))
		r.Stop()
		r.Start()
	}
	eventually(t, "/ready says why", func() bool { return strings.Contains(n.health(t, "/ready"), words) })
	next := quiet(t, stream)
	receive(t, n.x509Stream(t), "/web")
	second.Refuse(nil)
	eventually(t, "/ready is content", func() bool { return !strings.Contains(n.health(t, "/ready"), words) })
	ca.PutEntry(ca.Entry("e2", "/more", uidSelector))
	if m, err := next(); err != nil || len(m.Svids) != 2 {
		t.Errorf("Recv() = %v, %v; want the change on the stream that was open", m, err)
	}
}

func TestReadyNamesAllAddresses(t *testing.T) {
	ca := fakeca.New(t, td)
	second := ca.Replica()
	n := start(t, newReplicaConfig(t, ca, second))
	n.waitReady(t)
	ca.Stop()
	second.Stop()
	eventually(t, "/ready names them", func() bool {
		text := n.health(t, "/ready")
		return strings.Contains(text, ca.Address) && strings.Contains(text, second.Address)
	})
	metrics := func() string { return n.health(t, "/metrics") }
	connected := `merlon_agent_ca_connected{address="` + second.Address + `"} `
	if got := metrics(); !strings.Contains(got, connected+"0") {
		t.Errorf("/metrics does not say that %s is not followed", second.Address)
	}
	second.Start()
	eventually(t, "/metrics names the replica that is followed", func() bool { return strings.Contains(metrics(), connected+"1") })
}
