// A whole trust domain on one machine: `merlon dev`, or a CA and an agent as
// processes of their own.

package stage

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Domain is a running trust domain.
type Domain struct {
	TB          testing.TB
	TrustDomain string `json:"trust_domain"`
	WorkloadAPI string `json:"workload_api"` // unix:///…
	Admin       string `json:"admin"`        // admin socket of the CA
	AgentAdmin  string `json:"-"`            // admin socket of the agent
	HTTPS       string `json:"https"`
	CABundle    string `json:"ca"`
	GRPC        string `json:"-"`
	Health      string `json:"-"` // host:port of StartCA's CA
	AgentHealth string `json:"-"` // host:port of StartAgent's agent

	// CA and Agent are the processes; one and the same for Dev.
	CA, Agent *Process
	dir       string
	agentID   string
	binary    string   // of the CA; empty: merlon-ca
	env       []string // of the CA
	settings  []string // further lines of its configuration
}

// Dev starts `merlon dev`.
func Dev(tb testing.TB, args ...string) *Domain {
	tb.Helper()
	d := &Domain{TB: tb, dir: Dir(tb)}
	d.CA = Start(tb, "merlon", nil, append([]string{"dev", "--dir", filepath.Join(d.dir, "dev"), "-o", "json"}, args...)...)
	d.Agent = d.CA
	Eventually(tb, "merlon dev is ready", func() error {
		if strings.HasSuffix(d.CA.Stdout(), "}\n") {
			return nil
		}
		return errors.New("silent")
	})
	Decode(tb, d.CA.Stdout(), d)
	d.AgentAdmin = d.Admin
	return d
}

// Separate starts merlon-ca, with further lines of its configuration, and, with a
// join token, merlon-agent.
func Separate(tb testing.TB, settings ...string) *Domain {
	tb.Helper()
	return SeparateAs(tb, "merlon-ca", nil, settings...)
}

// SeparateAs is Separate with another binary of the CA, which Build made, its
// environment and further lines of its configuration.
func SeparateAs(tb testing.TB, binary string, env []string, settings ...string) *Domain {
	tb.Helper()
	d := CAAlone(tb, binary, env, settings...)
	d.join()
	return d
}

// SeparateOf is Separate for a trust domain of that name.
func SeparateOf(tb testing.TB, trustDomain string, settings ...string) *Domain {
	tb.Helper()
	d := newDomain(tb, trustDomain, "merlon-ca", nil, settings)
	d.StartCA()
	d.join()
	return d
}

// join starts the agent with a join token.
func (d *Domain) join() {
	d.TB.Helper()
	token := d.Token()
	d.StartAgent(token.Token, token.RootHash)
	d.agentID = token.AgentID
	d.AgentServes()
}

