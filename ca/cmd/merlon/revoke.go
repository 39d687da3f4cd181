// merlon revoke and merlon revocation: withdraw SVIDs before they expire.

package main

import (
	"fmt"
	"math/big"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"merlon.dev/ca/capb"
)

// revocationJSON is a revocation record as scripts see it.
type revocationJSON struct {
	SPIFFEID       string     `json:"spiffe_id,omitempty"`
	AgentID        string     `json:"agent_id,omitempty"`
	AuthorityID    string     `json:"authority_id,omitempty"`
	Serial         string     `json:"serial,omitempty"`
	BeforeRevision uint64     `json:"before_revision,omitempty"`
	Realm          uint32     `json:"realm,omitempty"` // of which nested CA's store the revision is
	ExpiresAt      *time.Time `json:"expires_at"`
	Note           string     `json:"note,omitempty"`
}

func newRevocationJSON(r *capb.Revocation) revocationJSON {
	return revocationJSON{
		r.GetSpiffeId(), r.GetAgentId(), r.GetAuthorityId(), r.GetSerial(),
		r.GetBeforeRevision(), r.GetRealm(), timeOf(r.GetExpiresAt()), r.GetNote(),
	}
}

// revocationSubject names what a record withdraws, for people.
func revocationSubject(r *capb.Revocation) (kind, value string) {
	switch {
	case r.GetSpiffeId() != "":
		return "spiffe_id", r.GetSpiffeId()
	case r.GetAgentId() != "":
		return "agent_id", r.GetAgentId()
	case r.GetAuthorityId() != "":
		return "authority_id", r.GetAuthorityId()
	default:
		return "serial", r.GetSerial()
	}
}

// plainHex is the hex number that openssl prints in upper case, in pairs of
// digits or with colons.
func plainHex(s string) string {
	s = strings.ToLower(strings.ReplaceAll(strings.TrimSpace(s), ":", ""))
	return strings.TrimLeft(strings.TrimPrefix(s, "0x"), "0")
}

// serialNumber reads one as records and revocations have it; what is no hex
// number is a mistake in the command line, not the number of no SVID.
func serialNumber(s, example string) (string, error) {
	plain := plainHex(s)
	if n, ok := new(big.Int).SetString(plain, 16); !ok || n.Sign() <= 0 || n.Text(16) != plain {
		return "", usageError{fmt.Sprintf("%q is no serial number: it is a hex number above 0, as openssl x509 -serial or a JWT-SVID's jti has it", s), example}
	}
	return plain, nil
}

func revokeCommand(o *options) *cobra.Command {
	var spiffeID, agentID, authorityID, serial, note string
	cmd := &cobra.Command{
		Use:   "revoke --spiffe-id ID | --agent ID | --authority HEX | --serial HEX",
		Short: "Withdraw SVIDs and cut the live connections that use them",
		Long: `Withdraw every SVID issued so far for a SPIFFE ID, through an agent or under an
authority, or one SVID by its serial number. Every enforcement point cuts the
live connections that use one. A workload whose entry still exists gets a new
SVID at once; to take its identity away, delete the entry.`,
		Example: `  merlon revoke --spiffe-id spiffe://shop.test/web --note "key leaked"
  merlon revoke --agent spiffe://shop.test/agent/node-1`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if cmd.Flags().Changed("serial") {
				var err error
				if serial, err = serialNumber(serial, "merlon revoke --serial 1f3c…"); err != nil {
					return err
				}
			}
			req := &capb.RevokeRequest{Note: note}
			given := 0
			for _, flag := range []struct {
				value string
				set   func()
			}{
				{spiffeID, func() { req.Subject = &capb.RevokeRequest_SpiffeId{SpiffeId: spiffeID} }},
				{agentID, func() { req.Subject = &capb.RevokeRequest_AgentId{AgentId: agentID} }},
				{authorityID, func() { req.Subject = &capb.RevokeRequest_AuthorityId{AuthorityId: authorityID} }},
				{serial, func() { req.Subject = &capb.RevokeRequest_Serial{Serial: serial} }},
			} {
				if flag.value != "" {
					given++
					flag.set()
				}
			}
			if given != 1 {
				return usageError{"say what to revoke: exactly one of --spiffe-id, --agent, --authority, --serial", "merlon revoke --spiffe-id spiffe://shop.test/web"}
			}
			return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
				resp, err := ca.Revoke(cmd.Context(), req)
				if err != nil {
					return listHint(err, "merlon agent list")
				}
				r := resp.GetRevocation()
				if names := resp.GetNotTold(); len(names) > 0 && r.GetSerial() == "" {
					if _, err := fmt.Fprintf(cmd.ErrOrStderr(), "hint: not told yet: %s. What they have issued is withdrawn once they are; at once one SVID by --serial, or all of a nested CA by merlon replica evict\n", strings.Join(names, ", ")); err != nil {
						return err
					}
				}
				if o.output == "json" {
					return printJSON(cmd.OutOrStdout(), newRevocationJSON(r))
				}
				kind, value := revocationSubject(r)
				return printFields(cmd.OutOrStdout(), "revoked "+kind, value,
					"before_revision", strconv.FormatUint(r.GetBeforeRevision(), 10), "expires_at", formatTime(r.GetExpiresAt()))
			})
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&spiffeID, "spiffe-id", "", "every SVID of this SPIFFE ID")
	fl.StringVar(&agentID, "agent", "", "every SVID issued through this agent (SPIFFE ID)")
	fl.StringVar(&authorityID, "authority", "", "every SVID under this authority (hex of its subject key ID)")
	fl.StringVar(&serial, "serial", "", "the one SVID with this serial number (hex)")
	fl.StringVar(&note, "note", "", "why, for the record")
	return cmd
}

func revocationCommand(o *options) *cobra.Command {
	return noun("revocation", "Live revocation records", &cobra.Command{
		Use:     "list",
		Short:   "List revocation records that can still concern an SVID",
		Example: "  merlon revocation list",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
				resp, err := ca.ListRevocations(cmd.Context(), &capb.ListRevocationsRequest{})
				if err != nil {
					return err
				}
				if o.output == "json" {
					out := make([]revocationJSON, 0, len(resp.GetRevocations()))
					for _, r := range resp.GetRevocations() {
						out = append(out, newRevocationJSON(r))
					}
					return printJSON(cmd.OutOrStdout(), out)
				}
				var rows [][]string
				for _, r := range resp.GetRevocations() {
					kind, value := revocationSubject(r)
					rows = append(rows, []string{kind, value, strconv.FormatUint(r.GetBeforeRevision(), 10), formatTime(r.GetExpiresAt()), r.GetNote()})
				}
				return printTable(cmd.OutOrStdout(), []string{"KIND", "SUBJECT", "BEFORE_REVISION", "EXPIRES_AT", "NOTE"}, rows)
			})
		},
	})
}
