// What of a backup is brought back when something is lost, and what is not.

package offline

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/api"
	"merlon.dev/ca/internal/approval"
	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/config"
	"merlon.dev/ca/internal/opening"
	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/rotation"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
	"merlon.dev/ca/internal/store/snapshot"
	"merlon.dev/ca/internal/trust"
)

var restoreTD = spiffeid.RequireTrustDomainFromString("shop.test")

// haStore fills a store as a CA of three replicas does, and returns its
// configuration.
func haStore(t *testing.T) config.Config {
	t.Helper()
	cfg := config.Config{TrustDomain: "shop.test", DataDir: filepath.Join(t.TempDir(), "a"), AdminSocket: filepath.Join(t.TempDir(), "none.sock")}.WithDefaults()
	st, err := badger.Open(cfg.StoreDir(), badger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	keys := spiffebundle.New(restoreTD)
	keys.AddX509Authority(someRoot(t))
	var ops []store.Op
	for _, r := range []*replica.Record{
		{Name: "ca", RootHolder: true, JWTKeyID: "key-ca"}, {Name: "east", JWTKeyID: "key-east"}, {Name: "west", JWTKeyID: "key-west"},
	} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		if err := keys.AddJWTAuthority(r.JWTKeyID, key.Public()); err != nil {
			t.Fatal(err)
		}
		r.Authorities = []replica.Authority{{ID: "id-" + r.Name, NotAfter: time.Now().Add(time.Hour)}}
		op, err := r.Put()
		if err != nil {
			t.Fatal(err)
		}
		ops = append(ops, op)
	}
	next, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if err := keys.AddJWTAuthority("key-east-next", next.Public()); err != nil {
		t.Fatal(err)
	}
	ops = append(ops, storedAuthorities(t, rotation.Authority{ID: "key-east", Replica: "east", State: rotation.Active},
		rotation.Authority{ID: "key-east-next", Replica: "east", State: rotation.Published}, rotation.Authority{ID: "key-ca", Replica: "ca", State: rotation.Active}))
	ops = append(ops, store.Put("entry/1", []byte("e")), store.Put("revocation/1", []byte("r")), store.Put("agent/n1", []byte("a")),
		store.Put("token/mrt/1", []byte("replica")), store.Put("token/new/1", []byte("of a kind to come")),
		store.Put(approval.Prefix+"proposal/1", []byte("it may have been granted since")), store.Put(approval.Prefix+"required/east", nil))
	if _, err := st.Txn(t.Context(), nil, ops, nil); err != nil {
		t.Fatal(err)
	}
	expires := time.Now().Add(time.Hour)
	if _, err := attest.CreateJoinToken(t.Context(), st, "n1", expires); err != nil {
		t.Fatal(err)
	}
	if _, err := attest.CreateReaderToken(t.Context(), st, "main", expires); err != nil {
		t.Fatal(err)
	}
	if _, err := trust.Publish(t.Context(), st, keys); err != nil {
		t.Fatal(err)
	}
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
	return cfg
}

func storedAuthorities(t *testing.T, jwtKeys ...rotation.Authority) store.Op {
	t.Helper()
	for i := range jwtKeys {
		jwtKeys[i].Kind, jwtKeys[i].PublicKey, jwtKeys[i].NotAfter = rotation.JWT, []byte("key"), time.Now().Add(time.Hour)
	}
	b, err := json.Marshal(map[string]any{"v": 1, "authorities": jwtKeys})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := rotation.Decode(b); err != nil {
		t.Fatal(err)
	}
	return store.Put(trust.AuthoritiesKey, b)
}

func someRoot(t *testing.T) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return root
}

func writeAudit(t *testing.T, cfg config.Config, records ...audit.Record) {
	t.Helper()
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		t.Fatal(err)
	}
	log, err := audit.Open(cfg.AuditPath(), cfg.AuditOptions())
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range records {
		if err := log.Append(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
}

func backupFile(t *testing.T, cfg config.Config) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "backup")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Backup(t.Context(), cfg, f); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

