// merlon token: secrets that are shown once.

package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"merlon.dev/ca/capb"
)

func tokenCommand(o *options) *cobra.Command {
	return noun("token", "Secrets for new agents and replicas, and for readers of policy bundles", tokenCreate(o))
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
	"replica":       capb.TokenKind_TOKEN_KIND_REPLICA,
	"nested-ca":     capb.TokenKind_TOKEN_KIND_NESTED_CA,
}

// tokenUse says what to do with a fresh token.
var tokenUse = map[string]string{
	"join":          "put the token into a file on the node and name it there: merlon-agent -join-token-file FILE -root-hash ROOT_HASH",
	"bundle-reader": "it is a bearer token: merlon trust show -o pem > ca.pem; curl --cacert ca.pem -H 'Authorization: Bearer TOKEN' https://CA:8444/v1/policy/bundles/main",
	"replica":       "start the new CA on the same etcd, with the token in a file: merlon-ca -store etcd -etcd-endpoints URLS -join-address THIS_CA:8443 -join-token-file FILE -root-hash ROOT_HASH",
	"nested-ca":     "start the new CA with a store of its own, with the token in a file: merlon-ca -upstream merlon -upstream-address THIS_CA:8443 -join-token-file FILE -root-hash ROOT_HASH",
}

// tokenFlags are flags for some kinds of tokens, with an example each.
var tokenFlags = map[string]struct {
	kinds   []string
	example string
}{
	"agent":  {[]string{"join"}, "merlon token create --agent node-1"},
	"bundle": {[]string{"bundle-reader"}, "merlon token create --kind bundle-reader --bundle main"},
	"name":   {[]string{"replica", "nested-ca"}, "merlon token create --kind replica --name ca-2"},
}

// checkTokenFlags refuses flags of another kind of token, which would be
// ignored.
func checkTokenFlags(kind string, cmd *cobra.Command) error {
	for flag, of := range tokenFlags {
		if !slices.Contains(of.kinds, kind) && cmd.Flags().Changed(flag) {
			return usageError{fmt.Sprintf("--%s is for tokens of kind %s", flag, strings.Join(of.kinds, " or ")), of.example}
		}
	}
	if of := tokenFlags["name"]; slices.Contains(of.kinds, kind) && !cmd.Flags().Changed("name") {
		return usageError{"a replica or nested CA needs a name: --name", of.example}
	}
	return nil
}

func tokenCreate(o *options) *cobra.Command {
	var kind string
	var ttl time.Duration
	var req capb.CreateTokenRequest
	cmd := &cobra.Command{
		Use:   "create [--kind join|bundle-reader|replica|nested-ca]",
		Short: "Make a token for one agent, for one replica of the CA, for one nested CA, or for reading a policy bundle",
		Long: `Make a token. It is shown once; the CA keeps only a hash.

A join token works once. Give the agent the token and the root hash: it sends
the token only to a CA whose root has that hash.

A replica token works once, too, and is made on the CA that holds the root key:
it lets another CA on the same etcd issue SVIDs. Guard it like a key.

A nested-ca token does the same for a CA with a store of its own below this one.`,
		Example: `  merlon token create --agent node-1
  merlon token create --kind bundle-reader --bundle main --ttl 720h
  merlon token create --kind replica --name ca-2
  merlon token create --kind nested-ca --name eu`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var ok bool
			if req.Kind, ok = tokenKinds[kind]; !ok {
				return usageError{fmt.Sprintf("unknown kind of token %q", kind), "use --kind join, bundle-reader, replica or nested-ca"}
			}
			if err := checkTokenFlags(kind, cmd); err != nil {
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
	fl.StringVar(&kind, "kind", "join", "join, bundle-reader, replica or nested-ca")
	fl.StringVar(&req.AgentName, "agent", "", "join: name of the agent, the last segment of its SPIFFE ID (default: random)")
	fl.DurationVar(&ttl, "ttl", 0, "lifetime of the token (default 10m, 90 days for bundle-reader)")
	fl.StringVar(&req.PolicyBundle, "bundle", "", "bundle-reader: policy bundle that it may read (default main)")
	fl.StringVar(&req.ReplicaName, "name", "", "replica, nested-ca: its name among the replicas, for good")
	return cmd
}
