// Keys that were authorities and have left the list. Their IDs are kept for ever:
// an older copy of a CA's keys, or a replica that was evicted long ago, must not
// bring one back that was withdrawn.

package trust

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"merlon.dev/ca/internal/rotation"
	"merlon.dev/ca/internal/store"
)

// WithdrawnPrefix is where the store keeps them, by ID.
const WithdrawnPrefix = "trust/withdrawn/"

// ErrWithdrawn is what every *WithdrawnError is.
var ErrWithdrawn = errors.New("the key was withdrawn")

// WithdrawnError is returned where such a key would become an authority again.
type WithdrawnError struct {
	Kind  rotation.Kind
	ID    string
	Since time.Time
}

// Error implements error.
func (e *WithdrawnError) Error() string {
	return fmt.Sprintf("%s %s was withdrawn at %s, and never signs again", e.Kind, e.ID, e.Since.UTC().Format(time.RFC3339))
}

// Is implements the interface of errors.Is.
func (e *WithdrawnError) Is(target error) bool { return target == ErrWithdrawn }

type storedWithdrawn struct {
	Version int           `json:"v"`
	Kind    rotation.Kind `json:"kind"`
	Since   time.Time     `json:"since"`
}

// Withdrawn returns what is kept of a key that was withdrawn; nil if none with
// this ID was.
func (d Domain) Withdrawn(ctx context.Context, id string) (*WithdrawnError, error) {
	kv, _, err := d.Store.Get(ctx, WithdrawnPrefix+id)
	if errors.Is(err, store.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look whether key %s was withdrawn: %w", id, err)
	}
	return decodeWithdrawn(kv)
}

// decodeWithdrawn reads what is stored. What cannot be read is an error, and not a key
// that was never withdrawn.
func decodeWithdrawn(kv store.KV) (*WithdrawnError, error) {
	var s storedWithdrawn
	if err := json.Unmarshal(kv.Value, &s); err != nil {
		return nil, fmt.Errorf("decode %s: %w", kv.Key, err)
	}
	if s.Version != encodingVersion {
		return nil, fmt.Errorf("decode %s: version %d is not known", kv.Key, s.Version)
	}
	return &WithdrawnError{s.Kind, strings.TrimPrefix(kv.Key, WithdrawnPrefix), s.Since}, nil
}

// remember returns the writes that keep the IDs of those which leave the list.
func remember(before, after rotation.Set) (ops []store.Op, err error) {
	for _, a := range before.All() {
		if _, there := after.Get(a.ID); there {
			continue
		}
		value, err := json.Marshal(storedWithdrawn{encodingVersion, a.Kind, a.Since[rotation.Revoked]})
		if err != nil {
			return nil, fmt.Errorf("encode what is kept of key %s: %w", a.ID, err)
		}
		ops = append(ops, store.Put(WithdrawnPrefix+a.ID, value))
	}
	return ops, nil
}

// checkNew refuses what is new in after, and was withdrawn before. Nobody can
// withdraw it meanwhile: that changes the authorities, too.
func (d Domain) checkNew(ctx context.Context, before, after rotation.Set) error {
	for _, a := range after.All() {
		if _, known := before.Get(a.ID); known {
			continue
		}
		if gone, err := d.Withdrawn(ctx, a.ID); err != nil {
			return err
		} else if gone != nil {
			return gone
		}
	}
	return nil
}
