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

// tokenUse says what to do with a fresh token.
var tokenUse = map[string]string{
	"join":          "put the token into a file on the node and name it there: merlon-agent -join-token-file FILE -root-hash ROOT_HASH",
	"bundle-reader": "it is a bearer token: merlon trust show -o pem > ca.pem; curl --cacert ca.pem -H 'Authorization: Bearer TOKEN' https://CA:8444/v1/policy/bundles/main",
}

// checkTokenFlags refuses flags of the other kind of token, which would be
// ignored.
func checkTokenFlags(kind capb.TokenKind, cmd *cobra.Command) error {
	if kind == capb.TokenKind_TOKEN_KIND_JOIN && cmd.Flags().Changed("bundle") {
		return usageError{"--bundle is for tokens that read a policy bundle", "merlon token create --kind bundle-reader --bundle main"}
	}
	if kind == capb.TokenKind_TOKEN_KIND_BUNDLE_READER && cmd.Flags().Changed("agent") {
		return usageError{"--agent is for join tokens", "merlon token create --agent node-1"}
	}
	return nil
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
			if err := checkTokenFlags(req.GetKind(), cmd); err != nil {
				return err
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
				if err := printFields(cmd.OutOrStdout(), "token", resp.GetToken(), "root_hash", resp.GetRootHash(),
					"agent_id", resp.GetAgentId(), "expires_at", formatTime(resp.GetExpiresAt())); err != nil {
					return err
				}
				_, err = fmt.Fprintln(cmd.ErrOrStderr(), "hint:", tokenUse[kind])
				return err
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
