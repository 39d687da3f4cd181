// What the agent keeps on disk: its own SVID with key, and the trust bundle
// (and what it has seen, seen.go).

package caclient

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/ca/capb"
)

const (
	svidFile  = "agent_svid"   // key and chain in PEM, in one file: one rename replaces both
	trustFile = "trust_bundle" // storedTrust
)

// storedTrust is the form of trustFile.
type storedTrust struct {
	TrustDomain string          `json:"trust_domain"`
	Sequence    uint64          `json:"sequence"`
	JWKS        json.RawMessage `json:"jwks"`
	Tainted     []string        `json:"tainted,omitempty"`
}

func (c *Client) saveSVID(chain [][]byte, key crypto.Signer) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("encode the agent's key: %w", err)
	}
	out := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	for _, cert := range chain {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert})...)
	}
	return c.cfg.DataDir.Write(svidFile, out)
}

// loadSVID returns the agent's SVID from the disk, nil when there is none. It
// may have expired.
func (c *Client) loadSVID() (*x509svid.SVID, error) {
	content, err := c.cfg.DataDir.Read(context.Background(), svidFile)
	if err != nil || content == nil {
		return nil, err
	}
	own, err := x509svid.Parse(content, content)
	if err != nil {
		return nil, fmt.Errorf("read the agent's SVID in %s: %w", c.cfg.DataDir.Path(), err)
	}
	if err := checkAgentID(own.ID, c.cfg.TrustDomain); err != nil {
		return nil, fmt.Errorf("the SVID in %s is another's: %w", c.cfg.DataDir.Path(), err)
	}
	return own, nil
}

// saveTrust writes t down unless a newer one is there.
func (c *Client) saveTrust(t *cache.Trust) error {
	c.saving.Lock()
	defer c.saving.Unlock()
	if t.Sequence < c.saved {
		return nil
	}
	content, err := json.Marshal(storedTrust{TrustDomain: c.cfg.TrustDomain.Name(), Sequence: t.Sequence, JWKS: t.Document, Tainted: t.Tainted})
	if err != nil {
		return fmt.Errorf("encode the trust bundle: %w", err)
	}
	if err := c.cfg.DataDir.Write(trustFile, content); err != nil {
		return err
	}
	c.saved = t.Sequence
	return nil
}

// loadTrust returns the trust bundle from the disk, nil when there is none.
func (c *Client) loadTrust() (*cache.Trust, error) {
	content, err := c.cfg.DataDir.Read(context.Background(), trustFile)
	if err != nil || content == nil {
		return nil, err
	}
	var stored storedTrust
	if err := json.Unmarshal(content, &stored); err != nil {
		return nil, fmt.Errorf("read %s: %w", trustFile, err)
	}
	return cache.ParseTrust(&capb.TrustBundle{
		TrustDomain: stored.TrustDomain, Sequence: stored.Sequence, Jwks: stored.JWKS, TaintedAuthorityIds: stored.Tainted,
	}, c.cfg.TrustDomain.Name())
}

// checkAgentID says whether id is one of an agent.
func checkAgentID(id spiffeid.ID, td spiffeid.TrustDomain) error {
	prefix := "/agent/"
	if !id.MemberOf(td) || len(id.Path()) <= len(prefix) || id.Path()[:len(prefix)] != prefix {
		return fmt.Errorf("%s is not the ID of an agent of trust domain %s", id, td.Name())
	}
	return nil
}
