// merlon entry: registration entries.

package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/ca/capb"
)

func entryCommand(o *options) *cobra.Command {
	return noun("entry", "Registration entries: which process gets which SPIFFE ID",
		entryCreate(o), entryList(o), entryShow(o), entryDelete(o))
}

// entryJSON is an entry as scripts see it.
type entryJSON struct {
	EntryID            string     `json:"entry_id"`
	SPIFFEID           string     `json:"spiffe_id"`
	ParentID           string     `json:"parent_id"`
	Selectors          []string   `json:"selectors"`
	X509SVIDTTLSeconds int64      `json:"x509_svid_ttl_seconds,omitempty"`
	JWTSVIDTTLSeconds  int64      `json:"jwt_svid_ttl_seconds,omitempty"`
	DNSNames           []string   `json:"dns_names,omitempty"`
	CommonName         string     `json:"common_name,omitempty"`
	Hint               string     `json:"hint,omitempty"`
	KeyDelivery        string     `json:"key_delivery"`
	FederatesWith      []string   `json:"federates_with,omitempty"`
	FederationWaiting  []string   `json:"federation_waiting,omitempty"`
	Admin              bool       `json:"admin,omitempty"`
	Role               string     `json:"role,omitempty"`
	RolePrefix         string     `json:"role_prefix,omitempty"`
	ExpiresAt          *time.Time `json:"expires_at,omitempty"`
	CreatedAt          *time.Time `json:"created_at,omitempty"`
	Revision           uint64     `json:"revision"`
}

func newEntryJSON(e *capb.Entry) entryJSON {
	return entryJSON{
		EntryID: e.GetEntryId(), SPIFFEID: e.GetSpiffeId(), ParentID: e.GetParentId(), Selectors: selectorStrings(e.GetSelectors()),
		X509SVIDTTLSeconds: e.GetX509SvidTtlSeconds(), JWTSVIDTTLSeconds: e.GetJwtSvidTtlSeconds(),
		DNSNames: e.GetDnsNames(), CommonName: e.GetCommonName(), Hint: e.GetHint(), KeyDelivery: deliveryText(e.GetKeyDelivery()), Admin: e.GetAdmin(),
		FederatesWith: e.GetFederatesWith(), FederationWaiting: e.GetFederationWaiting(),
		Role: roleText(e.GetRole()), RolePrefix: e.GetRolePrefix(),
		ExpiresAt: timeOf(e.GetExpiresAt()), CreatedAt: timeOf(e.GetCreatedAt()), Revision: e.GetRevision(),
	}
}

func selectorStrings(selectors []*capb.Selector) []string {
	out := make([]string, 0, len(selectors))
	for _, s := range selectors {
		out = append(out, s.GetType()+":"+s.GetValue())
	}
	return out
}

func printEntry(w io.Writer, o *options, e *capb.Entry) error {
	if o.output == "json" {
		return printJSON(w, newEntryJSON(e))
	}
	ttl := ""
	if s := e.GetX509SvidTtlSeconds(); s > 0 {
		ttl = (time.Duration(s) * time.Second).String()
	}
	return printFields(w,
		"entry_id", e.GetEntryId(), "spiffe_id", e.GetSpiffeId(), "parent_id", e.GetParentId(),
		"selectors", strings.Join(selectorStrings(e.GetSelectors()), " "), "x509_svid_ttl", ttl,
		"dns_names", strings.Join(e.GetDnsNames(), " "), "common_name", e.GetCommonName(),
		"hint", e.GetHint(), "key_delivery", deliveryText(e.GetKeyDelivery()),
		"federates_with", strings.Join(e.GetFederatesWith(), " "), "federation_waiting", strings.Join(e.GetFederationWaiting(), " "), "role", roleText(e.GetRole()), "role_prefix", e.GetRolePrefix(), "expires_at", formatTime(e.GetExpiresAt()))
}

// entryFlags are the fields of a new entry as typed.
type entryFlags struct {
	spiffeID, parent, commonName, hint, expires string
	delivery                                    string
	selectors, dnsNames, federatesWith          []string
	ttl, jwtTTL                                 time.Duration
	admin                                       bool
	role, rolePrefix                            string
}

