// What a nested CA takes over from the one above it, and what it does not.

package nested

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/rotation"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
	"merlon.dev/ca/internal/trust"
	"merlon.dev/sdk/svid"
)

var td = spiffeid.RequireTrustDomainFromString("shop.test")

func newMirror(t testing.TB) *Mirror {
	t.Helper()
	st, err := badger.Open(t.TempDir(), badger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	return &Mirror{Store: st, TrustDomain: td}
}

// root is a self-signed certificate.
func root(t testing.TB) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour),
	}, &x509.Certificate{}, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// stateWith is what a CA above under root says at a revision.
func stateWith(t testing.TB, of spiffeid.TrustDomain, root *x509.Certificate, revision, sequence uint64, realm uint32) State {
	t.Helper()
	keys := spiffebundle.New(of)
	keys.AddX509Authority(root)
	keys.SetSequenceNumber(sequence)
	jwks, err := keys.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := (&trust.Bundle{TrustDomain: of, Sequence: sequence, JWKS: jwks}).Encode()
	if err != nil {
		t.Fatal(err)
	}
	set, err := rotation.Set{}.Enrolled(rotation.Authority{
		ID: hex.EncodeToString(root.SubjectKeyId), Kind: rotation.Root, Replica: "ca", Certificate: root.Raw,
		NotBefore: root.NotBefore, NotAfter: root.NotAfter,
	}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	authorities, err := set.Encode()
	if err != nil {
		t.Fatal(err)
	}
	rec := &replica.Record{Name: "eu", Realm: realm, Authorities: []replica.Authority{{ID: "0a", NotAfter: root.NotAfter}}}
	put, err := rec.Put()
	if err != nil {
		t.Fatal(err)
	}
	return State{revision, bundle, authorities, put.Value}
}

func TestStateIsFollowed(t *testing.T) {
	m, r := newMirror(t), root(t)
	ctx := t.Context()
	if err := m.Join(ctx, stateWith(t, td, r, 7, 3, 1)); err != nil {
		t.Fatal(err)
	}
	same := stateWith(t, td, r, 9, 3, 1)
	revision, err := m.Apply(ctx, same)
	if err != nil {
		t.Fatal(err)
	}
	before, err := m.Store.Revision(ctx)
	if err != nil || revision > before {
		t.Fatalf("revision %d of %d, %v", revision, before, err)
	}
	if revision, err = m.Apply(ctx, same); err != nil || revision != 0 {
		t.Errorf("the same again was written at %d, %v; want nothing written", revision, err)
	}
	if revision, err = m.Apply(ctx, stateWith(t, td, r, 12, 4, 1)); err != nil || revision == 0 {
		t.Errorf("a newer state: %d, %v", revision, err)
	}
	// An answer that was on the way while the stream was faster.
	if revision, err = m.Apply(ctx, stateWith(t, td, r, 11, 3, 1)); err != nil || revision != 0 {
		t.Errorf("a state that was overtaken: %d, %v; want it left alone", revision, err)
	}
	current, err := trust.Current(ctx, m.Store)
	if err != nil || current.Sequence != 4 {
		t.Errorf("the trust bundle has sequence %+v, %v; want 4, as above", current, err)
	}
	// One as old, whose authorities are not as they were and whose trust bundle is.
	overtaken := stateWith(t, td, r, 11, 4, 1)
	overtaken.Authorities = append(overtaken.Authorities, ' ')
	if revision, err = m.Apply(ctx, overtaken); err != nil || revision != 0 {
		t.Errorf("a state that was overtaken by one with the same trust bundle: %d, %v; want it left alone", revision, err)
	}
	// Another process on the same store, as after a restart.
	again := &Mirror{Store: m.Store, TrustDomain: td}
	if _, err := again.Apply(ctx, stateWith(t, td, r, 2, 3, 1)); !errors.Is(err, ErrOlder) {
		t.Errorf("a CA above that was set back: %v; want ErrOlder", err)
	}
	if _, sequence, err := again.Seen(ctx); err != nil || sequence != 4 {
		t.Errorf("seen sequence %d, %v; want 4", sequence, err)
	}
}

func TestStateThatIsNotTaken(t *testing.T) {
	r := root(t)
	other := spiffeid.RequireTrustDomainFromString("other.test")
	good := func() State { return stateWith(t, td, r, 9, 5, 1) }
	shared := &replica.Record{Name: "eu", Authorities: []replica.Authority{{ID: "0a"}}}
	put, err := shared.Put()
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		edit func(*State)
		want string
	}{
		"another trust domain":   {func(s *State) { *s = stateWith(t, other, r, 9, 5, 1) }, "of trust domain other.test"},
		"no trust bundle":        {func(s *State) { s.TrustBundle = nil }, "decode the trust bundle"},
		"a newer encoding":       {func(s *State) { s.Authorities = []byte(`{"v":2}`) }, "version 2 is not known"},
		"no root that signs":     {func(s *State) { s.Authorities = []byte(`{"v":1,"authorities":[]}`) }, "no root that signs"},
		"no record":              {func(s *State) { s.Record = nil }, "decode the record"},
		"a replica's record":     {func(s *State) { s.Record = put.Value }, "shares a store"},
		"the record of another":  {func(s *State) { s.Record = []byte(strings.ReplaceAll(string(s.Record), `"eu"`, `"us"`)) }, "read the record of replica us"},
		"another realm":          {func(s *State) { *s = stateWith(t, td, r, 9, 5, 2) }, "as realm 2, and this one is realm 1"},
		"an older trust bundle":  {func(s *State) { *s = stateWith(t, td, r, 9, 3, 1) }, ErrOlder.Error()},
		"a record that is a lie": {func(s *State) { s.Record = []byte(`{"v":1,"name":"../trust/bundle"}`) }, "incomplete"},
	} {
		m := newMirror(t)
		if err := m.Join(t.Context(), stateWith(t, td, r, 7, 4, 1)); err != nil {
			t.Fatal(err)
		}
		before, err := m.Store.Revision(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		s := good()
		test.edit(&s)
		if _, err := m.Apply(t.Context(), s); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v; want %q", name, err, test.want)
		}
		if after, err := m.Store.Revision(t.Context()); err != nil || after != before {
			t.Errorf("%s: something was written", name)
		}
	}
}

