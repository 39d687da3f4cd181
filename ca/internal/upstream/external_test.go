// Intermediates signed by somebody else's CA: what is taken, what is refused, and
// what happens while it is away.

package upstream

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/smallstep/certificates/cas/apiv1"
)

// pki is an operator's own: a root, and an intermediate that signs for others.
type pki struct {
	root, ca *x509.Certificate
	key      *ecdsa.PrivateKey
	dir      string
}

// newPKI makes one; alter changes the intermediate.
func newPKI(t *testing.T, alter func(*x509.Certificate)) *pki {
	t.Helper()
	p := &pki{dir: t.TempDir()}
	template := func(name string) *x509.Certificate {
		serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
		if err != nil {
			t.Fatal(err)
		}
		return &x509.Certificate{
			SerialNumber: serial, Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		}
	}
	rootKey := newKey(t)
	root := template("Acme Root")
	p.root = makeCert(t, root, root, rootKey, rootKey)
	p.key = newKey(t)
	ca := template("Acme CA for Merlon")
	ca.MaxPathLen = 1
	if alter != nil {
		alter(ca)
	}
	p.ca = makeCert(t, ca, p.root, p.key, rootKey)
	p.write(t)
	return p
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func makeCert(t *testing.T, template, parent *x509.Certificate, key, signer *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func (p *pki) write(t *testing.T) {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(p.key)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, p.dir, "root.pem", string(encodeCert(p.root)))
	writeFile(t, p.dir, "ca.pem", string(encodeCerts([]*x509.Certificate{p.ca, p.root})))
	writeFile(t, p.dir, "ca.key", string(pem.EncodeToMemory(&pem.Block{Type: clearType, Bytes: der})))
}

func (p *pki) config() AuthorityConfig {
	return AuthorityConfig{
		Type: UpstreamDisk, RootFile: filepath.Join(p.dir, "root.pem"), CertFile: filepath.Join(p.dir, "ca.pem"), KeyFile: filepath.Join(p.dir, "ca.key"),
	}
}

func TestIntermediatesFromDiskChainToTheOperatorsRoot(t *testing.T) {
	p := newPKI(t, nil)
	cfg := config(t)
	cfg.Upstream = p.config()
	cfg.RootTTL = time.Hour // for roots that SVIDs are verified with
	k := open(t, cfg)
	if end := k.root().cert.NotAfter; end.Before(time.Now().Add(5 * 365 * 24 * time.Hour)) {
		t.Errorf("our own root ends at %s, and nothing replaces it", end)
	}
	chain := issue(t, k, "/web", "web.internal")
	if len(chain) != 3 {
		t.Errorf("%d certificates in the chain; want leaf, intermediate and the operator's CA", len(chain))
	}
	peer, err := verify(t, k, chain)
	if err != nil {
		t.Fatal(err)
	}
	if last := peer.AuthorityIDs[len(peer.AuthorityIDs)-1]; !k.X509().Root.Equal(p.root) || len(peer.AuthorityIDs) != 3 || last == "" {
		t.Errorf("authorities %v, root %s", peer.AuthorityIDs, k.X509().Root.Subject)
	}
	bundle, err := k.TrustBundle()
	if err != nil {
		t.Fatal(err)
	}
	if roots := bundle.X509Authorities(); len(roots) != 1 || !roots[0].Equal(p.root) {
		t.Errorf("roots in the trust bundle: %d", len(roots))
	}
	intermediate := k.X509().Chain[0]
	if !slices.Equal(intermediate.PermittedURIDomains, []string{"example.org"}) || intermediate.MaxPathLen != 0 || !intermediate.MaxPathLenZero {
		t.Errorf("constraint %v, path length %d", intermediate.PermittedURIDomains, intermediate.MaxPathLen)
	}
	again := open(t, cfg)
	sameKeys(t, k, again)
	if renewed, err := again.RenewIntermediate(t.Context(), time.Now().Add(13*time.Hour)); err != nil || !renewed {
		t.Errorf("RenewIntermediate = %t, %v", renewed, err)
	}
	if next := again.X509(); next.ID() == k.X509().ID() || len(next.Chain) != 2 || !next.Root.Equal(p.root) {
		t.Errorf("after renewal: %s, chain of %d", next.ID(), len(next.Chain))
	}
	if got := generations(t, cfg.Dir); !slices.Contains(got, "intermediate-2") || slices.Contains(got, "intermediate-1") {
		t.Errorf("on disk: %v", got)
	}
}

// The CA's root itself, on disk: what is above the intermediate is the root alone.
func TestRootFromDisk(t *testing.T) {
	p := newPKI(t, nil)
	key := newKey(t)
	template := *p.root
	template.SerialNumber, template.PublicKey, template.SubjectKeyId = big.NewInt(7), key.Public(), nil
	p.root = makeCert(t, &template, &template, key, key)
	p.ca, p.key = p.root, key
	p.write(t)
	cfg := config(t)
	cfg.Upstream = p.config()
	k := open(t, cfg)
	if chain := issue(t, k, "/web"); len(chain) != 2 {
		t.Errorf("%d certificates in the chain; want leaf and intermediate", len(chain))
	}
	if _, err := verify(t, k, issue(t, k, "/web")); err != nil {
		t.Error(err)
	}
}

// What stands above the intermediate can break every SVID under it.
func TestUpstreamsThatBreakSVIDsAreRefused(t *testing.T) {
	other := newPKI(t, nil)
	for name, tt := range map[string]struct {
		alter func(*x509.Certificate)
		cfg   func(*AuthorityConfig)
		want  string
	}{
		"no CA below":   {func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 0, true }, nil, "refused by everybody"},
		"not our names": {func(c *x509.Certificate) { c.PermittedURIDomains = []string{"acme.org"} }, nil, "refused by everybody"},
		"servers only": {func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}, nil, "refused by everybody"},
		"a workload's name": {func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/ca"}} }, nil, "refused by everybody"},
		"other root":        {nil, func(c *AuthorityConfig) { c.RootFile = filepath.Join(other.dir, "root.pem") }, "does not chain to the root in"},
		"other key":         {nil, func(c *AuthorityConfig) { c.KeyFile = filepath.Join(other.dir, "ca.key") }, "is not the key of the first certificate"},
		"no root":           {nil, func(c *AuthorityConfig) { c.RootFile = c.KeyFile }, "holds no certificate"},
		"no key":            {nil, func(c *AuthorityConfig) { c.KeyFile += ".not" }, "upstream_key_file"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := config(t)
			cfg.Upstream = newPKI(t, tt.alter).config()
			if tt.cfg != nil {
				tt.cfg(&cfg.Upstream)
			}
			_, err := Open(t.Context(), cfg)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Open = %v; want %q", err, tt.want)
			}
			if tt.want == "refused by everybody" && (!errors.Is(err, ErrUpstreamAnswer) || !errors.Is(err, ErrUpstreamAway)) {
				t.Errorf("Open = %v; the caller cannot tell why", err)
			}
			if _, err := os.Stat(filepath.Join(cfg.Dir, "intermediate-1")); !errors.Is(err, os.ErrNotExist) {
				t.Error("an intermediate was put away")
			}
		})
	}
}

