// merlon migrate spire: what SPIRE's registration entries and configuration are
// here. It prints that, or makes it so over the admin API.

package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/config"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/spire"
	"merlon.dev/sdk/settings"
)

func migrateCommand(o *options) *cobra.Command {
	return noun("migrate", "Come from another implementation of SPIFFE", migrateSPIRE(o))
}

// spireFiles are SPIRE's, as named on the command line.
type spireFiles struct {
	entries, server, agent string
	parents                []string
	apply                  bool
}

// moved is all of it, translated; what was not named is empty.
type moved struct {
	entries           []spire.Entry
	caYAML, agentYAML string
	follow            []spire.Follow
	remarks           []spire.Remark
}

func migrateSPIRE(o *options) *cobra.Command {
	var f spireFiles
	cmd := &cobra.Command{
		Use:   "spire",
		Short: "Print or apply what SPIRE's registration entries and configuration are here",
		Long: `Read what spire-server entry show -output json prints, server.conf and agent.conf,
and print what makes the same here: commands, ca.yaml and agent.yaml. With --apply
have the CA make the entries, and follow the trust bundles that server.conf names;
what is there already is not made twice, so it can be done again.

Whatever has no equivalent is named on stderr, with its line, and the exit code is 1
then; notes about what is not quite the same leave it 0. An entry of which one selector
has no equivalent is left out: without that selector more processes would get its
SPIFFE ID. ca/README.md, Coming from SPIRE, has the table.

Agents of SPIRE whose names do not say which node they are have to be named:
--parent spiffe://shop.test/spire/agent/x509pop/ab12…=spiffe://shop.test/agent/db1.`,
		Example: `  spire-server entry show -output json > entries.json
  merlon migrate spire --entries entries.json
  merlon migrate spire --entries entries.json --apply
  merlon migrate spire --server server.conf > ca.yaml
  merlon migrate spire --agent agent.conf > agent.yaml`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			m, err := f.read(cmd.InOrStdin(), time.Now())
			if err != nil {
				return err
			}
			if f.apply {
				return o.withCA(cmd.Context(), func(ca capb.AdminClient) error { return m.apply(cmd, o, ca) })
			}
			return m.print(cmd, o)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.entries, "entries", "", "`file` with what spire-server entry show -output json prints (- for stdin)")
	fl.StringVar(&f.server, "server", "", "server.conf of SPIRE, in HCL or JSON: a `file`")
	fl.StringVar(&f.agent, "agent", "", "agent.conf of SPIRE, in HCL or JSON: a `file`")
	fl.StringArrayVar(&f.parents, "parent", nil, "what an agent of SPIRE is here: `SPIRE_ID=MERLON_ID` (repeatable)")
	fl.BoolVar(&f.apply, "apply", false, "have the CA make it, instead of printing commands")
	return cmd
}

// read translates the files.
func (f *spireFiles) read(stdin io.Reader, now time.Time) (*moved, error) {
	switch {
	case f.entries+f.server+f.agent == "":
		return nil, usageError{"--entries, --server and --agent are missing: there is nothing to read", "spire-server entry show -output json > entries.json; merlon migrate spire --entries entries.json"}
	case f.apply && f.agent != "":
		return nil, usageError{"--agent is a file for the nodes, which --apply cannot bring there", "merlon migrate spire --agent agent.conf > agent.yaml, without --apply"}
	}
	m := new(moved)
	known, err := f.knownParents()
	if err != nil {
		return nil, err
	}
	for _, part := range []struct {
		file string
		read func(data []byte) ([]spire.Remark, error)
	}{
		{f.server, func(data []byte) (r []spire.Remark, err error) {
			m.caYAML, m.follow, r, err = spire.Server(f.server, data)
			return append(r, incomplete(m.caYAML, err)...), err
		}},
		{f.agent, func(data []byte) (r []spire.Remark, err error) {
			m.agentYAML, r, err = spire.Agent(f.agent, data)
			return r, err
		}},
		{f.entries, func(data []byte) (r []spire.Remark, err error) {
			m.entries, r, err = spire.Entries(f.entries, data, known, now)
			return r, err
		}},
	} {
		if part.file == "" {
			continue
		}
		data, err := readForeign(stdin, part.file)
		if err != nil {
			return nil, err
		}
		r, err := part.read(data)
		if err != nil {
			return nil, hintError{err, "--entries takes what spire-server entry show -output json prints (SPIRE 1.4 or later), --server and --agent its configuration files"}
		}
		m.remarks = append(m.remarks, r...)
	}
	return m, nil
}

