package federation

import (
	"reflect"
	"testing"
	"time"

	"merlon.dev/ca/internal/store"
)

// What is taken as a source could have been set, and says the same again.
func FuzzDecodeSource(f *testing.F) {
	for _, s := range []string{
		`{"v":1,"url":"https://partner.test/bundle","profile":"https_web","set_at":"2026-01-01T00:00:00Z","outcome":{"tried_at":"2026-01-01T00:00:00Z","ignored":["a"],"failure":"b","reason":"c"}}`,
		`{"v":1,"url":"https://partner.test/bundle","profile":"https_spiffe","endpoint_id":"spiffe://partner.test/ca"}`,
		`{"v":1,"url":"http://partner.test/","profile":"https_web"}`, `{"v":1,"url":"https://169.254.169.254/","profile":"https_web"}`, `{"v":2}`, `{}`, `null`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, value []byte) {
		kv := store.KV{Key: SourcePrefix + "partner.test", Value: value, ModRevision: 7}
		s, err := DecodeSource(kv)
		if err != nil {
			return
		}
		if err := s.Check(); err != nil || s.TrustDomain.Name() != "partner.test" {
			t.Fatalf("%q is read as %+v: %v", value, s, err)
		}
		if every := s.Interval(); every < PollLeast || every > PollMost {
			t.Fatalf("%q is fetched every %s", value, every)
		}
		op, err := s.Put()
		if err != nil {
			return // a time that JSON cannot hold
		}
		again, err := DecodeSource(store.KV{Key: op.Key, Value: op.Value, ModRevision: 7})
		if err != nil {
			t.Fatalf("%q is read as %+v, and then: %v", value, s, err)
		}
		again.SetAt = s.SetAt // in UTC
		if !reflect.DeepEqual(again.stable(), s.stable()) {
			t.Fatalf("%q is read as %+v, and then as %+v", value, s, again)
		}
	})
}

// stable is s with times as one instant has one form.
func (s *Source) stable() Source {
	c := *s
	for _, at := range []*time.Time{&c.SetAt, &c.TriedAt, &c.FetchedAt, &c.FailingSince} {
		*at = at.UTC()
	}
	if len(c.Ignored) == 0 {
		c.Ignored = nil
	}
	return c
}

// What is taken as an invite is of its trust domain, with readers that somebody can be.
func FuzzDecodeInvite(f *testing.F) {
	for _, s := range []string{`{"v":1}`, `{"v":1,"reader":"0123456789abcdef0123456789abcdef"}`, `{}`, `null`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, value []byte) {
		i, err := DecodeInvite(store.KV{Key: InvitePrefix + "partner.test", Value: value, ModRevision: 7})
		if err != nil {
			return
		}
		if i.TrustDomain.Name() != "partner.test" || !IsReader(i.Reader) || i.Previous != "" && !IsReader(i.Previous) {
			t.Fatalf("%q is read as %+v", value, i)
		}
	})
}
