// merlon policy diff: which calls one policy allows and another does not.

package main

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"merlon.dev/policy"
	"merlon.dev/policy/diff"
)

// diffJSON is `merlon policy diff -o json`.
type diffJSON struct {
	A string `json:"a"`
	B string `json:"b"`
	// Added and Removed are exact for grants, which are all of the policy where
	// OwnRego is absent.
	Added   []diff.Access `json:"added"`
	Removed []diff.Access `json:"removed"`
	Notes   []string      `json:"notes"`
	OwnRego *diff.Sample  `json:"own_rego_sampled,omitempty"`
}

func policyDiff(o *options) *cobra.Command {
	var name, at, failOn string
	cmd := &cobra.Command{
		Use:   "diff A B",
		Short: "Say which calls policy B allows and policy A does not, and the other way round",
		Long: `Compare what two policies allow. Each is a folder, a file of "merlon policy build",
or the number of a generation that the CA keeps.

What grants allow is compared exactly, whatever the grants are called: sets of calls
by source, destination, protocol, methods and paths, with precedence of deny and of
what ended (--at asks for another time); dry-run grants decide nothing and are notes.
Where a policy has Rego of its own, both are asked about calls made of their own
words besides. That is a sample: it shows differences, and that it shows none
proves none away, but for the destinations whose compiled policies are the same.

The exit code is 0 whether they differ or not; with --fail-on added, removed or any
it is 1 where access was added, was removed, or either.`,
		Example: `  merlon policy diff 3 ./policy
  merlon policy diff ./before ./after --fail-on added -o json`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if failOn != "" && failOn != "added" && failOn != "removed" && failOn != "any" {
				return usageError{fmt.Sprintf("unknown --fail-on %q", failOn), "use --fail-on added, removed or any"}
			}
			out, err := o.diffPolicies(cmd, args, name, at)
			if err != nil {
				return err
			}
			if err := printDiff(cmd.OutOrStdout(), o, out); err != nil {
				return err
			}
			added, removed := len(out.Added), len(out.Removed)
			if out.OwnRego != nil {
				added, removed = added+len(out.OwnRego.Added), removed+len(out.OwnRego.Removed)
			}
			switch {
			case added > 0 && (failOn == "added" || failOn == "any"):
				return errors.New("access was added")
			case removed > 0 && (failOn == "removed" || failOn == "any"):
				return errors.New("access was removed")
			}
			return nil
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&name, "name", defaultBundle, "name of the policy bundle at the CA")
	fl.StringVar(&at, "at", "", "the time to compare for, as 2027-01-01T00:00:00Z (default: now)")
	fl.StringVar(&failOn, "fail-on", "", "added, removed or any: end with exit code 1 on such a difference")
	return cmd
}

func (o *options) diffPolicies(cmd *cobra.Command, args []string, name, at string) (*diffJSON, error) {
	now, err := timeFlag("at", at)
	if err != nil {
		return nil, err
	}
	var both [2]*namedPolicy
	for i, where := range args {
		if where == "" {
			return nil, usageError{"the name of a policy is empty", "usage: " + cmd.UseLine()}
		}
		if both[i], err = o.openPolicy(cmd.Context(), where, name); err != nil {
			return nil, err
		}
	}
	d, err := diff.Grants(both[0].contents.Grants, both[1].contents.Grants, now)
	if err != nil {
		return nil, err
	}
	out := &diffJSON{
		A: both[0].name, B: both[1].name, Notes: append([]string{}, d.Notes...),
		Added: append([]diff.Access{}, d.Added...), Removed: append([]diff.Access{}, d.Removed...), // none is [], not null
	}
	if both[0].engine.OwnRego() || both[1].engine.OwnRego() {
		if out.OwnRego, err = diff.Policies(cmd.Context(), both[0].engine, both[1].engine); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func printDiff(w io.Writer, o *options, d *diffJSON) error {
	if o.output == "json" {
		return printJSON(w, d)
	}
	what := "by grants"
	if d.OwnRego == nil {
		what = "in all, for the policies are grants alone"
	}
	fmt.Fprintf(w, "from %s to %s, %s: %d sets of calls added, %d removed\n", d.A, d.B, what, len(d.Added), len(d.Removed))
	for _, rows := range []struct {
		mark string
		of   []diff.Access
	}{{"+", d.Added}, {"-", d.Removed}} {
		for i := range rows.of {
			fmt.Fprintf(w, "%s %s\n", rows.mark, accessText(&rows.of[i]))
		}
	}
	for _, note := range d.Notes {
		fmt.Fprintf(w, "note: %s\n", note)
	}
	if d.OwnRego != nil {
		printSample(w, d.OwnRego)
	}
	return nil
}

func printSample(w io.Writer, s *diff.Sample) {
	fmt.Fprintf(w, "with own Rego, sampled: %d calls to %d destinations; a sample proves no difference away\n", s.Calls, s.Destinations)
	for _, rows := range []struct {
		mark string
		of   []diff.Finding
	}{{"+", s.Added}, {"-", s.Removed}} {
		for _, f := range rows.of {
			fmt.Fprintf(w, "%s %s -> %s: %s, before: %s; %d calls, such as %s\n", rows.mark, f.Source, place(f.Destination),
				strings.TrimSpace(string(f.After)+" "+f.AfterRule), strings.TrimSpace(string(f.Before)+" "+f.BeforeRule), f.Calls, callText(f.Example))
		}
	}
	for _, id := range s.Unchanged {
		fmt.Fprintf(w, "unchanged for every call to %s\n", place(id))
	}
}

func place(id string) string {
	if id == anyOther {
		return "any other"
	}
	return id
}

// accessText is a set of calls in one line.
func accessText(a *diff.Access) string {
	s := fmt.Sprintf("%s -> %s, %s", items([]string{a.Source}, a.SourceExcept), items([]string{a.Destination}, a.DestinationExcept), a.Protocol)
	switch a.Protocol {
	case policy.HTTP:
		s += fmt.Sprintf(", method %s, path %s", items(a.Methods, a.MethodsExcept), items(a.Paths, a.PathsExcept))
	case policy.GRPC:
		s += fmt.Sprintf(", service %s, method %s", items(a.Services, a.ServicesExcept), items(a.Methods, a.MethodsExcept))
	}
	return s
}

func items(list, except []string) string {
	s := strings.Join(list, " ")
	if list == nil || len(list) == 1 && list[0] == "*" {
		s = "any"
	}
	if len(except) > 0 {
		s += " but " + strings.Join(except, " ")
	}
	return s
}
