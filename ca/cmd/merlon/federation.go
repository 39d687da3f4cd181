// merlon federation: trust bundles of other trust domains.

package main

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
)

func federationCommand(o *options) *cobra.Command {
	return noun("federation", "Other trust domains, whose SVIDs entries with --federates-with can verify",
		federationInvite(o), federationAccept(o), federationStatus(o), federationFollow(o), federationRefresh(o),
		federationSet(o), federationList(o), federationShow(o), federationRemove(o))
}

// federationJSON is the trust bundle of another trust domain as scripts see it.
type federationJSON struct {
	TrustDomain string     `json:"trust_domain"`
	Sequence    uint64     `json:"sequence"`
	RootHashes  []string   `json:"root_hashes"`
	JWTKeyIDs   []string   `json:"jwt_key_ids"`
	SetAt       *time.Time `json:"set_at,omitempty"`
	NotAfter    *time.Time `json:"not_after,omitempty"`
	// Source is where it is fetched, Reader whether the other side fetches ours.
	Source *sourceJSON `json:"source,omitempty"`
	Reader *readerJSON `json:"reader,omitempty"`
}

func newFederationJSON(b *capb.FederatedBundle) federationJSON {
	return federationJSON{
		b.GetTrustBundle().GetTrustDomain(), b.GetTrustBundle().GetSequence(),
		append([]string{}, b.GetRootHashes()...), append([]string{}, b.GetJwtKeyIds()...), timeOf(b.GetSetAt()), timeOf(b.GetNotAfter()),
		newSourceJSON(b.GetSource()), newReaderJSON(b.GetReader()),
	}
}

func (o *options) printFederation(w io.Writer, done string, b *capb.FederatedBundle) error {
	if o.output == "json" {
		return printJSON(w, newFederationJSON(b))
	}
	fields := []string{
		done, b.GetTrustBundle().GetTrustDomain(), "sequence", sequenceText(b),
		"root_hashes", strings.Join(b.GetRootHashes(), " "), "jwt_key_ids", strings.Join(b.GetJwtKeyIds(), " "),
		"set_at", formatTime(b.GetSetAt()), "not_after", formatTime(b.GetNotAfter()),
	}
	if src := b.GetSource(); src != nil {
		fields = append(fields, "url", src.GetUrl(), "profile", src.GetProfile(), "fetched_at", formatTime(src.GetFetchedAt()), "failure", src.GetFailure())
		for _, why := range src.GetIgnored() {
			fields = append(fields, "ignored", why)
		}
	}
	return printFields(w, fields...)
}

// sequenceText is empty where the document had none.
func sequenceText(b *capb.FederatedBundle) string {
	if b.GetTrustBundle().GetSequence() == 0 {
		return ""
	}
	return strconv.FormatUint(b.GetTrustBundle().GetSequence(), 10)
}

func federationSet(o *options) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "set TRUST_DOMAIN FILE",
		Short: "Take the trust bundle of another trust domain from a file",
		Long: `Take the trust bundle of another trust domain from a file (- for stdin): a SPIFFE
trust bundle document (JWKS), or its X.509 authorities in PEM, which verify no
JWT-SVIDs. It takes the place of what is known of that trust domain, and reaches
the workloads whose entries federate with it (entry create --federates-with) at
once. The other side does the same with the trust bundle of this one.

Get the file by a way that nobody can tamper with: whoever changes it says who
the workloads of that trust domain are. A document with a lower sequence number
than the last is refused, since it may bring a withdrawn key back; so is one with a
key of a third trust domain, since it may be the wrong file.`,
		Example: `  partner$ merlon trust show -o jwks > partner.json
  merlon federation set partner.test partner.json`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			document, err := readDocument(cmd.InOrStdin(), args[1])
			if err != nil {
				return err
			}
			return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
				resp, err := ca.SetFederatedBundle(cmd.Context(), &capb.SetFederatedBundleRequest{TrustDomain: args[0], Document: document, Force: force})
				if status.Code(err) == codes.FailedPrecondition {
					return hintError{err, "get the document anew; if this one is right, --force takes it all the same"}
				}
				if err != nil {
					return err
				}
				for _, why := range resp.GetIgnored() {
					fmt.Fprintln(cmd.ErrOrStderr(), "merlon: ignored:", why)
				}
				return o.printFederation(cmd.OutOrStdout(), "trust_domain", resp.GetFederatedBundle())
			})
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "take it also where it is not later than what is known, or has a key of a third trust domain")
	return cmd
}

