// merlon policy canary, pause, promote, abort, rollback and history: how a policy comes
// into force by and by, and how it goes back.

package main

import (
	"context"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
)

// rolloutJSON is what the verbs about a candidate and a rollback print.
type rolloutJSON struct {
	Name       string         `json:"name"`
	Generation uint64         `json:"generation"`
	Candidate  *candidateJSON `json:"candidate,omitempty"`
}

// candidateJSON is a candidate as scripts see it.
type candidateJSON struct {
	Generation   uint64     `json:"generation"`
	Stage        string     `json:"stage"` // "shadow" or "canary"
	Destinations []string   `json:"canary_destinations,omitempty"`
	Percent      float64    `json:"canary_percent,omitempty"`
	Since        *time.Time `json:"since"`
	Alarm        *alarmJSON `json:"alarm,omitempty"`
}

// alarmJSON is why a canary was paused.
type alarmJSON struct {
	At          *time.Time `json:"at"`
	Destination string     `json:"destination,omitempty"`
	Allowed     uint64     `json:"allowed"`
	Denied      uint64     `json:"denied"`
}

func newCandidateJSON(c *capb.PolicyCandidate) *candidateJSON {
	if c == nil {
		return nil
	}
	j := &candidateJSON{
		Generation: c.GetGeneration(), Stage: "shadow", Destinations: c.GetCanary().GetDestinations(),
		Percent: float64(c.GetCanary().GetPerMille()) / 10, Since: timeOf(c.GetSince()),
	}
	if c.GetStage() == capb.PolicyStage_POLICY_STAGE_CANARY {
		j.Stage = "canary"
	}
	if a := c.GetAlarm(); a != nil {
		j.Alarm = &alarmJSON{timeOf(a.GetAt()), a.GetDestination(), a.GetAllowed(), a.GetDenied()}
	}
	return j
}

// where says in words where the candidate decides.
func (c *candidateJSON) where() string {
	if c.Stage == "shadow" {
		return "shadow: it decides nothing"
	}
	var places []string
	if c.Percent > 0 {
		places = append(places, fmt.Sprintf("%g %% of agents and services", c.Percent))
	}
	for _, d := range c.Destinations {
		places = append(places, "calls to "+d)
	}
	return "canary: it decides " + strings.Join(places, ", ")
}

func (o *options) printRollout(cmd *cobra.Command, b *capb.PolicyBundle) error {
	c := newCandidateJSON(b.GetCandidate())
	if o.output == "json" {
		return printJSON(cmd.OutOrStdout(), rolloutJSON{b.GetName(), b.GetGeneration(), c})
	}
	fields := []string{"name", b.GetName(), "generation", strconv.FormatUint(b.GetGeneration(), 10)}
	if c != nil {
		fields = append(fields, "candidate", strconv.FormatUint(c.Generation, 10), "stage", c.where())
	}
	return printFields(cmd.OutOrStdout(), fields...)
}

// rolloutVerb makes cmd do act with the policy bundle that --name names, and print what
// came of it.
func (o *options) rolloutVerb(cmd *cobra.Command, act func(ctx context.Context, ca capb.AdminClient, name string) (*capb.PolicyBundle, error)) *cobra.Command {
	var name string
	cmd.Args = cobra.NoArgs
	cmd.Flags().StringVar(&name, "name", defaultBundle, "name of the policy bundle")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
			b, err := act(cmd.Context(), ca, name)
			if err != nil {
				return rolloutHint(err)
			}
			return o.printRollout(cmd, b)
		})
	}
	return cmd
}

func rolloutHint(err error) error {
	switch status.Code(err) {
	case codes.FailedPrecondition:
		return hintError{err, "merlon policy status and merlon policy history show how it stands; nothing was changed"}
	case codes.NotFound:
		return hintError{err, "merlon policy push FOLDER makes the first generation"}
	}
	return err
}

