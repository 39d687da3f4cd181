// The sequence number of the trust bundle, over the real store.

package trust

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
	"merlon.dev/sdk/svid/forge"
)

var td = spiffeid.RequireTrustDomainFromString("shop.test")

func keys(t *testing.T, kids ...string) *spiffebundle.Bundle {
	t.Helper()
	b := spiffebundle.New(td)
	for _, kid := range kids {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.AddJWTAuthority(kid, key.Public()); err != nil {
			t.Fatal(err)
		}
	}
	return b
}

func open(t *testing.T, dir string) store.Store {
	t.Helper()
	st, err := badger.Open(dir, badger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// SPIFFE Trust Domain and Bundle §4.1.1; SECURITY.md B2.
func TestSequenceRisesWithContentAndNeverFalls(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "s")
	st := open(t, dir)
	one, two := keys(t, "one"), keys(t, "two")
	for i, step := range []struct {
		content *spiffebundle.Bundle
		want    uint64
	}{{one, 1}, {one, 1}, {two, 2}, {two, 2}, {one, 2}} {
		got, err := Publish(t.Context(), st, step.content)
		if err != nil || got.Sequence != step.want {
			t.Fatalf("step %d: %+v, %v; want sequence %d", i, got, err, step.want)
		}
	}
	gone, err := Plan(t.Context(), st, td, func(b *spiffebundle.Bundle) error { b.RemoveJWTAuthority("two"); return nil })
	if err != nil {
		t.Fatal(err)
	}
	if res, err := st.Txn(t.Context(), []store.Cmp{gone.Cmp}, gone.Ops, nil); err != nil || !res.Succeeded {
		t.Fatalf("take a key away: %+v, %v", res, err)
	}
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
	st = open(t, dir)
	defer st.Close()
	got, err := Publish(t.Context(), st, one)
	if err != nil || got.Sequence != 3 || got.Keys.HasJWTAuthority("two") {
		t.Fatalf("after a restart: %+v, %v; want sequence 3", got, err)
	}
	parsed, err := spiffebundle.Parse(td, got.JWKS)
	if err != nil {
		t.Fatal(err)
	}
	if seq, ok := parsed.SequenceNumber(); !ok || seq != 3 {
		t.Errorf("the document says sequence %d, %v; want 3", seq, ok)
	}
}

// restored is a store as it goes on after a loss.
type restored struct{ store.Store }

func (r restored) Revision(ctx context.Context) (uint64, error) {
	revision, err := r.Store.Revision(ctx)
	return store.NextEpoch(revision) + 7, err
}

// Agents take no lower number, and do not know which one is lost.
func TestRestoredStorePublishesTheSameKeysAnew(t *testing.T) {
	st := open(t, t.TempDir())
	defer st.Close()
	one := keys(t, "one")
	if _, err := Publish(t.Context(), st, one); err != nil {
		t.Fatal(err)
	}
	epoch := store.NextEpoch(1)
	for i, step := range []struct {
		content *spiffebundle.Bundle
		want    uint64
	}{{one, epoch}, {one, epoch}, {keys(t, "two"), epoch + 1}} {
		got, err := Publish(t.Context(), restored{st}, step.content)
		if err != nil || got.Sequence != step.want || !holds(got.Keys, step.content) {
			t.Fatalf("step %d: %+v, %v; want sequence %d", i, got, err, step.want)
		}
	}
}

func holds(published, keys *spiffebundle.Bundle) bool {
	for kid := range keys.JWTAuthorities() {
		if !published.HasJWTAuthority(kid) {
			return false
		}
	}
	return true
}

// Replicas publish side by side; a CA with another root does not.
func TestPublishAddsAndKeepsToOneRoot(t *testing.T) {
	st := open(t, t.TempDir())
	defer st.Close()
	root := forge.New(t, td.Name()).Bundle().X509Authorities()[0]
	for _, kid := range []string{"one", "two"} {
		content := keys(t, kid)
		content.AddX509Authority(root)
		if _, err := Publish(t.Context(), st, content); err != nil {
			t.Fatal(err)
		}
	}
	other := keys(t, "three")
	other.AddX509Authority(forge.New(t, td.Name()).Bundle().X509Authorities()[0])
	if _, err := Publish(t.Context(), st, other); !errors.Is(err, ErrOtherRoot) {
		t.Errorf("another root: %v; want ErrOtherRoot", err)
	}
	got, err := Current(t.Context(), st)
	if err != nil || len(got.Keys.JWTAuthorities()) != 2 || len(got.Keys.X509Authorities()) != 1 || got.Sequence != 2 {
		t.Errorf("published: %+v, %v; want both keys, one root, sequence 2", got, err)
	}
}

func TestTwoPublishersNeverShareASequence(t *testing.T) {
	st := open(t, t.TempDir())
	defer st.Close()
	var wg sync.WaitGroup
	var mu sync.Mutex
	seen := make(map[uint64]bool)
	for range 8 {
		content := keys(t, "k")
		wg.Go(func() {
			got, err := Publish(t.Context(), st, content)
			mu.Lock()
			defer mu.Unlock()
			if err != nil || seen[got.Sequence] {
				t.Errorf("%+v, %v; want a sequence of its own", got, err)
				return
			}
			seen[got.Sequence] = true
		})
	}
	wg.Wait()
}

func TestStoreOfAnotherTrustDomainIsRefused(t *testing.T) {
	st := open(t, t.TempDir())
	defer st.Close()
	if _, err := Publish(t.Context(), st, keys(t, "k")); err != nil {
		t.Fatal(err)
	}
	other := spiffebundle.New(spiffeid.RequireTrustDomainFromString("other.test"))
	if _, err := Publish(t.Context(), st, other); err == nil || !strings.Contains(err.Error(), "shop.test") {
		t.Errorf("Publish = %v; want it to name shop.test", err)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"v":1,"trust_domain":"shop.test","sequence":1,"jwks":{"keys":[]}}`))
	f.Fuzz(func(_ *testing.T, b []byte) { _, _ = Decode(store.KV{Value: b}) })
}
