// merlon policy status: which policy decides where, who lags, and what a candidate
// would change.

package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"merlon.dev/ca/capb"
)

// statusJSON is one policy bundle of `merlon policy status -o json`.
type statusJSON struct {
	Name       string         `json:"name"`
	Generation uint64         `json:"generation"`
	IssuedAt   *time.Time     `json:"issued_at"`
	Candidate  *candidateJSON `json:"candidate,omitempty"`
	// Comparisons and Differences count calls since the candidate's stage began.
	Comparisons []comparisonJSON `json:"comparisons"`
	Differences []differenceJSON `json:"differences"`
	Dropped     uint64           `json:"differences_dropped,omitempty"`
	Points      []pointJSON      `json:"points"`
	OPAsLeftOut uint32           `json:"opas_left_out,omitempty"`
}

// comparisonJSON counts calls to one destination.
type comparisonJSON struct {
	Destination string `json:"destination"`
	DecidedBy   string `json:"decided_by"` // "active" or "candidate"
	BothAllow   uint64 `json:"both_allow"`
	BothDeny    uint64 `json:"both_deny"`
	WouldAllow  uint64 `json:"would_allow"`
	WouldDeny   uint64 `json:"would_deny"`
}

// differenceJSON counts calls of one kind that come out differently.
type differenceJSON struct {
	Source          string `json:"source"`
	Destination     string `json:"destination"`
	Would           string `json:"would"` // "allow" or "deny": the candidate
	Reason          string `json:"reason"`
	RuleID          string `json:"rule_id,omitempty"`
	CandidateReason string `json:"candidate_reason"`
	CandidateRuleID string `json:"candidate_rule_id,omitempty"`
	Calls           uint64 `json:"calls"`
}

// pointJSON is a place where policy decides.
type pointJSON struct {
	Kind         string     `json:"kind"`
	SPIFFEID     string     `json:"spiffe_id"`
	AgentID      string     `json:"agent_id,omitempty"`
	PID          int32      `json:"pid,omitempty"`
	Connected    bool       `json:"connected"`
	Replica      string     `json:"replica,omitempty"`
	Generation   uint64     `json:"generation"`
	Candidate    uint64     `json:"candidate_generation,omitempty"`
	LaggingSince *time.Time `json:"lagging_since,omitempty"`
	Fault        string     `json:"fault,omitempty"`
	// Of a stock OPA, by its own word but for who uploaded it.
	Uploader string            `json:"uploader,omitempty"`
	Instance string            `json:"instance,omitempty"`
	Labels   map[string]string `json:"labels,omitempty"`
	HeardAt  *time.Time        `json:"heard_at,omitempty"`
}

