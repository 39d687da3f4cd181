// The CA's own X509-SVID, which it presents on its ports: minted from its own
// authority and renewed at half its life, or at once when it is revoked or
// another root signs.

package ca

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"merlon.dev/ca/internal/api"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/authority"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/upstream"
	"merlon.dev/sdk/checkpoint"
	"merlon.dev/sdk/svid"
)

const (
	ownTTL   = time.Hour
	ownRetry = 10 * time.Second
	// ownLook is how often the wall clock is looked at, by which the SVID ends:
	// timers stand still while a machine sleeps.
	ownLook = 15 * time.Second
	// caHandle begins the serials of the CA's own SVIDs; no agent has it.
	caHandle = 0
)

// ownSVID implements x509svid.Source.
type ownSVID struct {
	realm    uint32
	td       spiffeid.TrustDomain
	dnsNames []string
	keys     *upstream.Keys
	registry *registry.Registry
	audit    *audit.Log
	standing func() error // why this replica must not issue

	current atomic.Pointer[issuedSVID]
}

type issuedSVID struct {
	svid    *x509svid.SVID
	peer    *svid.Peer // how others see it
	root    *x509.Certificate
	renewAt time.Time
}

// GetX509SVID implements x509svid.Source.
func (o *ownSVID) GetX509SVID() (*x509svid.SVID, error) {
	c := o.current.Load()
	if c == nil {
		return nil, errors.New("the CA has no X509-SVID yet")
	}
	return c.svid, nil
}

// renew issues a new SVID with a new key.
func (o *ownSVID) renew(ctx context.Context, now time.Time) error {
	if err := o.standing(); err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make the CA's own key: %w", err)
	}
	serial, err := svid.NewSerial(caHandle, o.registry.Revision())
	if err != nil {
		return fmt.Errorf("number the CA's own X509-SVID: %w", err)
	}
	serial = serial.In(o.realm)
	ca := o.keys.X509()
	leaf, err := ca.Issue(authority.LeafRequest{
		SPIFFEID: entry.CAID(o.td), PublicKey: key.Public(), Serial: serial, TTL: ownTTL, DNSNames: o.names(), Now: now,
	})
	if err != nil {
		return fmt.Errorf("issue the CA's own X509-SVID: %w", err)
	}
	cert, err := x509.ParseCertificate(leaf.DER)
	if err != nil {
		return fmt.Errorf("read the CA's own X509-SVID: %w", err)
	}
	chain := append([]*x509.Certificate{cert}, ca.Chain...)
	// Agents are as strict: better to fail here than at each of them.
	peer, err := svid.VerifyChain(chain, o.registry, now)
	if err != nil {
		return fmt.Errorf("verify the CA's own X509-SVID: %w", err)
	}
	signed, err := checkpoint.CertificateHash(leaf.DER)
	if err != nil {
		return fmt.Errorf("record the CA's own X509-SVID: %w", err)
	}
	err = o.audit.Append(ctx, audit.Record{
		Time: now, Type: audit.Issue, Actor: entry.CAID(o.td).String(), SPIFFEID: entry.CAID(o.td).String(),
		Serial: serial.String(), AuthorityID: ca.ID(), SignedHash: signed, NotAfter: leaf.NotAfter,
	})
	if err != nil {
		return fmt.Errorf("record the CA's own X509-SVID: %w", err)
	}
	o.current.Store(&issuedSVID{
		svid:    &x509svid.SVID{ID: entry.CAID(o.td), Certificates: chain, PrivateKey: key},
		peer:    peer,
		root:    ca.Root,
		renewAt: now.Add(peer.NotAfter.Sub(now) / 2).Round(0), // of the wall clock alone
	})
	return nil
}

func (o *ownSVID) names() []string {
	names := []string{"localhost"}
	for _, n := range o.dnsNames {
		if !slices.Contains(names, n) {
			names = append(names, n)
		}
	}
	return names
}

// run renews until ctx ends. A failure is tried again: the SVID at hand holds
// for as long again.
func (o *ownSVID) run(ctx context.Context, log *slog.Logger) error {
	for {
		o.waitUntilDue(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err := o.renew(ctx, time.Now()); err != nil && ctx.Err() == nil {
			level := slog.LevelError
			if errors.Is(err, api.ErrEvicted) {
				level = slog.LevelDebug // it was said once, and /ready says it
			}
			log.LogAttrs(ctx, level, "own X509-SVID not renewed", slog.Any("err", err))
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(ownRetry):
			}
		}
	}
}

// waitUntilDue returns at renewAt, or when a revocation concerns the SVID, a root took
// over from its root, or by the clock, which was set, the SVID is not valid yet.
func (o *ownSVID) waitUntilDue(ctx context.Context) {
	for ctx.Err() == nil {
		seen := o.registry.Revision() // before the look: no revocation is missed
		now := time.Now()
		if o.due(now) {
			return
		}
		change, cancel := context.WithTimeout(ctx, min(ownLook, o.current.Load().renewAt.Sub(now)))
		_ = o.registry.Wait(change, seen+1) // fails at the end of the wait only
		cancel()
	}
}

func (o *ownSVID) due(now time.Time) bool {
	current := o.current.Load()
	_, revoked := o.registry.Revoked(current.peer)
	// Made by a clock that was ahead, and is right again: nobody takes it.
	early := slices.ContainsFunc(current.svid.Certificates, func(c *x509.Certificate) bool { return now.Before(c.NotBefore) })
	return revoked || early || !now.Before(current.renewAt) || !current.root.Equal(o.keys.X509().Root)
}
