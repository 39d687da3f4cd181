// merlon explain: why a process has no identity, and why a call was refused.

package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/agent/agentpb"
)

func explainCommand(o *options) *cobra.Command {
	return noun("explain", "Why a process has no identity, and why a call was refused", explainIdentity(o), explainDecision(o))
}

// listHint points to the list when something was not found.
func listHint(err error, list string) error {
	if status.Code(err) == codes.NotFound {
		return hintError{err, list + " shows what there is"}
	}
	return err
}

// identityJSON is `merlon explain identity -o json`.
type identityJSON struct {
	PID        int32       `json:"pid"`
	AgentID    string      `json:"agent_id"`
	Synced     bool        `json:"synced"`
	Connected  bool        `json:"connected"`
	Stale      bool        `json:"stale"`
	HeardAt    *time.Time  `json:"heard_at"`
	EntryCount int32       `json:"entry_count"`
	Selectors  []string    `json:"selectors"`
	Notes      []string    `json:"notes"`
	Entries    []matchJSON `json:"entries"`
	Reason     string      `json:"reason,omitempty"`
	Hint       string      `json:"hint,omitempty"`
}

type matchJSON struct {
	EntryID  string   `json:"entry_id"`
	SPIFFEID string   `json:"spiffe_id"`
	Matches  bool     `json:"matches"`
	Missing  []string `json:"missing,omitempty"`

	FederatesWith     []string `json:"federates_with,omitempty"`
	FederationWaiting []string `json:"federation_waiting,omitempty"`
}

func explainIdentity(o *options) *cobra.Command {
	var pid int32
	cmd := &cobra.Command{
		Use:     "identity --pid PID",
		Short:   "Show what a process is to its agent, and which entries it matches or misses",
		Example: "  merlon explain identity --pid 4711",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !cmd.Flags().Changed("pid") {
				return usageError{"--pid is missing", "merlon explain identity --pid $(pidof web)"}
			}
			if pid <= 0 {
				return usageError{fmt.Sprintf("--pid %d is not the number of a process", pid), "merlon explain identity --pid $(pidof web)"}
			}
			return o.withAgent(func(agent agentpb.DebugClient) error {
				resp, err := agent.ExplainIdentity(cmd.Context(), &agentpb.ExplainIdentityRequest{Pid: pid})
				if status.Code(err) == codes.NotFound {
					return hintError{errors.New(status.Convert(err).Message()), "ask while the process runs, on its own node, by its number outside of containers: merlon explain identity --pid $(pidof web)"}
				}
				if err != nil {
					return err
				}
				return printIdentity(cmd.OutOrStdout(), o, pid, resp)
			})
		},
	}
	cmd.Flags().Int32Var(&pid, "pid", 0, "process ID, as the agent sees it")
	return cmd
}

func printIdentity(w io.Writer, o *options, pid int32, resp *agentpb.ExplainIdentityResponse) error {
	if o.output == "json" {
		out := identityJSON{
			PID: pid, AgentID: resp.GetAgentId(),
			Synced: resp.GetSynced(), Connected: resp.GetConnected(), Stale: resp.GetStale(),
			HeardAt: timeOf(resp.GetHeardAt()), EntryCount: resp.GetEntryCount(),
			Selectors: append([]string{}, resp.GetSelectors()...), Notes: append([]string{}, resp.GetNotes()...), // none is [], not null
			Entries: []matchJSON{}, Reason: resp.GetReason(), Hint: resp.GetHint(),
		}
		for _, m := range resp.GetEntries() {
			out.Entries = append(out.Entries, matchJSON{m.GetEntryId(), m.GetSpiffeId(), m.GetMatches(), m.GetMissing(), m.GetFederatesWith(), m.GetFederationWaiting()})
		}
		return printJSON(w, out)
	}
	fmt.Fprintf(w, "pid %d, under %s, is:\n  %s\n", pid, cmp.Or(resp.GetAgentId(), "an agent that is not attested"), strings.Join(resp.GetSelectors(), "\n  "))
	for _, note := range resp.GetNotes() {
		fmt.Fprintf(w, "not proved: %s\n", note)
	}
	fmt.Fprintf(w, "agent: %s, %d entries\n", syncText(resp), resp.GetEntryCount())
	for _, m := range resp.GetEntries() {
		if m.GetMatches() {
			fmt.Fprintf(w, "matches %s (entry %s)\n", m.GetSpiffeId(), m.GetEntryId())
			if len(m.GetFederatesWith()) > 0 {
				fmt.Fprintf(w, "  federates with %s\n", strings.Join(m.GetFederatesWith(), ", "))
			}
			if waiting := m.GetFederationWaiting(); len(waiting) > 0 {
				fmt.Fprintf(w, "  has no trust bundle of %s: merlon federation set %s FILE\n", strings.Join(waiting, ", "), waiting[0])
			}
		} else {
			fmt.Fprintf(w, "not %s (entry %s): lacks %s\n", m.GetSpiffeId(), m.GetEntryId(), strings.Join(m.GetMissing(), ", "))
		}
	}
	if resp.GetReason() != "" {
		what := "identity"
		if slices.ContainsFunc(resp.GetEntries(), (*agentpb.EntryMatch).GetMatches) {
			what = "X509-SVID"
		}
		fmt.Fprintf(w, "no %s: %s\nhint: %s\n", what, resp.GetReason(), resp.GetHint())
	}
	return nil
}

