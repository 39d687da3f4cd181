// Whose the public keys are that this CA signed for (authority.KeyUse), also from
// before its start: the audit log says it.

package api

import (
	"context"
	"crypto"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/big"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/authority"
	"merlon.dev/sdk/svid"
)

// recentRecords is how far a start reads back: what a busy CA issues in an hour,
// and reads in less than a second.
const recentRecords = 100_000

// claim makes key one of id on agent's node until an SVID of this life ends, and
// names it for the record. Another's is refused.
func (s *Service) claim(key crypto.PublicKey, id spiffeid.ID, agent *attest.Agent, ttl time.Duration, now time.Time) (string, error) {
	keyID, err := authority.IdentifyKey(key)
	if err != nil {
		return "", err
	}
	return keyID.String(), s.keys.Claim(keyID, authority.KeyOwner{ID: id, Agent: agent.Handle}, now.Add(ttl), now)
}

// RememberKeys takes over from the audit log whose the keys of SVIDs are that
// still live, and which agents were renewed without the store. A log that cannot be read holds nobody up: the service then knows
// the keys from now on, and says so.
func (s *Service) RememberKeys(ctx context.Context, now time.Time) {
	known := 0
	for line, err := range s.opts.Audit.Recent(recentRecords) {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			s.log.LogAttrs(ctx, slog.LevelWarn, "keys of SVIDs from before the start are not known: their use by another identity would not be noticed", slog.Any("err", err))
			return
		}
		keyID, owner, made, err := claimOf(line.Text)
		if err != nil || !made.NotAfter.After(now) {
			continue
		}
		s.rememberRenewal(owner.ID, made)
		if s.keys.Claim(keyID, owner, made.NotAfter, now) == nil {
			known++
		}
	}
	s.log.LogAttrs(ctx, slog.LevelDebug, "keys of SVIDs from before the start are known", slog.Int("svids", known))
}

// claimOf reads whose a key is, and of which SVID, out of the record of an issuance. Other records are
// errors.
func claimOf(line []byte) (keyID authority.KeyID, owner authority.KeyOwner, made attest.SVID, err error) {
	var r audit.Record
	if err := json.Unmarshal(line, &r); err != nil {
		return keyID, owner, made, err
	}
	id, err := spiffeid.FromString(r.SPIFFEID)
	if err != nil {
		return keyID, owner, made, err
	}
	number, _ := new(big.Int).SetString(r.Serial, 16)
	serial, ok := svid.SerialFromBig(number)
	if n, err := hex.Decode(keyID[:], []byte(r.KeyID[:min(len(r.KeyID), 2*len(keyID))])); err != nil || n != len(keyID) || !ok {
		return keyID, owner, made, fmt.Errorf("it records no X509-SVID with its key")
	}
	return keyID, authority.KeyOwner{ID: id, Agent: serial.Agent}, attest.SVID{Serial: r.Serial, NotAfter: r.NotAfter}, nil
}
