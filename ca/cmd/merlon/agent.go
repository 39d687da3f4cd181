// merlon agent: attested nodes.

package main

import (
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"merlon.dev/ca/capb"
)

func agentCommand(o *options) *cobra.Command {
	return noun("agent", "Attested nodes", agentList(o))
}

// agentJSON is an agent as scripts see it.
type agentJSON struct {
	SPIFFEID            string     `json:"spiffe_id"`
	Attestation         string     `json:"attestation"`
	AttestedAt          *time.Time `json:"attested_at"`
	NotAfter            *time.Time `json:"not_after"`
	Connected           bool       `json:"connected"`
	Revision            uint64     `json:"revision"`
	TrustBundleSequence uint64     `json:"trust_bundle_sequence"`
	PolicyGeneration    uint64     `json:"policy_generation"`
}

func agentList(o *options) *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Short:   "List agents, whether they are connected, and what they serve",
		Example: "  merlon agent list -o json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
				resp, err := ca.ListAgents(cmd.Context(), &capb.ListAgentsRequest{})
				if err != nil {
					return err
				}
				if o.output == "json" {
					out := make([]agentJSON, 0, len(resp.GetAgents()))
					for _, a := range resp.GetAgents() {
						out = append(out, agentJSON{
							a.GetSpiffeId(), a.GetAttestation(), timeOf(a.GetAttestedAt()), timeOf(a.GetNotAfter()), a.GetConnected(),
							a.GetAck().GetRevision(), a.GetAck().GetTrustBundleSequence(), a.GetAck().GetPolicyGeneration(),
						})
					}
					return printJSON(cmd.OutOrStdout(), out)
				}
				var rows [][]string
				for _, a := range resp.GetAgents() {
					rows = append(rows, []string{
						a.GetSpiffeId(), a.GetAttestation(), strconv.FormatBool(a.GetConnected()), formatTime(a.GetNotAfter()),
						strconv.FormatUint(a.GetAck().GetTrustBundleSequence(), 10), strconv.FormatUint(a.GetAck().GetPolicyGeneration(), 10),
					})
				}
				return printTable(cmd.OutOrStdout(), []string{"SPIFFE_ID", "ATTESTATION", "CONNECTED", "NOT_AFTER", "TRUST_SEQUENCE", "POLICY_GENERATION"}, rows)
			})
		},
	}
}
