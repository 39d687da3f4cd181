// First contact: the pinned root's server, and nobody else's.

package svid_test

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

func TestVerifyPinned(t *testing.T) {
	ca, other := forge.New(t, "example.org"), forge.New(t, "example.org")
	hash := func(c *x509.Certificate) string {
		sum := sha256.Sum256(c.RawSubjectPublicKeyInfo)
		return hex.EncodeToString(sum[:])
	}
	root, otherRoot := ca.Root().Cert, other.Root().Cert
	leaf := ca.Intermediate().Leaf("/ca")
	td, elsewhere := spiffeid.RequireTrustDomainFromString("example.org"), spiffeid.RequireTrustDomainFromString("other.org")
	full := append(slices.Clone(leaf.Chain), root)
	if p, err := svid.VerifyPinned(full, td, hash(root), time.Now()); err != nil || p.ID.Path() != "/ca" {
		t.Errorf("the pinned root's: %v, %v", p, err)
	}
	// The root of a larger PKI names no trust domain; being pinned it may vouch.
	larger := forge.New(t, "example.org", forge.URIs())
	below := larger.Intermediate(forge.URIs("spiffe://example.org")).Leaf("/ca")
	chain := append(slices.Clone(below.Chain), larger.Root().Cert)
	if p, err := svid.VerifyPinned(chain, td, hash(larger.Root().Cert), time.Now()); err != nil || p.ID.Path() != "/ca" {
		t.Errorf("a pinned root without a name: %v, %v", p, err)
	}
	if _, err := svid.VerifyPinned(chain, elsewhere, hash(larger.Root().Cert), time.Now()); err == nil {
		t.Error("a pinned root without a name vouches for another trust domain than that of the leaf")
	}
	self := ca.Leaf("/ca").Chain
	for name, test := range map[string]struct {
		chain []*x509.Certificate
		td    spiffeid.TrustDomain
		hash  string
	}{
		"another root":              {full, td, hash(otherRoot)},
		"no hash":                   {full, td, ""},
		"without the root":          {leaf.Chain, td, hash(root)},
		"nothing":                   {nil, td, hash(root)},
		"the root appended":         {append(slices.Clone(other.Leaf("/ca").Chain), root), td, hash(root)},
		"another trust domain":      {full, elsewhere, hash(root)},
		"a leaf pinned as its root": {append(slices.Clone(self), self[0]), td, hash(self[0])},
	} {
		if p, err := svid.VerifyPinned(test.chain, test.td, test.hash, time.Now()); err == nil {
			t.Errorf("%s: accepted as %s", name, p.ID)
		}
	}
}
