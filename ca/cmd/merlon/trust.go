// merlon trust: the trust bundle, for programs that do not speak the Workload
// API.

package main

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/capb"
)

func trustCommand(o *options) *cobra.Command {
	return noun("trust", "The trust bundle: public keys that SVIDs are verified with", trustShow(o))
}

// trustJSON is `merlon trust show -o json`.
type trustJSON struct {
	TrustDomain string          `json:"trust_domain"`
	Sequence    uint64          `json:"sequence"`
	RootHashes  []string        `json:"root_hashes"`
	JWKS        json.RawMessage `json:"jwks"`
}

func trustShow(o *options) *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "show",
		Short: "Print the trust bundle",
		Example: `  merlon trust show -o pem > bundle.pem
  merlon trust show -o jwks`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			print, ok := map[string]func(io.Writer, *capb.GetTrustBundleResponse) error{
				"table": printTrustTable, "json": printTrustJSON, "pem": printTrustPEM, "jwks": printTrustJWKS,
			}[format]
			if !ok {
				return usageError{fmt.Sprintf("unknown output format %q", format), "use -o table, json, pem or jwks"}
			}
			return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
				resp, err := ca.GetTrustBundle(cmd.Context(), &capb.GetTrustBundleRequest{})
				if err != nil {
					return err
				}
				return print(cmd.OutOrStdout(), resp)
			})
		},
	}
	cmd.Flags().StringVarP(&format, "output", "o", "table", "output format: table, json, pem (X.509 roots) or jwks (the SPIFFE document)")
	return cmd
}

func printTrustTable(w io.Writer, resp *capb.GetTrustBundleResponse) error {
	return printFields(w,
		"trust_domain", resp.GetTrustBundle().GetTrustDomain(),
		"sequence", strconv.FormatUint(resp.GetTrustBundle().GetSequence(), 10),
		"root_hashes", strings.Join(resp.GetRootHashes(), " "))
}

func printTrustJSON(w io.Writer, resp *capb.GetTrustBundleResponse) error {
	b := resp.GetTrustBundle()
	return printJSON(w, trustJSON{b.GetTrustDomain(), b.GetSequence(), resp.GetRootHashes(), b.GetJwks()})
}

func printTrustJWKS(w io.Writer, resp *capb.GetTrustBundleResponse) error {
	return printJWKS(w, resp.GetTrustBundle())
}

func printJWKS(w io.Writer, b *capb.TrustBundle) error {
	_, err := fmt.Fprintf(w, "%s\n", b.GetJwks())
	return err
}

func printTrustPEM(w io.Writer, resp *capb.GetTrustBundleResponse) error {
	return printRoots(w, resp.GetTrustBundle())
}

func printRoots(w io.Writer, b *capb.TrustBundle) error {
	pems, err := rootsPEM(b)
	if err != nil {
		return err
	}
	_, err = w.Write(pems)
	return err
}

// rootsPEM returns the X.509 roots of a trust bundle.
func rootsPEM(b *capb.TrustBundle) ([]byte, error) {
	td, err := spiffeid.TrustDomainFromString(b.GetTrustDomain())
	if err != nil {
		return nil, fmt.Errorf("read the trust bundle: %w", err)
	}
	bundle, err := spiffebundle.Parse(td, b.GetJwks())
	if err != nil {
		return nil, fmt.Errorf("read the trust bundle: %w", err)
	}
	var out []byte
	for _, root := range bundle.X509Authorities() {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Raw})...)
	}
	return out, nil
}
