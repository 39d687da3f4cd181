// The corpus in the format of x509-limbo (its schema, version 1), with one member
// more: trust_domain, whose trust bundle the trusted certificates are.

package pathcase

import (
	"encoding/json"
	"encoding/pem"
	"io"
	"time"
)

type limbo struct {
	Version   int         `json:"version"`
	TestCases []limboCase `json:"testcases"`
}

type limboCase struct {
	ID            string   `json:"id"`
	ConflictsWith []string `json:"conflicts_with"`
	Features      []string `json:"features"`
	Importance    string   `json:"importance"`
	Description   string   `json:"description"`
	// ValidationKind is which end the peer is; X509-SVIDs are judged alike in both.
	ValidationKind         string   `json:"validation_kind"`
	TrustDomain            string   `json:"trust_domain"`
	TrustedCerts           []string `json:"trusted_certs"`
	UntrustedIntermediates []string `json:"untrusted_intermediates"`
	// PeerCertificate is empty where nothing is presented.
	PeerCertificate     string    `json:"peer_certificate"`
	PeerCertificateKey  *string   `json:"peer_certificate_key"`
	ValidationTime      time.Time `json:"validation_time"`
	SignatureAlgorithms []string  `json:"signature_algorithms"`
	KeyUsage            []string  `json:"key_usage"`
	ExtendedKeyUsage    []string  `json:"extended_key_usage"`
	ExpectedResult      string    `json:"expected_result"`
	ExpectedPeerName    *string   `json:"expected_peer_name"`
	ExpectedPeerNames   []string  `json:"expected_peer_names"`
	MaxChainDepth       *int      `json:"max_chain_depth"`
	CRLs                []string  `json:"crls"`
}

// importance is x509-limbo's word for how much a verdict counts.
var importance = map[Source]string{RFC5280: "high", SPIFFE: "high", Prudence: "medium"}

// WriteLimbo writes cases as one JSON object. IDs get the prefix "spiffe::" and
// x509-limbo's separator.
func WriteLimbo(w io.Writer, cases []Case) error {
	out := limbo{Version: 1}
	for _, c := range cases {
		lc := limboCase{
			ID: "spiffe::" + c.Theme() + "::" + c.ID[len(c.Theme())+1:], ConflictsWith: []string{}, Features: []string{},
			Importance: importance[c.By], Description: c.Why + " [" + string(c.By) + "]", ValidationKind: "SERVER",
			TrustDomain: c.TrustDomain.Name(), TrustedCerts: []string{}, UntrustedIntermediates: []string{},
			ValidationTime: c.Time.UTC().Truncate(time.Second), SignatureAlgorithms: []string{}, KeyUsage: []string{},
			ExtendedKeyUsage: []string{"serverAuth", "clientAuth"}, ExpectedResult: "FAILURE", ExpectedPeerNames: []string{}, CRLs: []string{},
		}
		if c.Accept {
			lc.ExpectedResult = "SUCCESS"
		}
		for _, cert := range c.Trusted {
			lc.TrustedCerts = append(lc.TrustedCerts, inPEM(cert.Raw))
		}
		for i, der := range c.Presented {
			if i == 0 {
				lc.PeerCertificate = inPEM(der)
				continue
			}
			lc.UntrustedIntermediates = append(lc.UntrustedIntermediates, inPEM(der))
		}
		out.TestCases = append(out.TestCases, lc)
	}
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(out)
}

func inPEM(der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}
