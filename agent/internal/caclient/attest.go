// The node proves itself, and the CA first: no evidence leaves the
// machine before the CA's chain ends in the root whose hash was pinned.

package caclient

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"merlon.dev/agent/internal/attest"
	"merlon.dev/agent/internal/cache"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid"
)

// errEvidence says that the node cannot prove itself. Every replica of the CA
// would say so.
var errEvidence = errors.New("attest the node")

// attestBy trades evidence for the agent's own SVID with key. Where evidence is
// good once it counts as used when a CA took it, also if its answer is lost.
func (c *Client) attestBy(ctx context.Context, picture *cache.Cache, address string, by attest.Attestor, key *ecdsa.PrivateKey, csr []byte) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	cc, conn, err := c.meet(ctx, picture, address)
	if err != nil {
		return err
	}
	defer cc.Close()
	req := &capb.AttestRequest{Csr: csr}
	if err := by.Evidence(ctx, conn, req); err != nil {
		return fmt.Errorf("%w: %w", errEvidence, err)
	}
	answer, err := capb.NewNodeClient(cc).Attest(ctx, req)
	if err != nil {
		return err
	}
	return c.adopt(ctx, picture, answer.GetX509Svid(), answer.GetTrustBundle(), key)
}

// adopt checks and keeps a new SVID of the agent's own.
func (c *Client) adopt(ctx context.Context, picture *cache.Cache, chain [][]byte, bundle *capb.TrustBundle, key *ecdsa.PrivateKey) error {
	trust, err := cache.ParseTrust(bundle, c.cfg.TrustDomain.Name())
	if err != nil {
		return fmt.Errorf("the CA's answer: %w", err)
	}
	// A replica that is behind may not know the newest bundle: what was
	// distrusted meanwhile stays so, also after a restart.
	if held := picture.Trust(); held != nil && held.Sequence > trust.Sequence {
		trust = held
	}
	peer, err := svid.VerifyRawChain(chain, trust.Bundle, time.Now())
	if err != nil {
		return fmt.Errorf("verify the agent's new SVID: %w", err)
	}
	if err := checkAgentID(peer.ID, c.cfg.TrustDomain); err != nil {
		return fmt.Errorf("the agent's new SVID: %w", err)
	}
	if held := c.own.Load(); held != nil && held.ID != peer.ID && held.valid(time.Now()) && held.refused == nil {
		return fmt.Errorf("the agent's new SVID is of %s, but this is %s", peer.ID, held.ID)
	}
	if pub, ok := peer.Leaf.PublicKey.(*ecdsa.PublicKey); !ok || !pub.Equal(&key.PublicKey) {
		return errors.New("the agent's new SVID has another key")
	}
	certs, err := x509.ParseCertificates(bytes.Join(chain, nil))
	if err != nil {
		return fmt.Errorf("parse the agent's new SVID: %w", err)
	}
	// Trust first: an SVID without it could not be used.
	if err := c.saveTrust(trust); err != nil {
		return err
	}
	if err := c.saveSVID(chain, key); err != nil {
		return err
	}
	picture.SetTrust(ctx, trust)
	c.setOwn(&x509svid.SVID{ID: peer.ID, Certificates: certs, PrivateKey: key}, time.Now())
	c.replaceOwn(trust, time.Now().Add(againPause))
	c.cfg.Logger.LogAttrs(ctx, slog.LevelInfo, "agent has an SVID",
		slog.String("spiffe_id", peer.ID.String()), slog.String("serial", peer.SerialHex),
		slog.Time("not_after", peer.NotAfter))
	return nil
}

// firstContact is a TLS configuration without a client certificate that goes
// through with only if the server is the CA: by the trust bundle, if one is
// held, or by the pinned root. A trust bundle whose roots have all ended vouches
// for nobody, and would keep the agent away for ever from a CA that had to begin
// with a new root.
func (c *Client) firstContact(picture *cache.Cache) *tls.Config {
	cfg := svid.TLS{}.Client()
	cfg.GetClientCertificate = nil
	cfg.VerifyConnection = c.timed(func(cs tls.ConnectionState, now time.Time) error {
		if trust := picture.Trust(); trust != nil && !trust.Ended(now) {
			return c.checkCA(cs.PeerCertificates, trust.Bundle, now)
		}
		peer, err := svid.VerifyPinned(cs.PeerCertificates, c.cfg.TrustDomain, c.cfg.RootHash, now)
		if err != nil {
			return err
		}
		return svid.AdmitID(c.caID)(peer)
	})
	return cfg
}

func (c *Client) checkCA(chain []*x509.Certificate, bundle x509bundle.Source, now time.Time) error {
	peer, err := svid.VerifyChain(chain, bundle, now)
	if err != nil {
		return fmt.Errorf("verify the CA: %w", err)
	}
	return svid.AdmitID(c.caID)(peer)
}

// newKey makes a key, which never leaves the node, and a CSR for it.
func newKey() (key *ecdsa.PrivateKey, csr []byte, err error) {
	if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, nil, fmt.Errorf("make the agent's key: %w", err)
	}
	if csr, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key); err != nil {
		return nil, nil, fmt.Errorf("make the agent's CSR: %w", err)
	}
	return key, csr, nil
}