func policyCanary(o *options) *cobra.Command {
	var destinations []string
	var percent float64
	var generation uint64
	cmd := o.rolloutVerb(&cobra.Command{
		Use:   "canary",
		Short: "Let the candidate decide for some services, or for a share of all",
		Long: `Let the candidate decide the calls to the services that are named, and to a share
of all pairs of agent and service; the policy in force decides all others, and is
asked about those too. A pair that is in a share stays in it while it grows.

When the candidate denies more of the calls that the policy in force allows than
the CA is configured to stand (canary_denied_per_mille, canary_min_calls), it goes
back to shadow, with an alarm. The policy in force is never taken back by itself.`,
		Example: `  merlon policy canary --destination spiffe://shop.test/orders
  merlon policy canary --percent 10`,
	}, func(ctx context.Context, ca capb.AdminClient, name string) (*capb.PolicyBundle, error) {
		resp, err := ca.StageCandidate(ctx, &capb.StageCandidateRequest{
			Name: name, Generation: generation, Canary: &capb.PolicyCanary{Destinations: destinations, PerMille: uint32(math.Round(percent * 10))},
		})
		return resp.GetPolicyBundle(), err
	})
	cmd.PreRunE = func(*cobra.Command, []string) error {
		if tenths := percent * 10; percent < 0 || percent > 100 || math.Abs(math.Round(tenths)-tenths) > 1e-6 {
			return usageError{fmt.Sprintf("--percent %g is not between 0 and 100, in steps of 0.1", percent), "for example --percent 10"}
		}
		if percent == 0 && len(destinations) == 0 {
			return usageError{"nothing is named for which the candidate is to decide", "give --destination or --percent; merlon policy pause takes it back to shadow"}
		}
		for _, d := range destinations {
			if err := checkID("destination", d); err != nil {
				return err
			}
		}
		return nil
	}
	cmd.Flags().StringArrayVar(&destinations, "destination", nil, "SPIFFE ID of a called service; can be repeated")
	cmd.Flags().Float64Var(&percent, "percent", 0, "share of all pairs of agent and service")
	cmd.Flags().Uint64Var(&generation, "generation", 0, "the candidate that is meant; another one is refused")
	return cmd
}

func policyPause(o *options) *cobra.Command {
	return o.rolloutVerb(&cobra.Command{
		Use:     "pause",
		Short:   "Take the candidate back to shadow: it decides nothing any more",
		Example: "  merlon policy pause",
	}, func(ctx context.Context, ca capb.AdminClient, name string) (*capb.PolicyBundle, error) {
		resp, err := ca.StageCandidate(ctx, &capb.StageCandidateRequest{Name: name})
		return resp.GetPolicyBundle(), err
	})
}

func policyAbort(o *options) *cobra.Command {
	return o.rolloutVerb(&cobra.Command{
		Use:     "abort",
		Short:   "Take the candidate away; the policy in force stays",
		Example: "  merlon policy abort",
	}, func(ctx context.Context, ca capb.AdminClient, name string) (*capb.PolicyBundle, error) {
		resp, err := ca.AbortCandidate(ctx, &capb.AbortCandidateRequest{Name: name})
		return resp.GetPolicyBundle(), err
	})
}

func policyPromote(o *options) *cobra.Command {
	var generation uint64
	var wait time.Duration
	var cmd *cobra.Command
	cmd = o.rolloutVerb(&cobra.Command{
		Use:   "promote",
		Short: "Put the candidate into force everywhere",
		Long: `Put the candidate into force, as the next generation. The command ends once each
connected agent decides by it, or after --wait, and then names those that do not
yet.`,
		Example: `  merlon policy promote
  merlon policy promote --generation 7`,
	}, func(ctx context.Context, ca capb.AdminClient, name string) (*capb.PolicyBundle, error) {
		resp, err := ca.PromoteCandidate(ctx, &capb.PromoteCandidateRequest{Name: name, Generation: generation})
		return inForce(ctx, cmd, ca, resp.GetPolicyBundle(), wait, err)
	})
	cmd.Flags().Uint64Var(&generation, "generation", 0, "the candidate that is meant; another one is refused")
	waitFlag(cmd, &wait)
	return cmd
}