func entryCreate(o *options) *cobra.Command {
	var f entryFlags
	cmd := &cobra.Command{
		Use:   "create --spiffe-id ID --selector TYPE:VALUE…",
		Short: "Give a SPIFFE ID to the processes that have every selector",
		Example: `  merlon entry create --spiffe-id spiffe://shop.test/web --selector unix:path:/usr/bin/web --selector unix:user:web
  merlon entry create --spiffe-id spiffe://shop.test/db --selector unix:uid:999 --dns db.shop.test --ttl 30m
  merlon entry create --spiffe-id spiffe://shop.test/watch --selector unix:uid:998 --role viewer
  merlon entry create --spiffe-id spiffe://shop.test/agent/alias/eu --selector k8s:cluster:eu
  merlon entry create --spiffe-id spiffe://shop.test/web --selector unix:uid:1000 --parent spiffe://shop.test/agent/alias/eu`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			e, err := f.entry()
			if err != nil {
				return err
			}
			return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
				return createEntry(cmd, o, ca, e)
			})
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.spiffeID, "spiffe-id", "", "SPIFFE ID that matching processes get")
	fl.StringArrayVar(&f.selectors, "selector", nil, "what a process must be, split at the first colon: unix:uid:1000, unix:path:/usr/bin/web, systemd:unit:web.service, container:id:… (repeat: all must hold; agent/README.md lists them)")
	fl.StringVar(&f.parent, "parent", "", "SPIFFE ID of the agent, or of an alias of nodes (default: the only agent; of an alias, the CA)")
	fl.DurationVar(&f.ttl, "ttl", 0, "lifetime of X509-SVIDs (default: the CA's, 1h)")
	fl.DurationVar(&f.jwtTTL, "jwt-ttl", 0, "lifetime of JWT-SVIDs (default: the CA's, 5m)")
	fl.StringArrayVar(&f.dnsNames, "dns", nil, "DNS name to put into the X509-SVID (repeatable)")
	fl.StringVar(&f.commonName, "cn", "", "common name of the subject, for software that cannot read URI SANs")
	fl.StringVar(&f.hint, "hint", "", "hint by which a workload with several identities tells them apart")
	fl.StringVar(&f.delivery, "key-delivery", "agent", "who makes the key of X509-SVIDs: agent (the Workload API hands it over), workload (by CSR; no call hands it over) or both")
	fl.StringArrayVar(&f.federatesWith, "federates-with", nil, "another trust domain, such as partner.test, whose SVIDs the workload can verify (repeatable; merlon federation)")
	fl.StringVar(&f.role, "role", "", "role in which the workload may administer the CA: viewer, registrar, policy-publisher or operator")
	fl.StringVar(&f.rolePrefix, "role-prefix", "", "path at or below which the SPIFFE IDs of a registrar lie, such as /ns/shop")
	fl.BoolVar(&f.admin, "allow-admin", false, "the workload may administer the CA: --role operator")
	fl.StringVar(&f.expires, "expires", "", "end of the entry, RFC 3339")
	return cmd
}

// entry turns the flags into a request; what only the CA can judge stays with
// the CA.
func (f *entryFlags) entry() (*capb.Entry, error) {
	const example = "merlon entry create --spiffe-id spiffe://shop.test/web --selector unix:path:/usr/bin/web --selector unix:user:web"
	if f.spiffeID == "" {
		return nil, usageError{"--spiffe-id is missing", example}
	}
	if len(f.selectors) == 0 {
		return nil, usageError{"--selector is missing: an entry without selectors would match nothing", example}
	}
	if f.ttl%time.Second != 0 || f.jwtTTL%time.Second != 0 {
		return nil, usageError{"--ttl and --jwt-ttl are whole seconds", "for example --ttl 30m"}
	}
	given, err := f.givenRole()
	if err != nil {
		return nil, err
	}
	delivery, err := f.givenDelivery()
	if err != nil {
		return nil, err
	}
	e := &capb.Entry{
		KeyDelivery: delivery, FederatesWith: f.federatesWith,
		Role: given, RolePrefix: f.rolePrefix,
		SpiffeId: f.spiffeID, ParentId: f.parent, DnsNames: f.dnsNames, CommonName: f.commonName,
		Hint: f.hint, Admin: given == capb.Role_ROLE_OPERATOR, // for a CA that knows no roles
		X509SvidTtlSeconds: int64(f.ttl / time.Second), JwtSvidTtlSeconds: int64(f.jwtTTL / time.Second),
	}
	for _, s := range f.selectors {
		typ, value, ok := strings.Cut(s, ":")
		if !ok {
			return nil, usageError{fmt.Sprintf("selector %q has no colon", s), "selectors are TYPE:VALUE, for example unix:uid:1000"}
		}
		e.Selectors = append(e.Selectors, &capb.Selector{Type: typ, Value: value})
	}
	if f.expires != "" {
		t, err := time.Parse(time.RFC3339, f.expires)
		if err != nil {
			return nil, usageError{fmt.Sprintf("--expires %q is not RFC 3339", f.expires), "for example --expires 2027-01-01T00:00:00Z"}
		}
		e.ExpiresAt = timestamppb.New(t)
	}
	return e, nil
}

