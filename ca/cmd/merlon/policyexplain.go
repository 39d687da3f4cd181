// merlon policy explain: what the policy says of a call that somebody has in mind.

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"merlon.dev/policy"
	"merlon.dev/policy/engine"
)

// explainedJSON is `merlon policy explain -o json`.
type explainedJSON struct {
	policy.Answer
	Policy     string        `json:"policy"`
	Generation uint64        `json:"generation,omitempty"`
	Input      *policy.Input `json:"input"`
	Details    []string      `json:"details"`
	Trace      string        `json:"trace,omitempty"`
}

// callFlags are a call on the command line.
type callFlags struct {
	from, to, protocol, method, path string
	headers                          []string
}

func policyExplain(o *options) *cobra.Command {
	var call callFlags
	var name, at string
	var how engine.How
	cmd := &cobra.Command{
		Use:   "explain [FOLDER | FILE | GENERATION] --from ID --to ID",
		Short: "Say what the policy decides about a call, and why",
		Long: `Say what a policy decides about a call, by which rule, and for a denial which
grant came nearest and what of the call keeps it from matching; grants that ended,
and dry-run grants that would match; of own Rego the expressions that do not hold,
by file and line, as OPA's tracer finds them. The policy is the one in force,
which the CA gives to the roles policy-publisher and operator; or that of a folder,
of a file of "merlon policy build", or of a generation that the CA keeps. A denial
is an answer: the exit code is 0.`,
		Example: `  merlon policy explain --from spiffe://shop.test/web --to spiffe://shop.test/orders --method POST --path /orders/1
  merlon policy explain ./policy --from spiffe://shop.test/web --to spiffe://shop.test/orders --protocol grpc --path /shop.Orders/Get
  merlon policy explain ./policy --from spiffe://shop.test/web --to spiffe://shop.test/orders --path / --header x-team:shop --trace`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			in, err := call.input()
			if err != nil {
				return err
			}
			if how.At, err = timeFlag("at", at); err != nil {
				return err
			}
			where := ""
			if len(args) == 1 {
				if where = args[0]; where == "" {
					return usageError{"the name of the policy is empty", "leave it out for the policy in force"}
				}
			}
			p, err := o.openPolicy(cmd.Context(), where, name)
			if err != nil {
				return err
			}
			return printExplained(cmd.OutOrStdout(), o, p, in, p.engine.Explain(cmd.Context(), in, how))
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&call.from, "from", "", "SPIFFE ID of the caller")
	fl.StringVar(&call.to, "to", "", "SPIFFE ID of the called service")
	fl.StringVar(&call.protocol, "protocol", "http", "http, grpc or tcp")
	fl.StringVar(&call.method, "method", "", "HTTP method (default GET)")
	fl.StringVar(&call.path, "path", "", "path, with its query if any; for grpc /package.Service/Method")
	fl.StringArrayVar(&call.headers, "header", nil, "a request header, as name:value; can be repeated")
	fl.StringVar(&name, "name", defaultBundle, "name of the policy bundle at the CA")
	fl.StringVar(&at, "at", "", "the time to decide for, as 2027-01-01T00:00:00Z (default: now)")
	fl.BoolVar(&how.Trace, "trace", false, "print OPA's whole trace, too")
	return cmd
}

// input reads the flags as ParseInput reads a line.
func (c *callFlags) input() (*policy.Input, error) {
	switch {
	case c.from == "" || c.to == "":
		return nil, usageError{"--from and --to say who calls whom", "merlon policy explain --from spiffe://shop.test/web --to spiffe://shop.test/orders --method GET --path /orders"}
	case c.protocol == string(policy.TCP) && (c.path != "" || c.method != "" || c.headers != nil):
		return nil, usageError{"a tcp connection has neither method nor path nor headers", "leave out --protocol for HTTP"}
	case c.protocol != string(policy.TCP) && c.path == "":
		return nil, usageError{"--path is missing", "for example --path /orders/1; --protocol tcp for a connection without"}
	case c.protocol == string(policy.GRPC) && c.method != "" && c.method != "POST":
		return nil, usageError{"a gRPC call's method is in its path", "--path /package.Service/Method, and no --method"}
	}
	method := map[string]string{"http": "GET", "grpc": "POST"}[c.protocol]
	if c.method != "" {
		method = c.method
	}
	headers := map[string][]string{}
	for _, h := range c.headers {
		name, text, ok := strings.Cut(h, ":")
		if !ok || name == "" {
			return nil, usageError{fmt.Sprintf("--header %q is no header", h), "for example --header x-team:shop"}
		}
		name = strings.ToLower(name)
		headers[name] = append(headers[name], strings.TrimSpace(text))
	}
	raw, err := json.Marshal(map[string]any{
		"source": c.from, "destination": c.to, "protocol": c.protocol, "method": method, "path": c.path, "headers": headers,
	})
	if err != nil {
		return nil, err
	}
	in, err := policy.ParseInput(raw)
	if err != nil {
		return nil, usageError{strings.TrimPrefix(err.Error(), "input: "), "merlon policy explain -h shows every flag and an example"}
	}
	return in, nil
}

func printExplained(w io.Writer, o *options, p *namedPolicy, in *policy.Input, x engine.Explanation) error {
	generation := p.contents.Metadata.Generation
	if o.output == "json" {
		return printJSON(w, explainedJSON{x.Answer(x.Engine), p.name, generation, in, append([]string{}, x.Details...), x.Trace})
	}
	verdict := "denied"
	if x.Allow {
		verdict = "allowed"
	}
	rule := ""
	if x.RuleID != "" {
		rule = " by " + x.RuleID
	}
	fmt.Fprintf(w, "%s: %s%s (policy %s, engine %s)\n", verdict, x.Reason, rule, p.name, x.Engine)
	fmt.Fprintf(w, "  %s -> %s, %s\n", in.Source, in.Destination, callText(in))
	for _, line := range x.Details {
		fmt.Fprintf(w, "  %s\n", line)
	}
	if x.Trace != "" {
		fmt.Fprintf(w, "OPA's trace:\n%s", x.Trace)
	}
	return nil
}

// callText is a call without its ends.
func callText(in *policy.Input) string {
	if in.Protocol == policy.TCP {
		return string(in.Protocol)
	}
	path := in.Path
	if in.Query != "" {
		path += "?" + in.Query
	}
	return fmt.Sprintf("%s %s %s", in.Protocol, in.Method, strings.Trim(strconv.Quote(path), `"`))
}
