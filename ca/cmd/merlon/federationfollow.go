// merlon federation invite, accept, follow, refresh and status: trust bundles that come
// by themselves.

package main

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
)

// sourceJSON is where a trust bundle is fetched, as scripts see it.
type sourceJSON struct {
	URL          string     `json:"url"`
	Profile      string     `json:"profile"`
	EndpointID   string     `json:"endpoint_spiffe_id,omitempty"`
	TriedAt      *time.Time `json:"tried_at,omitempty"`
	FetchedAt    *time.Time `json:"fetched_at,omitempty"`
	Failure      string     `json:"failure,omitempty"`
	Reason       string     `json:"reason,omitempty"`
	FailingSince *time.Time `json:"failing_since,omitempty"`
	// Ignored says of the keys in the last document that do not count, why.
	Ignored []string `json:"ignored,omitempty"`
}

func newSourceJSON(s *capb.FederationSource) *sourceJSON {
	if s == nil {
		return nil
	}
	return &sourceJSON{
		s.GetUrl(), s.GetProfile(), s.GetEndpointSpiffeId(), timeOf(s.GetTriedAt()), timeOf(s.GetFetchedAt()), s.GetFailure(), s.GetReason(), timeOf(s.GetFailingSince()), s.GetIgnored(),
	}
}

// readerJSON says whether another CA follows our trust bundle.
type readerJSON struct {
	InvitedAt *time.Time `json:"invited_at,omitempty"`
	FetchedAt *time.Time `json:"fetched_at,omitempty"`
	Sequence  uint64     `json:"sequence"`
}

func newReaderJSON(r *capb.FederationReader) *readerJSON {
	if r == nil {
		return nil
	}
	return &readerJSON{timeOf(r.GetInvitedAt()), timeOf(r.GetFetchedAt()), r.GetSequence()}
}

// reach is where a trust bundle is to be had, and how its server is known.
type reach struct{ url, profile, webCA string }

// authorities checks the flags and reads --web-ca.
func (r reach) authorities() (string, error) {
	if err := r.check(); err != nil {
		return "", err
	}
	if r.webCA == "" {
		return "", nil
	}
	text, err := os.ReadFile(r.webCA)
	if err != nil {
		return "", notThere(err, "give the file with the authorities of the web server's certificate, in PEM")
	}
	return string(text), nil
}

func federationInvite(o *options) *cobra.Command {
	var at reach
	cmd := &cobra.Command{
		Use:   "invite TRUST_DOMAIN",
		Short: "Make a token by which another trust domain follows this one's trust bundle",
		Long: `Make a token by which the CA of another trust domain follows this one's trust
bundle: the bundle itself, where it is to be had from now on, and how its server is
known. The other side's operator gives it to merlon federation accept; for trust in
both directions each side invites the other, one token each way.

The token holds nothing secret. Send it by a way that nobody can tamper with:
whoever changes it says whom the other side trusts. It can be accepted for a week.

--url is where the other side reaches this CA: https_address, and the profile
https_spiffe; or bundle_endpoint, and https_web. Nothing of it is inferred.`,
		Example: `  merlon federation invite partner.test --profile https_spiffe --url https://ca.shop.test:8444/v1/trust/bundle
  merlon federation invite partner.test --profile https_web --url https://trust.shop.test/v1/trust/bundle`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			authorities, err := at.authorities()
			if err != nil {
				return err
			}
			return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
				resp, err := ca.CreateFederationInvite(cmd.Context(), &capb.CreateFederationInviteRequest{
					TrustDomain: args[0], Url: at.url, Profile: at.profile, WebAuthorities: authorities,
				})
				if err != nil {
					return err
				}
				if o.output == "json" {
					return printJSON(cmd.OutOrStdout(), map[string]any{"token": resp.GetToken(), "expires_at": timeOf(resp.GetExpiresAt())})
				}
				fmt.Fprintf(cmd.ErrOrStderr(), "merlon: for the operator of %s, until %s: merlon federation accept TOKEN\n", args[0], formatTime(resp.GetExpiresAt()))
				_, err = fmt.Fprintln(cmd.OutOrStdout(), resp.GetToken())
				return err
			})
		},
	}
	cmd.Flags().StringVar(&at.url, "url", "", "where the other side reaches this CA's trust bundle (required)")
	cmd.Flags().StringVar(&at.profile, "profile", "", "how the other side knows that server: https_spiffe or https_web (required)")
	cmd.Flags().StringVar(&at.webCA, "web-ca", "", "https_web: `file` with the authorities of the server's certificate, where others would not know them")
	return cmd
}

