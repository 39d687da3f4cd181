// What an identity goes by at the moment, for a program that shows it to operators.

package sdk

import (
	"errors"
	"time"

	"merlon.dev/policy"
)

// State is a picture of an Identity.
type State struct {
	SPIFFEID string    `json:"spiffe_id,omitempty"` // empty after it was withdrawn
	Serial   string    `json:"serial,omitempty"`
	NotAfter time.Time `json:"not_after,omitzero"`
	// PolicyGeneration is that of the active policy; 0 for none. Compiled says that
	// calls are decided in this process.
	PolicyGeneration uint64    `json:"policy_revision"`
	Compiled         bool      `json:"policy_compiled"`
	PolicyAsOf       time.Time `json:"policy_as_of,omitzero"`
	// TrustGeneration counts the changes of trust bundles in this process.
	TrustGeneration uint64    `json:"trust_generation"`
	RevocationsAsOf time.Time `json:"revocations_as_of,omitzero"`
	// Connections are those whose peer was verified.
	Connections []Connection `json:"connections"`
}

// Connection is one live connection.
type Connection struct {
	SPIFFEID string `json:"spiffe_id"` // the peer's
	Serial   string `json:"serial"`
	// Authorities are the hex subject key IDs of those that vouch for the peer, and
	// TrustGeneration is that of the trust bundles by which they were verified.
	Authorities     []string `json:"authorities"`
	TrustGeneration uint64   `json:"trust_generation"`
	Remote          string   `json:"remote,omitempty"`
	// Calls are under way on it, streams included, as far as httpauth, grpcauth or a
	// sidecar decide them; the oldest policy by which one of them was allowed is
	// PolicyGeneration, 0 without calls.
	Calls            int    `json:"calls"`
	PolicyGeneration uint64 `json:"policy_revision"`
	// Drains is from when on the peer is asked to come back on a new connection, and
	// Ends when this one is cut at the latest.
	Drains time.Time `json:"drains"`
	Ends   time.Time `json:"ends"`
}

// State gives the picture of now, with at most maxConns connections.
func (id *Identity) State(maxConns int) State {
	s := State{PolicyGeneration: id.generation.Load(), Compiled: id.DecidesHere(), Connections: []Connection{}}
	if own := id.current.Load(); own.svid != nil {
		s.SPIFFEID, s.NotAfter, s.TrustGeneration = own.svid.ID.String(), own.notAfter, own.changes
		s.Serial = own.svid.Certificates[0].SerialNumber.Text(16)
	}
	if at := id.news.asOf.Load(); at > 0 {
		s.PolicyAsOf = time.Unix(0, at)
	}
	if at := id.revocationsAsOf.Load(); at > 0 {
		s.RevocationsAsOf = time.Unix(0, at)
	}
	calls, now := id.callsByConn(), time.Now()
	id.conns.conns.Range(func(key, v any) bool {
		c := v.(*liveConn)
		if len(s.Connections) == maxConns {
			return false
		}
		under := calls[key.(connKey)]
		open := Connection{
			SPIFFEID: c.peer.ID.String(), Serial: c.peer.SerialHex, Authorities: c.peer.AuthorityIDs, TrustGeneration: c.trust,
			Calls: under.n, PolicyGeneration: under.oldest, Drains: now.Add(c.drainsIn(now)), Ends: c.end,
		}
		if c.raw != nil {
			open.Remote = addrString(c.raw.RemoteAddr())
		}
		s.Connections = append(s.Connections, open)
		return true
	})
	return s
}

// callsUnderWay are those on one connection.
type callsUnderWay struct {
	n      int
	oldest uint64 // policy generation
}

func (id *Identity) callsByConn() map[connKey]callsUnderWay {
	by := make(map[connKey]callsUnderWay)
	for _, c := range id.calls.all() {
		if c.conn == nil {
			continue
		}
		under := by[c.conn]
		if revision := c.info.decision.Revision; under.n == 0 || revision < under.oldest {
			under.oldest = revision
		}
		under.n++
		by[c.conn] = under
	}
	return by
}

// PolicyReady says why no policy can decide calls to this process yet, or any more;
// nil where one can.
func (id *Identity) PolicyReady() error {
	if id.generation.Load() == 0 {
		return errors.New("no policy is active: merlon policy push FOLDER")
	}
	switch id.stale(time.Now()) {
	case policy.StaleRevocations:
		return errors.New("the revocations are older than the agent allows")
	case policy.StalePolicy:
		return errors.New("the policy is older than the agent allows")
	}
	return nil
}
