// merlon replica: the processes of a replicated CA.

package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
)

func replicaCommand(o *options) *cobra.Command {
	return noun("replica", "The replicas of the CA, and the CAs nested below it", replicaList(o), replicaEvict(o))
}

// replicaJSON is a replica as scripts see it.
type replicaJSON struct {
	Name        string     `json:"name"`
	RootHolder  bool       `json:"root_holder"`
	Self        bool       `json:"self"`
	JoinedAt    *time.Time `json:"joined_at"`
	AuthorityID string     `json:"authority_id"`
	NotAfter    *time.Time `json:"not_after"`
	JWTKeyID    string     `json:"jwt_key_id"`
	PolicyKeyID string     `json:"policy_key_id,omitempty"`
	Realm       uint32     `json:"realm,omitempty"` // of a nested CA
}

func newReplicaJSON(r *capb.CAReplica) replicaJSON {
	return replicaJSON{
		r.GetName(), r.GetRootHolder(), r.GetSelf(), timeOf(r.GetJoinedAt()), r.GetAuthorityId(), timeOf(r.GetNotAfter()),
		r.GetJwtKeyId(), r.GetPolicyKeyId(), r.GetRealm(),
	}
}

// replicaRole says in a word what sets a replica apart.
func replicaRole(r *capb.CAReplica) string {
	role := "replica"
	switch {
	case r.GetRootHolder():
		role = "root holder"
	case r.GetRealm() != 0:
		role = fmt.Sprintf("nested CA, realm %d", r.GetRealm())
	}
	if r.GetSelf() {
		role += ", answers"
	}
	return role
}

func replicaList(o *options) *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Short:   "List the replicas of the CA, and the CAs nested below it, with their authorities",
		Example: "  merlon replica list",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
				resp, err := ca.ListReplicas(cmd.Context(), &capb.ListReplicasRequest{})
				if err != nil {
					return err
				}
				if o.output == "json" {
					out := make([]replicaJSON, 0, len(resp.GetReplicas()))
					for _, r := range resp.GetReplicas() {
						out = append(out, newReplicaJSON(r))
					}
					return printJSON(cmd.OutOrStdout(), out)
				}
				var rows [][]string
				for _, r := range resp.GetReplicas() {
					rows = append(rows, []string{r.GetName(), replicaRole(r), formatTime(r.GetJoinedAt()), r.GetAuthorityId(), formatTime(r.GetNotAfter())})
				}
				return printTable(cmd.OutOrStdout(), []string{"NAME", "ROLE", "JOINED_AT", "AUTHORITY_ID", "NOT_AFTER"}, rows)
			})
		},
	}
}

func replicaEvict(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "evict NAME",
		Short: "Withdraw everything that a replica, or a nested CA, was given",
		Long: `Withdraw what a replica was given: every SVID under its authorities is revoked,
its JWT key leaves the trust bundle, and its policy key is forgotten; policy
bundles that it signed are signed again. The replica stops serving.

Workloads get new SVIDs at once. An agent whose own SVID came from the replica
needs a new join token: to retire a replica without that, stop it, wait for one
agent_svid_ttl (1h by default), and evict it then. Take its access to etcd away,
too: this command cannot.

A nested CA is withdrawn in the same way: everything below it is refused.`,
		Example: "  merlon replica evict ca-2",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
				resp, err := ca.EvictReplica(cmd.Context(), &capb.EvictReplicaRequest{Name: args[0]})
				if err != nil {
					if status.Code(err) == codes.FailedPrecondition {
						return hintError{err, "merlon replica list shows which one holds the root key, and which one answers"}
					}
					return listHint(err, "merlon replica list")
				}
				if o.output == "json" {
					return printJSON(cmd.OutOrStdout(), newReplicaJSON(resp.GetReplica()))
				}
				if err := printFields(cmd.OutOrStdout(), "evicted", resp.GetReplica().GetName(),
					"authority_id", resp.GetReplica().GetAuthorityId(), "jwt_key_id", resp.GetReplica().GetJwtKeyId()); err != nil {
					return err
				}
				if resp.GetReplica().GetRealm() != 0 {
					return nil
				}
				_, err = fmt.Fprintln(cmd.ErrOrStderr(), "hint: take the replica's access to etcd away, too: revoke its client certificate or its role there")
				return err
			})
		},
	}
}
