// What the store says about the current generation of a policy bundle.

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

// Head names the current generation of one policy bundle. It is immutable.
type Head struct {
	Name       string
	Generation uint64
	// Blob, SizeBytes and Chunks say how the signed bytes lie in the store;
	// Previous is the blob of the generation before, kept for those who read it.
	Blob      string
	Previous  string
	SizeBytes int
	Chunks    int
	// SHA256 is the hex hash of the signed bytes.
	SHA256   string
	IssuedAt time.Time
	NotAfter time.Time
	// Revision is the store revision of the head.
	Revision uint64
}

// ETag is the HTTP entity tag of the signed bytes.
func (h *Head) ETag() string {
	return fmt.Sprintf("%q", fmt.Sprintf("%d-%.24s", h.Generation, h.SHA256))
}

type storedHead struct {
	Version    int       `json:"v"`
	Generation uint64    `json:"generation"`
	Blob       string    `json:"blob"`
	Previous   string    `json:"previous,omitempty"`
	SizeBytes  int       `json:"size_bytes"`
	Chunks     int       `json:"chunks"`
	SHA256     string    `json:"sha256"`
	IssuedAt   time.Time `json:"issued_at"`
	NotAfter   time.Time `json:"not_after"`
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
	return &Head{
		Name: strings.TrimPrefix(kv.Key, HeadPrefix), Generation: s.Generation, Blob: s.Blob, Previous: s.Previous, SizeBytes: s.SizeBytes, Chunks: s.Chunks,
		SHA256: s.SHA256, IssuedAt: s.IssuedAt, NotAfter: s.NotAfter, Revision: kv.ModRevision,
	}, nil
}

func (h *Head) put() (store.Op, error) {
	b, err := json.Marshal(storedHead{
		Version: encodingVersion, Generation: h.Generation, Blob: h.Blob, Previous: h.Previous, SizeBytes: h.SizeBytes, Chunks: h.Chunks,
		SHA256: h.SHA256, IssuedAt: h.IssuedAt.UTC(), NotAfter: h.NotAfter.UTC(),
	})
	if err != nil {
		return store.Op{}, fmt.Errorf("encode the head of policy bundle %s: %w", h.Name, err)
	}
	return store.Put(HeadPrefix+h.Name, b), nil
}