// Each rule on what comes back, by itself.
func TestUpstreamAnswersAreChecked(t *testing.T) {
	k := open(t, config(t))
	want := *k.X509().Chain[0]
	now := time.Now()
	for name, spoil := range map[string]func(c *x509.Certificate){
		"leaf":        func(c *x509.Certificate) { c.IsCA = false },
		"usage":       func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageDigitalSignature },
		"no usage":    func(c *x509.Certificate) { c.KeyUsage = 0 },
		"no name":     func(c *x509.Certificate) { c.URIs = nil },
		"two names":   func(c *x509.Certificate) { c.URIs = slices.Repeat(c.URIs, 2) },
		"other name":  func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "evil.org"}} },
		"DNS name":    func(c *x509.Certificate) { c.DNSNames = []string{"evil.org"} },
		"constraint":  func(c *x509.Certificate) { c.PermittedURIDomains = []string{"evil.org"} },
		"longer life": func(c *x509.Certificate) { c.NotAfter = c.NotAfter.Add(time.Hour) },
		"ended":       func(c *x509.Certificate) { c.NotAfter = now.Add(-time.Second) },
		"not yet":     func(c *x509.Certificate) { c.NotBefore = now.Add(time.Hour) },
		"other key":   func(c *x509.Certificate) { c.PublicKey = k.X509().Root.PublicKey },
		"no key ID":   func(c *x509.Certificate) { c.SubjectKeyId = nil },
	} {
		got := want
		spoil(&got)
		if checkUpstream(&got, &want, now) == nil {
			t.Errorf("%s: not noticed", name)
		}
	}
	lax := want
	lax.PermittedURIDomains, lax.MaxPathLen, lax.KeyUsage = nil, -1, x509.KeyUsageCertSign
	if checkUpstream(nil, &want, now) == nil || checkUpstream(&want, &want, now) != nil || checkUpstream(&lax, &want, now) != nil {
		t.Error("nothing, the right certificate or one that SPIFFE allows is judged wrongly")
	}
}

// While the upstream is away the CA goes on, also over a restart, until its
// intermediate ends; a CA without one does not start.
func TestUpstreamThatIsAway(t *testing.T) {
	p := newPKI(t, nil)
	cfg := config(t)
	cfg.Upstream = p.config()
	k := open(t, cfg)
	id := k.X509().ID()
	away := filepath.Join(p.dir, "ca.key")
	if err := os.Rename(away, away+".away"); err != nil {
		t.Fatal(err)
	}
	if renewed, err := k.RenewIntermediate(t.Context(), time.Now().Add(13*time.Hour)); err == nil || renewed || k.X509().ID() != id {
		t.Errorf("RenewIntermediate = %t, %v", renewed, err)
	}
	if again := open(t, cfg); again.X509().ID() != id {
		t.Error("another intermediate after a restart")
	}
	fresh := cfg
	fresh.Dir = config(t).Dir
	if _, err := Open(t.Context(), fresh); !errors.Is(err, ErrUpstreamAway) {
		t.Errorf("Open of a new CA = %v", err)
	}
	if err := os.Rename(away+".away", away); err != nil {
		t.Fatal(err)
	}
	if renewed, err := k.RenewIntermediate(t.Context(), time.Now().Add(13*time.Hour)); err != nil || !renewed {
		t.Errorf("RenewIntermediate with the upstream back = %t, %v", renewed, err)
	}
}

