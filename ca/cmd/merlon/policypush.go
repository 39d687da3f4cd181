// merlon policy push and key: what of policy needs a running CA.

package main

import (
	"encoding/pem"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"merlon.dev/ca/capb"
	"merlon.dev/policy/bundle"
)

// policyNoun joins the verbs that work on a folder with those that need a CA.
func policyNoun(o *options) *cobra.Command {
	cmd := policyCommand(o)
	cmd.Args, cmd.RunE = unknownCommand, showHelp
	cmd.AddCommand(policyPush(o), policyKey(o))
	return cmd
}

// pushedJSON is `merlon policy push -o json`.
type pushedJSON struct {
	Name       string `json:"name"`
	Generation uint64 `json:"generation"`
	ETag       string `json:"etag"`
}

func policyPush(o *options) *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "push FOLDER",
		Short: "Check a policy folder, have the CA sign it, and put it into force everywhere",
		Example: `  merlon policy push ./policy
  merlon policy push ./policy --ca ca.example.org:8443`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			raw, err := bundle.Build(args[0])
			if err != nil {
				return hintError{err, "merlon policy check " + args[0]}
			}
			return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
				resp, err := ca.PushPolicy(cmd.Context(), &capb.PushPolicyRequest{Name: name, Bundle: raw})
				if err != nil {
					return err
				}
				if o.output == "json" {
					return printJSON(cmd.OutOrStdout(), pushedJSON{resp.GetName(), resp.GetGeneration(), resp.GetEtag()})
				}
				return printFields(cmd.OutOrStdout(), "name", resp.GetName(), "generation", strconv.FormatUint(resp.GetGeneration(), 10), "etag", resp.GetEtag())
			})
		},
	}
	cmd.Flags().StringVar(&name, "name", "main", "name of the policy bundle")
	return cmd
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
	cmd.Flags().StringVar(&name, "name", "main", "name of the policy bundle")
	return cmd
}
