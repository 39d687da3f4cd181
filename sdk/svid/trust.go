// Trust bundles prepared for many handshakes: the roots are found by name instead
// of all being tried, a chain that was verified is known again, and of one that was not
// the intermediate (issuers.go).

package svid

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// maxChains is how many verified chains the younger half of a Trust's memory has.
const maxChains = 1024

// Trust is a set of trust bundles at one moment, and what was verified against it.
// It gives the answers of [VerifyChain], which looks at revocations no more than
// it does. When trust changes, make another: nothing is remembered from one to the
// next. It is safe for concurrent use. The zero value trusts nobody.
type Trust struct {
	anchors map[spiffeid.TrustDomain]*anchors

	mu           sync.Mutex // guards the rest
	young, older map[chainKey]verified
}

// chainKey is the hash of all of a presented chain.
type chainKey [sha256.Size]byte

// verified is a peer, and when verifying its chain again would give the same.
type verified struct {
	peer        *Peer
	from, until time.Time
}

// NewTrust prepares bundles, which may change afterwards without any effect here.
func NewTrust(bundles *x509bundle.Set) *Trust {
	t := &Trust{anchors: make(map[spiffeid.TrustDomain]*anchors), young: make(map[chainKey]verified)}
	for _, bundle := range bundles.Bundles() {
		t.anchors[bundle.TrustDomain()] = prepare(bundle)
	}
	return t
}

// VerifyChain is the function of that name, against t.
func (t *Trust) VerifyChain(presented []*x509.Certificate, now time.Time) (*Peer, error) {
	if err := checkPresented(presented); err != nil {
		return nil, err
	}
	key := keyOf(presented)
	if peer := t.known(key, now); peer != nil {
		return peer, nil
	}
	peer, err := verify(presented, func(td spiffeid.TrustDomain) (*anchors, error) {
		if a := t.anchors[td]; a != nil {
			return a, nil
		}
		return nil, refuse("X17", "no trust bundle for %s", td.IDString())
	}, now)
	if err != nil {
		return nil, err
	}
	t.remember(key, verified{peer, now, t.anchors[peer.ID.TrustDomain()].until(presented, peer, now)})
	return peer, nil
}

func keyOf(presented []*x509.Certificate) (key chainKey) {
	h := sha256.New()
	for _, cert := range presented {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(cert.Raw)))
		h.Write(n[:])
		h.Write(cert.Raw)
	}
	h.Sum(key[:0])
	return key
}

func (t *Trust) known(key chainKey, now time.Time) *Peer {
	t.mu.Lock()
	defer t.mu.Unlock()
	v, ok := t.young[key]
	if !ok {
		if v, ok = t.older[key]; ok {
			t.put(key, v)
		}
	}
	if !ok || now.Before(v.from) || !now.Before(v.until) {
		return nil
	}
	return v.peer
}

func (t *Trust) remember(key chainKey, v verified) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.put(key, v)
}

// put is for holders of t.mu.
func (t *Trust) put(key chainKey, v verified) {
	if len(t.young) >= maxChains {
		t.older, t.young = t.young, make(map[chainKey]verified, maxChains)
	}
	t.young[key] = v
}

// Forget makes every chain be verified again.
func (t *Trust) Forget() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.older, t.young = nil, make(map[chainKey]verified)
	for _, a := range t.anchors {
		a.issuers.forget()
	}
}

// Same says whether t trusts what bundles say, and nothing else.
func (t *Trust) Same(bundles *x509bundle.Set) bool {
	if bundles.Len() != len(t.anchors) {
		return false
	}
	for _, bundle := range bundles.Bundles() {
		if a := t.anchors[bundle.TrustDomain()]; a == nil || !a.bundle.Equal(bundle) {
			return false
		}
	}
	return true
}

// anchors is one trust bundle. Without the maps it is one that is asked once.
type anchors struct {
	bundle *x509bundle.Bundle
	roots  []*x509.Certificate            // of bundle
	named  map[string][]*x509.Certificate // by subject, DER
	raw    map[string]bool                // by all of their bytes

	issuers *issuers // that were verified; nil: none is remembered
}

func prepare(bundle *x509bundle.Bundle) *anchors {
	bundle = bundle.Clone()
	a := &anchors{bundle: bundle, roots: bundle.X509Authorities(), named: map[string][]*x509.Certificate{}, raw: map[string]bool{}, issuers: &issuers{}}
	for _, root := range a.roots {
		a.named[string(root.RawSubject)] = append(a.named[string(root.RawSubject)], root)
		a.raw[string(root.Raw)] = true
	}
	return a
}

// has says whether cert is one of the roots.
func (a *anchors) has(cert *x509.Certificate) bool {
	if a.raw != nil {
		return a.raw[string(cert.Raw)]
	}
	return slices.ContainsFunc(a.roots, cert.Equal)
}

// above is the bundle with those roots alone that can stand above one of certs: a
// path goes from a certificate's issuer to a root of that very name (RFC 5280
// section 6.1), so the others play no part.
func (a *anchors) above(certs []*x509.Certificate) *x509bundle.Bundle {
	if a.named == nil {
		return a.bundle
	}
	var roots []*x509.Certificate
	for i, cert := range certs {
		seen := slices.ContainsFunc(certs[:i], func(c *x509.Certificate) bool { return string(c.RawIssuer) == string(cert.RawIssuer) })
		if !seen {
			roots = append(roots, a.named[string(cert.RawIssuer)]...)
		}
	}
	if len(roots) == len(a.roots) {
		return a.bundle
	}
	return x509bundle.FromX509Authorities(a.bundle.TrustDomain(), roots)
}

// paths are all valid ones from the leaf in certs to a root; what each certificate says
// beyond RFC 5280 is not looked at.
func (a *anchors) paths(id spiffeid.ID, certs []*x509.Certificate, now time.Time) ([][]*x509.Certificate, error) {
	if chains := a.issuers.paths(certs, now); chains != nil {
		return chains, nil
	}
	verified, chains, err := x509svid.Verify(certs, a.above(certs), x509svid.WithTime(now))
	if err != nil {
		return nil, &Error{Rule: "X13", Reason: "no valid path to the trust bundle of " + id.TrustDomain().IDString(), Err: err}
	}
	if verified != id {
		return nil, refuse("X14", "go-spiffe reads SPIFFE ID %q where %q is written", verified, id)
	}
	a.issuers.learn(a, certs, chains, now)
	return chains, nil
}

// until is when verifying the chain of peer again could give something else: a
// certificate has ended, or one that was not valid yet at the time now begins.
func (a *anchors) until(presented []*x509.Certificate, peer *Peer, now time.Time) time.Time {
	until := peer.NotAfter
	for _, certs := range [][]*x509.Certificate{presented, a.roots} {
		for _, cert := range certs {
			if now.Before(cert.NotBefore) && cert.NotBefore.Before(until) {
				until = cert.NotBefore
			}
		}
	}
	return until
}
