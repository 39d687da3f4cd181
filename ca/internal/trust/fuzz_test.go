package trust

import (
	"encoding/json"
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
