// Whose a public key is. Two identities with one key are one to whoever holds it,
// and an agent that has a key signed under a second name, or that sends a CSR of
// another node's, has something in mind (SECURITY.md T12). So a key belongs to the
// SPIFFE ID and the agent that first proved its possession, until the last SVID
// for it has ended.
//
// This is remembered in memory, so that an issuance writes nothing to the store,
// and therefore by each CA for what it signed itself. The audit records name the
// key: a start reads the latest of them, and what two replicas cannot see shows
// when their logs are laid side by side.

package authority

import (
	"crypto"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// MaxKeys is how many keys are remembered: those of a million workloads that
// renew at half life. It takes about 170 MB.
const MaxKeys = 2 << 20

// KeyID names a public key: it is the subject key ID of its certificates.
type KeyID [20]byte

// IdentifyKey names a key that PublicKeyFromCSR returned.
func IdentifyKey(pub crypto.PublicKey) (KeyID, error) {
	key, err := encodeKey(pub)
	if err != nil {
		return KeyID{}, err
	}
	return KeyID(key.id), nil
}

// String is hex, as in audit records.
func (k KeyID) String() string { return hex.EncodeToString(k[:]) }

// KeyOwner is an identity on a node.
type KeyOwner struct {
	ID    spiffeid.ID
	Agent uint64 // the agent's handle
}

// KeyUse remembers owners of keys. It is safe for concurrent use.
type KeyUse struct {
	limit int

	mu        sync.Mutex // guards what follows
	uses      map[shortKey]keyUse
	ending    map[minute][]shortKey // by the minute in which they end
	front     minute                // no use ends before this minute
	forgotten uint64
}

// A use takes about 80 bytes: the beginning of the key's name, and a hash of the
// owner's names.
type (
	shortKey [16]byte
	keyUse   struct {
		owner [8]byte
		end   minute
	}
	minute uint32
)

// NewKeyUse remembers up to limit keys; beyond that those are forgotten that end
// first.
func NewKeyUse(limit int) *KeyUse {
	return &KeyUse{limit: limit, uses: make(map[shortKey]keyUse), ending: make(map[minute][]shortKey)}
}

// Claim makes owner the one of a key whose possession he has proved, until the
// given time. It is an *InvalidError that says nothing of the other when the key
// is another's.
func (u *KeyUse) Claim(key KeyID, owner KeyOwner, until, now time.Time) error {
	claim := keyUse{owner: owner.hash(), end: minuteOf(until) + 1}
	k := shortKey(key[:])
	u.mu.Lock()
	defer u.mu.Unlock()
	u.expire(minuteOf(now))
	held, is := u.uses[k]
	switch {
	case is && held.owner != claim.owner:
		return invalid("csr", "has the key of another SPIFFE ID, or of this one on another node: each needs a key of its own")
	case is && held.end >= claim.end:
		return nil
	case !is && len(u.uses) >= u.limit:
		u.forgetFirst()
	}
	u.uses[k] = claim
	u.front = min(u.front, claim.end) // a clock that was ahead
	u.ending[claim.end] = append(u.ending[claim.end], k)
	return nil
}

// Held says whether the key is somebody's at now.
func (u *KeyUse) Held(key KeyID, now time.Time) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.expire(minuteOf(now))
	_, is := u.uses[shortKey(key[:])]
	return is
}

// Forgotten is how many keys were forgotten before their end, for want of room.
func (u *KeyUse) Forgotten() uint64 {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.forgotten
}

// expire drops what ended before now.
func (u *KeyUse) expire(now minute) {
	if u.front == 0 || len(u.ending) == 0 {
		u.front = now
	}
	for ; u.front < now && len(u.ending) > 0; u.front++ {
		u.drop(u.front)
	}
	u.front = max(u.front, now)
}

// forgetFirst makes room.
func (u *KeyUse) forgetFirst() {
	before := len(u.uses)
	for ; len(u.uses) == before; u.front++ { // some minute holds them all
		u.drop(u.front)
	}
	u.forgotten += uint64(before - len(u.uses))
}

// drop forgets the keys that end in a minute, but those used for longer since.
func (u *KeyUse) drop(end minute) {
	for _, k := range u.ending[end] {
		if u.uses[k].end == end {
			delete(u.uses, k)
		}
	}
	delete(u.ending, end)
}

func (o KeyOwner) hash() [8]byte {
	text := binary.BigEndian.AppendUint64(make([]byte, 0, 128), o.Agent)
	sum := sha256.Sum256(append(text, o.ID.String()...))
	return [8]byte(sum[:8])
}

func minuteOf(t time.Time) minute { return minute(t.Unix() / 60) }
