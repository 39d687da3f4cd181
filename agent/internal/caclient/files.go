// What the agent keeps on disk: its own SVID with key, and the trust bundle
// (and what it has seen, seen.go).

package caclient

import (
	"crypto"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/durable"
)

const (
	svidFile  = "agent_svid.pem"    // key and chain in one file: one rename replaces both
	trustFile = "trust_bundle.json" // storedTrust

	// maxFileBytes bounds what is read back.
	maxFileBytes = 4 << 20
)

// storedTrust is the form of trustFile.
type storedTrust struct {
	TrustDomain string          `json:"trust_domain"`
	Sequence    uint64          `json:"sequence"`
	JWKS        json.RawMessage `json:"jwks"`
	Tainted     []string        `json:"tainted,omitempty"`
}

// ReadFile reads what durable.WriteFile wrote; nil when there is no such file. It
// refuses a file that other users can read or write.
func ReadFile(dir, name string) ([]byte, error) {
	path := filepath.Join(dir, name)
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() || fi.Size() > maxFileBytes {
		return nil, fmt.Errorf("read %s: not a file of the agent's", path)
	}
	if fi.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("read %s: mode %04o lets other users in; chmod it to 0600", path, fi.Mode().Perm())
	}
	return os.ReadFile(path)
}

// MakeDataDir makes dir for the agent's user only, or refuses one that others
// can enter.
func MakeDataDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make the data directory: %w", err)
	}
	fi, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("open the data directory: %w", err)
	}
	if !fi.IsDir() || fi.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("data directory %s has mode %04o, which lets other users in; chmod it to 0700", dir, fi.Mode().Perm())
	}
	if err := durable.RemoveUnfinished(dir); err != nil {
		return fmt.Errorf("clean the data directory: %w", err)
	}
	return nil
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
	return durable.WriteFile(c.cfg.DataDir, svidFile, out)
}

// loadSVID returns the agent's SVID from the disk, nil when there is none. It
// may have expired.
func (c *Client) loadSVID() (*x509svid.SVID, error) {
	content, err := ReadFile(c.cfg.DataDir, svidFile)
	if err != nil || content == nil {
		return nil, err
	}
	own, err := x509svid.Parse(content, content)
	if err != nil {
		return nil, fmt.Errorf("read the agent's SVID in %s: %w", filepath.Join(c.cfg.DataDir, svidFile), err)
	}
	if err := checkAgentID(own.ID, c.cfg.TrustDomain); err != nil {
		return nil, fmt.Errorf("the SVID in %s is another's: %w", filepath.Join(c.cfg.DataDir, svidFile), err)
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
	if err := durable.WriteFile(c.cfg.DataDir, trustFile, content); err != nil {
		return err
	}
	c.saved = t.Sequence
	return nil
}

// loadTrust returns the trust bundle from the disk, nil when there is none.
func (c *Client) loadTrust() (*cache.Trust, error) {
	content, err := ReadFile(c.cfg.DataDir, trustFile)
	if err != nil || content == nil {
		return nil, err
	}
	var stored storedTrust
	if err := json.Unmarshal(content, &stored); err != nil {
		return nil, fmt.Errorf("read %s: %w", filepath.Join(c.cfg.DataDir, trustFile), err)
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
