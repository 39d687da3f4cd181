// merlon policy push and key: what of policy needs a running CA.

package main

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
)

// policyNoun joins the verbs that work on a folder with those that need a CA.
func policyNoun(o *options) *cobra.Command {
	cmd := policyCommand(o)
	cmd.Args, cmd.RunE = unknownCommand, showHelp
	cmd.AddCommand(policyPush(o), policyCanary(o), policyPause(o), policyPromote(o), policyAbort(o), policyRollback(o),
		policyHistory(o), policyStatus(o), policyKey(o))
	return cmd
}

// defaultBundle is the policy bundle that agents follow unless told otherwise.
const defaultBundle = "main"

// pushedJSON is `merlon policy push -o json`.
type pushedJSON struct {
	Name       string `json:"name"`
	Generation uint64 `json:"generation"`
	ETag       string `json:"etag"`
}

func policyPush(o *options) *cobra.Command {
	var name string
	var wait time.Duration
	var candidate bool
	cmd := &cobra.Command{
		Use:   "push FOLDER",
		Short: "Check a policy folder, have the CA sign it, and put it into force everywhere",
		Long: `Check a policy folder, have the CA give it the next generation, sign it and
send it to every agent. The command ends once each connected agent decides by
it, or after --wait, and then names those that do not yet.

With --candidate it is not put into force, but evaluated beside the policy that
is, wherever calls are decided: merlon policy status counts what it would have
allowed and denied. What comes next is merlon policy canary, promote or abort.
Any other push or rollback ends the candidate.`,
		Example: `  merlon policy push ./policy
  merlon policy push ./policy --candidate
  merlon policy push ./policy --ca ca.example.org:8443`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if wait < 0 {
				return usageError{"--wait is negative", "for example --wait 30s; 0 does not wait"}
			}
			raw, err := buildFolder(args[0])
			if err != nil {
				return err
			}
			return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
				resp, err := ca.PushPolicy(cmd.Context(), &capb.PushPolicyRequest{Name: name, Bundle: raw, Candidate: candidate})
				if err != nil {
					return pushRefused(err)
				}
				if resp.GetName() == defaultBundle && !candidate { // agents acknowledge the bundle that they follow
					if err := awaitPolicy(cmd.Context(), ca, resp.GetGeneration(), wait, cmd.ErrOrStderr()); err != nil {
						return err
					}
				}
				if o.output == "json" {
					return printJSON(cmd.OutOrStdout(), pushedJSON{resp.GetName(), resp.GetGeneration(), resp.GetEtag()})
				}
				return printFields(cmd.OutOrStdout(), "name", resp.GetName(), "generation", strconv.FormatUint(resp.GetGeneration(), 10), "etag", resp.GetEtag())
			})
		},
	}
	cmd.Flags().StringVar(&name, "name", defaultBundle, "name of the policy bundle")
	cmd.Flags().BoolVar(&candidate, "candidate", false, "try it beside the policy in force, which goes on deciding")
	cmd.Flags().DurationVar(&wait, "wait", 5*time.Second, "how long to wait for the agents; 0 does not wait")
	return cmd
}

// pushRefused tells a policy that the CA does not take from a mistake in the
// command line.
func pushRefused(err error) error {
	message := status.Convert(err).Message()
	if status.Code(err) != codes.InvalidArgument || strings.HasPrefix(message, "name: ") {
		return err
	}
	return hintError{errors.New(message), "this CA judges the folder otherwise than this merlon does: use the merlon of its version; the policy in force is unchanged"}
}

// awaitPolicy returns once every connected agent decides by generation, or
// after wait, having said who lags. That the policy is stored is certain by
// then, so a laggard is no error.
func awaitPolicy(ctx context.Context, ca capb.AdminClient, generation uint64, wait time.Duration, stderr io.Writer) error {
	if wait == 0 {
		return nil
	}
	deadline := time.Now().Add(wait)
	for {
		resp, err := ca.ListAgents(ctx, &capb.ListAgentsRequest{})
		if status.Code(err) == codes.PermissionDenied {
			fmt.Fprintln(stderr, "warning: not waited for the agents, which a policy-publisher does not see: the role viewer beside it does")
			return nil
		}
		if err != nil {
			return err
		}
		var lagging []string
		for _, a := range resp.GetAgents() {
			if a.GetConnected() && a.GetAck().GetPolicyGeneration() < generation {
				lagging = append(lagging, a.GetSpiffeId())
			}
		}
		if len(lagging) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			fmt.Fprintf(stderr, "warning: not yet in force after %s on %s\n", wait, strings.Join(lagging, ", "))
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// policyKeyJSON is one key of `merlon policy key -o json`.
type policyKeyJSON struct {
	KID       string `json:"kid"`
	Algorithm string `json:"algorithm"`
	PublicKey string `json:"public_key"`
}

func policyKey(o *options) *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "key",
		Short: "Print the public keys that sign policy bundles, for a stock OPA",
		Example: `  merlon policy key > policy.pem
  merlon policy key -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
				resp, err := ca.GetPolicy(cmd.Context(), &capb.GetPolicyRequest{Name: name})
				if err != nil {
					return err
				}
				keys := []policyKeyJSON{}
				for _, k := range resp.GetPolicyBundle().GetKeys() {
					block := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: k.GetPublicKey()})
					keys = append(keys, policyKeyJSON{k.GetKid(), "ES256", string(block)})
				}
				if o.output == "json" {
					return printJSON(cmd.OutOrStdout(), keys)
				}
				for _, k := range keys {
					fmt.Fprintf(cmd.ErrOrStderr(), "kid %s\n", k.KID)
					fmt.Fprint(cmd.OutOrStdout(), k.PublicKey)
				}
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&name, "name", defaultBundle, "name of the policy bundle")
	return cmd
}