// check refuses what says neither where nor how: nothing of it is inferred.
func (r reach) check() error {
	switch {
	case r.url == "":
		return usageError{"--url is missing: where the trust bundle is to be had is not inferred", "for example --url https://ca.shop.test:8444/v1/trust/bundle"}
	case r.profile != "https_web" && r.profile != "https_spiffe":
		return usageError{fmt.Sprintf("--profile %q: how the server is known is not inferred", r.profile), "use --profile https_spiffe (its X509-SVID) or https_web (a certificate of the web)"}
	}
	return nil
}

// orderHint says what to do about a trust bundle that is not later than what is known.
func orderHint(err error) error {
	if status.Code(err) == codes.FailedPrecondition {
		return hintError{err, "have a new token or document made; merlon federation show says what is known, and merlon federation remove forgets it"}
	}
	return err
}

func federationAccept(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "accept TOKEN",
		Short: "Take the token of another trust domain's CA, and follow its trust bundle",
		Long: `Take the token that merlon federation invite printed on the other side (- reads it
from stdin): its trust bundle counts at once, and is fetched by this CA from now on.
Entries name it with --federates-with. The other side trusts nobody here until it
has accepted a token of this side's.`,
		Example: "  merlon federation accept merlon-federation-1.eyJ…",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			token := args[0]
			if token == "-" {
				text, err := io.ReadAll(io.LimitReader(cmd.InOrStdin(), maxDocument))
				if err != nil {
					return fmt.Errorf("read the token: %w", err)
				}
				token = string(text)
			}
			return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
				resp, err := ca.AcceptFederationInvite(cmd.Context(), &capb.AcceptFederationInviteRequest{Token: token})
				if err != nil {
					return orderHint(err)
				}
				return o.printFollowed(cmd, resp.GetFederatedBundle())
			})
		},
	}
}

func federationFollow(o *options) *cobra.Command {
	var at reach
	var endpointID, bundle string
	cmd := &cobra.Command{
		Use:   "follow TRUST_DOMAIN",
		Short: "Fetch the trust bundle of another trust domain from its endpoint from now on",
		Long: `Fetch the trust bundle of another trust domain from its bundle endpoint, now and as
often as it says: of a CA that makes no token for merlon federation accept. URL,
profile and trust domain are yours to say; nothing is inferred (SPIFFE Federation
§5.1).

A https_spiffe server is verified by the trust bundle that is known, so the first one
has to be handed over: --bundle FILE.`,
		Example: `  merlon federation follow partner.test --profile https_web --url https://trust.partner.test/bundle
  merlon federation follow partner.test --profile https_spiffe --url https://spire.partner.test:8443 \
      --endpoint-id spiffe://partner.test/spire/server --bundle partner.json`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			authorities, err := at.authorities()
			if err != nil {
				return err
			}
			var document []byte
			if bundle != "" {
				if document, err = readDocument(cmd.InOrStdin(), bundle); err != nil {
					return err
				}
			}
			return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
				resp, err := ca.SetFederationSource(cmd.Context(), &capb.SetFederationSourceRequest{
					TrustDomain: args[0], Document: document,
					Source: &capb.FederationSource{Url: at.url, Profile: at.profile, EndpointSpiffeId: endpointID, WebAuthorities: authorities},
				})
				if err != nil {
					return orderHint(err)
				}
				return o.printFollowed(cmd, resp.GetFederatedBundle())
			})
		},
	}
	cmd.Flags().StringVar(&at.url, "url", "", "the bundle endpoint, https://… (required)")
	cmd.Flags().StringVar(&at.profile, "profile", "", "https_web or https_spiffe (required)")
	cmd.Flags().StringVar(&endpointID, "endpoint-id", "", "https_spiffe: SPIFFE ID of the server")
	cmd.Flags().StringVar(&at.webCA, "web-ca", "", "https_web: `file` with the authorities of the server's certificate; without it the system's")
	cmd.Flags().StringVar(&bundle, "bundle", "", "`file` with the trust bundle to begin with (- for stdin)")
	return cmd
}