// AgentServes waits for the agent's public socket: who fetches by a single try
// would otherwise find none.
func (d *Domain) AgentServes() {
	d.TB.Helper()
	Eventually(d.TB, "the agent serves", func() error {
		conn, err := net.Dial("unix", strings.TrimPrefix(d.WorkloadAPI, "unix://"))
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

// CAAlone is SeparateAs without an agent.
func CAAlone(tb testing.TB, binary string, env []string, settings ...string) *Domain {
	tb.Helper()
	d := newDomain(tb, "shop.test", binary, env, settings)
	d.StartCA()
	return d
}

func newDomain(tb testing.TB, trustDomain, binary string, env, settings []string) *Domain {
	tb.Helper()
	dir := Dir(tb)
	return &Domain{TB: tb, dir: dir, binary: binary, env: env, settings: settings, TrustDomain: trustDomain, Admin: filepath.Join(dir, "ca", "admin.sock")}
}

// StartCA writes a config file and starts merlon-ca on it.
func (d *Domain) StartCA() {
	d.TB.Helper()
	d.GRPC = fmt.Sprintf("127.0.0.1:%d", FreePort(d.TB))
	https := FreePort(d.TB)
	d.HTTPS = fmt.Sprintf("https://localhost:%d", https)
	d.Health = fmt.Sprintf("127.0.0.1:%d", FreePort(d.TB))
	config := filepath.Join(d.dir, "ca.yaml")
	d.write(config, fmt.Sprintf(`trust_domain: %s
data_dir: %s
address: %s
https_address: 127.0.0.1:%d
health_address: %s
admin_socket: %s
`, d.TrustDomain, d.CAData(), d.GRPC, https, d.Health, d.Admin)+strings.Join(append(d.settings, ""), "\n"))
	if d.binary == "" {
		d.binary = "merlon-ca"
	}
	d.CA = Start(d.TB, d.binary, d.env, "-config", config)
	Eventually(d.TB, "the CA answers", func() error {
		_, _, err := d.Try("agent", "list")
		return err
	})
}

// StartAgent starts merlon-agent with a join token.
func (d *Domain) StartAgent(token, rootHash string) {
	d.TB.Helper()
	d.StartAgentBy(rootHash, "join_token: "+token)
}

// StartAgentBy starts merlon-agent, with the lines of its configuration by which
// the node proves itself.
func (d *Domain) StartAgentBy(rootHash string, evidence ...string) {
	d.TB.Helper()
	d.Agent = Start(d.TB, "merlon-agent", nil, "-config", d.AgentConfig(rootHash, evidence...))
}

// AgentConfig writes the config file of such an agent.
func (d *Domain) AgentConfig(rootHash string, evidence ...string) (path string) {
	d.TB.Helper()
	config := filepath.Join(d.dir, "agent.yaml")
	public := filepath.Join(d.dir, "agent", "public", "api.sock")
	d.WorkloadAPI = "unix://" + public
	d.AgentAdmin = filepath.Join(d.dir, "agent", "admin", "admin.sock")
	d.AgentHealth = fmt.Sprintf("127.0.0.1:%d", FreePort(d.TB))
	d.write(config, fmt.Sprintf(`trust_domain: %s
ca_address: %s
ca_https_address: %s
data_dir: %s
public_socket: %s
admin_socket: %s
health_address: %s
root_hash: %s
`, d.TrustDomain, d.GRPC, strings.TrimPrefix(d.HTTPS, "https://"), filepath.Join(d.dir, "agent-data"),
		public, d.AgentAdmin, d.AgentHealth, rootHash)+strings.Join(append(evidence, ""), "\n"))
	return config
}

func (d *Domain) write(path, text string) {
	d.TB.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		d.TB.Fatal(err)
	}
}

// Try runs the CLI against the CA.
func (d *Domain) Try(args ...string) (stdout, stderr string, err error) {
	return Run(d.TB.Context(), d.TB, []string{"MERLON_ADMIN=" + d.Admin}, "merlon", args...)
}

// Merlon runs the CLI against the CA and fails the test if that fails.
func (d *Domain) Merlon(args ...string) string {
	d.TB.Helper()
	stdout, stderr, err := d.Try(args...)
	if err != nil {
		d.TB.Fatalf("merlon %s: %v\n%s", strings.Join(args, " "), err, stderr)
	}
	return stdout
}

// Explain runs the CLI against the agent.
func (d *Domain) Explain(args ...string) string {
	d.TB.Helper()
	stdout, stderr, err := Run(d.TB.Context(), d.TB, []string{"MERLON_ADMIN=" + d.AgentAdmin}, "merlon", append([]string{"explain"}, args...)...)
	if err != nil {
		d.TB.Fatalf("merlon explain %s: %v\n%s", strings.Join(args, " "), err, stderr)
	}
	return stdout
}

// JoinToken is what `merlon token create` prints.
type JoinToken struct {
	Token    string `json:"token"`
	RootHash string `json:"root_hash"`
	AgentID  string `json:"agent_id"`
}

// Token makes a join token.
func (d *Domain) Token(args ...string) JoinToken {
	d.TB.Helper()
	var token JoinToken
	Decode(d.TB, d.Merlon(append([]string{"token", "create", "-o", "json"}, args...)...), &token)
	return token
}

// Entry registers path (under the trust domain) for this very process, and
// whatever else has its executable, and returns the entry ID.
func (d *Domain) Entry(path string, args ...string) string {
	d.TB.Helper()
	exe, err := os.Executable()
	if err != nil {
		d.TB.Fatal(err)
	}
	args = append([]string{"entry", "create", "-o", "json", "--spiffe-id", d.ID(path), "--selector", "unix:path:" + exe}, args...)
	if d.agentID != "" {
		args = append(args, "--parent", d.agentID)
	}
	var entry struct {
		EntryID string `json:"entry_id"`
	}
	Decode(d.TB, d.Merlon(args...), &entry)
	return entry.EntryID
}

// ID returns the SPIFFE ID of path in the trust domain.
func (d *Domain) ID(path string) string { return "spiffe://" + d.TrustDomain + path }

// AgentID is the SPIFFE ID of the agent of Separate.
func (d *Domain) AgentID() string { return d.agentID }

// CAData is the data_dir of StartCA's CA.
func (d *Domain) CAData() string { return filepath.Join(d.dir, "ca-data") }

// AgentData is the data_dir of StartAgent's agent.
func (d *Domain) AgentData() string { return filepath.Join(d.dir, "agent-data") }

// SetDir makes d start its further processes in dir.
func (d *Domain) SetDir(dir string) { d.dir = dir }

// Trusts hands from's trust bundle over to d's operator, who takes it, in a format of
// `merlon trust show`.
func (d *Domain) Trusts(from *Domain, format string) {
	d.TB.Helper()
	file := filepath.Join(d.TB.TempDir(), "bundle")
	if err := os.WriteFile(file, []byte(from.Merlon("trust", "show", "-o", format)), 0o600); err != nil {
		d.TB.Fatal(err)
	}
	d.Merlon("federation", "set", from.TrustDomain, file)
}
