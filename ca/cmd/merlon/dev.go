// merlon dev: a whole trust domain in one process, on loopback, without root
// and without a config file: a CA, an agent that has joined it, and one admin
// socket for both.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"merlon.dev/agent"
	"merlon.dev/agent/agentpb"
	"merlon.dev/ca"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/unixsock"
)

// devFlags are the settings of `merlon dev`.
type devFlags struct {
	dir, trustDomain, policy string
	logLevel                 string
}

func devCommand(o *options) *cobra.Command {
	var f devFlags
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Run a trust domain on this machine: CA, agent and policy in one process",
		Long: `Run a CA and an agent in one process, on loopback only, for development. Without
--dir everything lives in a temporary folder that is removed at the end. There
is no policy until you push one: every call is denied. The root is marked as a
development root. Everybody who can enter the folder is served.`,
		Example: `  merlon dev
  merlon dev --dir ./dev --policy ./policy -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return f.run(cmd.Context(), o, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.dir, "dir", "", "folder to keep everything in (default: a temporary one, removed at the end)")
	fl.StringVar(&f.trustDomain, "trust-domain", "dev.local", "name of the trust domain")
	fl.StringVar(&f.policy, "policy", "", "policy folder to push at the start")
	fl.StringVar(&f.logLevel, "log-level", "warn", "debug, info, warn or error")
	return cmd
}

func (f devFlags) run(ctx context.Context, o *options, stdout, stderr io.Writer) error {
	var level slog.Level
	if err := level.UnmarshalText([]byte(f.logLevel)); err != nil {
		return usageError{fmt.Sprintf("unknown log level %q", f.logLevel), "use debug, info, warn or error"}
	}
	if _, err := spiffeid.TrustDomainFromString(f.trustDomain); err != nil {
		return usageError{fmt.Sprintf("--trust-domain %q is none: %v", f.trustDomain, err), "for example --trust-domain dev.local"}
	}
	var policy []byte
	if f.policy != "" {
		var err error
		if policy, err = buildFolder(f.policy); err != nil {
			return err
		}
	}
	folder, err := openDevFolder(f.dir)
	if err != nil {
		return err
	}
	defer folder.close()
	d := &dev{folder: folder, trustDomain: f.trustDomain, stderr: stderr, debug: make(chan agentpb.DebugServer, 1)}
	d.log = slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level}))
	return d.run(ctx, policy, func(ready devJSON) error {
		if o.output == "json" { // on one line: there is no end of output to wait for
			return json.NewEncoder(stdout).Encode(ready)
		}
		fmt.Fprintf(stderr, "%s is ready. In another terminal:\n", ready.TrustDomain)
		_, err := fmt.Fprintf(stdout, "export SPIFFE_ENDPOINT_SOCKET=%s MERLON_ADMIN=%s\n", ready.WorkloadAPI, ready.Admin)
		return err
	})
}

// devFolder is where one `merlon dev` keeps everything.
type devFolder struct {
	path      string
	temporary bool
}

// longest is the longest socket path below a folder of `merlon dev`.
const longest = "agent-admin/admin.sock"

func openDevFolder(dir string) (devFolder, error) {
	if dir == "" {
		path, err := os.MkdirTemp("", "merlon-dev")
		return devFolder{path, true}, err
	}
	path, err := filepath.Abs(dir)
	if err != nil {
		return devFolder{}, err
	}
	if n := len(filepath.Join(path, longest)); n > unixsock.MaxPath {
		return devFolder{}, usageError{
			fmt.Sprintf("the folder %s is too long: with the names of sockets it has %d bytes, and a socket path at most %d", path, n, unixsock.MaxPath),
			"choose a shorter --dir",
		}
	}
	// The folder's mode keeps other users from the sockets and the keys.
	if err := os.MkdirAll(path, 0o700); err != nil {
		return devFolder{}, hintError{fmt.Errorf("make the folder: %w", err), "choose a folder that this user can write with --dir"}
	}
	return devFolder{path: path}, os.Chmod(path, 0o700) //nolint:gosec // a folder is entered by x
}

func (d devFolder) join(elem string) string { return filepath.Join(d.path, elem) }

func (d devFolder) close() {
	if d.temporary {
		_ = os.RemoveAll(d.path) // nobody left to tell
	}
}

// devJSON is what `merlon dev -o json` prints once it is ready.
type devJSON struct {
	TrustDomain string `json:"trust_domain"`
	WorkloadAPI string `json:"workload_api"`
	Admin       string `json:"admin"`
	HTTPS       string `json:"https"`
	CA          string `json:"ca"`
	PID         int    `json:"pid"`
}

// dev is a running trust domain.
type dev struct {
	folder      devFolder
	trustDomain string
	log         *slog.Logger
	stderr      io.Writer
	// debug receives the agent's debug service once there is an agent.
	debug chan agentpb.DebugServer
}

func (d *dev) adminSocket() string { return d.folder.join("admin/admin.sock") }

// run starts CA and agent, calls ready, and serves until ctx ends. The agent
// stops first, so that it never misses its CA.
func (d *dev) run(ctx context.Context, policy []byte, ready func(devJSON) error) error {
	authority, err := ca.New(ca.Config{
		TrustDomain: d.trustDomain, DataDir: d.folder.join("ca"), Development: true,
		Address: "127.0.0.1:0", HTTPSAddress: "127.0.0.1:0", HealthAddress: "127.0.0.1:0",
		AdminSocket: d.adminSocket(), Logger: d.log,
		AdminServices: []func(grpc.ServiceRegistrar){func(r grpc.ServiceRegistrar) {
			agentpb.RegisterDebugServer(r, &lateDebug{arrives: d.debug})
		}},
	})
	if err != nil {
		return err
	}
	// The CA outlives ctx, until the agent has stopped.
	caCtx, stopCA := context.WithCancel(context.WithoutCancel(ctx))
	caDone := make(chan error, 1)
	go func() { caDone <- authority.Run(caCtx) }()
	defer stopCA()
	select {
	case <-authority.Ready():
	case err := <-caDone:
		return err
	}
	err = d.runAgent(ctx, authority, policy, ready)
	stopCA()
	return errors.Join(err, <-caDone)
}

// runAgent joins an agent to the CA and serves until ctx ends.
func (d *dev) runAgent(ctx context.Context, authority *ca.Server, policy []byte, ready func(devJSON) error) error {
	admin := &options{admin: d.adminSocket()}
	var token *capb.CreateTokenResponse
	if err := admin.withCA(ctx, func(c capb.AdminClient) (err error) {
		token, err = c.CreateToken(ctx, &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_JOIN, AgentName: "dev"})
		return err
	}); err != nil {
		return err
	}
	node, err := agent.New(agent.Config{
		TrustDomain: d.trustDomain, CAAddress: agent.Addresses{authority.Address().String()}, CAHTTPSAddress: agent.Addresses{authority.HTTPSAddress().String()},
		DataDir: d.folder.join("agent"), PublicSocket: d.folder.join("public/api.sock"), AdminSocket: d.folder.join(longest),
		JoinToken: token.GetToken(), RootHash: token.GetRootHash(), HealthAddress: "127.0.0.1:0", Logger: d.log,
	})
	if err != nil {
		return err
	}
	d.debug <- node.Debug()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	done := make(chan error, 1)
	go func() { done <- node.Run(ctx) }()
	select {
	case <-node.Ready():
	case err := <-done:
		return err
	}
	err = d.announce(ctx, admin, authority, policy, ready)
	if err != nil {
		stop()
	}
	return errors.Join(err, <-done)
}

// announce pushes the policy, waits until the agent decides by it, and calls
// ready.
func (d *dev) announce(ctx context.Context, admin *options, authority *ca.Server, policy []byte, ready func(devJSON) error) error {
	out := devJSON{
		TrustDomain: d.trustDomain, WorkloadAPI: "unix://" + d.folder.join("public/api.sock"), Admin: d.adminSocket(),
		CA: d.folder.join("bundle.pem"), PID: os.Getpid(),
	}
	_, port, err := net.SplitHostPort(authority.HTTPSAddress().String())
	if err != nil {
		return err
	}
	out.HTTPS = "https://localhost:" + port
	err = admin.withCA(ctx, func(c capb.AdminClient) error {
		trust, err := c.GetTrustBundle(ctx, &capb.GetTrustBundleRequest{})
		if err != nil {
			return err
		}
		roots, err := rootsPEM(trust.GetTrustBundle())
		if err != nil {
			return err
		}
		if err := os.WriteFile(out.CA, roots, 0o600); err != nil {
			return err
		}
		return pushPolicy(ctx, c, policy, d.stderr)
	})
	if err != nil {
		return err
	}
	return ready(out)
}

// pushPolicy returns once the agent decides by the policy, if there is one.
func pushPolicy(ctx context.Context, c capb.AdminClient, policy []byte, stderr io.Writer) error {
	if policy == nil {
		return nil
	}
	pushed, err := c.PushPolicy(ctx, &capb.PushPolicyRequest{Name: defaultBundle, Bundle: policy})
	if err != nil {
		return err
	}
	return awaitPolicy(ctx, c, pushed.GetGeneration(), 10*time.Second, stderr)
}

// lateDebug is the agent's debug service on the CA's admin socket: the socket
// is there before the agent. A call waits for it.
type lateDebug struct {
	agentpb.UnimplementedDebugServer
	arrives chan agentpb.DebugServer
}

func (l *lateDebug) get(ctx context.Context) (agentpb.DebugServer, error) {
	select {
	case s := <-l.arrives:
		l.arrives <- s
		return s, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// ExplainIdentity asks the agent.
func (l *lateDebug) ExplainIdentity(ctx context.Context, req *agentpb.ExplainIdentityRequest) (*agentpb.ExplainIdentityResponse, error) {
	s, err := l.get(ctx)
	if err != nil {
		return nil, err
	}
	return s.ExplainIdentity(ctx, req)
}

// ExplainDecision asks the agent.
func (l *lateDebug) ExplainDecision(ctx context.Context, req *agentpb.ExplainDecisionRequest) (*agentpb.ExplainDecisionResponse, error) {
	s, err := l.get(ctx)
	if err != nil {
		return nil, err
	}
	return s.ExplainDecision(ctx, req)
}

// Status asks the agent.
func (l *lateDebug) Status(ctx context.Context, req *agentpb.StatusRequest) (*agentpb.StatusResponse, error) {
	s, err := l.get(ctx)
	if err != nil {
		return nil, err
	}
	return s.Status(ctx, req)
}
