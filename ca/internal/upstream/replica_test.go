// A replica's keys: made there, certified by the root holder, and worth nothing
// for anything else.

package upstream

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/authority"
	"merlon.dev/ca/internal/replica"
	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

// holder is the way to a root holder in the same process.
type holder struct {
	t     testing.TB
	keys  *Keys
	name  string
	alter func(*Certificates)
	calls []string
}

func (h *holder) Join(_ context.Context, r KeyRequests) (*Certificates, error) {
	return h.certify("join", r)
}

func (h *holder) Certify(_ context.Context, r KeyRequests) (*Certificates, error) {
	return h.certify("certify", r)
}

func (h *holder) certify(call string, r KeyRequests) (*Certificates, error) {
	h.calls = append(h.calls, call)
	var keys []crypto.PublicKey
	for _, csr := range [][]byte{r.Intermediate, r.Policy, r.JWT} {
		key, err := authority.PublicKeyFromCSR(csr)
		if err != nil {
			h.t.Error(err)
		}
		keys = append(keys, key)
	}
	intermediate, err := h.keys.SignIntermediate(keys[0], time.Now())
	if err != nil {
		return nil, err
	}
	policy, err := h.keys.CertifyPolicyKey(h.name, keys[1], time.Now())
	if err != nil {
		return nil, err
	}
	got := &Certificates{Intermediate: intermediate, Policy: policy, Root: h.keys.root().cert}
	if h.alter != nil {
		h.alter(got)
	}
	return got, nil
}

func replicaConfig(t testing.TB, root *Keys, name string) Config {
	cfg := config(t)
	cfg.RootHolder = &holder{t: t, keys: root, name: name}
	return cfg
}

func TestReplicaJoinsOnceAndIssuesUnderTheRoot(t *testing.T) {
	root := open(t, config(t))
	cfg := replicaConfig(t, root, "ca-2")
	first := open(t, cfg)
	again := open(t, cfg)
	if calls := cfg.RootHolder.(*holder).calls; !slices.Equal(calls, []string{"join"}) {
		t.Errorf("calls = %v; want one join", calls)
	}
	if first.Name() != "ca-2" || again.Name() != "ca-2" || first.HoldsRoot() || !root.HoldsRoot() || root.Name() != DefaultName {
		t.Errorf("names %q, %q, %q", first.Name(), again.Name(), root.Name())
	}
	if again.X509().ID() != first.X509().ID() || again.JWT().KeyID != first.JWT().KeyID {
		t.Error("the second start has other keys than the first")
	}
	if first.X509().ID() == root.X509().ID() || first.X509().Chain[0].Subject.String() == root.X509().Chain[0].Subject.String() {
		t.Error("the replica's intermediate is not told apart from the root holder's")
	}
	if _, err := verify(t, root, issue(t, again, "/web")); err != nil {
		t.Errorf("what the replica issues: %v", err)
	}
	entries, err := filepath.Glob(filepath.Join(cfg.Dir, "*", sealedFile))
	if err != nil || len(entries) != 4 {
		t.Errorf("private keys: %v, %v; want intermediate, jwt, log and policy", entries, err)
	}
	if _, err := os.Stat(filepath.Join(cfg.Dir, "anchor-1", certFile)); err != nil {
		t.Error(err)
	}
}

func TestReplicaRenewsAtHalfLifeWithTheRootHolder(t *testing.T) {
	root := open(t, config(t))
	cfg := replicaConfig(t, root, "ca-2")
	k := open(t, cfg)
	first := k.X509().ID()
	if renewed, err := k.RenewIntermediate(t.Context(), time.Now().Add(11*time.Hour)); renewed || err != nil {
		t.Errorf("before half life: %t, %v", renewed, err)
	}
	if renewed, err := k.RenewIntermediate(t.Context(), time.Now().Add(13*time.Hour)); !renewed || err != nil {
		t.Fatalf("after half life: %t, %v", renewed, err)
	}
	if k.X509().ID() == first || open(t, cfg).X509().ID() != k.X509().ID() {
		t.Error("the new intermediate is not the one in use, here and after a restart")
	}
	if _, err := verify(t, root, issue(t, k, "/web")); err != nil {
		t.Error(err)
	}
}

