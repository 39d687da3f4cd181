// What the store says about a policy bundle: the generation in force, those before
// it, and the candidate that is tried.

package release

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"merlon.dev/ca/internal/store"
)

// HeadPrefix is where the store keeps the head of each policy bundle, by name.
const HeadPrefix = "policy/head/"

const encodingVersion = 1

// How a generation came to be.
const (
	Pushed     = "push"
	Promoted   = "promote"
	RolledBack = "rollback"
	Renewed    = "renew"
)

// Release is one generation of a policy bundle, signed.
type Release struct {
	Generation uint64 `json:"generation"`
	// How it came to be; Of is the generation whose content it has, where that was
	// not pushed as this one.
	How string `json:"how,omitempty"`
	Of  uint64 `json:"of,omitempty"`
	// Blob, SizeBytes and Chunks say how the signed bytes lie in the store.
	Blob      string `json:"blob"`
	SizeBytes int    `json:"size_bytes"`
	Chunks    int    `json:"chunks"`
	// SHA256 is the hex hash of the signed bytes.
	SHA256   string    `json:"sha256"`
	IssuedAt time.Time `json:"issued_at"`
	NotAfter time.Time `json:"not_after"`
}

// ETag is the HTTP entity tag of the signed bytes.
func (r *Release) ETag() string {
	return fmt.Sprintf("%q", fmt.Sprintf("%d-%.24s", r.Generation, r.SHA256))
}

// origin is the generation that r's content was first pushed or promoted as.
func (r *Release) origin() uint64 {
	if r.Of != 0 && r.How != Promoted {
		return r.Of
	}
	return r.Generation
}

// Candidate is a generation that is tried beside the one in force.
type Candidate struct {
	Release
	// Canary is where it decides; nowhere is in shadow.
	Canary Canary `json:"canary,omitzero"`
	// Step rises with each change of what is tried, and Since says when.
	Step  uint32    `json:"step"`
	Since time.Time `json:"since"`
	// Alarm is why it was taken back to shadow; nil: it was not.
	Alarm *Alarm `json:"alarm,omitempty"`
}

// Canary is where a candidate decides: for these destinations, and for a share of
// the others, by a hash of agent and destination.
type Canary struct {
	Destinations []string `json:"destinations,omitempty"`
	PerMille     uint32   `json:"per_mille,omitempty"`
}

// Shadow says whether the candidate decides nowhere.
func (c *Canary) Shadow() bool { return len(c.Destinations) == 0 && c.PerMille == 0 }

// Alarm is a rise of denials: of so many calls that the policy in force allows, the
// candidate denied so many.
type Alarm struct {
	At time.Time `json:"at"`
	// Destination is where it was seen; empty: in all together.
	Destination string `json:"destination,omitempty"`
	Allowed     uint64 `json:"allowed"`
	Denied      uint64 `json:"denied"`
}

// Head is the state of one policy bundle. It is immutable.
type Head struct {
	Name string
	// Release is the generation in force.
	Release
	// Last is the highest generation that was ever given out, also to a candidate.
	Last uint64
	// History are the generations before, newest first.
	History []Release
	// Candidate is nil where there is none.
	Candidate *Candidate
	// Revision is the store revision of the head.
	Revision uint64
}

type storedHead struct {
	Version int `json:"v"`
	Release
	Last      uint64     `json:"last,omitempty"`
	History   []Release  `json:"history,omitempty"`
	Candidate *Candidate `json:"candidate,omitempty"`
}

// DecodeHead reads a stored head.
func DecodeHead(kv store.KV) (*Head, error) {
	var s storedHead
	if err := json.Unmarshal(kv.Value, &s); err != nil {
		return nil, fmt.Errorf("decode %s: %w", kv.Key, err)
	}
	if s.Version != encodingVersion {
		return nil, fmt.Errorf("decode %s: version %d is not known", kv.Key, s.Version)
	}
	h := &Head{
		Name: strings.TrimPrefix(kv.Key, HeadPrefix), Release: s.Release, Last: max(s.Last, s.Generation),
		History: s.History, Candidate: s.Candidate, Revision: kv.ModRevision,
	}
	if c := h.Candidate; c != nil && c.Generation <= h.Generation {
		return nil, fmt.Errorf("decode %s: candidate %d is not newer than generation %d", kv.Key, c.Generation, h.Generation)
	}
	return h, nil
}

func (h *Head) put() (store.Op, error) {
	b, err := json.Marshal(storedHead{Version: encodingVersion, Release: h.Release, Last: h.Last, History: h.History, Candidate: h.Candidate})
	if err != nil {
		return store.Op{}, fmt.Errorf("encode the head of policy bundle %s: %w", h.Name, err)
	}
	return store.Put(HeadPrefix+h.Name, b), nil
}

// blobs are all that h names.
func (h *Head) blobs() []string {
	if h == nil {
		return nil
	}
	var names []string
	for _, r := range h.History {
		names = append(names, r.Blob)
	}
	if h.Candidate != nil {
		names = append(names, h.Candidate.Blob)
	}
	return append(names, h.Blob)
}

// succeed is the head in which r takes the place of what is in force in h, which
// may be nil. The candidate was measured against that, and goes.
func (h *Head) succeed(name string, r Release) *Head {
	next := &Head{Name: name, Release: r}
	if h == nil {
		return next
	}
	next.Last = h.Last
	next.History = append([]Release{h.Release}, h.History...)
	next.History = next.History[:min(len(next.History), keepGenerations-1)]
	return next
}

// former finds the generation that a rollback goes back to: number to, or for 0 the
// one that came before the content in force. Rolling back twice goes back further,
// never forward again.
func (h *Head) former(to uint64) (*Release, error) {
	if to != 0 && to == h.Generation {
		return nil, &StateError{fmt.Sprintf("generation %d is in force", to)}
	}
	for i := range h.History {
		r := &h.History[i]
		if to == 0 && r.Generation < h.origin() || to != 0 && r.Generation == to {
			return r, nil
		}
	}
	if to == 0 {
		return nil, &StateError{"no earlier generation is kept"}
	}
	return nil, &StateError{fmt.Sprintf("generation %d is not among the last %d, which are kept", to, keepGenerations)}
}