// printFollowed prints a federation that was begun. That its first fetch failed is said,
// and is no failure of the command: the CA goes on trying.
func (o *options) printFollowed(cmd *cobra.Command, b *capb.FederatedBundle) error {
	if failure := b.GetSource().GetFailure(); failure != "" {
		fmt.Fprintf(cmd.ErrOrStderr(), "merlon: it could not be fetched yet, and will be tried again: %s\n", failure)
	}
	return o.printFederation(cmd.OutOrStdout(), "trust_domain", b)
}

func federationRefresh(o *options) *cobra.Command {
	return &cobra.Command{
		Use:     "refresh TRUST_DOMAIN",
		Short:   "Fetch a trust bundle now, instead of at the next poll",
		Example: "  merlon federation refresh partner.test",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
				resp, err := ca.RefreshFederatedBundle(cmd.Context(), &capb.RefreshFederatedBundleRequest{TrustDomain: args[0]})
				if err != nil {
					return listHint(err, "merlon federation status")
				}
				return o.printFederation(cmd.OutOrStdout(), "trust_domain", resp.GetFederatedBundle())
			})
		},
	}
}

func federationStatus(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Say whether trust bundles go in both directions",
		Long: `Say of each trust domain whether its trust bundle comes here, and whether ours is
fetched there. Exits with 3, and says why, if one of the two was not fetched for three
times as long as it should be, cannot be had, has ended or is empty, or if a key is in
the trust bundles of two trust domains.`,
		Example: "  merlon federation status",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
				resp, err := ca.ListFederatedBundles(cmd.Context(), &capb.ListFederatedBundlesRequest{})
				if err != nil {
					return err
				}
				return o.printHealth(cmd, resp.GetFederatedBundles())
			})
		},
	}
}

// printHealth prints how each federation goes, and fails where one of them has problems.
func (o *options) printHealth(cmd *cobra.Command, all []*capb.FederatedBundle) (err error) {
	healthy := true
	list := []healthJSON{}
	var rows [][]string
	for _, b := range all {
		s := newHealthJSON(b)
		list = append(list, s)
		rows = append(rows, []string{
			s.TrustDomain, s.In, sequenceText(b), formatTime(b.GetSource().GetFetchedAt()), s.Out, readerSequence(b), formatTime(b.GetReader().GetFetchedAt()),
		})
		healthy = healthy && len(s.Problems) == 0
	}
	if o.output == "json" {
		err = printJSON(cmd.OutOrStdout(), list)
	} else {
		err = printTable(cmd.OutOrStdout(), []string{"TRUST_DOMAIN", "THEIRS", "SEQUENCE", "FETCHED_AT", "OURS", "SEQUENCE", "FETCHED_AT"}, rows)
	}
	for _, s := range list {
		for _, problem := range s.Problems {
			fmt.Fprintf(cmd.ErrOrStderr(), "merlon: %s: %s\n", s.TrustDomain, problem)
		}
	}
	if err == nil && !healthy {
		return silentError{exitUnhealthy}
	}
	return err
}

// healthJSON is one federation with its health.
type healthJSON struct {
	federationJSON
	// In says how their trust bundle comes: ok, failing, late, ended, empty, missing,
	// by hand or none; Out whether ours is fetched there: ok, late, never, expired or not
	// invited. Problems are what somebody has to look at.
	In       string   `json:"in"`
	Out      string   `json:"out"`
	Problems []string `json:"problems"`
}

func newHealthJSON(b *capb.FederatedBundle) healthJSON {
	h := b.GetHealth()
	s := healthJSON{newFederationJSON(b), h.GetTheirs(), h.GetOurs(), append([]string{}, h.GetProblems()...)}
	if h == nil {
		s.Problems = []string{"this CA does not say how it goes: it is older than this command"}
	}
	return s
}

func readerSequence(b *capb.FederatedBundle) string {
	if b.GetReader().GetFetchedAt() == nil {
		return ""
	}
	return strconv.FormatUint(b.GetReader().GetSequence(), 10)
}
