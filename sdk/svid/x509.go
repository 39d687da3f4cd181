// Judges a presented certificate chain: go-spiffe's verdict first needs to be
// yes, and then every MUST of the X509-SVID standard has to hold, also those
// which go-spiffe v2.9.0 does not look at.

package svid

import (
	"cmp"
	"crypto/x509"
	"encoding/hex"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Limits of a presented chain, checked before any signature: whoever can
// connect can send one (SECURITY.md T38).
const (
	MaxChainCerts = 8
	MaxChainBytes = 64 << 10
)

// MaxIDBytes is the length of the longest SPIFFE ID (SPIFFE-ID §2.3).
const MaxIDBytes = 2048

// Peer is who a verified chain proves to be at the other end. It is read-only
// and safe for concurrent use.
type Peer struct {
	ID spiffeid.ID
	// Serial is the leaf's number taken apart, meaningful when OurSerial. The
	// numbers of other trust domains' authorities may look like ours: trust the
	// parts only for an ID of the own trust domain.
	Serial    Serial
	OurSerial bool
	SerialHex string // the leaf's number in lower-case hex
	// AuthorityIDs are the hex subject key IDs of every certificate that vouches
	// for the leaf, from its issuer up to the root.
	AuthorityIDs []string
	// NotBefore is the leaf's; NotAfter is the earliest of the whole chain.
	NotBefore, NotAfter time.Time
	Leaf                *x509.Certificate
}

// VerifyRawChain is VerifyChain for the DER bytes of a chain, leaf first.
func VerifyRawChain(raw [][]byte, bundles x509bundle.Source, now time.Time) (*Peer, error) {
	if err := checkCaps(raw); err != nil {
		return nil, err
	}
	certs := make([]*x509.Certificate, len(raw))
	for i, der := range raw {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, &Error{Rule: "X13", Reason: "a certificate of the chain does not parse", Err: err}
		}
		certs[i] = cert
	}
	return verify(certs, from(bundles), now)
}

// VerifyChain checks a presented chain, leaf first, against the trust bundle of
// the leaf's own trust domain, at the time now. A root in the presented chain
// counts for nothing. The error is an *Error. VerifyChain may keep presented[0].
func VerifyChain(presented []*x509.Certificate, bundles x509bundle.Source, now time.Time) (*Peer, error) {
	if err := checkPresented(presented); err != nil {
		return nil, err
	}
	return verify(presented, from(bundles), now)
}

// from makes a source of trust bundles one of anchors, to be asked once.
func from(bundles x509bundle.Source) func(spiffeid.TrustDomain) (*anchors, error) {
	return func(td spiffeid.TrustDomain) (*anchors, error) {
		if bundles == nil {
			return nil, refuse("X17", "there is no source of trust bundles")
		}
		bundle, err := bundles.GetX509BundleForTrustDomain(td)
		if err != nil {
			return nil, &Error{Rule: "X17", Reason: "no trust bundle for " + td.IDString(), Err: err}
		}
		if bundle == nil || bundle.TrustDomain() != td {
			return nil, refuse("X17", "the source of trust bundles answered with one of another trust domain")
		}
		return &anchors{bundle: bundle, roots: bundle.X509Authorities()}, nil
	}
}

func checkPresented(presented []*x509.Certificate) error {
	raw := make([][]byte, len(presented))
	for i, cert := range presented {
		if cert == nil {
			return refuse("CAP", "certificate %d of the chain is nil", i)
		}
		raw[i] = cert.Raw
	}
	return checkCaps(raw)
}

func checkCaps(raw [][]byte) error {
	switch total := sumLen(raw); {
	case len(raw) == 0:
		return refuse("CAP", "no certificate was presented")
	case len(raw) > MaxChainCerts:
		return refuse("CAP", "%d certificates were presented; at most %d are looked at", len(raw), MaxChainCerts)
	case total > MaxChainBytes:
		return refuse("CAP", "the presented chain has %d bytes; at most %d are looked at", total, MaxChainBytes)
	}
	return nil
}

