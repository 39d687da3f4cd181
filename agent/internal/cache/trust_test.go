// What becomes trusted of a trust bundle that the CA sends, when it counts as served,
// and what else of the feed is handed on.

package cache

import (
	"encoding/json"
	"fmt"
	"testing"

	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid/forge"
)

// X16: only the first certificate of an entry counts. Whether such a document
// is refused whole or read in part, the second is never trusted.
func TestX16OnlyTheFirstCertificateOfAnEntryCanBeTrusted(t *testing.T) {
	root, other := forge.New(t, td), forge.New(t, td)
	document, err := root.Bundle().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	parse := func(change func(entry map[string]any)) (*Trust, error) {
		var jwks map[string]any
		if err := json.Unmarshal(document, &jwks); err != nil {
			t.Fatal(err)
		}
		for _, entry := range jwks["keys"].([]any) {
			if e := entry.(map[string]any); e["use"] == "x509-svid" {
				change(e)
			}
		}
		changed, err := json.Marshal(jwks)
		if err != nil {
			t.Fatal(err)
		}
		return ParseTrust(&capb.TrustBundle{TrustDomain: td, Sequence: 1, Jwks: changed}, td)
	}
	if _, err := parse(func(map[string]any) {}); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(map[string]any){
		"two certificates": func(e map[string]any) { e["x5c"] = append(e["x5c"].([]any), other.Cert.Raw) },
		"empty x5c":        func(e map[string]any) { e["x5c"] = []any{} },
		"no x5c":           func(e map[string]any) { delete(e, "x5c") },
		"another use":      func(e map[string]any) { e["use"] = "X509-SVID" },
	} {
		if trust, err := parse(change); err == nil && (len(trust.Bundle.X509Authorities()) != 1 || !trust.Bundle.HasX509Authority(root.Cert)) {
			t.Errorf("%s: %d authorities are trusted", name, len(trust.Bundle.X509Authorities()))
		}
	}
}

func TestOlderTrustBundleIsRefused(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		f.sync()
		f.apply(&capb.SyncResponse{TrustBundle: f.trust(5)})
		f.apply(&capb.SyncResponse{TrustBundle: f.trust(4)})
		if got := f.Trust().Sequence; got != 5 {
			t.Errorf("sequence = %d; want 5", got)
		}
		empty := &capb.TrustBundle{TrustDomain: td, Sequence: 6, Jwks: []byte(`{"keys":[]}`)}
		if err := f.Apply(t.Context(), &capb.SyncResponse{TrustBundle: empty}); err == nil {
			t.Error("a trust bundle without authorities was taken")
		}
	})
}

func TestAckWaitsForTheSlowestStream(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		f.sync(newEntry("e1", "/a", "unix:uid:1"))
		s1, s2 := f.Subscribe(), f.Subscribe()
		s1.Delivered(1)
		s2.Delivered(1)
		f.apply(&capb.SyncResponse{TrustBundle: f.trust(2)})
		s1.Delivered(2)
		if _, got := f.Ack(false); got != 1 {
			t.Errorf("Ack() = %d while one stream has 1; want 1", got)
		}
		s2.Close()
		if _, got := f.Ack(false); got != 2 {
			t.Errorf("Ack() = %d; want 2", got)
		}
		s1.Close()
	})
}

func TestRevocationFeed(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		f.sync()
		revoke := func(path string) {
			f.apply(&capb.SyncResponse{Revocations: []*capb.Revocation{{
				Subject: &capb.Revocation_SpiffeId{SpiffeId: "spiffe://" + td + path}, BeforeRevision: 9,
			}}})
		}
		revoke("/a")
		all, reset, cursor, _ := f.RevocationsSince(Cursor{})
		if len(all) != 1 || !reset {
			t.Fatalf("RevocationsSince() = %v, %v; want all", all, reset)
		}
		_, _, cursor, more := f.RevocationsSince(cursor)
		revoke("/b")
		select {
		case <-more:
		default:
			t.Fatal("the watcher was not woken")
		}
		added, reset, cursor, _ := f.RevocationsSince(cursor)
		if len(added) != 1 || reset || added[0].SPIFFEID != "spiffe://"+td+"/b" {
			t.Fatalf("RevocationsSince() = %v, %v; want /b only", added, reset)
		}
		f.sync()
		if left, reset, _, _ := f.RevocationsSince(cursor); len(left) != 0 || !reset {
			t.Errorf("RevocationsSince() = %v, %v after a listing without any; want a reset to none", left, reset)
		}
	})
}

// Whoever keeps up gets each record once and never everything again, however many there
// are; who does not misses nothing either.
func TestRevocationFeedOfMany(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		f.sync()
		type watcher struct {
			every, read, resets int
			cursor              Cursor
			known               map[string]bool
		}
		watchers := []*watcher{{every: 1}, {every: maxFeed - 7}, {every: 2*maxFeed + 5}, {every: 3*maxFeed + 11}}
		const all = 4*maxFeed + 100
		for i := range all {
			f.apply(&capb.SyncResponse{Revocations: []*capb.Revocation{{
				Subject: &capb.Revocation_SpiffeId{SpiffeId: fmt.Sprintf("spiffe://%s/%d", td, i)}, BeforeRevision: 9,
			}}})
			for _, w := range watchers {
				if i%w.every != 0 && i != all-1 {
					continue
				}
				records, reset, next, _ := f.RevocationsSince(w.cursor)
				if reset {
					w.known = make(map[string]bool)
					w.resets++
				}
				for _, r := range records {
					w.known[r.SPIFFEID] = true
				}
				w.cursor, w.read = next, w.read+len(records)
			}
		}
		for _, w := range watchers {
			if len(w.known) != all {
				t.Errorf("who reads every %d knows %d of %d", w.every, len(w.known), all)
			}
			if w.every < maxFeed && (w.resets != 1 || w.read != all) {
				t.Errorf("who reads every %d was reset %d times, and read %d of %d", w.every, w.resets, w.read, all)
			}
		}
	})
}
