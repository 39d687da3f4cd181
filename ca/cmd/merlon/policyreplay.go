// merlon policy replay: what a policy would have decided otherwise.

package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"merlon.dev/policy/replay"
)

// maxBadLines is how many lines that cannot be read are named.
const maxBadLines = 100

// replayJSON is `merlon policy replay -o json`.
type replayJSON struct {
	Policy string `json:"policy"`
	*replay.Report
}

func policyReplay(o *options) *cobra.Command {
	var logs []string
	var where, name string
	cmd := &cobra.Command{
		Use:   "replay --log FILE --bundle POLICY",
		Short: "Say which decisions of a log a policy would have made otherwise",
		Long: `Read a decision log in OPA's event format, as an agent or a stock OPA writes it:
JSON lines or lists, plain or gzip, "-" for standard input; and ask a policy about
each call, for the time at which it was decided. The policy is a folder, a file of
"merlon policy build", or the number of a generation that the CA keeps.

What comes out otherwise is counted by source, destination and rule, with examples.
Where the log has only some of the calls that were allowed, it says for how many
each stands, and so does the count; where it lacks parts of a call that the policy
may read, which it says for each group, the policy may have decided otherwise. The log
is read as it comes, however long it is.

Lines that cannot be read are named on standard error, and the exit code is then 1;
that decisions change is no failure.`,
		Example: `  merlon policy replay --log decisions.jsonl --bundle ./policy
  zcat decisions-*.gz | merlon policy replay --log - --bundle 7 -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if len(logs) == 0 || where == "" {
				return usageError{"--log and --bundle say which calls and which policy", "merlon policy replay --log decisions.jsonl --bundle ./policy"}
			}
			p, err := o.openPolicy(cmd.Context(), where, name)
			if err != nil {
				return err
			}
			report, incomplete := replayLogs(cmd, p, logs)
			if report == nil {
				return incomplete
			}
			if err := printReplay(cmd.OutOrStdout(), o, p.name, report); err != nil {
				return err
			}
			if incomplete != nil {
				return incomplete
			}
			if report.Bad > 0 {
				return hintError{fmt.Errorf("%d lines could not be read", report.Bad), "a line is an event of OPA's decision log, or a list of them; what could be read is in the report"}
			}
			return nil
		},
	}
	fl := cmd.Flags()
	fl.StringArrayVar(&logs, "log", nil, `decision log to read, "-" for standard input; can be repeated`)
	fl.StringVar(&where, "bundle", "", "the policy to ask: a folder, a file of merlon policy build, or a generation")
	fl.StringVar(&name, "name", defaultBundle, "name of the policy bundle at the CA")
	return cmd
}

// replayLogs reports what it could read, also where the error says what it could not.
func replayLogs(cmd *cobra.Command, p *namedPolicy, logs []string) (*replay.Report, error) {
	stderr, file, named := cmd.ErrOrStderr(), "", 0
	r := replay.New(p.engine, func(line int, err error) {
		switch named++; {
		case named <= maxBadLines:
			fmt.Fprintf(stderr, "%s:%d: %v\n", file, line, err)
		case named == maxBadLines+1:
			fmt.Fprintln(stderr, "more lines could not be read")
		}
	})
	for _, file = range logs {
		if err := replayFile(cmd, r, file); err != nil {
			if _, usage := errors.AsType[usageError](err); usage {
				return nil, err
			}
			return r.Report(), err
		}
	}
	return r.Report(), nil
}

func replayFile(cmd *cobra.Command, r *replay.Replayer, file string) error {
	in := cmd.InOrStdin()
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return usageError{fmt.Sprintf("open the decision log: %v", err), "--log names a file, or - for standard input"}
		}
		defer f.Close()
		in = f
	}
	if err := r.Read(cmd.Context(), in); err != nil {
		return fmt.Errorf("read %s: %w", file, err)
	}
	return nil
}

func printReplay(w io.Writer, o *options, name string, r *replay.Report) error {
	if o.output == "json" {
		return printJSON(w, replayJSON{name, r})
	}
	fmt.Fprintf(w, "asked %s about %d events, which stand for %.0f calls\n", name, r.Events, r.Calls)
	gained, lost := 0, 0
	for _, g := range r.Changed {
		if g.After.Allow {
			gained += g.Events
		} else {
			lost += g.Events
		}
	}
	fmt.Fprintf(w, "%d would be allowed that were denied, %d denied that were allowed\n", gained, lost)
	for _, g := range r.Changed {
		printGroup(w, &g)
	}
	if len(r.Otherwise) > 0 {
		fmt.Fprintln(w, "the same answer for another reason or by another rule:")
	}
	for _, g := range r.Otherwise {
		printGroup(w, &g)
	}
	printCaveats(w, r)
	return nil
}

func printGroup(w io.Writer, g *replay.Group) {
	mark := map[bool]string{true: "+", false: "-"}[g.After.Allow]
	if g.Before.Allow == g.After.Allow {
		mark = "="
	}
	fmt.Fprintf(w, "%s %s -> %s: %s, before: %s; %d events, %.0f calls", mark, g.Source, place(g.Destination), verdictText(g.After), verdictText(g.Before), g.Events, g.Calls)
	if g.Incomplete > 0 {
		fmt.Fprintf(w, ", %d of them not whole", g.Incomplete)
	}
	fmt.Fprintln(w)
	for _, e := range g.Examples {
		fmt.Fprintf(w, "    line %d, %s %s: %s\n", e.Line, e.Timestamp.UTC().Format(time.RFC3339), e.DecisionID, callText(e.Input))
	}
}

func verdictText(v replay.Verdict) string {
	return strings.TrimSpace(string(v.Reason) + " " + v.RuleID)
}

// printCaveats says what the answer does not cover.
func printCaveats(w io.Writer, r *replay.Report) {
	if r.Incomplete > 0 {
		var parts []string
		for _, part := range slices.Sorted(maps.Keys(r.IncompleteParts)) {
			parts = append(parts, fmt.Sprintf("%s %d", part, r.IncompleteParts[part]))
		}
		fmt.Fprintf(w, "not whole: %d events were masked or cut in what the policy may read (%s), and may come out otherwise\n", r.Incomplete, strings.Join(parts, ", "))
	}
	if r.Sampled > 0 {
		fmt.Fprintf(w, "sampled: %d allowed events stand for several calls each\n", r.Sampled)
	}
	if r.Erased > 0 {
		fmt.Fprintf(w, "not asked: %d events whose call was erased, or has bytes that are no text\n", r.Erased)
	}
	for _, reason := range slices.Sorted(maps.Keys(r.Before)) {
		fmt.Fprintf(w, "not asked: %d events that were %s, which stands before any policy\n", r.Before[reason], reason)
	}
	if r.Other > 0 {
		fmt.Fprintf(w, "not asked: %d events that are not about calls\n", r.Other)
	}
	if r.Missing > 0 {
		fmt.Fprintf(w, "missing: %d decisions that the log itself says it lacks\n", r.Missing)
	}
	if r.Ungrouped > 0 {
		fmt.Fprintf(w, "not shown: %d events that come out otherwise, in more groups than are kept\n", r.Ungrouped)
	}
}