func sumLen(raw [][]byte) (total int) {
	for _, b := range raw {
		total += len(b)
	}
	return total
}

func verify(certs []*x509.Certificate, trusted func(spiffeid.TrustDomain) (*anchors, error), now time.Time) (*Peer, error) {
	leaf := certs[0]
	id, err := leafID(leaf)
	if err != nil {
		return nil, err
	}
	// Fetched once and handed on: a source that changes between two questions
	// cannot give the rules another bundle than go-spiffe saw.
	anchors, err := trusted(id.TrustDomain())
	if err != nil {
		return nil, err
	}
	if err := checkLeaf(leaf, id, anchors); err != nil {
		return nil, err
	}
	for _, cert := range certs {
		if err := checkKey(cert.PublicKey); err != nil {
			return nil, refuse("X13", "certificate of %q: %v", cert.Subject, err)
		}
	}
	if now.IsZero() { // go-spiffe would silently take the real time
		return nil, refuse("X13", "the current time is not known")
	}
	chains, err := anchors.paths(id, certs, now)
	if err != nil {
		return nil, err
	}
	return newPeer(id, leaf, chains)
}

// newPeer keeps the chains that obey every rule. Authorities of all of them
// count, and the earliest end: if a revoked or expiring authority vouches for
// the peer on one path, another path does not hide that. So does one whose
// authority key IDs do not fit, but it vouches for nobody by itself.
func newPeer(id spiffeid.ID, leaf *x509.Certificate, chains [][]*x509.Certificate) (*Peer, error) {
	peer := peerOf(id, leaf)
	var firstErr error
	linked, seen := false, make(map[string]bool)
	for _, chain := range chains {
		if err := checkChain(chain); err != nil {
			firstErr = cmp.Or(firstErr, err)
			continue
		}
		err := checkLinks(chain)
		linked, firstErr = linked || err == nil, cmp.Or(firstErr, err)
		for _, authority := range chain[1:] {
			if authority.NotAfter.Before(peer.NotAfter) {
				peer.NotAfter = authority.NotAfter
			}
			if keyID := hex.EncodeToString(authority.SubjectKeyId); !seen[keyID] {
				seen[keyID] = true
				peer.AuthorityIDs = append(peer.AuthorityIDs, keyID)
			}
		}
	}
	switch {
	case linked:
		return peer, nil
	case firstErr != nil:
		return nil, firstErr
	}
	return nil, refuse("X13", "no valid path to a root")
}

// PeerOfLeaf says who a leaf is whose chain somebody else has verified and did not
// hand on, as an Envoy does. It holds every rule on the leaf that needs neither
// signature nor trust bundle, and no validity. AuthorityIDs has the leaf's issuer
// alone, and NotAfter is the leaf's. The error is an *Error.
func PeerOfLeaf(leaf *x509.Certificate) (*Peer, error) {
	if err := checkPresented([]*x509.Certificate{leaf}); err != nil {
		return nil, err
	}
	id, err := leafID(leaf)
	if err != nil {
		return nil, err
	}
	if err := checkLeaf(leaf, id, &anchors{}); err != nil {
		return nil, err
	}
	if err := checkKey(leaf.PublicKey); err != nil {
		return nil, refuse("X13", "certificate of %q: %v", leaf.Subject, err)
	}
	peer := peerOf(id, leaf)
	if len(leaf.AuthorityKeyId) > 0 {
		peer.AuthorityIDs = []string{hex.EncodeToString(leaf.AuthorityKeyId)}
	}
	return peer, nil
}

// peerOf is what the leaf alone says.
func peerOf(id spiffeid.ID, leaf *x509.Certificate) *Peer {
	serial, ours := SerialFromBig(leaf.SerialNumber)
	return &Peer{
		ID:        id,
		Serial:    serial,
		OurSerial: ours,
		SerialHex: leaf.SerialNumber.Text(16),
		NotBefore: leaf.NotBefore,
		NotAfter:  leaf.NotAfter,
		Leaf:      leaf,
	}
}
