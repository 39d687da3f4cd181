// First contact: a server is judged before there is a trust bundle, by the hash
// of its root's key alone.

package svid

import (
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// KeyHash is how a root is pinned: the hex SHA-256 of its SubjectPublicKeyInfo.
func KeyHash(root *x509.Certificate) string {
	sum := sha256.Sum256(root.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:])
}

// VerifyPinned verifies a presented chain that ends in its root (TLS.IncludeRoot)
// when the root is the one that is pinned: rootHash is its KeyHash. It says who the peer is in trust domain td; whether that
// is the right one is the caller's matter.
func VerifyPinned(presented []*x509.Certificate, td spiffeid.TrustDomain, rootHash string, now time.Time) (*Peer, error) {
	if len(presented) < 2 || len(presented) > MaxChainCerts {
		return nil, fmt.Errorf("the CA presents %d certificates, expected its chain up to the root", len(presented))
	}
	root := presented[len(presented)-1]
	want, err := hex.DecodeString(rootHash)
	if err != nil || len(want) != sha256.Size {
		return nil, errors.New("root_hash is not set to the hash that `merlon token create` printed: it is what tells the right CA from any other")
	}
	if got := sha256.Sum256(root.RawSubjectPublicKeyInfo); subtle.ConstantTimeCompare(got[:], want) != 1 {
		return nil, fmt.Errorf("the CA's root has the hash %x, not the configured root_hash %x: it is not the CA that printed the token", got, want)
	}
	// No bundle yet to say so: only a certificate that is an authority may vouch for
	// the trust domain; and where it names one, as ours does and the root of a larger
	// PKI does not, it has to be this one.
	if !root.IsCA || len(root.URIs) > 1 || len(root.URIs) == 1 && root.URIs[0].String() != td.IDString() {
		return nil, fmt.Errorf("the pinned root is not an authority of trust domain %s", td.Name())
	}
	peer, err := VerifyChain(presented[:len(presented)-1], x509bundle.FromX509Authorities(td, []*x509.Certificate{root}), now)
	if err != nil {
		return nil, fmt.Errorf("verify the CA: %w", err)
	}
	return peer, nil
}