// The names of roles in the protos: ROLE_POLICY_PUBLISHER is policy-publisher.
const roleEnum = "ROLE_"

func roleText(r capb.Role) string {
	if r == capb.Role_ROLE_UNSPECIFIED {
		return ""
	}
	return strings.ReplaceAll(strings.ToLower(strings.TrimPrefix(r.String(), roleEnum)), "_", "-")
}

// deliveryText is a way of the key as the flag has it.
func deliveryText(d capb.KeyDelivery) string {
	if d == capb.KeyDelivery_KEY_DELIVERY_UNSPECIFIED {
		d = capb.KeyDelivery_KEY_DELIVERY_AGENT // of a CA that knows no other
	}
	return strings.ToLower(strings.TrimPrefix(d.String(), "KEY_DELIVERY_"))
}

func (f *entryFlags) givenDelivery() (capb.KeyDelivery, error) {
	for n := range capb.KeyDelivery_name {
		if d := capb.KeyDelivery(n); n != 0 && deliveryText(d) == f.delivery {
			return d, nil
		}
	}
	return 0, usageError{fmt.Sprintf("--key-delivery %q is not known", f.delivery), "agent, workload or both"}
}

func (f *entryFlags) givenRole() (capb.Role, error) {
	if f.admin && (f.role != "" || f.rolePrefix != "") {
		return 0, usageError{"--allow-admin is --role operator", "give --role alone"}
	}
	if f.admin {
		return capb.Role_ROLE_OPERATOR, nil
	}
	for n := range capb.Role_name {
		if r := capb.Role(n); roleText(r) == f.role {
			return r, nil
		}
	}
	return 0, usageError{fmt.Sprintf("--role %q is not a role", f.role), "viewer, registrar (with --role-prefix), policy-publisher or operator"}
}

// aliasPath is in the SPIFFE IDs of aliases, whose parent is the CA.
const aliasPath = "/agent/alias/"

func createEntry(cmd *cobra.Command, o *options, ca capb.AdminClient, e *capb.Entry) error {
	ctx := cmd.Context()
	if td, _, ok := strings.Cut(e.GetSpiffeId(), aliasPath); ok && e.GetParentId() == "" {
		e.ParentId = td + "/ca"
	}
	if e.GetParentId() == "" {
		parent, err := onlyAgent(ctx, ca)
		if err != nil {
			return err
		}
		e.ParentId = parent
	}
	resp, err := ca.CreateEntry(ctx, &capb.CreateEntryRequest{Entry: e})
	if err != nil {
		return err
	}
	warnAbsentAgent(ctx, cmd.ErrOrStderr(), ca, e.GetParentId())
	warnOpenToAll(cmd.ErrOrStderr(), e)
	for _, td := range resp.GetEntry().GetFederationWaiting() {
		fmt.Fprintf(cmd.ErrOrStderr(), "hint: the entry waits for the trust bundle of %s: merlon federation set %s FILE\n", td, td)
	}
	return printEntry(cmd.OutOrStdout(), o, resp.GetEntry())
}

// warnOpenToAll is for an entry that names a program and nobody who runs it.
func warnOpenToAll(stderr io.Writer, e *capb.Entry) {
	for _, s := range e.GetSelectors() {
		if s.GetType() != "unix" || !strings.HasPrefix(s.GetValue(), "path:") && !strings.HasPrefix(s.GetValue(), "sha256:") {
			return
		}
	}
	fmt.Fprintln(stderr, "hint: every user of the node who may execute this program can have this SPIFFE ID: add --selector unix:user:NAME or systemd:unit:NAME")
}

