// merlon policy schema: what policies get to see of a call.

package main

import (
	"github.com/spf13/cobra"

	"merlon.dev/policy/engine"
)

func policySchema() *cobra.Command {
	return &cobra.Command{
		Use:   "schema",
		Short: "Print the JSON schema of the input that policies get",
		Long: `Print the JSON schema of the input that policies get. merlon policy check and push
hold every policy to it; an annotation "schemas" in a policy can say more:

  # METADATA
  # schemas:
  #   - input.jwt: {type: object, properties: {team: {type: string}}}`,
		Example: `  merlon policy schema
  merlon policy schema > input.json && opa check --schema input.json ./policy`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := cmd.OutOrStdout().Write(engine.InputSchema)
			return err
		},
	}
}
