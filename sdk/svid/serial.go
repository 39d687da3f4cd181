// The serial number that Merlon gives to an SVID says through which agent, and
// from which state of the registry, it was issued. That makes a revocation a
// small record ("all that agent 7 obtained before revision 1200") which never
// looks at a clock: NotBefore is backdated and cannot order an SVID and its
// revocation.

package svid

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"math/big"
)

// The widths of the parts, from the top. The sum is 159 bits: RFC 5280 §4.1.2.2
// allows 20 octets of a positive number, so the 160th bit stays clear.
const (
	agentBits    = 48
	realmBits    = 8
	revisionBits = 39
	randomBits   = 64
	serialBits   = agentBits + realmBits + revisionBits + randomBits

	// MaxAgent is the largest agent handle that a serial number can carry.
	MaxAgent uint64 = 1<<agentBits - 1
	// MaxRealm is the highest number of a CA with a store of its own.
	MaxRealm uint32 = 1<<realmBits - 1
	// MaxRevision is the largest store revision that a serial number can carry.
	MaxRevision uint64 = 1<<revisionBits - 1
)

// Serial is the number of an SVID: certificate serial number of an X509-SVID,
// and in hex the jti of a JWT-SVID.
type Serial struct {
	Agent uint64 // handle of the agent that it was issued through, 48 bits; 0 is the CA itself
	// Realm says of which CA's store Revision is: 0 is that of the CA that holds
	// the root, each nested CA has a number of its own. Revisions of two realms
	// say nothing about each other.
	Realm    uint32 // 8 bits
	Revision uint64 // store revision of the registry that it was issued from, 39 bits
	Random   uint64 // makes it unique and its certificate unpredictable; never 0
}

// NewSerial makes a number of realm 0 with fresh randomness. It is an error when
// agent or revision need more bits than there are.
func NewSerial(agent, revision uint64) (Serial, error) {
	if agent > MaxAgent {
		return Serial{}, fmt.Errorf("make a serial number: agent handle %d needs more than %d bits", agent, agentBits)
	}
	if revision > MaxRevision {
		return Serial{}, fmt.Errorf("make a serial number: store revision %d needs more than %d bits", revision, revisionBits)
	}
	s := Serial{Agent: agent, Revision: revision}
	for s.Random == 0 { // RFC 5280 wants a positive number, whatever the other parts are
		var b [8]byte
		rand.Read(b[:]) // never returns an error (crypto/rand)
		s.Random = binary.BigEndian.Uint64(b[:])
	}
	return s, nil
}

// In is the number as realm gives it.
func (s Serial) In(realm uint32) Serial {
	s.Realm = realm
	return s
}

// SerialFromBig reads a number. It is false for one that Merlon cannot have
// given. The reverse does not hold: other authorities' numbers may look like
// ours, so the parts say something only about an SVID of our trust domain.
func SerialFromBig(n *big.Int) (Serial, bool) {
	if n == nil || n.Sign() <= 0 || n.BitLen() > serialBits {
		return Serial{}, false
	}
	var b [20]byte
	n.FillBytes(b[:])
	high := uint64(binary.BigEndian.Uint32(b[0:4]))<<17 | uint64(binary.BigEndian.Uint32(b[4:8])>>15)
	s := Serial{
		Agent:    high & MaxAgent,
		Realm:    uint32(binary.BigEndian.Uint64(b[4:12])>>revisionBits) & MaxRealm,
		Revision: binary.BigEndian.Uint64(b[4:12]) & MaxRevision,
		Random:   binary.BigEndian.Uint64(b[12:20]),
	}
	return s, s.Random != 0
}

// Big gives the number as crypto/x509 wants it.
func (s Serial) Big() *big.Int {
	n := new(big.Int).SetUint64(s.Agent)
	n.Lsh(n, realmBits+revisionBits).Or(n, new(big.Int).SetUint64(uint64(s.Realm)<<revisionBits|s.Revision))
	return n.Lsh(n, randomBits).Or(n, new(big.Int).SetUint64(s.Random))
}

// String gives the number in lower-case hex without leading zeros, as in jti, in
// revocation records and in the audit log.
func (s Serial) String() string { return s.Big().Text(16) }

// serialFromHex reads what String writes, and nothing else.
func serialFromHex(text string) (Serial, bool) {
	if text == "" || len(text) > serialBits/4+1 {
		return Serial{}, false
	}
	n, ok := new(big.Int).SetString(text, 16)
	if !ok {
		return Serial{}, false
	}
	s, ok := SerialFromBig(n)
	return s, ok && s.String() == text
}
