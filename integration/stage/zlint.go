// zlint over certificates, and what Merlon has against some of its lints.

package stage

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

var buildZlint = sync.OnceValues(func() (string, error) { return buildModule("zlint") })

// buildModule compiles integration/NAME, which is a Go module of its own.
func buildModule(name string) (string, error) {
	dir, err := binDir()
	if err != nil {
		return "", err
	}
	bin := filepath.Join(dir, name)
	if exists(bin) {
		return bin, nil
	}
	root, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "merlon.dev").Output()
	if err != nil {
		return "", fmt.Errorf("find the module: %w", err)
	}
	cmd := exec.Command("go", "build", "-C", filepath.Join(strings.TrimSpace(string(root)), "integration", name), "-o", bin, ".")
	cmd.Env = append(os.Environ(), "GOWORK=off", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s: %w\n%s", name, err, out)
	}
	return bin, nil
}

// webOnly are the lints that an X509-SVID cannot or need not pass, each with the
// reason. All of them are rules of browsers and of the CAs that browsers trust; of
// what RFC 5280 and its successors say nothing is left out.
var webOnly = map[string]string{
	"e_ext_san_uniform_resource_identifier_present":                 "X509-SVID §2: the SPIFFE ID is a URI SAN",
	"e_sub_cert_certificate_policies_missing":                       "policies name the validation of a domain or an organization; there is none",
	"e_sub_cert_cert_policy_empty":                                  "likewise",
	"e_sub_ca_certificate_policies_missing":                         "likewise",
	"e_invalid_ca_certificate_policies":                             "likewise",
	"e_sub_cert_aia_missing":                                        "no OCSP and no fetching of issuers: SVIDs carry their chain, and revocation is pushed",
	"w_sub_cert_aia_does_not_contain_issuing_ca_url":                "likewise",
	"w_sub_ca_aia_missing":                                          "likewise",
	"e_sub_ca_crl_distribution_points_missing":                      "no CRLs: an intermediate lives a day, and revocation is pushed",
	"e_ca_country_name_missing":                                     "the name of an authority is a trust domain, which has no country",
	"e_dnsname_not_valid_tld":                                       "DNS SANs are internal names, as the registration entry says",
	"n_san_iana_pub_suffix_empty":                                   "likewise: localhost",
	"w_subject_common_name_included":                                "databases read the common name, where an entry asks for one",
	"e_subject_common_name_not_exactly_from_san":                    "likewise: it is the name of a database's user",
	"w_ext_subject_key_identifier_not_recommended_subscriber":       "RFC 5280 §4.2.1.2 says that end entities SHOULD have one",
	"w_root_ca_basic_constraints_path_len_constraint_field_present": "RFC 5280 §4.2.1.9 allows it: one intermediate, and no authority below it",
	"n_ca_digital_signature_not_set":                                "no authority signs OCSP responses",
	"n_sub_ca_eku_missing":                                          "X509-SVID has no rule on the extended key usage of authorities",
	"n_mp_allowed_eku":                                              "likewise",
	"n_ct_sct_policy_count_unsatisfied":                             "no public Certificate Transparency: the CA has a log of its own",
}

// CheckZlint fails the test for what zlint finds in the certificates, by name,
// but webOnly.
func CheckZlint(tb testing.TB, certs map[string]*x509.Certificate) {
	tb.Helper()
	for name, findings := range Zlint(tb, certs) {
		for _, f := range findings {
			if webOnly[f.Lint] == "" {
				tb.Errorf("%s: %s %s of %s: %s", name, f.Status, f.Lint, f.Source, f.Details)
			}
		}
	}
}

// Finding is what one lint says about a certificate.
type Finding struct {
	Certificate int    `json:"certificate"`
	Lint        string `json:"lint"`
	Source      string `json:"source"`
	Status      string `json:"status"`
	Details     string `json:"details"`
}

// Zlint returns what every lint of zlint finds in the certificates, by name.
func Zlint(tb testing.TB, certs map[string]*x509.Certificate) map[string][]Finding {
	tb.Helper()
	bin, err := buildZlint()
	if err != nil {
		tb.Fatal(err)
	}
	names := slices.Sorted(maps.Keys(certs))
	var in, out, errs bytes.Buffer
	for _, name := range names {
		if err := pem.Encode(&in, &pem.Block{Type: "CERTIFICATE", Bytes: certs[name].Raw}); err != nil {
			tb.Fatal(err)
		}
	}
	cmd := exec.CommandContext(tb.Context(), bin)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = &in, &out, &errs
	if err := cmd.Run(); err != nil {
		tb.Fatalf("zlint: %v\n%s", err, errs.String())
	}
	found := make(map[string][]Finding)
	for dec := json.NewDecoder(&out); dec.More(); {
		var f Finding
		if err := dec.Decode(&f); err != nil {
			tb.Fatal(err)
		}
		found[names[f.Certificate]] = append(found[names[f.Certificate]], f)
	}
	return found
}
