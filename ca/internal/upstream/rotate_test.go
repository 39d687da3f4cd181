// Several roots and JWT keys in one folder: which signs, who takes which from
// whom, and what is left on disk.

package upstream

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

func folders(t *testing.T, k *Keys, pattern string) (names []string) {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(k.cfg.Dir, pattern))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		names = append(names, filepath.Base(path))
	}
	return names
}

func TestPreparedRootSignsWhenItIsTold(t *testing.T) {
	cfg := config(t)
	k := open(t, cfg)
	now := time.Now()
	before := k.X509()
	next, err := k.PrepareRoot(now)
	if err != nil {
		t.Fatal(err)
	}
	id := rootID(next.Certificate)
	if bytes.Equal(next.Certificate.RawSubject, before.Root.RawSubject) || id == rootID(before.Root) {
		t.Error("two roots share a subject or a key ID: verifiers would try each")
	}
	if k.X509() != before || len(k.Anchors()) != 2 {
		t.Error("a prepared root signs")
	}
	if changed, err := k.UseRoot(t.Context(), id, now); err != nil || !changed {
		t.Fatalf("UseRoot = %t, %v", changed, err)
	}
	if got := k.X509(); rootID(got.Root) != id || got.Chain[0].CheckSignatureFrom(next.Certificate) != nil {
		t.Error("the intermediate is not under the new root")
	}
	policy, err := x509.ParseCertificate(k.PolicyCertificate())
	if err != nil || policy.CheckSignatureFrom(next.Certificate) != nil {
		t.Errorf("the policy key has no certificate under the new root: %v", err)
	}
	if changed, err := k.UseRoot(t.Context(), id, now); err != nil || changed {
		t.Errorf("UseRoot again = %t, %v; want nothing to change", changed, err)
	}
	if _, err := k.UseRoot(t.Context(), "00", now); err == nil {
		t.Error("a root that is not here signs")
	}

	// After a restart the store says which one signs, also the one before.
	for _, active := range []string{id, rootID(before.Root)} {
		cfg.ActiveRoot = active
		k = open(t, cfg)
		if got := rootID(k.X509().Root); got != active {
			t.Errorf("after a restart %s signs; want %s", got, active)
		}
	}
	if found, err := k.Discard(rootID(k.X509().Root)); err != nil || found {
		t.Errorf("Discard of the root that signs = %t, %v", found, err)
	}
	if found, err := k.Discard(id); err != nil || !found || !slices.Equal(folders(t, k, "root-*"), []string{"root-1"}) {
		t.Errorf("Discard = %t, %v; left: %v", found, err, folders(t, k, "root-*"))
	}
	cfg.ActiveRoot = ""
	open(t, cfg)
}

func TestJWTKeysFollowEachOther(t *testing.T) {
	cfg := config(t)
	k := open(t, cfg)
	first := k.JWT().KeyID
	next, err := k.PrepareJWT()
	if err != nil {
		t.Fatal(err)
	}
	if k.JWT().KeyID != first || !k.HoldsJWT(next.KeyID) {
		t.Error("a prepared key signs, or is not here")
	}
	if err := k.UseJWT(next.KeyID); err != nil || k.JWT().KeyID != next.KeyID {
		t.Fatalf("UseJWT: %v; %s signs", err, k.JWT().KeyID)
	}
	if err := k.UseJWT("none"); err == nil || k.JWT().KeyID != next.KeyID {
		t.Error("a key that is not here signs")
	}
	cfg.ActiveJWT = func(name string) string { return map[string]string{"ca": first}[name] }
	k = open(t, cfg)
	if got := k.JWT().KeyID; got != first {
		t.Errorf("after a restart %s signs; want %s, as the store says", got, first)
	}
	if found, err := k.Discard(first); err != nil || found {
		t.Errorf("Discard of the key that signs = %t, %v", found, err)
	}
	if found, err := k.Discard(next.KeyID); err != nil || !found || k.HoldsJWT(next.KeyID) {
		t.Errorf("Discard = %t, %v", found, err)
	}
}

// Who can write the store can name any root there: a replica takes none that a
// root it has did not seal.
func TestReplicaTakesOnlySealedRoots(t *testing.T) {
	root := open(t, config(t))
	r := open(t, replicaConfig(t, root, "ca-2"))
	now := time.Now()
	next, err := root.PrepareRoot(now)
	if err != nil {
		t.Fatal(err)
	}
	foreign := open(t, config(t))
	theirs, err := foreign.PrepareRoot(now)
	if err != nil {
		t.Fatal(err)
	}
	token, err := root.Seal(theirs.Certificate.Raw) // made for something else
	if err != nil {
		t.Fatal(err)
	}
	for name, try := range map[string]struct {
		cert *x509.Certificate
		seal []byte
		by   string
	}{
		"another CA's, sealed by it":       {theirs.Certificate, theirs.Seal, theirs.SealedBy},
		"another CA's, as if sealed by us": {theirs.Certificate, theirs.Seal, next.SealedBy},
		"another CA's with our seal":       {theirs.Certificate, next.Seal, next.SealedBy},
		"no seal":                          {next.Certificate, nil, next.SealedBy},
		"the seal of a token":              {theirs.Certificate, token, next.SealedBy},
	} {
		if err := r.AddAnchor(try.cert, try.seal, try.by); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if len(r.Anchors()) != 1 {
		t.Fatalf("%d roots after that; want 1", len(r.Anchors()))
	}
	if err := r.AddAnchor(next.Certificate, next.Seal, next.SealedBy); err != nil {
		t.Fatal(err)
	}
	id := rootID(next.Certificate)
	if _, err := root.UseRoot(t.Context(), id, now); err != nil {
		t.Fatal(err)
	}
	if changed, err := r.UseRoot(t.Context(), id, now); err != nil || !changed || rootID(r.X509().Root) != id {
		t.Fatalf("UseRoot = %t, %v; it signs under %s", changed, err, rootID(r.X509().Root))
	}
	cfg := r.cfg
	r = open(t, cfg)
	if len(r.Anchors()) != 2 || rootID(r.X509().Root) != id {
		t.Errorf("after a restart it knows %d roots, and signs under %s", len(r.Anchors()), rootID(r.X509().Root))
	}
	if _, err := r.PrepareRoot(now); !errors.Is(err, ErrNoRootKey) {
		t.Errorf("PrepareRoot on a replica: %v", err)
	}
}

func TestEndedRootIsReplacedWhenItIsSaid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := config(t)
		cfg.RootTTL, cfg.IntermediateTTL = time.Hour, time.Hour
		first := rootID(open(t, cfg).X509().Root)
		time.Sleep(time.Hour + time.Minute)
		if _, err := Open(context.Background(), cfg); !errors.Is(err, ErrRootEnded) {
			t.Errorf("Open with an ended root: %v; want ErrRootEnded", err)
		}
		cfg.NewRoot = true
		k := open(t, cfg)
		if got := rootID(k.X509().Root); got == first {
			t.Error("the ended root signs")
		}
		issue(t, k, "/web")
		again := open(t, cfg) // the flag, left on by mistake
		if !again.X509().Root.Equal(k.X509().Root) || len(again.Anchors()) != 2 {
			t.Error("a second new root was made")
		}
	})
}