// maxDocument is more than the CA takes, and less than gRPC would refuse.
const maxDocument = 1 << 20

func readDocument(stdin io.Reader, path string) ([]byte, error) {
	from := stdin
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, notThere(err, "give the file with the trust bundle, as `merlon trust show -o jwks` prints it there, or - for stdin")
		}
		defer f.Close()
		from = f
	}
	document, err := io.ReadAll(io.LimitReader(from, maxDocument))
	if err != nil {
		return nil, fmt.Errorf("read the trust bundle: %w", err)
	}
	return document, nil
}

func federationList(o *options) *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Short:   "List the trust domains of which there is a trust bundle",
		Example: "  merlon federation list -o json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
				resp, err := ca.ListFederatedBundles(cmd.Context(), &capb.ListFederatedBundlesRequest{})
				if err != nil {
					return err
				}
				if o.output == "json" {
					out := make([]federationJSON, 0, len(resp.GetFederatedBundles()))
					for _, b := range resp.GetFederatedBundles() {
						out = append(out, newFederationJSON(b))
					}
					return printJSON(cmd.OutOrStdout(), out)
				}
				var rows [][]string
				for _, b := range resp.GetFederatedBundles() {
					rows = append(rows, []string{
						b.GetTrustBundle().GetTrustDomain(), sequenceText(b), strconv.Itoa(len(b.GetRootHashes())),
						strconv.Itoa(len(b.GetJwtKeyIds())), formatTime(b.GetSetAt()), formatTime(b.GetNotAfter()),
					})
				}
				return printTable(cmd.OutOrStdout(), []string{"TRUST_DOMAIN", "SEQUENCE", "ROOTS", "JWT_KEYS", "SET_AT", "NOT_AFTER"}, rows)
			})
		},
	}
}

func federationShow(o *options) *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "show TRUST_DOMAIN",
		Short: "Print the trust bundle of another trust domain",
		Example: `  merlon federation show partner.test
  merlon federation show partner.test -o jwks`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			print, ok := map[string]func(io.Writer, *capb.FederatedBundle) error{
				"table": func(w io.Writer, b *capb.FederatedBundle) error { return o.printFederation(w, "trust_domain", b) },
				"json":  func(w io.Writer, b *capb.FederatedBundle) error { return printJSON(w, newFederationJSON(b)) },
				"pem":   func(w io.Writer, b *capb.FederatedBundle) error { return printRoots(w, b.GetTrustBundle()) },
				"jwks":  func(w io.Writer, b *capb.FederatedBundle) error { return printJWKS(w, b.GetTrustBundle()) },
			}[format]
			if !ok {
				return usageError{fmt.Sprintf("unknown output format %q", format), "use -o table, json, pem or jwks"}
			}
			return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
				resp, err := ca.GetFederatedBundle(cmd.Context(), &capb.GetFederatedBundleRequest{TrustDomain: args[0]})
				if err != nil {
					return listHint(err, "merlon federation list")
				}
				return print(cmd.OutOrStdout(), resp.GetFederatedBundle())
			})
		},
	}
	cmd.Flags().StringVarP(&format, "output", "o", "table", "output format: table, json, pem (X.509 roots) or jwks (the SPIFFE document)")
	return cmd
}

func federationRemove(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "remove TRUST_DOMAIN",
		Short: "Withdraw the trust in another trust domain",
		Long: `Withdraw the trust in another trust domain: its workloads are refused, and live
connections of the SDK to them are cut. Entries that federate with it wait again.
The other side still trusts this one until it does the same.`,
		Example: "  merlon federation remove partner.test",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
				resp, err := ca.RemoveFederatedBundle(cmd.Context(), &capb.RemoveFederatedBundleRequest{TrustDomain: args[0]})
				if err != nil {
					return listHint(err, "merlon federation list")
				}
				return o.printFederation(cmd.OutOrStdout(), "removed", resp.GetFederatedBundle())
			})
		},
	}
}
