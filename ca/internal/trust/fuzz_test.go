package trust

import (
	"encoding/json"
	"errors"
	"testing"

	"merlon.dev/ca/internal/store"
)

// What is taken as another trust domain's record is of that trust domain, and can be
// written down again.
func FuzzDecodeFederated(f *testing.F) {
	for _, s := range []string{`{"keys":[]}`, `{"keys":[{"use":"x509-svid"}],"spiffe_sequence":1}`, `null`} {
		record, err := json.Marshal(storedFederated{Version: encodingVersion, TrustDomain: "partner.test", JWKS: []byte(s)})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(record)
	}
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, value []byte) {
		b, err := DecodeFederated(store.KV{Key: FederatedPrefix + "partner.test", Value: value, ModRevision: 7})
		if err != nil {
			return
		}
		if b.TrustDomain.Name() != "partner.test" {
			t.Fatalf("%q is of %s", value, b.TrustDomain)
		}
		op, err := b.Put()
		if err != nil {
			return // a time that JSON cannot hold
		}
		again, err := DecodeFederated(store.KV{Key: op.Key, Value: op.Value, ModRevision: 7})
		if err != nil || again.Digest() != b.Digest() {
			t.Fatalf("%q is read as %+v, and then as %+v, %v", value, b, again, err)
		}
	})
}

// What is kept of a key that was withdrawn is of that key; what cannot be read is an
// error, and never a key that may come back.
func FuzzDecodeWithdrawn(f *testing.F) {
	for _, s := range []string{`{"v":1,"kind":"x509","since":"2026-01-01T00:00:00Z"}`, `{"v":2}`, `{}`, `null`} {
		f.Add("0a", []byte(s))
	}
	f.Fuzz(func(t *testing.T, id string, value []byte) {
		got, err := decodeWithdrawn(store.KV{Key: WithdrawnPrefix + id, Value: value})
		if (got == nil) != (err != nil) {
			t.Fatalf("%q is read as %v, %v", value, got, err)
		}
		if err != nil {
			return
		}
		if got.ID != id || !errors.Is(got, ErrWithdrawn) {
			t.Fatalf("%q of %q is read as %+v", value, id, got)
		}
		text, err := json.Marshal(storedWithdrawn{encodingVersion, got.Kind, got.Since})
		if err != nil {
			return // a time that JSON cannot hold
		}
		again, err := decodeWithdrawn(store.KV{Key: WithdrawnPrefix + id, Value: text})
		if err != nil || again.Kind != got.Kind || !again.Since.Equal(got.Since) {
			t.Fatalf("%q is read as %+v, and then as %+v, %v", value, got, again, err)
		}
	})
}
