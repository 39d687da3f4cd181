// When a provider is asked for keys, what it can make the CA do, and for how
// long its keys count (SECURITY.md T40).

package oidc

import (
	"bytes"
	"crypto/elliptic"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	josejson "github.com/go-jose/go-jose/v4/json"

	"merlon.dev/integration/oidcprovider"
)

// at is a token that is good at now.
func (p *provider) at(now time.Time) string {
	return p.token(func(c map[string]any) { c["iat"], c["exp"] = now.Unix(), now.Add(time.Minute).Unix() })
}

func TestKeysAreFetchedOnceAndKept(t *testing.T) {
	p := startProvider(t)
	v := p.verifier()
	var calls sync.WaitGroup
	for range 20 {
		calls.Go(func() {
			if _, err := v.Verify(t.Context(), p.at(noon), noon); err != nil {
				t.Error(err)
			}
		})
	}
	calls.Wait()
	if n := p.Asked("/keys"); n != 1 {
		t.Errorf("20 tokens at once asked for keys %d times; want once", n)
	}
	soon := noon.Add(freshFor)
	if _, err := v.Verify(t.Context(), p.at(soon), soon); err != nil || p.Asked("/keys") != 1 {
		t.Errorf("within %s: %v, asked %d times; want the kept keys", freshFor, err, p.Asked("/keys"))
	}
	later := soon.Add(time.Second)
	if _, err := v.Verify(t.Context(), p.at(later), later); err != nil || p.Asked("/keys") != 2 {
		t.Errorf("after %s: %v, asked %d times; want a second look", freshFor, err, p.Asked("/keys"))
	}
}

// A key that the provider began to use is found; tokens with made-up kids do not
// make the CA ask more than every now and then.
func TestUnknownKidAsksRarely(t *testing.T) {
	p := startProvider(t)
	v := p.verifier()
	if _, err := v.Verify(t.Context(), p.at(noon), noon); err != nil {
		t.Fatal(err)
	}
	fresh := oidcprovider.ECKey(t, elliptic.P256())
	now := noon.Add(askEvery)
	payload, err := json.Marshal(p.Claims(audience, "ci", noon))
	if err != nil {
		t.Fatal(err)
	}
	p.Change(func(a *oidcprovider.Answers) {
		a.Keys = append(slices.Clone(a.Keys), jose.JSONWebKey{Key: fresh.Public(), KeyID: "ec-2"})
	})
	if _, err := v.Verify(t.Context(), oidcprovider.Sign(t, jose.ES256, fresh, "ec-2", payload, nil), now); err != nil {
		t.Errorf("a key that is new: %v", err)
	}
	asked := p.Asked("/keys")
	for i := range 100 {
		if _, err := v.Verify(t.Context(), oidcprovider.Sign(t, jose.ES256, fresh, fmt.Sprint("made-up-", i), payload, nil), now.Add(time.Second)); err == nil {
			t.Fatal("a made-up kid was taken")
		}
	}
	if n := p.Asked("/keys"); n != asked {
		t.Errorf("100 made-up kids asked for keys %d times", n-asked)
	}
}

// The last good keys count while the provider is away, and not for ever.
func TestLastGoodKeysCountForADay(t *testing.T) {
	p := startProvider(t)
	v := p.verifier()
	if _, err := v.Verify(t.Context(), p.at(noon), noon); err != nil {
		t.Fatal(err)
	}
	broken := func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", http.StatusInternalServerError) }
	p.Change(func(a *oidcprovider.Answers) { a.Instead["/keys"] = broken })
	for _, age := range []time.Duration{freshFor + time.Second, keptFor} {
		if _, err := v.Verify(t.Context(), p.at(noon.Add(age)), noon.Add(age)); err != nil {
			t.Errorf("%s after the keys came: %v", age, err)
		}
	}
	late := noon.Add(keptFor + time.Minute)
	if _, err := v.Verify(t.Context(), p.at(late), late); !errors.Is(err, ErrUnavailable) {
		t.Errorf("a day after the keys came: %v; want ErrUnavailable", err)
	}
	p.Change(func(a *oidcprovider.Answers) { delete(a.Instead, "/keys") })
	if _, err := v.Verify(t.Context(), p.at(late), late.Add(askEvery)); err != nil {
		t.Errorf("once the provider is back: %v", err)
	}
}