func policyStatus(o *options) *cobra.Command {
	var name string
	var bound time.Duration
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show which policy decides where, who lags, and what a candidate would change",
		Long: `Show the generation in force of each policy bundle, and at every agent, and every
process below it that decides by itself, which one decides there and since when it
lags; likewise at every stock OPA that sends its status to the CA and was heard in the
last ten minutes. Of a candidate its stage, and how many calls it would have allowed or
denied otherwise, by source, destination and rule.

The exit status is 3 where something has lagged for longer than --lag-bound; an agent
that is not connected counts until its X509-SVID ends. Agents and OPAs of other replicas of
the CA are as those wrote them down last.`,
		Example: `  merlon policy status
  merlon policy status --lag-bound 10s -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if bound < 0 {
				return usageError{"--lag-bound is negative", "for example --lag-bound 1m"}
			}
			return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
				resp, err := ca.GetPolicyStatus(cmd.Context(), &capb.GetPolicyStatusRequest{Name: name})
				if err != nil {
					return rolloutHint(err)
				}
				all := []statusJSON{}
				for _, s := range resp.GetStatuses() {
					all = append(all, newStatusJSON(s))
				}
				if err := o.printStatuses(cmd.OutOrStdout(), all); err != nil {
					return err
				}
				return tooLate(cmd.ErrOrStderr(), all, bound, time.Now())
			})
		},
	}
	cmd.Flags().StringVar(&name, "name", "", "name of a policy bundle; all without it")
	cmd.Flags().DurationVar(&bound, "lag-bound", time.Minute, "how long something may lag")
	return cmd
}

func newStatusJSON(s *capb.PolicyStatus) statusJSON {
	b := s.GetPolicyBundle()
	j := statusJSON{
		Name: b.GetName(), Generation: b.GetGeneration(), IssuedAt: timeOf(s.GetIssuedAt()), Candidate: newCandidateJSON(b.GetCandidate()),
		Comparisons: []comparisonJSON{}, Differences: []differenceJSON{}, Points: []pointJSON{}, Dropped: s.GetCounts().GetDifferencesDropped(), OPAsLeftOut: s.GetOpasLeftOut(),
	}
	for _, c := range s.GetCounts().GetComparisons() {
		by := "active"
		if c.GetCanary() {
			by = "candidate"
		}
		j.Comparisons = append(j.Comparisons, comparisonJSON{c.GetDestination(), by, c.GetBothAllow(), c.GetBothDeny(), c.GetWouldAllow(), c.GetWouldDeny()})
	}
	for _, d := range s.GetCounts().GetDifferences() {
		would := "deny"
		if d.GetCandidateAllows() {
			would = "allow"
		}
		j.Differences = append(j.Differences, differenceJSON{
			d.GetSource(), d.GetDestination(), would, d.GetReason(), d.GetRuleId(), d.GetCandidateReason(), d.GetCandidateRuleId(), d.GetCalls(),
		})
	}
	for _, p := range s.GetPoints() {
		j.Points = append(j.Points, pointJSON{
			p.GetKind(), p.GetSpiffeId(), p.GetAgentId(), p.GetPid(), p.GetConnected(), p.GetReplica(), p.GetGeneration(), p.GetCandidateGeneration(),
			timeOf(p.GetLaggingSince()), p.GetFault(), p.GetUploader(), p.GetInstance(), p.GetLabels(), timeOf(p.GetHeardAt()),
		})
	}
	return j
}

func (o *options) printStatuses(w io.Writer, all []statusJSON) error {
	if o.output == "json" {
		return printJSON(w, all)
	}
	for i := range all {
		if i > 0 {
			fmt.Fprintln(w)
		}
		if err := all[i].print(w); err != nil {
			return err
		}
	}
	return nil
}

func (s *statusJSON) print(w io.Writer) error {
	fields := []string{"policy", s.Name, "generation", number(s.Generation), "issued_at", s.IssuedAt.Format(time.RFC3339)}
	if c := s.Candidate; c != nil {
		fields = append(fields, "candidate", number(c.Generation), "stage", c.where(), "since", c.Since.Format(time.RFC3339), "compared", s.compared())
		if a := c.Alarm; a != nil {
			fields = append(fields, "alarm", fmt.Sprintf("paused at %s: of %d calls to %s that generation %d allows it denied %d",
				a.At.Format(time.RFC3339), a.Allowed, cmp.Or(a.Destination, "all services"), s.Generation, a.Denied))
		}
	}
	if err := printFields(w, fields...); err != nil {
		return err
	}
	if len(s.Differences) > 0 {
		var rows [][]string
		for _, d := range s.Differences {
			rows = append(rows, []string{d.Would, d.Source, d.Destination, printable(d.Reason + " " + d.RuleID), printable(d.CandidateReason + " " + d.CandidateRuleID), number(d.Calls)})
		}
		fmt.Fprintln(w)
		if err := printTable(w, []string{"WOULD", "SOURCE", "DESTINATION", "IN_FORCE", "CANDIDATE", "CALLS"}, rows); err != nil {
			return err
		}
	}
	if len(s.Points) == 0 {
		return nil
	}
	var rows [][]string
	for _, p := range s.Points {
		lagging, instance := "", printable(p.Instance)
		if p.LaggingSince != nil {
			lagging = p.LaggingSince.Format(time.RFC3339)
		}
		if p.PID != 0 {
			instance = strconv.Itoa(int(p.PID))
		}
		rows = append(rows, []string{p.Kind, cmp.Or(p.SPIFFEID, p.Uploader), instance, strconv.FormatBool(p.Connected), number(p.Generation), number(p.Candidate), lagging, printable(p.Fault)})
	}
	if s.OPAsLeftOut > 0 {
		rows = append(rows, []string{"opa", fmt.Sprintf("and %d more", s.OPAsLeftOut), "", "", "", "", "", ""})
	}
	fmt.Fprintln(w)
	return printTable(w, []string{"KIND", "SPIFFE_ID", "INSTANCE", "CONNECTED", "GENERATION", "CANDIDATE", "LAGGING_SINCE", "FAULT"}, rows)
}

// compared sums the counts up in words.
func (s *statusJSON) compared() string {
	var calls, allow, deny uint64
	for _, c := range s.Comparisons {
		calls, allow, deny = calls+c.BothAllow+c.BothDeny+c.WouldAllow+c.WouldDeny, allow+c.WouldAllow, deny+c.WouldDeny
	}
	return fmt.Sprintf("%d calls: it would allow %d more, and deny %d more", calls, allow, deny)
}

// printable is s on one line, without what steers a terminal: agents and OPAs have said
// it.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, s)
}

// number is n, empty for 0.
func number(n uint64) string {
	if n == 0 {
		return ""
	}
	return strconv.FormatUint(n, 10)
}

// tooLate is exit status 3 where something has lagged for longer than bound at now.
func tooLate(w io.Writer, all []statusJSON, bound time.Duration, now time.Time) error {
	late := 0
	for _, s := range all {
		late += len(slices.DeleteFunc(slices.Clone(s.Points), func(p pointJSON) bool {
			return p.LaggingSince == nil || now.Sub(*p.LaggingSince) <= bound
		}))
	}
	if late == 0 {
		return nil
	}
	fmt.Fprintf(w, "merlon: %d of the places where policy decides lag for longer than %s\nhint: FAULT says why; the log and /ready of an agent that is not connected say what keeps it from the CA\n", late, bound)
	return silentError{exitUnhealthy}
}
