// Recovery: an agent whose own X509-SVID ended while it could not reach the CA
// comes back by the key of that SVID, once. It is for nodes whose other evidence
// is good once; the CA forgets nothing about them for that long, and so knows
// whether the SVID was withdrawn, and whether it is the last one that the agent
// got: one that was replaced since is a copy, or the agent was put back.

package attest

import (
	"context"
	"crypto/x509"
	"errors"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"

	"merlon.dev/ca/internal/authority"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/store"
	"merlon.dev/sdk/possession"
	"merlon.dev/sdk/svid"
)

// OwnSVID is the kind of evidence in the audit log. An agent's record keeps that
// by which its node was proved.
const OwnSVID = "own_svid"

const (
	maxOwnChain     = 8
	maxOwnBytes     = 64 << 10
	maxOwnSignature = 1 << 10
)

// ProveFormer says whose the chain and the signature over statement are. The SVID
// must have held when it was issued, below a root that is trusted now and no
// tainted authority, whose key may be somebody else's: he can date an SVID as he
// likes. It must not be older than life.
func ProveFormer(chain [][]byte, signature, statement []byte, bundle x509bundle.Source, tainted []string, life time.Duration, now time.Time) (*svid.Peer, error) {
	total := 0
	for _, der := range chain {
		total += len(der)
	}
	if len(chain) == 0 || len(chain) > maxOwnChain || total > maxOwnBytes {
		return nil, refused(OwnSVID, Malformed, "the chain has %d certificates and %d bytes; want 1 to %d, and at most %d", len(chain), total, maxOwnChain, maxOwnBytes)
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, refused(OwnSVID, Malformed, "the agent's SVID does not parse")
	}
	// Its last moment says nothing about its holder before verify does.
	held := leaf.NotAfter.Add(-time.Second)
	if held.After(now) {
		held = now
	}
	peer, err := svid.VerifyRawChain(chain, bundle, held)
	if err != nil {
		return nil, refused(OwnSVID, Untrusted, "the agent's SVID is not one of this trust domain, or its root is not trusted any more: attest the node anew, with a join token")
	}
	if _, ok := entry.AgentName(peer.ID); !ok || !peer.OurSerial {
		return nil, refused(OwnSVID, NotAllowed, "the SVID is not an agent's")
	}
	if len(signature) > maxOwnSignature || !possession.Verify(peer.Leaf.PublicKey, statement, signature) {
		return nil, refused(OwnSVID, NotProved, "the signature is not by the SVID's key over this connection and CSR: connect again and sign anew")
	}
	if slices.ContainsFunc(peer.AuthorityIDs, func(id string) bool { return slices.Contains(tainted, id) }) {
		return nil, refused(OwnSVID, Untrusted, "the authority that signed the agent's SVID is tainted: attest the node anew, with a join token")
	}
	if age := now.Sub(peer.Leaf.NotBefore.Add(authority.Backdate)); age > life {
		return nil, refused(OwnSVID, NotAllowed, "the agent's SVID was issued %v ago, and brings it back for %v (agent_recovery): attest the node anew, with a join token", age.Round(time.Minute), life)
	}
	return peer, nil
}

// Recovered records that the agent of p was given the SVID issued for the one that
// it showed, in one compare-and-swap: of any number who hold the same key one
// succeeds, and again only with the same next key, for an answer can be lost.
// Anybody else has a copy: ErrCloned.
func Recovered(ctx context.Context, st store.Store, p *svid.Peer, issued SVID) error {
	return act(ctx, st, p.ID, func(a *Agent) error {
		last := p.SerialHex == a.LastSerial
		if a.LastSerial == "" { // it has that of its attestation, whose number has the record's revision
			last = p.Serial.Revision == a.AttestedRevision
		}
		// A renewal that could not be noted ends later than the last that was.
		last = last || p.NotAfter.After(a.NotAfter)
		again := p.SerialHex == a.PriorSerial && issued.KeyID == a.LastKeyID
		if !last && !again {
			return ErrCloned
		}
		a.replaced(p.SerialHex, issued)
		return nil
	})
}

// Withdrawn refuses an SVID for what is known of it or its agent. What an operator
// decided is told as it is.
func Withdrawn(fault error) error {
	if errors.Is(fault, ErrBanned) {
		return fault
	}
	return refused(OwnSVID, NotAllowed, "%v: attest the node anew, with a join token", fault)
}
