// merlon approval: what one administrator proposes and another one grants.

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"merlon.dev/ca/capb"
)

func approvalCommand(o *options) *cobra.Command {
	return noun("approval", "What waits for a second administrator (four_eyes): list it, grant it, withdraw it",
		approvalList(o), approvalGrant(o), approvalWithdraw(o))
}

// proposalJSON is a proposal as scripts see it.
type proposalJSON struct {
	ProposalID string     `json:"proposal_id"`
	Act        string     `json:"act"`
	Request    string     `json:"request"`
	Basis      string     `json:"basis,omitempty"`
	ProposedBy string     `json:"proposed_by"`
	Role       string     `json:"role"`
	ProposedAt *time.Time `json:"proposed_at"`
	ExpiresAt  *time.Time `json:"expires_at"`
	// Response is what the act answered, once it is granted.
	Response json.RawMessage `json:"response,omitempty"`
}

func newProposalJSON(p *capb.Proposal) proposalJSON {
	return proposalJSON{
		ProposalID: p.GetProposalId(), Act: p.GetAct(), Request: p.GetRequest(), Basis: p.GetBasis(), ProposedBy: p.GetProposedBy(), Role: p.GetRole(),
		ProposedAt: timeOf(p.GetProposedAt()), ExpiresAt: timeOf(p.GetExpiresAt()),
	}
}

// waiting is the proposal that the CA made of the call which ended with err, and what
// it says of it; nil: none.
func waiting(err error) (p *capb.Proposal, message string) {
	st, ok := errors.AsType[interface {
		error
		GRPCStatus() *status.Status
	}](err)
	if !ok {
		return nil, ""
	}
	for _, detail := range st.GRPCStatus().Details() {
		if p, ok := detail.(*capb.Proposal); ok {
			return p, st.GRPCStatus().Message()
		}
	}
	return nil, ""
}

// printProposal prints p as the outcome of cmd, with further fields.
func printProposal(w io.Writer, output string, p *capb.Proposal, more ...string) error {
	if output == "json" {
		return printJSON(w, newProposalJSON(p))
	}
	return printFields(w, append([]string{
		"proposal_id", p.GetProposalId(), "act", p.GetAct(), "request", p.GetRequest(), "basis", p.GetBasis(),
		"proposed_by", p.GetProposedBy(), "expires_at", formatTime(p.GetExpiresAt()),
	}, more...)...)
}

func approvalList(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List what waits for a second administrator",
		Long: `List what waits for a second administrator: the act, all that was asked for
(REQUEST), what it rests on (BASIS; where that changes, the proposal is void), by
whom, and until when. An ID stands for exactly this.`,
		Example: "  merlon approval list\n  merlon approval list -o json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
				resp, err := ca.ListProposals(cmd.Context(), &capb.ListProposalsRequest{})
				if err != nil {
					return err
				}
				out, rows := []proposalJSON{}, [][]string(nil)
				for _, p := range resp.GetProposals() {
					out = append(out, newProposalJSON(p))
					rows = append(rows, []string{p.GetProposalId(), p.GetAct(), p.GetRequest(), p.GetBasis(), p.GetProposedBy(), formatTime(p.GetExpiresAt())})
				}
				if o.output == "json" {
					return printJSON(cmd.OutOrStdout(), out)
				}
				return printTable(cmd.OutOrStdout(), []string{"PROPOSAL_ID", "ACT", "REQUEST", "BASIS", "PROPOSED_BY", "EXPIRES_AT"}, rows)
			})
		},
	}
}

func approvalGrant(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "grant PROPOSAL_ID",
		Short: "Let what another administrator proposed be done, now",
		Long: `Let what another administrator proposed be done, at once and once. Whoever proposed
it cannot grant it; root and the CA's own user count as one. It takes the role that
the act takes, and the other one must still have it. A key is activated on the
replica that holds it: grant there. Read it first: merlon approval list.`,
		Example: "  merlon approval grant 3f2a0c…",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
				resp, err := ca.GrantProposal(cmd.Context(), &capb.GrantProposalRequest{ProposalId: strings.ToLower(args[0])})
				if err != nil {
					return approvalHint(err)
				}
				answer, err := resp.GetResponse().UnmarshalNew()
				if err != nil {
					return fmt.Errorf("%s was done; read what it answered: %w", resp.GetProposal().GetAct(), err)
				}
				return printGranted(cmd.OutOrStdout(), o.output, resp.GetProposal(), answer)
			})
		},
	}
}

// printGranted prints what was done, and what nobody can ask for again.
func printGranted(w io.Writer, output string, p *capb.Proposal, answer proto.Message) error {
	if output == "json" {
		raw, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(answer)
		if err != nil {
			return err
		}
		out := newProposalJSON(p)
		out.Response = json.RawMessage(raw)
		return printJSON(w, out)
	}
	more := []string{"granted", "done"}
	if token, ok := answer.(*capb.CreateTokenResponse); ok {
		more = append(more, "token", token.GetToken(), "root_hash", token.GetRootHash(), "token_expires_at", formatTime(token.GetExpiresAt()))
	}
	return printProposal(w, output, p, more...)
}

func approvalWithdraw(o *options) *cobra.Command {
	return &cobra.Command{
		Use:     "withdraw PROPOSAL_ID",
		Short:   "Take a proposal back, one's own or another's",
		Example: "  merlon approval withdraw 3f2a0c…",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
				resp, err := ca.WithdrawProposal(cmd.Context(), &capb.WithdrawProposalRequest{ProposalId: strings.ToLower(args[0])})
				if err != nil {
					return approvalHint(err)
				}
				return printProposal(cmd.OutOrStdout(), o.output, resp.GetProposal())
			})
		},
	}
}

// approvalHints are what helps, by the reason of the refusal.
var approvalHints = map[string]string{
	"PROPOSAL_UNKNOWN":   "merlon approval list shows what waits, with whole IDs",
	"PROPOSAL_EXPIRED":   "let it be proposed again: a proposal waits for an hour",
	"PROPOSAL_DONE":      "nothing is left to do; merlon authority list, or merlon replica list, shows how it is now",
	"PROPOSAL_WITHDRAWN": "ask whoever withdrew it, and let it be proposed again",
	"PROPOSAL_OWN":       "let another administrator grant it, by an SVID or token of their own",
	"PROPOSAL_VOID":      "look how it is now (merlon authority list, merlon replica list), and let it be proposed again",
	"PROPOSALS_TOO_MANY": "merlon approval list shows what waits: let another administrator grant it, or take it back: merlon approval withdraw PROPOSAL_ID",
	"PROPOSAL_TOO_LONG":  "say less: fewer selectors, DNS names and the like, or a shorter note",
}

// hintOfRefusal is what helps against a refusal of the CA's that names its reason.
func hintOfRefusal(st *status.Status) string {
	for _, detail := range st.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			return approvalHints[info.GetReason()]
		}
	}
	return ""
}

// approvalHint is for what the act may refuse when it is granted.
func approvalHint(err error) error {
	if hintOfRefusal(status.Convert(err)) != "" {
		return err // describe says it
	}
	return stepHint(err)
}