func TestStoreOfAnotherRootDoesNotJoin(t *testing.T) {
	m := newMirror(t)
	if err := m.Join(t.Context(), stateWith(t, td, root(t), 7, 4, 1)); err != nil {
		t.Fatal(err)
	}
	if err := m.Join(t.Context(), stateWith(t, td, root(t), 9, 9, 1)); !errors.Is(err, trust.ErrOtherRoot) {
		t.Errorf("join under another root: %v; want %v", err, trust.ErrOtherRoot)
	}
	// One that joins again, after it was evicted, has another realm.
	r := root(t)
	m = newMirror(t)
	for realm := range uint32(2) {
		if err := m.Join(t.Context(), stateWith(t, td, r, uint64(7+realm), 4, realm+1)); err != nil {
			t.Fatal(err)
		}
		if rec, err := replica.Read(t.Context(), m.Store, "eu"); err != nil || rec.Realm != realm+1 {
			t.Errorf("realm %+v, %v; want %d", rec, err, realm+1)
		}
	}
}

// A record that comes twice, as after a stream that broke, does nothing the second
// time: what was issued meanwhile stays good.
func TestImportIsOnce(t *testing.T) {
	m := newMirror(t)
	records := []revocation.Shared{{
		ID:         "0123456789abcdef0123456789abcdef",
		Revocation: svid.Revocation{SPIFFEID: "spiffe://shop.test/web", BeforeRevision: 900, ExpiresAt: time.Now().Add(time.Hour)},
	}}
	limits := func() (own, all []uint64) {
		kvs, _, _, err := m.Store.List(t.Context(), revocation.Prefix, "", 10, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, kv := range kvs {
			rec, err := revocation.Decode(kv)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, rec.BeforeRevision)
			if rec.Realm == 3 {
				own = append(own, rec.BeforeRevision)
			}
		}
		return own, all
	}
	if err := m.Import(t.Context(), 3, records, time.Now()); err != nil {
		t.Fatal(err)
	}
	first, all := limits()
	if len(first) != 1 || len(all) != 2 {
		t.Fatalf("%d records of its own and %d in all; want 1 and 2", len(first), len(all))
	}
	if err := m.Follows(t.Context(), 900); err != nil {
		t.Fatal(err)
	}
	if err := m.Import(t.Context(), 3, records, time.Now()); err != nil {
		t.Fatal(err)
	}
	if again, _ := limits(); again[0] != first[0] {
		t.Errorf("the second time moved the limit from %d to %d", first[0], again[0])
	}
	if revision, _, err := m.Seen(t.Context()); err != nil || revision != 900 {
		t.Errorf("seen %d, %v; want 900", revision, err)
	}
	records[0].ID, records[0].ExpiresAt = "1123456789abcdef0123456789abcdef", time.Now().Add(-time.Second)
	if err := m.Import(t.Context(), 3, records, time.Now()); err != nil {
		t.Fatal(err)
	}
	if _, all := limits(); len(all) != 2 {
		t.Errorf("%d records after one that has expired; want 2", len(all))
	}
}

func TestSeenThatMakesNoSenseIsAnError(t *testing.T) {
	m := newMirror(t)
	for _, value := range []string{"", "7", `{"v":2,"revision":3}`} {
		if _, err := m.Store.Txn(t.Context(), nil, []store.Op{store.Put(seenKey, []byte(value))}, nil); err != nil {
			t.Fatal(err)
		}
		if revision, _, err := m.Seen(t.Context()); err == nil {
			t.Errorf("Seen of %q = %d; want an error", value, revision)
		}
	}
}

// Whatever comes, what is taken can be read back as what a CA starts with.
func FuzzState(f *testing.F) {
	good := stateWith(f, td, root(f), 7, 3, 1)
	f.Add(good.TrustBundle, good.Authorities, good.Record)
	f.Add([]byte("{}"), []byte("{}"), []byte(`{"v":1,"name":"eu","realm":1}`))
	m := &Mirror{TrustDomain: td}
	f.Fuzz(func(t *testing.T, bundle, authorities, record []byte) {
		d, err := m.read(State{1, bundle, authorities, record})
		if err != nil {
			return
		}
		set, err := rotation.Decode(authorities)
		if err != nil || set.Root() == nil || d.bundle.TrustDomain != td || len(d.bundle.Keys.X509Authorities()) == 0 {
			t.Errorf("taken without a root that signs, or of %s: %v", d.bundle.TrustDomain, err)
		}
		var name struct{ Name string }
		if err := json.Unmarshal(record, &name); err != nil || d.record.Realm == 0 || d.record.Realm > svid.MaxRealm || d.record.Name != name.Name {
			t.Errorf("taken with the record %s: %v", record, err)
		}
	})
}
