package attest

import (
	"bytes"
	"encoding/json"
	"reflect"
	"testing"
	"time"

	"merlon.dev/ca/internal/store"
)

// What is taken as an agent's record can be written down again, and says the same.
func FuzzDecodeAgent(f *testing.F) {
	for _, s := range []string{
		`{"v":1,"id":"spiffe://td/agent/a","handle":1}`, `{"v":2,"handle":281474976710655,"standing":"banned","selectors":["x509pop:subject:a"]}`,
		`{"v":1,"handle":281474976710656}`, `{"v":1,"handle":1,"selectors":["a"]}`, `{}`, `null`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, value []byte) {
		a, err := DecodeAgent(store.KV{Key: "k", Value: value, ModRevision: 7})
		if err != nil {
			return
		}
		op, err := a.put()
		if err != nil {
			t.Fatalf("%q is read as %+v, which cannot be written: %v", value, a, err)
		}
		again, err := DecodeAgent(store.KV{Key: op.Key, Value: op.Value, ModRevision: 7})
		if err != nil || !reflect.DeepEqual(again, a) {
			t.Fatalf("%q is read as %+v, and then as %+v, %v", value, a, again, err)
		}
	})
}

// What is taken as a token's record says the same again, and one that cannot be read
// is neither good nor expired: it is kept, and lets nobody in.
func FuzzDecodeToken(f *testing.F) {
	for _, s := range []string{
		`{"v":1,"subject":"n1","expires_at":"2026-01-01T00:00:00Z"}`, `{"v":1,"subject":"ca","expires_at":"0001-01-01T00:00:00Z","seal":"AA=="}`,
		`{"v":2,"subject":"n1","expires_at":"2026-01-01T00:00:00Z"}`, `{}`, `null`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, value []byte) {
		kv := store.KV{Key: TokenPrefix + "join/x", Value: value}
		got, err := decodeToken(kv)
		far := time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC).AddDate(1, 0, 0)
		if expired := TokenExpired(kv, far); expired != (err == nil) {
			t.Fatalf("%q: expired %v, %v", value, expired, err)
		}
		if err != nil {
			if got.Subject != "" || len(got.Seal) > 0 {
				t.Fatalf("%q is refused, and read as %+v", value, got)
			}
			return
		}
		text, err := json.Marshal(got)
		if err != nil {
			return // a time that JSON cannot hold
		}
		again, err := decodeToken(store.KV{Key: kv.Key, Value: text})
		if err != nil || again.Subject != got.Subject || !again.ExpiresAt.Equal(got.ExpiresAt) || !bytes.Equal(again.Seal, got.Seal) {
			t.Fatalf("%q is read as %+v, and then as %+v, %v", value, got, again, err)
		}
	})
}
