// merlon policy test: the tests beside a policy, and what of it they reach.

package main

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"merlon.dev/policy/bundle"
	"merlon.dev/policy/engine"
)

// testedJSON is `merlon policy test --coverage -o json`; without --coverage the tests
// alone are printed.
type testedJSON struct {
	Tests    []engine.TestResult    `json:"tests"`
	Coverage *engine.CoverageReport `json:"coverage"`
}

func policyTest(o *options) *cobra.Command {
	var coverage bool
	var threshold float64
	cmd := &cobra.Command{
		Use:   "test FOLDER",
		Short: "Run the tests beside a policy: grants_test.yaml and *_test.rego",
		Long: `Run the tests beside a policy: the calls of grants_test.yaml, and the rules test_… of
*_test.rego. A call that comes out otherwise than its test wants is explained as
"merlon policy explain" does, a Rego test that is not true by the expressions that
do not hold.

--coverage says which grants decided the call of no test in grants_test.yaml (a
dry-run grant has to match one), and which lines of own Rego no test evaluated.
With --threshold the command also fails where less than that many percent of the
grants, or of the lines, were reached.`,
		Example: `  merlon policy test ./policy
  merlon policy test ./policy --coverage --threshold 80 -o json`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			limited := cmd.Flags().Changed("threshold")
			if threshold < 0 || threshold > 100 {
				return usageError{fmt.Sprintf("--threshold %g is no percentage", threshold), "for example --threshold 80"}
			}
			results, reached, err := runPolicyTests(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			failed, err := o.printTests(cmd.OutOrStdout(), results, reached, coverage || limited)
			switch {
			case err != nil:
				return err
			case failed > 0:
				return fmt.Errorf("%d of %d policy tests failed", failed, len(results))
			case len(results) == 0:
				return hintError{fmt.Errorf("%s has no tests", args[0]), "write " + filepath.Join(args[0], bundle.TestsName) + ": a list of {name, source, destination, protocol, method, path, want}"}
			case limited:
				return belowThreshold(reached, threshold)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&coverage, "coverage", false, "say what of the policy no test reaches")
	cmd.Flags().Float64Var(&threshold, "threshold", 0, "fail where less than this percentage of grants, or of lines of Rego, is reached; implies --coverage")
	return cmd
}

func belowThreshold(r *engine.CoverageReport, threshold float64) error {
	var below []string
	if r.Grants.Percent < threshold {
		below = append(below, fmt.Sprintf("%.1f%% of the grants", r.Grants.Percent))
	}
	if r.Rego.Percent < threshold {
		below = append(below, fmt.Sprintf("%.1f%% of the lines of Rego", r.Rego.Percent))
	}
	if below == nil {
		return nil
	}
	return hintError{fmt.Errorf("tests reach %s; --threshold asks for %g%%", strings.Join(below, " and "), threshold), "the report names what no test reaches"}
}

func runPolicyTests(ctx context.Context, dir string) ([]engine.TestResult, *engine.CoverageReport, error) {
	f, e, err := loadFolder(ctx, dir)
	if err != nil {
		return nil, nil, err
	}
	reached := engine.NewCoverage(e, source(f))
	results := []engine.TestResult{}
	if f.GrantTests != nil {
		if results, err = e.RunGrantTests(ctx, bundle.TestsName, f.GrantTests, reached); err != nil {
			return nil, nil, err
		}
	}
	if len(f.Tests) > 0 {
		rego, err := engine.RunRegoTests(ctx, source(f), f.Tests, reached)
		if err != nil {
			return nil, nil, err
		}
		results = append(results, rego...)
	}
	report, err := reached.Report()
	return results, report, err
}

func (o *options) printTests(w io.Writer, results []engine.TestResult, reached *engine.CoverageReport, coverage bool) (failed int, err error) {
	for _, r := range results {
		if !r.Pass {
			failed++
		}
	}
	switch {
	case o.output == "json" && coverage:
		return failed, printJSON(w, testedJSON{results, reached})
	case o.output == "json":
		return failed, printJSON(w, results)
	}
	for _, r := range results {
		verdict := "PASS"
		if !r.Pass {
			verdict = "FAIL"
		}
		fmt.Fprintf(w, "%s %s:%d %s\n", verdict, r.File, r.Line, r.Name)
		if r.Detail != "" {
			fmt.Fprintf(w, "     %s\n", r.Detail)
		}
	}
	fmt.Fprintf(w, "%d passed, %d failed\n", len(results)-failed, failed)
	if coverage {
		printCoverage(w, reached)
	}
	return failed, nil
}

func printCoverage(w io.Writer, r *engine.CoverageReport) {
	fmt.Fprintf(w, "grants: %d of %d decided a call of %s (%.1f%%)\n", r.Grants.Covered, r.Grants.Of, bundle.TestsName, r.Grants.Percent)
	for _, id := range r.Grants.NotCovered {
		fmt.Fprintf(w, "     not reached: grant %s\n", id)
	}
	fmt.Fprintf(w, "lines of Rego: %d of %d were evaluated (%.1f%%)\n", r.Rego.Covered, r.Rego.Of, r.Rego.Percent)
	for _, where := range r.Rego.NotCovered {
		fmt.Fprintf(w, "     not reached: %s\n", where)
	}
}
