// The key of this replica's log: who signs its checkpoints, and the certificate
// by which the authority that issues now vouches for it.

package ca

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/authority"
	"merlon.dev/ca/internal/opening"
	"merlon.dev/ca/internal/upstream"
	"merlon.dev/sdk/checkpoint"
)

// logKey is safe for concurrent use.
type logKey struct {
	checkpoint.Key
	keys  *upstream.Keys
	audit *audit.Log

	mu sync.Mutex
	// guarded by mu
	by    *authority.X509Authority // who certified chain
	chain [][]byte
}

// publishLog lets the log sign checkpoints.
func (p *parts) publishLog(td spiffeid.TrustDomain) error {
	public, ok := p.keys.Log().Public().(ed25519.PublicKey)
	if !ok {
		return fmt.Errorf("the log's key is a %T", p.keys.Log().Public())
	}
	k := &logKey{
		Key:  checkpoint.Key{TrustDomain: td.Name(), Replica: p.keys.Name(), Public: public},
		keys: p.keys, audit: p.audit,
	}
	if err := p.audit.Publish(audit.Key{Key: k.Key, Signer: p.keys.Log(), Chain: k.certificates}); err != nil {
		return err
	}
	if _, err := k.certificates(); err != nil {
		return err
	}
	return p.audit.Vouch(context.Background())
}

// certificates is the chain under the authority that issues now, and its root.
func (k *logKey) certificates() ([][]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	ca := k.keys.X509()
	if ca == k.by {
		return k.chain, nil
	}
	now := time.Now()
	chain, err := ca.CertifyLogKey(k.Replica, k.Public, now)
	if err != nil {
		return nil, err
	}
	err = k.audit.Append(context.Background(), audit.Record{
		Time: now, Type: audit.Renew, Actor: "ca", Detail: "certificate of the log's key", AuthorityID: ca.ID(), NotAfter: ca.NotAfter(),
	})
	if err != nil && !errors.Is(err, audit.ErrClosed) { // the last checkpoint comes after the last record
		return nil, fmt.Errorf("record the certificate of the log's key: %w", err)
	}
	k.by, k.chain = ca, append(chain, ca.Root.Raw)
	return k.chain, nil
}

// openAudit opens the log, and sees whether it is a new one.
func (p *parts) openAudit(cfg Config) error {
	first, err := opening.BeginOfLog(cfg)
	if err != nil {
		return err
	}
	p.newLog = first == 0
	p.audit, err = audit.Open(cfg.AuditPath(), cfg.AuditOptions())
	return err
}
