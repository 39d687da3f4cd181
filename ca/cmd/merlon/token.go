// merlon token: secrets that are shown once.

package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"merlon.dev/ca/capb"
)

func tokenCommand(o *options) *cobra.Command {
	return noun("token", "Secrets for new agents and for readers of policy bundles", tokenCreate(o))
}

// tokenJSON is a fresh token as scripts see it.
type tokenJSON struct {
	Token     string     `json:"token"`
	RootHash  string     `json:"root_hash,omitempty"`
	AgentID   string     `json:"agent_id,omitempty"`
	ExpiresAt *time.Time `json:"expires_at"`
}

var tokenKinds = map[string]capb.TokenKind{
	"join":          capb.TokenKind_TOKEN_KIND_JOIN,
	"bundle-reader": capb.TokenKind_TOKEN_KIND_BUNDLE_READER,
}

func tokenCreate(o *options) *cobra.Command {
	var kind string
	var ttl time.Duration
	var req capb.CreateTokenRequest
	cmd := &cobra.Command{
		Use:   "create [--kind join|bundle-reader]",
		Short: "Make a join token for one agent, or a token that reads a policy bundle",
		Long: `Make a token. It is shown once; the CA keeps only a hash.

A join token works once. Give the agent the token and the root hash: it sends
the token only to a CA whose root has that hash.`,
		Example: `  merlon token create --agent node-1
  merlon token create --kind bundle-reader --bundle main --ttl 720h`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var ok bool
			if req.Kind, ok = tokenKinds[kind]; !ok {
				return usageError{fmt.Sprintf("unknown kind of token %q", kind), "use --kind join or --kind bundle-reader"}
			}
			if ttl < 0 || ttl%time.Second != 0 {
				return usageError{"--ttl is a positive number of whole seconds", "for example --ttl 10m"}
			}
			req.TtlSeconds = int64(ttl / time.Second)
			return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
				resp, err := ca.CreateToken(cmd.Context(), &req)
				if err != nil {
					return err
				}
				if o.output == "json" {
					return printJSON(cmd.OutOrStdout(), tokenJSON{resp.GetToken(), resp.GetRootHash(), resp.GetAgentId(), timeOf(resp.GetExpiresAt())})
				}
				return printFields(cmd.OutOrStdout(), "token", resp.GetToken(), "root_hash", resp.GetRootHash(),
					"agent_id", resp.GetAgentId(), "expires_at", formatTime(resp.GetExpiresAt()))
			})
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&kind, "kind", "join", "join or bundle-reader")
	fl.StringVar(&req.AgentName, "agent", "", "join: name of the agent, the last segment of its SPIFFE ID (default: random)")
	fl.DurationVar(&ttl, "ttl", 0, "lifetime of the token (default 10m for join, 90 days for bundle-reader)")
	fl.StringVar(&req.PolicyBundle, "bundle", "", "bundle-reader: policy bundle that it may read (default main)")
	return cmd
}
