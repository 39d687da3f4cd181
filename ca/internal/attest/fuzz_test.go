package attest

import (
	"reflect"
	"testing"

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
