package replica

import (
	"reflect"
	"slices"
	"testing"

	"merlon.dev/ca/internal/store"
)

// What is taken as a replica's record can be written down again, and says the same.
func FuzzDecode(f *testing.F) {
	for _, s := range []string{
		`{"v":1,"name":"a","authorities":[{"id":"0a","not_after":"2026-01-01T00:00:00Z"}]}`, `{"v":1,"name":"a","realm":255,"authorities":[{}],"jwt_key_id":"x","policy_certificate":"AA=="}`,
		`{"v":1,"name":"a","authorities":[]}`, `{"v":1,"name":"b","authorities":[{}]}`, `{}`, `null`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, value []byte) {
		r, err := Decode(store.KV{Key: Prefix + "a", Value: value, ModRevision: 7})
		if err != nil {
			return
		}
		r.Current()
		op, err := r.Put()
		if err != nil {
			return // a time that JSON cannot hold
		}
		again, err := Decode(store.KV{Key: op.Key, Value: op.Value, ModRevision: 7})
		if err != nil {
			t.Fatalf("%q is read as %+v, and then: %v", value, r, err)
		}
		again.JoinedAt = r.JoinedAt // in UTC
		if !reflect.DeepEqual(again, r) {
			t.Fatalf("%q is read as %+v, and then as %+v", value, r, again)
		}
	})
}

// What is taken as a nested CA's progress says the same again; what is not holds steps
// back, as if nothing were served there.
func FuzzDecodeProgress(f *testing.F) {
	for _, s := range []string{`{"v":1,"trust_sequence":7,"behind":["spiffe://td/agent/a"]}`, `{"v":2,"trust_sequence":7}`, `{"v":1,"trust_sequence":-1}`, `{}`, `null`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, value []byte) {
		p, err := DecodeProgress(store.KV{Key: ProgressPrefix + "eu", Value: value})
		if p.Name != "eu" || err != nil && (p.TrustSequence != 0 || len(p.Behind) > 0) {
			t.Fatalf("%q is read as %+v, %v", value, p, err)
		}
		if err != nil {
			return
		}
		op, err := p.Put()
		if err != nil {
			t.Fatal(err)
		}
		again, err := DecodeProgress(store.KV{Key: op.Key, Value: op.Value})
		if err != nil || again.TrustSequence != p.TrustSequence || !slices.Equal(again.Behind, p.Behind) {
			t.Fatalf("%q is read as %+v, and then as %+v, %v", value, p, again, err)
		}
	})
}