// A disk that is full for an hour costs one authority, not sixty.
func TestReplicaAsksAgainForTheKeyThatItCouldNotPutAway(t *testing.T) {
	root := open(t, config(t))
	cfg := replicaConfig(t, root, "ca-2")
	k := open(t, cfg)
	first, later := k.X509().ID(), time.Now().Add(13*time.Hour)
	asked := make(map[string]int)
	cfg.RootHolder.(*holder).alter = func(c *Certificates) { asked[rootID(c.Intermediate)]++ }
	inTheWay := filepath.Join(cfg.Dir, "intermediate-2")
	if err := os.MkdirAll(filepath.Join(inTheWay, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if renewed, err := k.RenewIntermediate(t.Context(), later); renewed || err == nil || k.X509().ID() != first {
			t.Fatalf("RenewIntermediate = %t, %v under %s; want it to fail and go on under %s", renewed, err, k.X509().ID(), first)
		}
	}
	if err := os.RemoveAll(inTheWay); err != nil {
		t.Fatal(err)
	}
	if renewed, err := k.RenewIntermediate(t.Context(), later); !renewed || err != nil {
		t.Fatalf("with space: %t, %v", renewed, err)
	}
	if asked[k.X509().ID()] != 4 || len(asked) != 1 {
		t.Errorf("asked for %v; want %s each time", asked, k.X509().ID())
	}
	// The one after that is another.
	if renewed, err := k.RenewIntermediate(t.Context(), later.Add(24*time.Hour)); !renewed || err != nil || len(asked) != 2 {
		t.Errorf("the next: %t, %v, asked for %v; want a key of its own", renewed, err, asked)
	}
}

// A root holder that was taken over, or mixes answers up, is not believed.
func TestReplicaRefusesWhatTheRootHolderMustNotMake(t *testing.T) {
	root, other := open(t, config(t)), open(t, config(t))
	for name, alter := range map[string]func(*Certificates){
		"another replica's":  func(c *Certificates) { c.Intermediate = root.X509().Chain[0] },
		"another root's":     func(c *Certificates) { c.Root = other.root().cert },
		"the root itself":    func(c *Certificates) { c.Intermediate = root.root().cert },
		"no CA":              func(c *Certificates) { c.Intermediate = c.Policy },
		"CA as policy":       func(c *Certificates) { c.Policy = c.Intermediate },
		"another policy key": func(c *Certificates) { c.Policy = root.policy.Load().cert },
		"foreign policy":     func(c *Certificates) { c.Policy = other.policy.Load().cert },
	} {
		cfg := replicaConfig(t, root, "ca-2")
		cfg.RootHolder.(*holder).alter = alter
		if _, err := Open(t.Context(), cfg); err == nil {
			t.Errorf("%s: Open took it", name)
		}
		cfg.RootHolder.(*holder).alter = nil
		if k := open(t, cfg); k.Name() != "ca-2" { // the next attempt begins anew
			t.Errorf("%s: joined as %s afterwards", name, k.Name())
		}
	}
}

func TestFoldersKeepToWhatTheyWereMadeFor(t *testing.T) {
	rootCfg := config(t)
	root := open(t, rootCfg)
	replicaCfg := replicaConfig(t, root, "ca-2")
	open(t, replicaCfg)
	for name, test := range map[string]struct {
		cfg  func() Config
		want error
	}{
		"root holder as replica": {func() Config { c := rootCfg; c.RootHolder = replicaCfg.RootHolder; return c }, ErrIsRootHolder},
		"replica as root holder": {func() Config { c := replicaCfg; c.RootHolder = nil; return c }, ErrIsReplica},
		"a second root":          {func() Config { c := config(t); c.ExistingRoot = true; return c }, ErrNoKeys},
	} {
		if _, err := Open(t.Context(), test.cfg()); !errors.Is(err, test.want) {
			t.Errorf("%s: %v; want %v", name, err, test.want)
		}
	}
	renamed := replicaCfg
	renamed.Name = "ca-3"
	if _, err := Open(t.Context(), renamed); err == nil || !strings.Contains(err.Error(), "ca-2") {
		t.Errorf("another name: %v; want it to name ca-2", err)
	}
	again := rootCfg
	again.ExistingRoot = true
	open(t, again)
}

// Keys from before policy keys had certificates, or a crash in between.
func TestPolicyKeyWithoutCertificateGetsOne(t *testing.T) {
	cfg := config(t)
	before, _ := open(t, cfg).Policy()
	folder := filepath.Join(cfg.Dir, "policy-1")
	if err := os.Rename(filepath.Join(folder, certFile), filepath.Join(folder, unfinished+certFile)); err != nil {
		t.Fatal(err)
	}
	k := open(t, cfg)
	if after, _ := k.Policy(); after != before || k.Name() != DefaultName || len(k.PolicyCertificate()) == 0 {
		t.Errorf("policy key %s of %q; want %s, certified", after, k.Name(), before)
	}
}

func TestReplicaThatWasAwayTooLongIsTold(t *testing.T) {
	rootCfg := config(t)
	rootCfg.IntermediateTTL = time.Minute
	root := open(t, rootCfg)
	cfg := replicaConfig(t, root, "ca-2")
	k := open(t, cfg)
	if err := k.openReplica(t.Context(), time.Now().Add(2*time.Minute)); !errors.Is(err, ErrEnded) {
		t.Errorf("openReplica later = %v; want ErrEnded", err)
	}
	if left := time.Until(k.X509().NotAfter()); left > time.Minute {
		t.Errorf("the replica's intermediate lives for %s; want the root holder's own minute", left)
	}
}

// Only the root holder signs, and a policy key is good for policy alone.
func TestPolicyCertificateIsGoodForPolicyAlone(t *testing.T) {
	root := open(t, config(t))
	r := open(t, replicaConfig(t, root, "ca-2"))
	if _, err := r.SignIntermediate(r.policy.Load().signer.Public(), time.Now()); !errors.Is(err, ErrNoRootKey) {
		t.Errorf("SignIntermediate on a replica: %v", err)
	}
	if _, err := r.CertifyPolicyKey("x", r.policy.Load().signer.Public(), time.Now()); !errors.Is(err, ErrNoRootKey) {
		t.Errorf("CertifyPolicyKey on a replica: %v", err)
	}
	if _, err := r.Seal([]byte("x")); !errors.Is(err, ErrNoRootKey) {
		t.Errorf("Seal on a replica: %v", err)
	}
	now := time.Now()
	key, err := replica.VerifyPolicyCertificate(r.PolicyCertificate(), root.Anchors(), now)
	if kid, _ := r.Policy(); err != nil || key.Replica != "ca-2" || key.KID != kid || !key.Public.Equal(r.policy.Load().signer.Public()) {
		t.Errorf("VerifyPolicyCertificate = %+v, %v", key, err)
	}
	// As an SVID, and as the issuer of one.
	if _, err := verify(t, root, [][]byte{r.policy.Load().cert.Raw}); err == nil {
		t.Error("a policy certificate authenticates as an SVID")
	}
	abused := &authority.X509Authority{Chain: []*x509.Certificate{r.policy.Load().cert}, Root: root.root().cert, Signer: r.policy.Load().signer}
	leafKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial, err := svid.NewSerial(1, 1)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := abused.Issue(authority.LeafRequest{
		SPIFFEID: spiffeid.RequireFromPath(root.cfg.TrustDomain, "/web"), PublicKey: leafKey.Public(), Serial: serial, TTL: time.Minute, Now: now,
	})
	if err == nil {
		if _, err := verify(t, root, [][]byte{leaf.DER, r.policy.Load().cert.Raw}); err == nil {
			t.Error("an SVID under a policy key verifies")
		}
	}
	other := open(t, config(t))
	foreign := forge.New(t, "example.org")
	for name, der := range map[string][]byte{
		"another root's": other.PolicyCertificate(),
		"intermediate":   r.X509().Chain[0].Raw,
		"root":           root.root().cert.Raw,
		"workload":       issue(t, root, "/web")[0],
		"forged":         foreign.Leaf("/web").Chain[0].Raw,
		"noise":          []byte("noise"),
	} {
		if _, err := replica.VerifyPolicyCertificate(der, root.Anchors(), now); err == nil {
			t.Errorf("%s passes as a policy certificate", name)
		}
	}
	if _, err := replica.VerifyPolicyCertificate(r.PolicyCertificate(), root.Anchors(), root.root().cert.NotAfter.Add(time.Minute)); err == nil {
		t.Error("a policy certificate outlives its root")
	}
}

func TestSealIsTheRootsAndForThisStatement(t *testing.T) {
	root, other := open(t, config(t)), open(t, config(t))
	seal, err := root.Seal([]byte("statement"))
	if err != nil {
		t.Fatal(err)
	}
	r := open(t, replicaConfig(t, root, "ca-2"))
	if !root.Sealed([]byte("statement"), seal) || !r.Sealed([]byte("statement"), seal) {
		t.Error("the seal is not recognised")
	}
	if root.Sealed([]byte("statemen"), seal) || other.Sealed([]byte("statement"), seal) || root.Sealed([]byte("statement"), nil) {
		t.Error("the seal stands for something else too")
	}
}