// syncText says how well the agent knows what the CA knows.
func syncText(resp *agentpb.ExplainIdentityResponse) string {
	switch {
	case !resp.GetSynced():
		return "not in sync with the CA yet"
	case !resp.GetConnected():
		return "not connected to the CA, heard everything at " + formatTime(resp.GetHeardAt())
	case resp.GetStale():
		return "connected to a CA that cannot reach its store, heard everything at " + formatTime(resp.GetHeardAt())
	default:
		return "in sync with the CA"
	}
}

// decisionJSON is `merlon explain decision -o json`.
type decisionJSON struct {
	DecisionID       string     `json:"decision_id"`
	DecidedAt        *time.Time `json:"decided_at"`
	Allow            bool       `json:"allow"`
	LetThrough       bool       `json:"let_through,omitempty"`
	Reason           string     `json:"reason"`
	RuleID           string     `json:"rule_id,omitempty"`
	PolicyGeneration uint64     `json:"policy_generation"`
	Source           string     `json:"source"`
	Destination      string     `json:"destination"`
	Protocol         string     `json:"protocol"`
	Method           string     `json:"method,omitempty"`
	Path             string     `json:"path,omitempty"`
	Engine           string     `json:"engine,omitempty"`
	Details          []string   `json:"details"`
	Hint             string     `json:"hint,omitempty"`
	Trace            string     `json:"trace,omitempty"`
}

func explainDecision(o *options) *cobra.Command {
	var trace bool
	cmd := &cobra.Command{
		Use:   "decision DECISION_ID",
		Short: "Show one of the agent's last 10 000 denials and what it compared",
		Long: `Show one of the last 10 000 denials of this node, or of its last 1000 calls that
were allowed, by the ID that the caller got with the refusal; what decided
it, and what the policy compares. It is asked of the generation that decided, for
the time at which it did, also when the policy has changed since, as long as the
agent keeps that generation: the active one and the four before it. Of the
headers the agent keeps the values that explain_headers names.`,
		Example: `  merlon explain decision 5b2f0c6d1a7e4f3b9c8d7e6f
  merlon explain decision 5b2f0c6d1a7e4f3b9c8d7e6f --trace`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.withAgent(func(agent agentpb.DebugClient) error {
				resp, err := agent.ExplainDecision(cmd.Context(), &agentpb.ExplainDecisionRequest{DecisionId: args[0], Trace: trace})
				if status.Code(err) == codes.NotFound {
					return hintError{errors.New(status.Convert(err).Message()), "ask on the node of the called service, soon after the call: an agent keeps its last 10 000 denials, until it is restarted"}
				}
				if err != nil {
					return err
				}
				return printDecision(cmd.OutOrStdout(), o, resp)
			})
		},
	}
	cmd.Flags().BoolVar(&trace, "trace", false, "print OPA's whole trace, too")
	return cmd
}

func printDecision(w io.Writer, o *options, resp *agentpb.ExplainDecisionResponse) error {
	d, in := resp.GetDecision(), resp.GetInput()
	if o.output == "json" {
		details := resp.GetDetails()
		if details == nil {
			details = []string{}
		}
		return printJSON(w, decisionJSON{
			d.GetDecisionId(), timeOf(resp.GetDecidedAt()), d.GetAllow(), d.GetLetThrough(), d.GetReason(), d.GetRuleId(), d.GetPolicyGeneration(),
			in.GetSource(), in.GetDestination(), in.GetProtocol(), in.GetMethod(), in.GetPath(),
			resp.GetEngine(), details, resp.GetHint(), resp.GetTrace(),
		})
	}
	verdict := "denied"
	switch {
	case d.GetAllow():
		verdict = "allowed"
	case d.GetLetThrough():
		verdict = "denied, and let through by audit mode"
	}
	rule := ""
	if d.GetRuleId() != "" {
		rule = " by " + d.GetRuleId()
	}
	fmt.Fprintf(w, "%s %s: %s%s (policy generation %s)\n", formatTime(resp.GetDecidedAt()), verdict, d.GetReason(), rule,
		strconv.FormatUint(d.GetPolicyGeneration(), 10))
	fmt.Fprintf(w, "  %s -> %s, %s %s %s\n", in.GetSource(), in.GetDestination(), in.GetProtocol(), in.GetMethod(), in.GetPath())
	for _, line := range resp.GetDetails() {
		fmt.Fprintf(w, "  %s\n", line)
	}
	if resp.GetHint() != "" {
		fmt.Fprintf(w, "hint: %s\n", resp.GetHint())
	}
	if resp.GetTrace() != "" {
		fmt.Fprintf(w, "OPA's trace:\n%s", resp.GetTrace())
	}
	return nil
}