// hanging is an upstream that does not answer before it is told to.
type hanging struct {
	apiv1.CertificateAuthorityService
	release chan struct{}
}

func (h *hanging) CreateCertificate(*apiv1.CreateCertificateRequest) (*apiv1.CreateCertificateResponse, error) {
	<-h.release
	return nil, errors.New("released")
}

// A call that hangs holds nobody up, and is not joined by another each minute.
func TestUpstreamThatHangs(t *testing.T) {
	h := &hanging{release: make(chan struct{})}
	calls := 0
	apiv1.Register("hanging", func(context.Context, apiv1.Options) (apiv1.CertificateAuthorityService, error) {
		calls++
		return h, nil
	})
	e := &external{cfg: AuthorityConfig{Type: "hanging"}, root: newPKI(t, nil).root, busy: make(chan struct{}, 1)}
	ask := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		_, err := e.sign(ctx, &x509.Certificate{}, newKey(t))
		return err
	}
	if err := ask(); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("first call: %v", err)
	}
	for range 3 {
		if err := ask(); err == nil || !strings.Contains(err.Error(), "has not answered the call before") {
			t.Errorf("while it hangs: %v", err)
		}
	}
	close(h.release)
	e.busy <- struct{}{} // until the call is over
	<-e.busy
	if calls != 1 {
		t.Errorf("%d calls; want 1", calls)
	}
	if err := ask(); err == nil || !strings.Contains(err.Error(), "released") {
		t.Errorf("afterwards: %v", err)
	}
}

// A folder keeps to the root it began with.
func TestFolderKeepsToItsUpstream(t *testing.T) {
	own, below := config(t), config(t)
	open(t, own)
	below.Upstream = newPKI(t, nil).config()
	k := open(t, below)
	for name, cfg := range map[string]Config{
		"own root, then an upstream": {Dir: own.Dir, Upstream: below.Upstream},
		"upstream, then none":        {Dir: below.Dir},
		"upstream, then another":     {Dir: below.Dir, Upstream: newPKI(t, nil).config()},
	} {
		cfg.TrustDomain = own.TrustDomain
		if _, err := Open(t.Context(), cfg); !errors.Is(err, ErrOtherUpstream) {
			t.Errorf("%s: Open = %v", name, err)
		}
	}
	if _, err := k.SignIntermediate(newKey(t).Public(), time.Now()); err == nil || !strings.Contains(err.Error(), "one replica") {
		t.Errorf("SignIntermediate below an upstream = %v", err)
	}
}

func TestUpstreamSettings(t *testing.T) {
	for name, tt := range map[string]struct {
		cfg  AuthorityConfig
		want string
	}{
		"none":        {AuthorityConfig{}, ""},
		"disk":        {AuthorityConfig{Type: "disk", RootFile: "r", CertFile: "c", KeyFile: "k"}, ""},
		"step":        {AuthorityConfig{Type: "stepcas", RootFile: "r", Address: "https://a", KeyFile: "k", Provisioner: "p"}, ""},
		"vault":       {AuthorityConfig{Type: "vaultcas", RootFile: "r", Address: "https://a", ConfigFile: "c"}, ""},
		"cloud":       {AuthorityConfig{Type: "cloudcas", RootFile: "r", Address: "projects/p"}, ""},
		"unknown":     {AuthorityConfig{Type: "softcas", RootFile: "r"}, `"softcas" is none of`},
		"no type":     {AuthorityConfig{RootFile: "r"}, `"" is none of`},
		"no root":     {AuthorityConfig{Type: "disk", CertFile: "c", KeyFile: "k"}, "upstream_root_file: is missing"},
		"no key":      {AuthorityConfig{Type: "disk", RootFile: "r", CertFile: "c"}, "upstream_key_file: is missing"},
		"no settings": {AuthorityConfig{Type: "vaultcas", RootFile: "r", Address: "https://a"}, "upstream_config_file: is missing"},
	} {
		err := tt.cfg.Validate()
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: Validate = %v; want %q", name, err, tt.want)
		}
	}
	root := newPKI(t, nil).config().RootFile
	for typ, command := range upstreamBuild {
		cfg := config(t)
		cfg.Upstream = AuthorityConfig{Type: typ, RootFile: root, Address: "https://a", CertFile: "c", KeyFile: "k", Provisioner: "p", ConfigFile: "c"}
		if _, err := Open(t.Context(), cfg); !errors.Is(err, ErrUpstreamNotBuilt) || !strings.Contains(err.Error(), command) {
			t.Errorf("%s: Open = %v; want %q", typ, err, command)
		}
	}
}