// warnAbsentAgent tells an entry made ahead of its agent or alias from a typo.
func warnAbsentAgent(ctx context.Context, stderr io.Writer, ca capb.AdminClient, parent string) {
	if strings.HasSuffix(parent, "/ca") {
		return
	}
	if strings.Contains(parent, aliasPath) {
		resp, err := ca.ListEntries(ctx, &capb.ListEntriesRequest{SpiffeId: parent})
		if err == nil && len(resp.GetEntries()) == 0 {
			fmt.Fprintf(stderr, "hint: no node has the alias %s yet: merlon entry create --spiffe-id %s --selector k8s:cluster:…\n", parent, parent)
		}
		return
	}
	resp, err := ca.ListAgents(ctx, &capb.ListAgentsRequest{})
	if err != nil || slices.ContainsFunc(resp.GetAgents(), func(a *capb.Agent) bool { return a.GetSpiffeId() == parent }) {
		return
	}
	fmt.Fprintf(stderr, "hint: the entry waits for %s, which has not joined yet: merlon token create --agent %s\n", parent, path.Base(parent))
}

func entryList(o *options) *cobra.Command {
	var req capb.ListEntriesRequest
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "List registration entries",
		Example: "  merlon entry list -o json\n  merlon entry list --spiffe-id spiffe://shop.test/web",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := cmp.Or(checkID("parent", req.GetParentId()), checkID("spiffe-id", req.GetSpiffeId())); err != nil {
				return err
			}
			return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
				entries, err := allEntries(cmd.Context(), ca, &req)
				if err != nil {
					return err
				}
				return printEntries(cmd.OutOrStdout(), o, entries)
			})
		},
	}
	cmd.Flags().StringVar(&req.ParentId, "parent", "", "only entries under this agent or alias")
	cmd.Flags().StringVar(&req.SpiffeId, "spiffe-id", "", "only entries for this SPIFFE ID")
	return cmd
}

func allEntries(ctx context.Context, ca capb.AdminClient, req *capb.ListEntriesRequest) ([]*capb.Entry, error) {
	var entries []*capb.Entry
	for {
		resp, err := ca.ListEntries(ctx, req)
		if err != nil {
			return nil, err
		}
		entries = append(entries, resp.GetEntries()...)
		if req.PageToken = resp.GetNextPageToken(); req.PageToken == "" {
			return entries, nil
		}
	}
}

func printEntries(w io.Writer, o *options, entries []*capb.Entry) error {
	if o.output == "json" {
		out := make([]entryJSON, 0, len(entries))
		for _, e := range entries {
			out = append(out, newEntryJSON(e))
		}
		return printJSON(w, out)
	}
	rows := make([][]string, 0, len(entries))
	for _, e := range entries {
		rows = append(rows, []string{e.GetEntryId(), e.GetSpiffeId(), e.GetParentId(), strings.Join(selectorStrings(e.GetSelectors()), " ")})
	}
	return printTable(w, []string{"ENTRY_ID", "SPIFFE_ID", "PARENT_ID", "SELECTORS"}, rows)
}

func entryShow(o *options) *cobra.Command {
	return &cobra.Command{
		Use:     "show ENTRY_ID",
		Short:   "Show one registration entry",
		Example: "  merlon entry show 6f1c2a…",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
				resp, err := ca.GetEntry(cmd.Context(), &capb.GetEntryRequest{EntryId: args[0]})
				if err != nil {
					return listHint(err, "merlon entry list")
				}
				return printEntry(cmd.OutOrStdout(), o, resp.GetEntry())
			})
		},
	}
}

func entryDelete(o *options) *cobra.Command {
	return &cobra.Command{
		Use:     "delete ENTRY_ID",
		Short:   "Delete an entry and revoke what was issued for it",
		Example: "  merlon entry delete 6f1c2a…",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
				resp, err := ca.DeleteEntry(cmd.Context(), &capb.DeleteEntryRequest{EntryId: args[0]})
				if err != nil {
					return listHint(err, "merlon entry list")
				}
				return printEntry(cmd.OutOrStdout(), o, resp.GetEntry())
			})
		},
	}
}
