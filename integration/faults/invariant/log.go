// What the audit logs must show: I2 (why each SVID was issued) and I5 (that
// everything is there).

package invariant

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math/big"
	"strings"

	"merlon.dev/integration/faults/history"
	"merlon.dev/sdk/svid"
)

// Issuance is I2, by revisions and not by dates: the serial number says from which
// state of the registry an SVID was issued.
func Issuance(h *history.History) (found []string) {
	created, deleted := make(map[string]history.Op), make(map[string]history.Op)
	pending := make(map[string]bool) // SPIFFE IDs whose creation has no answer
	tokens := make(map[string]bool)
	for _, op := range h.Ops {
		switch {
		case op.Kind == history.Create && op.Outcome == history.OK:
			created[op.Value] = op
		case op.Kind == history.Create && op.Outcome == history.Unknown:
			pending[op.Key] = true
		case op.Kind == history.Delete && op.Outcome == history.OK:
			deleted[op.Value] = op
		case op.Kind == history.Join && op.Outcome == history.OK:
			if tokens[op.Key] {
				found = append(found, "a token worked twice: "+show(h, op))
			}
			tokens[op.Key] = true
		}
	}
	attested := make(map[string]bool)
	for _, log := range h.Logs {
		for _, r := range log {
			if r.Type == "attest" {
				attested[r.SPIFFEID] = true
			}
		}
	}
	for name, log := range h.Logs {
		for _, r := range log {
			if r.Type != "issue" || r.EntryID == "" {
				continue // the CA's own
			}
			if reason := unfounded(r, created[r.EntryID], deleted[r.EntryID], pending[r.SPIFFEID]); reason != "" {
				found = append(found, fmt.Sprintf("%s, record %d: an SVID for %s to %s: %s", name, r.Seq, r.SPIFFEID, r.Actor, reason))
			}
			if !attested[r.Actor] {
				found = append(found, fmt.Sprintf("%s, record %d: an SVID to %s, which never proved itself", name, r.Seq, r.Actor))
			}
		}
	}
	return found
}

// unfounded is what is wrong with an issuance; empty: nothing.
func unfounded(r history.Record, created, deleted history.Op, pending bool) string {
	n, ok := new(big.Int).SetString(r.Serial, 16)
	if !ok {
		return "its serial number is " + r.Serial
	}
	serial, ok := svid.SerialFromBig(n)
	switch {
	case !ok:
		return "its serial number is none of ours"
	case created.Kind == "" && pending:
		return ""
	case created.Kind == "":
		return "nobody created entry " + r.EntryID
	case created.Key != r.SPIFFEID:
		return "the entry is for " + created.Key
	case created.Under != r.Actor:
		return "the entry is for the node of " + created.Under
	case serial.Revision < created.Number:
		return fmt.Sprintf("it rests on revision %d, before the entry's %d", serial.Revision, created.Number)
	case deleted.Kind != "" && serial.Revision >= deleted.Number:
		return fmt.Sprintf("it rests on revision %d, and the entry went with %d", serial.Revision, deleted.Number)
	}
	return ""
}

// Audit is I5: each log is one chain from its first record on, and has what was
// answered and every SVID that anybody saw.
func Audit(h *history.History) (found []string) {
	if len(h.Logs) == 0 {
		return []string{"there is no audit log"}
	}
	acts, serials := make(map[string]bool), make(map[string]bool)
	for name, log := range h.Logs {
		found = append(found, chain(name, log)...)
		for _, r := range log {
			if r.Serial != "" && (r.Type == "issue" || r.Type == "attest" || r.Type == "renew") {
				serials[r.Serial] = true
			}
			if r.Type == "admin" && !r.Pending {
				acts[r.Detail+" "+r.EntryID] = true
				acts[r.Detail+" "+r.SPIFFEID] = true
			}
		}
	}
	for _, op := range h.Ops {
		if op.Outcome == history.OK && !recorded(op, acts, serials) {
			found = append(found, "no record of "+show(h, op)+" "+op.Value)
		}
	}
	return found
}

func recorded(op history.Op, acts, serials map[string]bool) bool {
	switch op.Kind {
	case history.Create:
		return acts["create entry "+op.Value]
	case history.Delete:
		return acts["delete entry "+op.Value]
	case history.Ban:
		return acts["ban agent "+op.Key]
	case history.Revoke:
		return acts["revoke SPIFFE ID "+op.Key]
	case history.Push:
		return acts[fmt.Sprintf("push policy bundle main, generation %d ", op.Number)]
	case history.Join, history.Sign, history.Connect:
		return op.Value == "" || serials[op.Value]
	}
	return true
}

// chain says where the records of a log do not follow each other.
func chain(name string, log []history.Record) (found []string) {
	prev := strings.Repeat("0", 2*sha256.Size)
	for i, r := range log {
		body, _, ok := bytes.Cut(r.Line, []byte(`,"hash":"`))
		sum := sha256.Sum256(body)
		switch {
		case r.Seq != uint64(i)+1:
			return []string{fmt.Sprintf("%s: record %d follows record %d", name, r.Seq, i)}
		case r.Prev != prev:
			return []string{fmt.Sprintf("%s: record %d does not follow from the one before", name, r.Seq)}
		case !ok || hex.EncodeToString(sum[:]) != r.Hash:
			return []string{fmt.Sprintf("%s: record %d was changed", name, r.Seq)}
		}
		prev = r.Hash
	}
	return nil
}
