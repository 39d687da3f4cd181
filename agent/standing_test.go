// An agent that was evicted or banned, over the real CA: it says why, also after
// a restart, and comes back by itself once it may.

package agent_test

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"

	"merlon.dev/agent"
	"merlon.dev/agent/agentpb"
	"merlon.dev/ca/capb"
)

// logged keeps a log for the test to read.
type logged struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *logged) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *logged) has(parts ...string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.text.String()) {
		all := true
		for _, part := range parts {
			all = all && strings.Contains(line, part)
		}
		if all {
			return true
		}
	}
	return false
}

func TestBannedAgentSaysWhyAndComesBackOnceItMay(t *testing.T) {
	srv, admin := startRealCA(t)
	log := new(logged)
	n := startRealNode(t, srv, admin, slog.New(slog.NewTextHandler(log, nil)))
	createEntry(t, admin, "/web")
	tokenFile := filepath.Join(filepath.Dir(n.cfg.DataDir), "token")
	token := func() string {
		t.Helper()
		made, err := admin.CreateToken(t.Context(), &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_JOIN, AgentName: "n1"})
		if err != nil {
			t.Fatal(err)
		}
		return made.GetToken()
	}
	later := token() // made before the ban: it is not used up while the ban holds
	if err := os.WriteFile(tokenFile, []byte(later), 0o600); err != nil {
		t.Fatal(err)
	}
	n.firstSVID(t, "/web")
	cc, ctx := conn(t, n.socket)
	watch, err := agentpb.NewLocalClient(cc).Watch(ctx, &agentpb.WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := admin.BanAgent(t.Context(), &capb.BanAgentRequest{Agent: "n1"}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the log says why", func() bool { return log.has("level=ERROR", "no connection to the CA", "the agent is banned") })
	// Its workloads hear that what each other of them has is revoked.
	for banned := false; !banned; {
		m, err := watch.Recv()
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range m.GetRevocations() {
			banned = banned || r.GetAgentId() == "spiffe://"+td+"/agent/n1" && r.GetAgentHandle() != 0
		}
	}

	n.stop()
	log = new(logged)
	cfg := n.cfg
	cfg.Logger, cfg.HealthAddress = slog.New(slog.NewTextHandler(log, nil)), "127.0.0.1:0"
	cfg.JoinToken, cfg.JoinTokenFile = "", tokenFile
	n = start(t, cfg)
	eventually(t, "the log of a restarted agent says why", func() bool { return log.has("level=ERROR", "no connection to the CA", "the agent is banned") })
	eventually(t, "/ready says why", func() bool {
		return strings.Contains(n.health(t, "/ready"), "the agent is banned")
	})

	// Lifted, it is evicted, and its token is good.
	if _, err := admin.UnbanAgent(t.Context(), &capb.UnbanAgentRequest{Agent: "n1"}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it attests anew and is ready", func() bool {
		return strings.Contains(n.health(t, "/ready"), `"ready":true`)
	})
	n.firstSVID(t, "/web")
}

// firstSVID is a stream that has brought path, whose entry may still be on its way.
func (n *node) firstSVID(t testing.TB, path string) (stream grpc.ServerStreamingClient[workload.X509SVIDResponse]) {
	t.Helper()
	eventually(t, path+" is there", func() bool {
		stream = n.x509Stream(t)
		m, err := stream.Recv()
		return err == nil && len(m.GetSvids()) == 1 && m.GetSvids()[0].GetSpiffeId() == "spiffe://"+td+path
	})
	return stream
}

func TestEvictedAgentAttestsAnewByItself(t *testing.T) {
	srv, admin := startRealCA(t)
	log := new(logged)
	token := func() string {
		t.Helper()
		made, err := admin.CreateToken(t.Context(), &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_JOIN, AgentName: "n1"})
		if err != nil {
			t.Fatal(err)
		}
		return made.GetToken()
	}
	n := startRealNode(t, srv, admin, slog.New(slog.NewTextHandler(log, nil)), func(cfg *agent.Config) {
		cfg.JoinToken, cfg.JoinTokenFile = "", filepath.Join(filepath.Dir(cfg.DataDir), "token")
		cfg.HealthAddress = "127.0.0.1:0"
		if err := os.MkdirAll(filepath.Dir(cfg.DataDir), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(cfg.JoinTokenFile, []byte(token()), 0o600); err != nil {
			t.Fatal(err)
		}
	})
	createEntry(t, admin, "/web")
	stream := n.firstSVID(t, "/web")
	if _, err := admin.EvictAgent(t.Context(), &capb.EvictAgentRequest{Agent: "n1"}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "/ready says what to do", func() bool {
		return strings.Contains(n.health(t, "/ready"), "has to attest anew")
	})
	eventually(t, "the log says that the token is used up", func() bool {
		return log.has("no connection to the CA", "was evicted", "refuses the join token", "merlon token create")
	})
	if err := os.WriteFile(n.cfg.JoinTokenFile, []byte(token()), 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it attests anew and is ready", func() bool {
		return strings.Contains(n.health(t, "/ready"), `"ready":true`)
	})
	// Its workload kept what it had, and the stream goes on.
	createEntry(t, admin, "/web2")
	if m, err := stream.Recv(); err != nil || len(m.GetSvids()) != 2 {
		t.Errorf("after the node attested anew: %v, %v; want two SVIDs on the stream of before", m, err)
	}
}
