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
	RevocationsAsOf  time.Time `json:"revocations_as_of,omitzero"`
	// Connections are those whose peer was verified.
	Connections []Connection `json:"connections"`
}

// Connection is one live connection.
type Connection struct {
	SPIFFEID string    `json:"spiffe_id"` // the peer's
	Serial   string    `json:"serial"`
	Remote   string    `json:"remote,omitempty"`
	Ends     time.Time `json:"ends"` // at the latest
}

// State gives the picture of now, with at most maxConns connections.
func (id *Identity) State(maxConns int) State {
	s := State{PolicyGeneration: id.generation.Load(), Compiled: id.DecidesHere(), Connections: []Connection{}}
	if own := id.current.Load(); own.svid != nil {
		s.SPIFFEID, s.NotAfter = own.svid.ID.String(), own.notAfter
		s.Serial = own.svid.Certificates[0].SerialNumber.Text(16)
	}
	if at := id.policyAsOf.Load(); at > 0 {
		s.PolicyAsOf = time.Unix(0, at)
	}
	if at := id.revocationsAsOf.Load(); at > 0 {
		s.RevocationsAsOf = time.Unix(0, at)
	}
	id.conns.conns.Range(func(_, v any) bool {
		c := v.(*liveConn)
		if len(s.Connections) == maxConns {
			return false
		}
		open := Connection{SPIFFEID: c.peer.ID.String(), Serial: c.peer.SerialHex, Ends: c.end}
		if c.raw != nil {
			open.Remote = addrString(c.raw.RemoteAddr())
		}
		s.Connections = append(s.Connections, open)
		return true
	})
	return s
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