// incomplete says what merlon-ca would refuse of the ca.yaml that was made.
func incomplete(yaml string, err error) []spire.Remark {
	if err != nil {
		return nil
	}
	cfg, err := settings.Parse[config.Config]("ca.yaml", []byte(yaml))
	if err == nil {
		err = cfg.Validate()
	}
	if err == nil {
		return nil
	}
	return []spire.Remark{{File: "ca.yaml", Of: "merlon-ca refuses it as it is", Text: err.Error(), Missing: true}}
}

// readForeign reads a file, or stdin for -, up to what is taken.
func readForeign(stdin io.Reader, file string) ([]byte, error) {
	if file != "-" {
		opened, err := os.Open(file)
		if err != nil {
			return nil, notThere(err, "name a file of SPIRE's, or - for stdin")
		}
		defer opened.Close()
		stdin = opened
	}
	data, err := io.ReadAll(io.LimitReader(stdin, spire.MaxBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", file, err)
	}
	return data, nil
}

// knownParents is --parent, by SPIRE's ID.
func (f *spireFiles) knownParents() (map[string]string, error) {
	known := make(map[string]string)
	for _, text := range f.parents {
		old, ours, ok := strings.Cut(text, "=")
		if !ok {
			return nil, usageError{fmt.Sprintf("--parent %q has no =", text), "for example --parent spiffe://shop.test/spire/agent/x509pop/ab12=spiffe://shop.test/agent/db1"}
		}
		for _, id := range []string{old, ours} {
			if _, err := spiffeid.FromString(id); err != nil {
				return nil, usageError{fmt.Sprintf("--parent: %q is not a SPIFFE ID: %v", id, err), "merlon agent list shows those of agents"}
			}
		}
		if _, twice := known[old]; twice {
			return nil, usageError{fmt.Sprintf("--parent says twice what %s is here", old), "give it once"}
		}
		known[old] = ours
	}
	return known, nil
}

// plannedJSON is an entry of SPIRE's as scripts see it here.
type plannedJSON struct {
	SPIREID string `json:"spire_entry_id"`
	// State is planned; or, with --apply, created, exists, differs or refused.
	State   string    `json:"state"`
	Reason  string    `json:"reason,omitempty"`
	Command string    `json:"command"`
	Entry   entryJSON `json:"entry"`
}

// followJSON is a trust bundle of another trust domain as scripts see it.
type followJSON struct {
	spire.Follow
	State   string `json:"state"` // as of entries
	Reason  string `json:"reason,omitempty"`
	Command string `json:"command"`
}

// movedJSON is all of it.
type movedJSON struct {
	Entries   []plannedJSON  `json:"entries"`
	Follow    []followJSON   `json:"follow"`
	CAYAML    string         `json:"ca_yaml,omitempty"`
	AgentYAML string         `json:"agent_yaml,omitempty"`
	Remarks   []spire.Remark `json:"remarks"`
}

// followLine is the command that follows it.
func followLine(f spire.Follow) string {
	args := []string{f.TrustDomain, "--profile", f.Profile, "--url", f.URL}
	if f.Profile == "https_spiffe" {
		args = append(args, "--endpoint-id", f.EndpointID, "--bundle", "FILE")
	}
	return shellLine("merlon federation follow", args)
}

// print writes commands to stdout and remarks to stderr.
func (m *moved) print(cmd *cobra.Command, o *options) error {
	out := make([]plannedJSON, 0, len(m.entries))
	for i := range m.entries {
		out = append(out, plannedJSON{
			SPIREID: m.entries[i].Was, State: "planned", Command: createLine(&m.entries[i].Entry), Entry: newEntryJSON(protoOf(&m.entries[i].Entry)),
		})
	}
	follow := make([]followJSON, 0, len(m.follow))
	for _, f := range m.follow {
		follow = append(follow, followJSON{f, "planned", "", followLine(f)})
	}
	var err error
	if o.output == "json" {
		err = printJSON(cmd.OutOrStdout(), movedJSON{out, follow, m.caYAML, m.agentYAML, m.allRemarks()})
	} else {
		_, err = io.WriteString(cmd.OutOrStdout(), m.text(out, follow))
	}
	if err != nil {
		return err
	}
	return m.conclude(cmd.ErrOrStderr(), o, fmt.Sprintf("%s to make, %s to follow", count(len(out), "entry", "entries"), count(len(follow), "trust bundle", "trust bundles")))
}

// text is files and commands. Beside YAML commands are comments.
func (m *moved) text(entries []plannedJSON, follow []followJSON) string {
	var b strings.Builder
	if m.caYAML != "" {
		b.WriteString("# ca.yaml\n" + m.caYAML)
	}
	for _, f := range follow {
		b.WriteString("# " + f.Command + "\n")
	}
	if m.agentYAML != "" {
		b.WriteString("# agent.yaml\n" + m.agentYAML)
	}
	for _, p := range entries {
		b.WriteString(p.Command + "\n")
	}
	return b.String()
}

func (m *moved) allRemarks() []spire.Remark {
	if m.remarks == nil {
		return []spire.Remark{}
	}
	return m.remarks
}

// conclude says what is nothing here, and ends with 1 if there is any.
func (m *moved) conclude(stderr io.Writer, o *options, done string) error {
	missing := 0
	for _, r := range m.remarks {
		if r.Missing {
			missing++
		}
		if o.output != "json" {
			fmt.Fprintln(stderr, r)
		}
	}
	fmt.Fprintf(stderr, "merlon: %s; %s without equivalent, %s\n", done, count(missing, "thing", "things"), count(len(m.remarks)-missing, "note", "notes"))
	if missing > 0 {
		return silentError{exitFailure}
	}
	return nil
}

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// protoOf is an entry as the admin API has it.
func protoOf(e *entry.Entry) *capb.Entry {
	p := &capb.Entry{
		SpiffeId: e.SPIFFEID.String(), ParentId: e.ParentID.String(), DnsNames: e.DNSNames, Hint: e.Hint, FederatesWith: e.FederatesWith,
		X509SvidTtlSeconds: int64(e.X509SVIDTTL / time.Second), JwtSvidTtlSeconds: int64(e.JWTSVIDTTL / time.Second),
	}
	for _, s := range e.Selectors {
		p.Selectors = append(p.Selectors, &capb.Selector{Type: s.Type, Value: s.Value})
	}
	if e.Role.Name != "" {
		p.Role, p.Admin = capb.Role_ROLE_OPERATOR, true // for a CA that knows no roles
	}
	if !e.ExpiresAt.IsZero() {
		p.ExpiresAt = timestamppb.New(e.ExpiresAt)
	}
	return p
}

// createLine is the command that makes e.
func createLine(e *entry.Entry) string {
	args := []string{"--spiffe-id", e.SPIFFEID.String()}
	if !e.Alias() {
		args = append(args, "--parent", e.ParentID.String())
	}
	for _, s := range e.Selectors {
		args = append(args, "--selector", s.String())
	}
	if e.X509SVIDTTL != 0 {
		args = append(args, "--ttl", e.X509SVIDTTL.String())
	}
	if e.JWTSVIDTTL != 0 {
		args = append(args, "--jwt-ttl", e.JWTSVIDTTL.String())
	}
	for _, name := range e.DNSNames {
		args = append(args, "--dns", name)
	}
	if e.Hint != "" {
		args = append(args, "--hint", e.Hint)
	}
	for _, td := range e.FederatesWith {
		args = append(args, "--federates-with", td)
	}
	if e.Role.Name != "" {
		args = append(args, "--role", string(e.Role.Name))
	}
	if !e.ExpiresAt.IsZero() {
		args = append(args, "--expires", e.ExpiresAt.UTC().Format(time.RFC3339))
	}
	return shellLine("merlon entry create", args)
}

// shellLine quotes what a shell would not take as it is.
func shellLine(command string, args []string) string {
	for _, a := range args {
		command += " " + spire.Word(a)
	}
	return command
}