// What a provider can answer, and what it must not bring about.
func TestProvidersThatAreNotBelieved(t *testing.T) {
	elsewhere := startProvider(t)
	answer := func(body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(body)) }
	}
	redirect := func(to string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, to, http.StatusFound) }
	}
	for name, test := range map[string]func(p *provider, a *oidcprovider.Answers){
		"keys on another host": func(p *provider, a *oidcprovider.Answers) { a.Document["jwks_uri"] = elsewhere.URL + "/keys" },
		"keys on another name": func(p *provider, a *oidcprovider.Answers) {
			a.Document["jwks_uri"] = strings.Replace(p.URL, "127.0.0.1", "localhost", 1) + "/keys"
		},
		"keys by http": func(p *provider, a *oidcprovider.Answers) {
			a.Document["jwks_uri"] = strings.Replace(p.URL, "https", "http", 1) + "/keys"
		},
		"keys in a file":      func(p *provider, a *oidcprovider.Answers) { a.Document["jwks_uri"] = "file:///etc/passwd" },
		"no keys":             func(p *provider, a *oidcprovider.Answers) { delete(a.Document, "jwks_uri") },
		"document of another": func(p *provider, a *oidcprovider.Answers) { a.Document["issuer"] = elsewhere.URL },
		"document redirects": func(p *provider, a *oidcprovider.Answers) {
			a.Instead[oidcprovider.DiscoveryPath] = redirect(elsewhere.URL + oidcprovider.DiscoveryPath)
		},
		"keys redirect":         func(p *provider, a *oidcprovider.Answers) { a.Instead["/keys"] = redirect(elsewhere.URL + "/keys") },
		"keys redirect at home": func(p *provider, a *oidcprovider.Answers) { a.Instead["/keys"] = redirect(p.URL + "/keys2") },
		"keys redirect to a cloud": func(p *provider, a *oidcprovider.Answers) {
			a.Instead["/keys"] = redirect("http://169.254.169.254/latest")
		},
		"endless keys": func(p *provider, a *oidcprovider.Answers) {
			a.Instead["/keys"] = answer(`{"keys":["` + strings.Repeat("x", maxAnswerBytes) + `"]}`)
		},
		"endless document": func(p *provider, a *oidcprovider.Answers) {
			a.Instead[oidcprovider.DiscoveryPath] = answer(strings.Repeat(" ", maxAnswerBytes+1))
		},
		"good keys, endless": func(_ *provider, a *oidcprovider.Answers) {
			keys := jose.JSONWebKeySet{Keys: a.Keys}
			a.Instead["/keys"] = func(w http.ResponseWriter, _ *http.Request) {
				_ = json.NewEncoder(w).Encode(keys)
				_, _ = w.Write(bytes.Repeat([]byte(" "), maxAnswerBytes))
			}
		},
		"many keys": func(p *provider, a *oidcprovider.Answers) {
			a.Instead["/keys"] = answer(`{"keys":[` + strings.Repeat("{},", maxKeys) + `{}]}`)
		},
		"keys twice": func(p *provider, a *oidcprovider.Answers) { a.Instead["/keys"] = answer(`{"keys":[],"keys":[]}`) },
		"no JSON":    func(p *provider, a *oidcprovider.Answers) { a.Instead["/keys"] = answer("<html>") },
		"one kid, two keys": func(p *provider, a *oidcprovider.Answers) {
			a.Keys = append(slices.Clone(a.Keys), jose.JSONWebKey{Key: elsewhere.EC.Public(), KeyID: "ec-1"})
		},
		"a key for encryption": func(p *provider, a *oidcprovider.Answers) {
			a.Keys = []jose.JSONWebKey{{Key: p.EC.Public(), KeyID: "ec-1", Use: "enc"}}
		},
		"a key for ES384": func(p *provider, a *oidcprovider.Answers) {
			a.Keys = []jose.JSONWebKey{{Key: p.EC.Public(), KeyID: "ec-1", Algorithm: "ES384"}}
		},
		"a symmetric key": func(p *provider, a *oidcprovider.Answers) {
			a.Keys = []jose.JSONWebKey{{Key: []byte(strings.Repeat("k", 32)), KeyID: "ec-1"}}
		},
		"no kid": func(p *provider, a *oidcprovider.Answers) { a.Keys = []jose.JSONWebKey{{Key: p.EC.Public()}} },
	} {
		p := startProvider(t)
		p.Change(func(a *oidcprovider.Answers) { test(p, a) })
		if _, err := p.verifier().Verify(t.Context(), p.token(nil), noon); !errors.Is(err, ErrUnavailable) {
			t.Errorf("%s: %v; want ErrUnavailable", name, err)
		}
	}
	if n := elsewhere.Asked("/keys") + elsewhere.Asked(oidcprovider.DiscoveryPath); n != 0 {
		t.Errorf("another host was asked %d times", n)
	}
}