func policyRollback(o *options) *cobra.Command {
	var to uint64
	var wait time.Duration
	var cmd *cobra.Command
	cmd = o.rolloutVerb(&cobra.Command{
		Use:   "rollback",
		Short: "Put an earlier policy into force again",
		Long: `Put the content of an earlier generation into force, signed anew as the next one:
agents take no older number. Without --to it is the content before the one in
force; a second rollback goes further back, not forward again. A candidate that
there is goes. The command ends once each connected agent decides by it, or after
--wait, and then names those that do not yet.`,
		Example: `  merlon policy rollback
  merlon policy rollback --to 5`,
	}, func(ctx context.Context, ca capb.AdminClient, name string) (*capb.PolicyBundle, error) {
		resp, err := ca.RollBackPolicy(ctx, &capb.RollBackPolicyRequest{Name: name, To: to})
		return inForce(ctx, cmd, ca, resp.GetPolicyBundle(), wait, err)
	})
	cmd.Flags().Uint64Var(&to, "to", 0, "the generation whose content is meant (merlon policy history)")
	waitFlag(cmd, &wait)
	return cmd
}

// waitFlag gives cmd the flag --wait.
func waitFlag(cmd *cobra.Command, wait *time.Duration) {
	cmd.Flags().DurationVar(wait, "wait", 5*time.Second, "how long to wait for the agents; 0 does not wait")
	cmd.PreRunE = func(*cobra.Command, []string) error {
		if *wait < 0 {
			return usageError{"--wait is negative", "for example --wait 30s; 0 does not wait"}
		}
		return nil
	}
}

// inForce waits until b is in force, as awaitPolicy does.
func inForce(ctx context.Context, cmd *cobra.Command, ca capb.AdminClient, b *capb.PolicyBundle, wait time.Duration, err error) (*capb.PolicyBundle, error) {
	if err != nil || b.GetName() != defaultBundle { // agents acknowledge the bundle that they follow
		return b, err
	}
	return b, awaitPolicy(ctx, ca, b.GetGeneration(), wait, cmd.ErrOrStderr())
}

// generationJSON is one generation of `merlon policy history -o json`.
type generationJSON struct {
	Generation uint64     `json:"generation"`
	IssuedAt   *time.Time `json:"issued_at"`
	How        string     `json:"how"`
	Of         uint64     `json:"of,omitempty"`
	SizeBytes  uint32     `json:"size_bytes"`
	Active     bool       `json:"active"`
}

func policyHistory(o *options) *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "history",
		Short: "List the generations of a policy that can be rolled back to",
		Example: `  merlon policy history
  merlon policy history -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
				resp, err := ca.ListPolicyGenerations(cmd.Context(), &capb.ListPolicyGenerationsRequest{Name: name})
				if err != nil {
					return rolloutHint(err)
				}
				out, rows := []generationJSON{}, [][]string{}
				for _, g := range resp.GetGenerations() {
					out = append(out, generationJSON{g.GetGeneration(), timeOf(g.GetIssuedAt()), g.GetHow(), g.GetOf(), g.GetSizeBytes(), g.GetActive()})
					of := ""
					if g.GetOf() != 0 {
						of = strconv.FormatUint(g.GetOf(), 10)
					}
					rows = append(rows, []string{
						strconv.FormatUint(g.GetGeneration(), 10), formatTime(g.GetIssuedAt()), g.GetHow(), of,
						strconv.FormatUint(uint64(g.GetSizeBytes()), 10), strconv.FormatBool(g.GetActive()),
					})
				}
				if o.output == "json" {
					return printJSON(cmd.OutOrStdout(), out)
				}
				return printTable(cmd.OutOrStdout(), []string{"GENERATION", "ISSUED_AT", "HOW", "OF", "BYTES", "IN_FORCE"}, rows)
			})
		},
	}
	cmd.Flags().StringVar(&name, "name", defaultBundle, "name of the policy bundle")
	return cmd
}