// stored lists the kinds of keys in a store, and its trust bundle.
func stored(t *testing.T, cfg config.Config) (keys []string, published *trust.Bundle) {
	t.Helper()
	st, err := badger.Open(cfg.StoreDir(), badger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	for kv, err := range snapshot.NewPages(st).All(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		key := kv.Key
		for _, random := range []string{"token/mjt", "token/mbr", "token/mrt"} {
			if strings.HasPrefix(key, random) {
				key = random
			}
		}
		if rec, err := revocation.Decode(kv); strings.HasPrefix(key, revocation.Prefix) && err == nil {
			key = revocation.Prefix + rec.AuthorityID
		}
		keys = append(keys, key)
		if kv.Key == trust.Key {
			if published, err = trust.Decode(kv); err != nil {
				t.Fatal(err)
			}
		}
	}
	return keys, published
}

// An act is one story, and one without an end may have been done.
func TestActsSinceABackupAreToldOnce(t *testing.T) {
	cfg := config.Config{DataDir: t.TempDir(), IssuanceLog: config.DefaultIssuanceLog}
	begin := time.Now().Add(-time.Minute)
	act := func(id, detail string, pending bool) audit.Record {
		return audit.Record{Type: audit.Admin, Actor: "uid:0", Act: id, Detail: detail, Pending: pending}
	}
	refused := act("3", "revoke", false)
	refused.Type = audit.Refuse
	before := act("0", "begin to create entry", true)
	before.Time = begin.Add(-time.Second)
	writeAudit(t, cfg,
		before, act("0", "create entry", false),
		act("1", "begin to create entry", true), act("2", "begin to delete entry", true), act("1", "create entry", false),
		act("3", "begin to revoke", true), refused,
		act("4", "begin to evict replica", true), act("4", "sign policy bundle again", true), act("4", "evict replica b", false),
		act("5", "begin to "+api.BackedUp, true), act("5", api.BackedUp, false),
		act("", "entry expired", false), act("6", "begin to evict replica", true), act("6", "sign policy bundle again", true),
	)
	var told []string
	for _, a := range actsSince(cfg, begin) {
		told = append(told, a.What)
	}
	want := []string{
		"create entry", "begin to delete entry; its outcome is not recorded", "create entry", "sign policy bundle again", "evict replica b",
		"entry expired", "begin to evict replica; its outcome is not recorded", "sign policy bundle again",
	}
	if diff := cmp.Diff(want, told); diff != "" {
		t.Errorf("acts (-want +got):\n%s", diff)
	}
}

// A token that was used since, and a replica that was evicted since, must not
// come back; SECURITY.md T6.
func TestRestoreWithALossLeavesOutWhatIsDangerous(t *testing.T) {
	from := haStore(t)
	file := backupFile(t, from)
	to := from
	to.DataDir = filepath.Join(t.TempDir(), "b")

	writeAudit(t, to,
		audit.Record{Type: audit.Renew, Detail: "intermediate of replica east", AuthorityID: "id-later", NotAfter: time.Now().Add(time.Hour)},
		audit.Record{Type: audit.Attest, Detail: "replica north joins, JWT key k", AuthorityID: "id-north", NotAfter: time.Now().Add(time.Hour)},
		audit.Record{Type: audit.Renew, Detail: "intermediate of replica east", AuthorityID: "id-ended", NotAfter: time.Now()},
		audit.Record{Type: audit.Renew, Detail: "intermediate", AuthorityID: "id-own", NotAfter: time.Now().Add(time.Hour)},
		audit.Record{Time: time.Now().Add(-time.Hour), Type: audit.Renew, Detail: "intermediate of replica long-gone", AuthorityID: "id-before", NotAfter: time.Now().Add(time.Hour)},
	)
	_, err := Restore(t.Context(), to, file, RestoreOptions{})
	if _, ok := errors.AsType[*LossError](err); !ok {
		t.Fatalf("without AcceptLoss: %v; want a LossError", err)
	}
	r, err := Restore(t.Context(), to, file, RestoreOptions{AcceptLoss: true})
	if err != nil {
		t.Fatal(err)
	}
	keys, published := stored(t, to)
	slices.Sort(keys) // revocations have random keys
	want := []string{
		"agent/n1", "entry/1", "former-replica/east", "former-replica/west", replica.RealmKey, "replica/ca", "revocation/1",
		"revocation/id-east", "revocation/id-later", "revocation/id-north", "revocation/id-west", "revocation/key-east", "revocation/key-east-next", "revocation/key-west",
		"token/mbr", trust.AuthoritiesKey, trust.Key,
	}
	if !slices.Equal(keys, want) {
		t.Errorf("restored %q; want %q", keys, want)
	}
	if len(r.Tokens) != 3 || !slices.Equal(r.Replicas, []string{"east", "west"}) || r.Keys != uint64(len(want)) || r.Revision != store.NextEpoch(1) {
		t.Errorf("it says %+v", r)
	}
	var kids []string
	for kid := range published.Keys.JWTAuthorities() {
		kids = append(kids, kid)
	}
	if !slices.Equal(kids, []string{"key-ca"}) || len(published.Keys.X509Authorities()) != 1 {
		t.Errorf("trust bundle with the JWT keys %q and %d roots; want the root holder's alone", kids, len(published.Keys.X509Authorities()))
	}
}

func TestRestoreWithoutALossBringsEverythingBack(t *testing.T) {
	from := haStore(t)
	file := backupFile(t, from)
	before, _ := stored(t, from)
	to := from
	to.DataDir = filepath.Join(t.TempDir(), "b")
	r, err := Restore(t.Context(), to, file, RestoreOptions{Replaces: from.StoreDir()})
	if err != nil {
		t.Fatal(err)
	}
	if after, _ := stored(t, to); !slices.Equal(after, before) || !r.Lossless || r.Revision != r.Backup.Revision {
		t.Errorf("restored %q, %+v; want %q", after, r, before)
	}
}

// A store that was put back, or another one, shows nothing.
func TestOlderStoreDoesNotShowThatNothingIsLost(t *testing.T) {
	from := haStore(t)
	older := filepath.Join(t.TempDir(), "older")
	if err := os.CopyFS(older, os.DirFS(from.StoreDir())); err != nil {
		t.Fatal(err)
	}
	st, err := badger.Open(from.StoreDir(), badger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := st.Txn(t.Context(), nil, []store.Op{store.Put("entry/2", nil)}, nil); err != nil {
		t.Fatal(err)
	}
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
	file := backupFile(t, from)
	to := from
	to.DataDir = filepath.Join(t.TempDir(), "b")
	_, err = Restore(t.Context(), to, file, RestoreOptions{Replaces: older})
	if loss, ok := errors.AsType[*LossError](err); !ok || loss.Head == 0 || loss.Head >= loss.Backup.Revision {
		t.Errorf("Restore = %v; want a LossError", err)
	}
}

// Two restores of one backup never give out one revision twice.
func TestEveryRestoreTakesAnEpochOfItsOwn(t *testing.T) {
	from := haStore(t)
	file := backupFile(t, from)
	to := from
	to.DataDir = filepath.Join(t.TempDir(), "b")
	for i := range uint64(3) {
		r, err := Restore(t.Context(), to, file, RestoreOptions{AcceptLoss: true})
		if err != nil || store.Epoch(r.Revision) != i+1 {
			t.Fatalf("restore %d: revision %d, %v; want epoch %d", i, r.Revision, err, i+1)
		}
		if err := os.RemoveAll(to.StoreDir()); err != nil {
			t.Fatal(err)
		}
	}
}

// A restore that was killed has left no store: nothing takes it for one, and the
// same command goes on.
func TestRestoreGoesOnWhereOneWasBrokenOff(t *testing.T) {
	from := haStore(t)
	file := backupFile(t, from)
	for _, state := range []string{"incoming-partial", "incoming"} {
		to := from
		to.DataDir = filepath.Join(t.TempDir(), "b")
		if err := badger.Import(filepath.Join(to.StoreDir(), state), badger.Options{}, 1, func(func(store.KV, error) bool) {}); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(filepath.Join(to.StoreDir(), "lost+found"), 0o700); err != nil { // a disk of its own
			t.Fatal(err)
		}
		_, err := Backup(t.Context(), to, io.Discard)
		if !errors.Is(err, store.ErrUnfinished) || !strings.Contains(opening.Hint(err), "run that command again") {
			t.Errorf("%s: a backup of it: %v", state, err)
		}
		if _, err := VerifyStore(t.Context(), to); !errors.Is(err, store.ErrUnfinished) {
			t.Errorf("%s: verify: %v", state, err)
		}
		if r, err := Restore(t.Context(), to, file, RestoreOptions{AcceptLoss: true}); err != nil || r.Keys == 0 {
			t.Errorf("%s: restore again: %+v, %v", state, r, err)
		}
	}
}

// What a store was is not told by the number of its last revision: another store
// that happens to end there does not show that nothing is lost.
func TestAnotherStoreOfTheSameRevisionShowsNothing(t *testing.T) {
	from, other := haStore(t), haStore(t)
	file := backupFile(t, from)
	to := from
	to.DataDir = filepath.Join(t.TempDir(), "b")
	_, err := Restore(t.Context(), to, file, RestoreOptions{Replaces: other.StoreDir()})
	if loss, ok := errors.AsType[*LossError](err); !ok || loss.Head != loss.Backup.Revision || !strings.Contains(err.Error(), "held something else") {
		t.Errorf("Restore = %v; want a LossError that says that it is another store", err)
	}
}

// A store that is beyond repair still says what it held, campaigns included.
func TestDamagedStoreShowsThatNothingIsLost(t *testing.T) {
	from := haStore(t)
	st, err := badger.Open(from.StoreDir(), badger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := st.Campaign(t.Context(), "upkeep", time.Minute); err != nil {
		t.Fatal(err)
	}
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
	file := backupFile(t, from)
	if err := os.Remove(filepath.Join(from.StoreDir(), "MANIFEST")); err != nil {
		t.Fatal(err)
	}
	to := from
	to.DataDir = filepath.Join(t.TempDir(), "b")
	if r, err := Restore(t.Context(), to, file, RestoreOptions{Replaces: from.StoreDir()}); err != nil || !r.Lossless {
		t.Errorf("Restore = %+v, %v; want nothing lost", r, err)
	}
}