// A provider that answers slowly holds a call up for a while and no more.
func TestSlowProviderIsGivenUp(t *testing.T) {
	p := startProvider(t)
	hang := make(chan struct{})
	p.Change(func(a *oidcprovider.Answers) {
		a.Instead["/keys"] = func(_ http.ResponseWriter, r *http.Request) {
			select {
			case <-hang:
			case <-r.Context().Done():
			}
		}
	})
	defer close(hang)
	v := p.verifier()
	v.issuers[p.URL].keys.client.Timeout = 100 * time.Millisecond
	if _, err := v.Verify(t.Context(), p.token(nil), noon); !errors.Is(err, ErrUnavailable) {
		t.Errorf("%v; want ErrUnavailable", err)
	}
}

// Where the keys are can be configured, for issuers that keep them elsewhere.
func TestConfiguredKeysURLIsAskedInstead(t *testing.T) {
	p, elsewhere := startProvider(t), startProvider(t)
	elsewhere.Change(func(a *oidcprovider.Answers) {
		a.Keys = []jose.JSONWebKey{{Key: p.EC.Public(), KeyID: oidcprovider.ECKeyID}}
	})
	i := p.issuer()
	i.KeysURL = elsewhere.URL + "/keys"
	i.Roots.AddCert(elsewhere.Certificate())
	if _, err := New([]Issuer{i}, slog.New(slog.DiscardHandler)).Verify(t.Context(), p.token(nil), noon); err != nil {
		t.Fatal(err)
	}
	if p.Asked(oidcprovider.DiscoveryPath) != 0 || elsewhere.Asked("/keys") != 1 {
		t.Error("the issuer was asked, or the configured URL was not")
	}
}

// A certificate that does not chain to the issuer's roots ends it.
func TestProviderIsAuthenticated(t *testing.T) {
	p := startProvider(t)
	i := p.issuer()
	i.Roots = nil // the system's, which know nothing of a test's
	if _, err := New([]Issuer{i}, slog.New(slog.DiscardHandler)).Verify(t.Context(), p.token(nil), noon); !errors.Is(err, ErrUnavailable) || p.Asked(oidcprovider.DiscoveryPath) != 0 {
		t.Errorf("%v; want ErrUnavailable, before anything is asked", err)
	}
}

func TestLinkLocalAddressesAreNotDialled(t *testing.T) {
	for address, want := range map[string]bool{
		"169.254.169.254:443": false, "[fe80::1]:443": false, "[::ffff:169.254.169.254]:443": false, "0.0.0.0:443": false, "[::]:443": false, "224.0.0.1:443": false,
		"127.0.0.1:443": true, "10.0.0.1:443": true, "[2001:db8::1]:443": true, "noise": false,
	} {
		if err := refuseLinkLocal("tcp", address, nil); (err == nil) != want {
			t.Errorf("%s: %v; want dialled = %t", address, err, want)
		}
	}
}

func FuzzKeys(f *testing.F) {
	f.Add([]byte(`[{"kty":"EC","crv":"P-256","kid":"a","x":"AA","y":"AA"}]`))
	f.Add([]byte(`[{"kty":"RSA","kid":"a","n":"AQAB","e":"AQAB"},{},null,7]`))
	f.Fuzz(func(t *testing.T, text []byte) {
		var raw []json.RawMessage
		if json.Unmarshal(text, &raw) != nil {
			return
		}
		own := make([]josejson.RawMessage, len(raw))
		for i := range raw {
			own[i] = josejson.RawMessage(bytes.Clone(raw[i]))
		}
		keys, err := usable(own)
		for kid, key := range keys {
			if kid == "" || algorithmOf(key) == "" || err != nil {
				t.Errorf("usable(%s) = %v, %v", text, keys, err)
			}
		}
	})
}
