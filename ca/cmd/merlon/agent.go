// merlon agent: attested nodes, and what is decided about them.

package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"merlon.dev/ca/capb"
)

func agentCommand(o *options) *cobra.Command {
	return noun("agent", "Attested nodes", agentList(o), agentShow(o), agentEvict(o), agentBan(o), agentUnban(o))
}

// agentJSON is an agent as scripts see it.
type agentJSON struct {
	SPIFFEID            string     `json:"spiffe_id"`
	State               string     `json:"state"`
	StateSince          *time.Time `json:"state_since,omitempty"`
	StateNote           string     `json:"state_note,omitempty"`
	Attestation         string     `json:"attestation"`
	Selectors           []string   `json:"selectors"`
	AttestedAt          *time.Time `json:"attested_at"`
	NotAfter            *time.Time `json:"not_after"`
	Connected           bool       `json:"connected"`
	Revision            uint64     `json:"revision"`
	TrustBundleSequence uint64     `json:"trust_bundle_sequence"`
	PolicyGeneration    uint64     `json:"policy_generation"`
}

func newAgentJSON(a *capb.Agent) agentJSON {
	return agentJSON{
		a.GetSpiffeId(), a.GetState(), timeOf(a.GetStateSince()), a.GetStateNote(),
		a.GetAttestation(), selectorStrings(a.GetSelectors()), timeOf(a.GetAttestedAt()), timeOf(a.GetNotAfter()), a.GetConnected(),
		a.GetAck().GetRevision(), a.GetAck().GetTrustBundleSequence(), a.GetAck().GetPolicyGeneration(),
	}
}

func agentList(o *options) *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Short:   "List agents, how they stand, whether they are connected, and what they serve",
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
						out = append(out, newAgentJSON(a))
					}
					return printJSON(cmd.OutOrStdout(), out)
				}
				var rows [][]string
				for _, a := range resp.GetAgents() {
					rows = append(rows, []string{
						a.GetSpiffeId(), a.GetState(), a.GetAttestation(), strconv.FormatBool(a.GetConnected()), formatTime(a.GetNotAfter()),
						strconv.FormatUint(a.GetAck().GetTrustBundleSequence(), 10), strconv.FormatUint(a.GetAck().GetPolicyGeneration(), 10),
					})
				}
				return printTable(cmd.OutOrStdout(), []string{"SPIFFE_ID", "STATE", "ATTESTATION", "CONNECTED", "NOT_AFTER", "TRUST_SEQUENCE", "POLICY_GENERATION"}, rows)
			})
		},
	}
}

// printAgent shows one agent; done, if not empty, is what was done with it.
func (o *options) printAgent(cmd *cobra.Command, done string, a *capb.Agent) error {
	if o.output == "json" {
		return printJSON(cmd.OutOrStdout(), newAgentJSON(a))
	}
	fields := []string{
		"spiffe_id", a.GetSpiffeId(), "state", a.GetState(), "attestation", a.GetAttestation(), "selectors", strings.Join(selectorStrings(a.GetSelectors()), " "),
		"attested_at", formatTime(a.GetAttestedAt()), "not_after", formatTime(a.GetNotAfter()), "connected", strconv.FormatBool(a.GetConnected()),
		"revision", strconv.FormatUint(a.GetAck().GetRevision(), 10), "trust_bundle_sequence", strconv.FormatUint(a.GetAck().GetTrustBundleSequence(), 10),
		"policy_generation", strconv.FormatUint(a.GetAck().GetPolicyGeneration(), 10),
	}
	if done != "" {
		fields = []string{done, a.GetSpiffeId(), "state", a.GetState()}
	}
	if a.GetStateSince() != nil {
		fields = append(fields, "state_since", formatTime(a.GetStateSince()), "state_note", a.GetStateNote())
	}
	return printFields(cmd.OutOrStdout(), fields...)
}

func agentShow(o *options) *cobra.Command {
	return &cobra.Command{
		Use:     "show NAME",
		Short:   "Show one agent, by its name or SPIFFE ID",
		Example: "  merlon agent show node-1",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
				resp, err := ca.GetAgent(cmd.Context(), &capb.GetAgentRequest{Agent: args[0]})
				if err != nil {
					return listHint(err, "merlon agent list")
				}
				return o.printAgent(cmd, "", resp.GetAgent())
			})
		},
	}
}

func agentEvict(o *options) *cobra.Command {
	return o.decision(&cobra.Command{
		Use:   "evict NAME",
		Short: "Make a node attest anew before its agent is served again",
		Long: `Make an agent's own X509-SVID worthless: its Sync stream is cut at once, and its
node has to attest anew, with a new join token, or by itself where the kind of
attestation can. Its registration entries stay, and so does what its workloads
hold until it expires. To withdraw that too, ban the agent.`,
		Example: `  merlon agent evict node-1 --note "reinstalled"`,
	}, "evicted", "give the node a new join token (merlon token create --agent NAME), unless it attests by itself",
		func(ctx context.Context, ca capb.AdminClient, name, note string) (*capb.Agent, error) {
			resp, err := ca.EvictAgent(ctx, &capb.EvictAgentRequest{Agent: name, Note: note})
			return resp.GetAgent(), err
		})
}

func agentBan(o *options) *cobra.Command {
	return o.decision(&cobra.Command{
		Use:   "ban NAME",
		Short: "Revoke everything issued through an agent, and let its node attest no more",
		Long: `Revoke an agent's X509-SVID and every SVID issued through it, in one transaction:
its Sync stream and the live connections of its workloads are cut everywhere, and
nothing that its node shows lets it in again. It does not hold up the rotation of
the CA's keys any more. Its registration entries stay: a workload that moves to
another node gets a new SVID as soon as there is an entry for it under the agent
there.`,
		Example: `  merlon agent ban node-1 --note "broken into"`,
	}, "banned", "move its workloads: merlon entry create --parent …, for each one; merlon agent unban NAME lifts the ban",
		func(ctx context.Context, ca capb.AdminClient, name, note string) (*capb.Agent, error) {
			resp, err := ca.BanAgent(ctx, &capb.BanAgentRequest{Agent: name, Note: note})
			return resp.GetAgent(), err
		})
}

func agentUnban(o *options) *cobra.Command {
	return o.decision(&cobra.Command{
		Use:   "unban NAME",
		Short: "Let the node of a banned agent attest again",
		Long: `Let the node of a banned agent attest again: the agent is evicted then. What the
ban revoked stays revoked.`,
		Example: "  merlon agent unban node-1",
	}, "unbanned", "give the node a new join token (merlon token create --agent NAME), unless it attests by itself",
		func(ctx context.Context, ca capb.AdminClient, name, note string) (*capb.Agent, error) {
			resp, err := ca.UnbanAgent(ctx, &capb.UnbanAgentRequest{Agent: name, Note: note})
			return resp.GetAgent(), err
		})
}

// decision makes cmd carry out what is decided about one agent, and say what is
// to be done next.
func (o *options) decision(cmd *cobra.Command, done, next string, carryOut func(ctx context.Context, ca capb.AdminClient, name, note string) (*capb.Agent, error)) *cobra.Command {
	var note string
	cmd.Args = cobra.ExactArgs(1)
	cmd.Flags().StringVar(&note, "note", "", "why, for the record")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
			a, err := carryOut(cmd.Context(), ca, args[0], note)
			if err != nil {
				return listHint(err, "merlon agent list")
			}
			if err := o.printAgent(cmd, done, a); err != nil || o.output == "json" {
				return err
			}
			_, err = fmt.Fprintln(cmd.ErrOrStderr(), "hint:", next)
			return err
		})
	}
	return cmd
}
