// The profiles of root and intermediate as text, and of a leaf as it comes out of
// the whole CA. Rewrite with go test -update, and review the diff like code.

package upstream

import (
	"crypto/x509"
	"flag"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/sdk/svid/forge"
)

var update = flag.Bool("update", false, "rewrite golden files")

// profiles are one certificate of each kind that keys of this package sign. What
// the root holder signs for a replica is of the profile of its own.
func profiles(t *testing.T) map[string]*x509.Certificate {
	t.Helper()
	cfg, dev, address := config(t), config(t), config(t)
	dev.Development = true
	address.TrustDomain = spiffeid.RequireTrustDomainFromString("10.0.0.1")
	k := open(t, cfg)
	leaf, err := x509.ParseCertificate(issue(t, k, "/web", "web.internal")[0])
	if err != nil {
		t.Fatal(err)
	}
	r := open(t, replicaConfig(t, k, "ca-2"))
	return map[string]*x509.Certificate{
		"root":                 k.X509().Root,
		"intermediate":         k.X509().Chain[0],
		"replica_intermediate": r.X509().Chain[0],
		"leaf":                 leaf,
		"development_root":     open(t, dev).X509().Root,
		"address_intermediate": open(t, address).X509().Chain[0],
		"policy":               k.policy.Load().cert,
		"replica_policy":       r.policy.Load().cert,
	}
}

func TestAuthorityProfilesAreTheGoldenOnes(t *testing.T) {
	for name, cert := range profiles(t) {
		forge.Golden(t, *update, name, forge.Dump(cert))
	}
}
