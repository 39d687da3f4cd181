// An agent whose own SVID ended while the CA was away comes back by that SVID,
// where its other evidence is good once and used up. The CA takes it once: an
// answer that is lost, also of a renewal before, is asked for again with the same
// new key.

package caclient

import (
	"context"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/agent/internal/attest"
	"merlon.dev/agent/internal/cache"
	"merlon.dev/ca/capb"
)

// successor is the key of the SVID that comes after by. It is safe for concurrent
// use.
type successor struct {
	mu sync.Mutex
	// guarded by mu
	by  *x509svid.SVID
	key *ecdsa.PrivateKey
	csr []byte
}

// after is the key with which to ask for what comes after by: the same until
// there is an answer.
func (s *successor) after(by *x509svid.SVID) (*ecdsa.PrivateKey, []byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.by != by {
		key, csr, err := newKey()
		if err != nil {
			return nil, nil, err
		}
		s.by, s.key, s.csr = by, key, csr
	}
	return s.key, s.csr, nil
}

// attest sees to a new SVID for the node: by the one before, where the CA has not
// refused that, or by the evidence that is configured.
func (c *Client) attest(ctx context.Context, picture *cache.Cache, address string) error {
	if own := c.own.Load(); c.cfg.Recover && own != nil && own.refused == nil {
		if done, err := c.tryRecover(ctx, picture, address, own); done {
			return err
		}
	}
	key, csr, err := newKey()
	if err != nil {
		return err
	}
	err = c.attestBy(ctx, picture, address, c.cfg.Attestor, key, csr)
	switch {
	case whyRefused(err) == capb.Refusal_REFUSAL_AGENT_BANNED:
		return fmt.Errorf("%w: %w", errEvidence, err) // no other evidence would help
	case status.Code(err) == codes.PermissionDenied:
		// The log's reader can do something about this one.
		kind := strings.ReplaceAll(c.cfg.Attestor.Kind(), "_", " ")
		return fmt.Errorf("%w: the CA refuses the %s: %s: %s", errEvidence, kind, statusOf(err).Message(), c.cfg.Attestor.Advice())
	case err != nil && !errors.Is(err, errEvidence):
		return fmt.Errorf("attest the node: %w", err)
	}
	return err
}

// tryRecover says whether there is nothing else to try for now.
func (c *Client) tryRecover(ctx context.Context, picture *cache.Cache, address string, own *ownSVID) (done bool, err error) {
	if c.notTaken == own.SVID {
		return false, nil
	}
	key, csr, err := c.successor.after(own.SVID)
	if err != nil {
		return true, err
	}
	err = c.attestBy(ctx, picture, address, &attest.OwnSVID{SVID: own.SVID}, key, csr)
	switch code := status.Code(err); {
	case err == nil:
		c.cfg.Logger.LogAttrs(ctx, slog.LevelInfo, "agent came back by its own SVID, which had ended", slog.Time("not_after", own.notAfter()))
		return true, nil
	case whyRefused(err) == capb.Refusal_REFUSAL_AGENT_BANNED:
		return true, fmt.Errorf("%w: %w", errEvidence, err)
	case code == codes.PermissionDenied || code == codes.InvalidArgument || code == codes.NotFound || code == codes.Unauthenticated:
		c.notTaken = own.SVID
		c.cfg.Logger.LogAttrs(ctx, slog.LevelWarn, "the CA does not take the agent's own SVID, which has ended", slog.String("reason", statusOf(err).Message()))
		return false, nil
	}
	return true, fmt.Errorf("attest the node by its own SVID: %w", err)
}
