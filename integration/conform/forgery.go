// Forged documents: made by one run and presented by the next, after an operator has
// made the implementation trust the forge as the trust domain example.org.

package main

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/integration/conform/jwtcase"
	"merlon.dev/integration/conform/pathcase"
	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

const (
	bundleFile  = "bundle.json"
	forgeryFile = "forgery.json"
	// forgedFor is how long forged documents can be used.
	forgedFor = 50 * time.Minute
)

// forgery is what a forge has made.
type forgery struct {
	MadeAt time.Time      `json:"made_at"`
	Paths  []forgedPath   `json:"paths"`
	Tokens []jwtcase.Case `json:"tokens"`
	// Key is the JWT key, PKCS #8, and Kid its name in the bundle.
	Key []byte `json:"jwt_key"`
	Kid string `json:"kid"`
}

// forgedPath is a chain with the leaf's key.
type forgedPath struct {
	ID          string          `json:"id"`
	Why         string          `json:"why"`
	Requirement string          `json:"requirement"`
	By          pathcase.Source `json:"by"`
	Accept      bool            `json:"accept"`
	Presented   [][]byte        `json:"presented"`
	Key         []byte          `json:"key"` // PKCS #8
}

// failing makes the forge's failures panics, which makeForgery catches.
type failing struct{}

func (failing) Helper() {}

func (failing) Fatal(args ...any) { panic(forgeError{fmt.Sprint(args...)}) }

type forgeError struct{ what string }

func (e forgeError) Error() string { return e.what }

// makeForgery makes every case, and the one trust bundle under which they all keep
// their verdicts. Cases that need a bundle or a moment of their own are left out, with
// their IDs.
func makeForgery(now time.Time) (f *forgery, bundle *spiffebundle.Bundle, left []string, err error) {
	defer func() {
		if e, ok := recover().(forgeError); ok {
			err = e
		}
	}()
	ca := forge.New(failing{}, pathcase.TrustDomain)
	other := forge.New(failing{}, "other.invalid")
	bundle = ca.Bundle()
	f = &forgery{MadeAt: now, Tokens: jwtcase.All(ca, other), Kid: ca.KeyID}
	if f.Key, err = x509.MarshalPKCS8PrivateKey(ca.JWTKey); err != nil {
		return nil, nil, nil, err
	}
	cases := pathcase.All(failing{})
	for _, c := range cases {
		if c.TrustDomain == bundle.TrustDomain() {
			addSound(bundle, c.Trusted, now)
		}
	}
	for _, c := range cases {
		key, err := x509.MarshalPKCS8PrivateKey(c.Key)
		if err != nil || c.TrustDomain != bundle.TrustDomain() || !keepsVerdict(c, bundle, now) {
			left = append(left, c.ID)
			continue
		}
		f.Paths = append(f.Paths, forgedPath{c.ID, c.Why, c.Requirement(), c.By, c.Accept, c.Presented, key})
	}
	return f, bundle, left, nil
}

// keepsVerdict says whether c is judged alike by bundle, as long as it is used.
func keepsVerdict(c pathcase.Case, bundle *spiffebundle.Bundle, now time.Time) bool {
	for _, t := range []time.Time{now, now.Add(forgedFor)} {
		if _, err := svid.VerifyRawChain(c.Presented, bundle, t); (err == nil) != c.Accept {
			return false
		}
	}
	return true
}

// addSound adds the roots that nobody has a reason to refuse in a trust bundle.
func addSound(bundle *spiffebundle.Bundle, roots []*x509.Certificate, now time.Time) {
	for _, root := range roots {
		sound := root.IsCA && svid.CheckAuthority(root) == nil && now.After(root.NotBefore) && now.Before(root.NotAfter)
		if sound && !bundle.HasX509Authority(root) {
			bundle.AddX509Authority(root)
		}
	}
}

// write writes the forgery and the bundle to dir.
func (f *forgery) write(dir string, bundle *spiffebundle.Bundle) error {
	bundle.SetSequenceNumber(uint64(f.MadeAt.Unix())) // after 1970
	bundle.SetRefreshHint(5 * time.Minute)
	document, err := bundle.Marshal()
	if err != nil {
		return err
	}
	secrets, err := json.Marshal(f)
	if err != nil {
		return err
	}
	return errors.Join(
		os.MkdirAll(dir, 0o700),
		os.WriteFile(filepath.Join(dir, bundleFile), document, 0o600),
		os.WriteFile(filepath.Join(dir, forgeryFile), secrets, 0o600),
	)
}

func readForgery(dir string, now time.Time) (*forgery, error) {
	text, err := os.ReadFile(filepath.Join(dir, forgeryFile))
	if err != nil {
		return nil, fmt.Errorf("%w (spiffe-conform forge %s makes it)", err, dir)
	}
	f := new(forgery)
	if err := json.Unmarshal(text, f); err != nil {
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	if age := now.Sub(f.MadeAt); age > forgedFor || age < -time.Minute {
		return nil, fmt.Errorf("what is in %s was forged %s ago and has expired: forge anew, and have the new bundle trusted", dir, age.Round(time.Minute))
	}
	return f, nil
}

// key reads PKCS #8.
func key(der []byte) (crypto.Signer, error) {
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, err
	}
	signer, ok := parsed.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("a key of type %T", parsed)
	}
	if weak, ok := signer.(*rsa.PrivateKey); ok && weak.N.BitLen() < 1024 {
		return nil, errors.New("an RSA key that TLS cannot use")
	}
	return signer, nil
}

// foreign is a token of the forge's key and kid for a workload of td, which is not the
// forge's trust domain.
func (f *forgery) foreign(td spiffeid.TrustDomain, audience string, now time.Time) (string, error) {
	signer, err := key(f.Key)
	if err != nil {
		return "", err
	}
	header, err := json.Marshal(map[string]any{"alg": "ES256", "kid": f.Kid, "typ": "JWT"})
	if err != nil {
		return "", err
	}
	claims, err := json.Marshal(map[string]any{
		"sub": td.IDString() + "/a", "aud": []string{audience}, "exp": now.Add(5 * time.Minute).Unix(), "jti": rand.Text(),
	})
	if err != nil {
		return "", err
	}
	return forge.Sign(signer, header, claims)
}
