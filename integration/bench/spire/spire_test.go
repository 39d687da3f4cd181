// SPIRE as a benchmark finds it: the binaries that the environment names, with SQLite,
// join tokens, keys on disk or in memory, and every other setting as it is without one.
// Only its limits of calls a second are off: they are not what is compared.

package spire_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"merlon.dev/integration/stage"
)

const serverConfig = `server {
  bind_address = "127.0.0.1"
  bind_port = "PORT"
  socket_path = "DIR/server.sock"
  trust_domain = "shop.test"
  data_dir = "DIR"
  log_level = "WARN"
  ratelimit {
    attestation = false
    signing = false
  }
}
plugins {
  DataStore "sql" {
    plugin_data {
      database_type = "sqlite3"
      connection_string = "DIR/store.sqlite3"
    }
  }
  NodeAttestor "join_token" {
    plugin_data {}
  }
  KeyManager "disk" {
    plugin_data {
      keys_path = "DIR/keys.json"
    }
  }
}
`

const agentConfig = `agent {
  data_dir = "DIR/agent"
  log_level = "WARN"
  server_address = "127.0.0.1"
  server_port = "PORT"
  socket_path = "DIR/agent.sock"
  trust_domain = "shop.test"
  insecure_bootstrap = true
  join_token = "TOKEN"
}
plugins {
  NodeAttestor "join_token" {
    plugin_data {}
  }
  KeyManager "memory" {
    plugin_data {}
  }
  WorkloadAttestor "unix" {
    plugin_data {}
  }
}
`

// server is SPIRE's, by its API.
type server struct {
	address string
	agents  agentv1.AgentClient
	entries entryv1.EntryClient
}

// programs are the binaries of SPIRE.
type programs struct{ server, agent string }

func programsOf(b *testing.B) (p programs) {
	b.Helper()
	for variable, program := range map[string]*string{"MERLON_BENCH_SPIRE_SERVER": &p.server, "MERLON_BENCH_SPIRE_AGENT": &p.agent} {
		if *program = os.Getenv(variable); *program == "" {
			b.Skipf("SPIRE is not measured: set %s to its binary (integration/bench/README.md says how one was built)", variable)
		}
	}
	return p
}

func startSPIRE(b *testing.B, programs programs) *side {
	b.Helper()
	dir, port := stage.Dir(b), fmt.Sprint(stage.FreePort(b))
	fill := func(text, token string) string {
		return strings.NewReplacer("DIR", dir, "PORT", port, "TOKEN", token).Replace(text)
	}
	serverPID := start(b, programs.server, filepath.Join(dir, "server.conf"), fill(serverConfig, ""))
	api := local(b, filepath.Join(dir, "server.sock"))
	s := &server{address: "127.0.0.1:" + port, agents: agentv1.NewAgentClient(api), entries: entryv1.NewEntryClient(api)}
	var token string
	stage.Eventually(b, "SPIRE's server answers", func() (err error) {
		token, err = s.token(b.Context())
		return err
	})
	agentPID := start(b, programs.agent, filepath.Join(dir, "agent.conf"), fill(agentConfig, token))
	stage.Eventually(b, "SPIRE's agent has joined", func() error {
		_, err := os.Stat(filepath.Join(dir, "agent.sock"))
		return err
	})
	return &side{
		name: "spire", server: serverPID, agent: agentPID, workloadAPI: "unix://" + filepath.Join(dir, "agent.sock"), node: nodeOf(token),
		create: s.create, remove: s.remove, join: s.join,
	}
}

func nodeOf(token string) string {
	return "spiffe://" + trustDomain + "/spire/agent/join_token/" + token
}

// start runs one of them until the benchmark ends.
func start(b *testing.B, program, path, config string) (pid int) {
	b.Helper()
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		b.Fatal(err)
	}
	var log stage.Buffer
	cmd := exec.Command(program, "run", "-config", path)
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if b.Failed() {
			b.Logf("%s said:\n%s", program, log.String())
		}
	})
	return cmd.Process.Pid
}

func (s *server) token(ctx context.Context) (string, error) {
	resp, err := s.agents.CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{Ttl: 600})
	return resp.GetValue(), err
}

func (s *server) create(ctx context.Context, node, path string, uid int) (string, error) {
	resp, err := s.entries.BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{{
		SpiffeId:  &types.SPIFFEID{TrustDomain: trustDomain, Path: path},
		ParentId:  &types.SPIFFEID{TrustDomain: trustDomain, Path: strings.TrimPrefix(node, "spiffe://"+trustDomain)},
		Selectors: []*types.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", uid)}},
	}}})
	if err != nil {
		return "", err
	}
	for _, r := range resp.GetResults() {
		if err := refused(r.GetStatus()); err != nil {
			return "", err
		}
	}
	return resp.GetResults()[0].GetEntry().GetId(), nil
}

func (s *server) remove(ctx context.Context, entryID string) error {
	resp, err := s.entries.BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{Ids: []string{entryID}})
	if err != nil {
		return err
	}
	return refused(resp.GetResults()[0].GetStatus())
}

func refused(s *types.Status) error {
	if s.GetCode() == 0 {
		return nil
	}
	return fmt.Errorf("SPIRE says %d: %s", s.GetCode(), s.GetMessage())
}

func (s *server) join(b *testing.B) (string, signer) {
	b.Helper()
	token, err := s.token(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	key, csr := newKey(b)
	stream, err := agentv1.NewAgentClient(remote(b, s.address, nil, nil)).AttestAgent(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	if err := stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data:   &types.AttestationData{Type: "join_token", Payload: []byte(token)},
		Params: &agentv1.AgentX509SVIDParams{Csr: csr},
	}}}); err != nil {
		b.Fatal(err)
	}
	resp, err := stream.Recv()
	if err != nil {
		b.Fatal(err)
	}
	svids := svidv1.NewSVIDClient(remote(b, s.address, resp.GetResult().GetSvid().GetCertChain(), key))
	return nodeOf(token), func(ctx context.Context, orders []order) error {
		req := &svidv1.BatchNewX509SVIDRequest{}
		for _, o := range orders {
			req.Params = append(req.Params, &svidv1.NewX509SVIDParams{EntryId: o.entryID, Csr: o.csr})
		}
		resp, err := svids.BatchNewX509SVID(ctx, req)
		var all []error
		for _, r := range resp.GetResults() {
			all = append(all, refused(r.GetStatus()))
		}
		return errors.Join(append(all, err)...)
	}
}
