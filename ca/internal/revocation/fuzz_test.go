package revocation

import (
	"testing"

	"merlon.dev/ca/internal/store"
)

// What is taken as a record concerns somebody by exactly one name, and never what was
// issued after it.
func FuzzDecode(f *testing.F) {
	for _, s := range []string{
		`{"v":1,"spiffe_id":"spiffe://td/a"}`, `{"v":1,"serial":"0a"}`, `{"v":1,"agent_id":"spiffe://td/agent/a","agent_handle":3,"imported":true,"before_revision":9}`,
		`{"v":1,"authority_id":"0a","for_good":true}`, `{"v":1,"spiffe_id":"spiffe://td/a","serial":"0a"}`, `{}`, `null`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, value []byte) {
		r, err := Decode(store.KV{Key: "k", Value: value, ModRevision: 7})
		if err != nil {
			return
		}
		if err := r.Validate(); err != nil {
			t.Fatalf("%q is read as %+v: %v", value, r, err)
		}
		if !r.Imported && r.BeforeRevision > 7 {
			t.Fatalf("%q, written at 7, is about what is issued up to %d", value, r.BeforeRevision)
		}
	})
}
