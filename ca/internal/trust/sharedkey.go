// Keys that are in the trust bundles of two trust domains. The own one's have no place
// in another's (SECURITY.md B9, T21), and a document that has one is refused. Between
// two others each keeps the key, and both are named: each trust bundle vouches for its
// own trust domain alone, so who copies a key without holding it lets its holder speak
// for the copier and gets nothing, whereas a rule by which one of the two loses the key
// would let the copier take it away from the holder. Nor does it matter which was seen
// first.

package trust

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// SharedKey is a key in the trust bundles of several trust domains.
type SharedKey struct {
	// What names it, as the first of them has it.
	What         string
	TrustDomains []spiffeid.TrustDomain // in order
}

// With are the others that td shares it with.
func (k SharedKey) With(td spiffeid.TrustDomain) (others []string) {
	for _, other := range k.TrustDomains {
		if other != td {
			others = append(others, other.Name())
		}
	}
	return others
}

// SharedKeys are the keys that several of the documents hold, in order.
func SharedKeys(documents map[spiffeid.TrustDomain]*Document) (shared []SharedKey) {
	held := make(map[string]*SharedKey)
	for _, td := range slices.SortedFunc(maps.Keys(documents), spiffeid.TrustDomain.Compare) {
		for spki, what := range documents[td].keys() {
			k := held[spki]
			if k == nil {
				k = &SharedKey{What: what}
				held[spki] = k
			}
			k.TrustDomains = append(k.TrustDomains, td)
		}
	}
	for _, k := range held {
		if len(k.TrustDomains) > 1 {
			shared = append(shared, *k)
		}
	}
	slices.SortFunc(shared, func(a, b SharedKey) int { return strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
	return shared
}

// keys names each key, by its SubjectPublicKeyInfo.
func (d *Document) keys() map[string]string {
	all := make(map[string]string, len(d.X509)+len(d.JWT))
	name := func(key crypto.PublicKey, what string) {
		spki := spki(key)
		all[spki] = fmt.Sprintf("%s (SHA-256 %x)", what, sha256.Sum256([]byte(spki)))
	}
	for _, kid := range slices.Sorted(maps.Keys(d.JWT)) {
		name(d.JWT[kid], fmt.Sprintf("the JWT key %.100q", kid))
	}
	for _, cert := range d.X509 {
		name(cert.PublicKey, fmt.Sprintf("the key of %.200q", cert.Subject))
	}
	return all
}

// spki is one text for one key, whatever certificate it came in.
func spki(key crypto.PublicKey) string {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil { // no kind that is taken
		return fmt.Sprintf("%T %v", key, key)
	}
	return string(der)
}
