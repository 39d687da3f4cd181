// Who calls, by what the Envoy has verified: the principal that it took from the
// certificate of its mutual TLS, and that certificate, where it is sent.

package extauthz

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"sync"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/sdk/svid"
)

const (
	// maxCertificateBytes bounds a leaf as it is sent, in PEM and encoded once more.
	maxCertificateBytes = 32 << 10
	// maxPeers is how many certificates the younger half of peers has.
	maxPeers = 1024
)

// peers remembers the certificates that were read. It is safe for concurrent use.
type peers struct {
	mu sync.Mutex
	// guarded by mu
	young, older map[[sha256.Size]byte]*svid.Peer
}

// of says who is at the other end. Without a certificate the peer has a SPIFFE ID and
// nothing else. A certificate that the SPIFFE standard refuses proves nothing here,
// even if Envoy's own validator took it.
func (p *peers) of(source *authv3.AttributeContext_Peer) (*svid.Peer, error) {
	principal := source.GetPrincipal()
	if principal == "" {
		return nil, errors.New("the Envoy names no principal: the caller showed no certificate")
	}
	if source.GetCertificate() == "" {
		id, err := spiffeid.FromString(principal)
		if err != nil || id.Path() == "" {
			return nil, fmt.Errorf("principal %.200q is not the SPIFFE ID of a workload", principal)
		}
		return &svid.Peer{ID: id}, nil
	}
	peer, err := p.read(source.GetCertificate())
	if err != nil {
		return nil, fmt.Errorf("certificate of principal %.200q: %w", principal, err)
	}
	if peer.ID.String() != principal {
		return nil, fmt.Errorf("the certificate is of %s, and the principal is %.200q", peer.ID, principal)
	}
	return peer, nil
}

func (p *peers) read(encoded string) (*svid.Peer, error) {
	if len(encoded) > maxCertificateBytes {
		return nil, fmt.Errorf("it has %d bytes; at most %d are looked at", len(encoded), maxCertificateBytes)
	}
	key := sha256.Sum256([]byte(encoded))
	if peer := p.known(key); peer != nil {
		return peer, nil
	}
	leaf, err := parse(encoded)
	if err != nil {
		return nil, err
	}
	peer, err := svid.PeerOfLeaf(leaf)
	if err != nil {
		return nil, err
	}
	p.remember(key, peer)
	return peer, nil
}

// parse reads one certificate in PEM, percent-encoded.
func parse(encoded string) (*x509.Certificate, error) {
	text, err := url.PathUnescape(encoded) // "+" stays what it is
	if err != nil {
		return nil, err
	}
	block, rest := pem.Decode([]byte(text))
	if block == nil || block.Type != "CERTIFICATE" || len(rest) > 0 {
		return nil, errors.New("it is not one certificate in PEM")
	}
	return x509.ParseCertificate(block.Bytes)
}

func (p *peers) known(key [sha256.Size]byte) *svid.Peer {
	p.mu.Lock()
	defer p.mu.Unlock()
	if peer := p.young[key]; peer != nil {
		return peer
	}
	peer := p.older[key]
	if peer != nil {
		p.put(key, peer)
	}
	return peer
}

func (p *peers) remember(key [sha256.Size]byte, peer *svid.Peer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.put(key, peer)
}

// put is for holders of p.mu.
func (p *peers) put(key [sha256.Size]byte, peer *svid.Peer) {
	if len(p.young) >= maxPeers || p.young == nil {
		p.older, p.young = p.young, make(map[[sha256.Size]byte]*svid.Peer)
	}
	p.young[key] = peer
}
