// Tokens that are taken, and every way in which one must not be.

package oidc

import (
	"crypto/elliptic"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"go.uber.org/goleak"

	"merlon.dev/ca/internal/role"
	"merlon.dev/integration/oidcprovider"
)

var noon = time.Date(2030, 1, 2, 12, 0, 0, 0, time.UTC)

const audience = "merlon-ca"

// provider is one whose issuer is configured.
type provider struct {
	*oidcprovider.Provider
	t *testing.T
}

func startProvider(t *testing.T) *provider {
	t.Helper()
	return &provider{oidcprovider.Start(t), t}
}

func (p *provider) issuer() Issuer {
	roots := x509.NewCertPool()
	roots.AddCert(p.Certificate())
	return Issuer{URL: p.URL, Audience: audience, Roots: roots, Rules: []Rule{
		{map[string]string{"sub": "ci"}, role.Role{Name: role.PolicyPublisher}},
		{map[string]string{"email": "ann@shop.test"}, role.Role{Name: role.Operator}},
		{map[string]string{"groups": "shop", "hd": "shop.test"}, role.Role{Name: role.Registrar, Prefix: "/ns/shop"}},
	}}
}

func (p *provider) verifier(others ...Issuer) *Verifier {
	return New(append(others, p.issuer()), slog.New(slog.NewTextHandler(p.t.Output(), nil)))
}

// token is a good one at noon, but for the change.
func (p *provider) token(change func(map[string]any)) string {
	claims := p.Claims(audience, "ci", noon)
	if change != nil {
		change(claims)
	}
	return p.Token(claims)
}

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestGoodTokensAndTheirRoles(t *testing.T) {
	p := startProvider(t)
	v := p.verifier()
	publisher, operator := role.Role{Name: role.PolicyPublisher}, role.Role{Name: role.Operator}
	registrar := role.Role{Name: role.Registrar, Prefix: "/ns/shop"}
	for name, test := range map[string]struct {
		change func(map[string]any)
		want   []role.Role
	}{
		"sub":               {nil, []role.Role{publisher}},
		"audience in list":  {func(c map[string]any) { c["aud"] = []string{audience} }, []role.Role{publisher}},
		"just expired":      {func(c map[string]any) { c["exp"] = noon.Add(-9 * time.Second).Unix() }, []role.Role{publisher}},
		"clock ahead":       {func(c map[string]any) { c["iat"], c["nbf"] = noon.Unix()+9, noon.Unix()+9 }, []role.Role{publisher}},
		"no iat":            {func(c map[string]any) { delete(c, "iat") }, []role.Role{publisher}},
		"fraction":          {func(c map[string]any) { c["exp"] = float64(noon.Unix()) + 60.5 }, []role.Role{publisher}},
		"other sub":         {func(c map[string]any) { c["sub"] = "ci2" }, nil},
		"sub in capitals":   {func(c map[string]any) { c["sub"] = "CI" }, nil},
		"email":             {func(c map[string]any) { c["email"], c["email_verified"] = "ann@shop.test", true }, []role.Role{publisher, operator}},
		"email unverified":  {func(c map[string]any) { c["email"], c["email_verified"] = "ann@shop.test", false }, []role.Role{publisher}},
		"email, not said":   {func(c map[string]any) { c["email"] = "ann@shop.test" }, []role.Role{publisher}},
		"verified in quote": {func(c map[string]any) { c["email"], c["email_verified"] = "ann@shop.test", "true" }, []role.Role{publisher}},
		"group":             {func(c map[string]any) { c["groups"], c["hd"] = []string{"x", "shop"}, "shop.test" }, []role.Role{publisher, registrar}},
		"group of others":   {func(c map[string]any) { c["groups"], c["hd"] = []string{"shop"}, "evil.test" }, []role.Role{publisher}},
		"group elsewhere":   {func(c map[string]any) { c["groups"] = []string{"shop"} }, []role.Role{publisher}},
		"odd claims": {func(c map[string]any) {
			c["groups"], c["hd"], c["email"] = map[string]any{"shop": 1}, 7, []any{[]any{}}
		}, []role.Role{publisher}},
	} {
		id, err := v.Verify(t.Context(), p.token(test.change), noon)
		if err != nil || !slices.Equal(id.Roles, test.want) {
			t.Errorf("%s: roles %v, %v; want %v", name, id.Roles, err, test.want)
		}
	}
	payload, err := json.Marshal(p.Claims(audience, "ci", noon))
	if err != nil {
		t.Fatal(err)
	}
	id, err := v.Verify(t.Context(), oidcprovider.Sign(t, jose.RS256, p.RSA, "rsa-1", payload, map[jose.HeaderKey]any{"x5t": "abc"}), noon)
	if err != nil || id.Name() != p.URL+"#ci" || !id.Expiry.Equal(noon.Add(time.Hour)) {
		t.Errorf("RS256: %+v, %v", id, err)
	}
}

// Every attack on a token that is good but for one thing.
func TestBadTokensAreRefused(t *testing.T) {
	p, other := startProvider(t), startProvider(t)
	v := p.verifier(other.issuer())
	good, err := json.Marshal(p.Claims(audience, "ci", noon))
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(p.RSA.Public())
	if err != nil {
		t.Fatal(err)
	}
	changed := func(name string, value any) string {
		return p.token(func(c map[string]any) {
			if c[name] = value; value == nil {
				delete(c, name)
			}
		})
	}
	raw := func(from, to string) string {
		return oidcprovider.Sign(t, jose.ES256, p.EC, "ec-1", []byte(strings.Replace(string(good), from, to, 1)), nil)
	}
	header := func(name jose.HeaderKey, value any) string {
		return oidcprovider.Sign(t, jose.ES256, p.EC, "ec-1", good, map[jose.HeaderKey]any{name: value})
	}
	parts := strings.Split(p.token(nil), ".")
	none := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none","kid":"ec-1"}`))
	stranger := oidcprovider.ECKey(t, elliptic.P256())
	for name, test := range map[string]struct{ token, want string }{
		"empty":                      {"", "not a JWT"},
		"noise":                      {"a.b.c", "not a JWT"},
		"alg none":                   {none + "." + parts[1] + ".", "not a JWT"},
		"alg none, signature kept":   {none + "." + parts[1] + "." + parts[2], "not a JWT"},
		"HS256 with the public key":  {oidcprovider.Sign(t, jose.HS256, der, "rsa-1", good, nil), "not a JWT"},
		"HS256 with the kid":         {oidcprovider.Sign(t, jose.HS256, []byte("ec-1ec-1ec-1ec-1ec-1ec-1ec-1ec-1"), "ec-1", good, nil), "not a JWT"},
		"PS256":                      {oidcprovider.Sign(t, jose.PS256, p.RSA, "rsa-1", good, nil), "not a JWT"},
		"ES384":                      {oidcprovider.Sign(t, jose.ES384, oidcprovider.ECKey(t, elliptic.P384()), "ec-1", good, nil), "not a JWT"},
		"RS256 by the EC key's kid":  {oidcprovider.Sign(t, jose.RS256, p.RSA, "ec-1", good, nil), "not what its key is for"},
		"ES256 by the RSA key's kid": {oidcprovider.Sign(t, jose.ES256, p.EC, "rsa-1", good, nil), "not what its key is for"},
		"signed by a stranger":       {oidcprovider.Sign(t, jose.ES256, stranger, "ec-1", good, nil), "not by the key"},
		"other claims":               {parts[0] + "." + base64.RawURLEncoding.EncodeToString([]byte(strings.Replace(string(good), `"ci"`, `"root"`, 1))) + "." + parts[2], "not by the key"},
		"no signature":               {parts[0] + "." + parts[1] + ".", "not by the key"},
		"two signatures":             {p.token(nil) + "." + parts[2], "not a JWT"},
		"JSON serialization":         {`{"payload":"` + parts[1] + `","protected":"` + parts[0] + `","signature":"` + parts[2] + `"}`, "not a JWT"},
		"no kid":                     {oidcprovider.Sign(t, jose.ES256, p.EC, "", good, nil), "no kid"},
		"long kid":                   {oidcprovider.Sign(t, jose.ES256, p.EC, strings.Repeat("k", 300), good, nil), "no kid"},
		"unknown kid":                {oidcprovider.Sign(t, jose.ES256, p.EC, "ec-2", good, nil), "no key of that kid"},
		"kid of another issuer":      {oidcprovider.Sign(t, jose.ES256, other.EC, "ec-1", good, nil), "not by the key"},
		"jku":                        {header("jku", other.URL+"/keys"), "jku"},
		"x5u":                        {header("x5u", other.URL), "x5u"},
		"key in the header":          {header("jwk", jose.JSONWebKey{Key: p.EC.Public(), KeyID: "ec-1"}), "key of its own"},
		"crit":                       {header("crit", []string{"exp"}), "header has crit"},
		"b64":                        {header("b64", false), "header has b64"},
		"logout token":               {header("typ", "logout+jwt"), "typ"},
		"typ is a list":              {header("typ", []string{"JWT"}), "typ"},
		"other issuer":               {changed("iss", "https://evil.test"), "issuer is not configured"},
		"issuer with slash":          {changed("iss", p.URL+"/"), "issuer is not configured"},
		"no issuer":                  {changed("iss", nil), "issuer is not configured"},
		"issuer is a list":           {changed("iss", []string{p.URL}), "issuer is not configured"},
		"other audience":             {changed("aud", "other"), "not meant for"},
		"longer audience":            {changed("aud", audience+"2"), "not meant for"},
		"two audiences":              {changed("aud", []string{audience, "other"}), "not meant for"},
		"no audience":                {changed("aud", nil), "not meant for"},
		"empty audience":             {changed("aud", []string{}), "not meant for"},
		"audience is an object":      {changed("aud", map[string]any{audience: true}), "not meant for"},
		"audience in a list":         {changed("aud", []any{[]string{audience}}), "not meant for"},
		"expired":                    {changed("exp", noon.Add(-10*time.Second).Unix()), "expired"},
		"no exp":                     {changed("exp", nil), "no exp"},
		"exp is text":                {changed("exp", "4102444800"), "not a time"},
		"exp is negative":            {changed("exp", -1), "not a time"},
		"exp is huge":                {changed("exp", 1e300), "not a time"},
		"lives for a week":           {changed("exp", noon.Add(7*24*time.Hour).Unix()), "lives for more"},
		"not yet":                    {changed("nbf", noon.Add(11*time.Second).Unix()), "nbf lies in the future"},
		"from the future":            {changed("iat", noon.Add(time.Minute).Unix()), "iat lies in the future"},
		"no sub":                     {changed("sub", nil), "sub is not"},
		"sub is a number":            {changed("sub", 7), "sub is not"},
		"long sub":                   {changed("sub", strings.Repeat("s", 256)), "sub is not"},
		"sub of two lines":           {changed("sub", "ci\n{\"type\":\"admin\"}"), "sub is not"},
		"sub for terminals":          {changed("sub", "ci\x1b[2J"), "sub is not"},
		"sub with U+2028":            {changed("sub", "ci\u2028"), "sub is not"},
		"sub twice":                  {raw(`"sub":"ci"`, `"sub":"x","sub":"ci"`), "each name is there once"},
		"exp twice":                  {raw(`"exp":`, `"exp":4102444800,"exp":`), "each name is there once"},
		"group twice in an object":   {raw(`"sub":"ci"`, `"sub":"ci","x":{"a":1,"a":2}`), "each name is there once"},
		"SUB":                        {raw(`"sub"`, `"SUB"`), "sub is not"},
		"claims are a list":          {oidcprovider.Sign(t, jose.ES256, p.EC, "ec-1", []byte(`["ci"]`), nil), "not one JSON object"},
		"claims and more":            {oidcprovider.Sign(t, jose.ES256, p.EC, "ec-1", append(slices.Clone(good), "{}"...), nil), "not one JSON object"},
		"too large":                  {changed("x", strings.Repeat("x", maxTokenBytes)), "more than"},
	} {
		id, err := v.Verify(t.Context(), test.token, noon)
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %+v, %v; want an error with %q", name, id, err, test.want)
		}
		if id.Roles != nil || errors.Is(err, ErrUnavailable) {
			t.Errorf("%s: %+v, %v; want a refusal for good and no roles", name, id, err)
		}
	}
}

func TestIssuersThatAreRefused(t *testing.T) {
	good := func() Issuer {
		return Issuer{URL: "https://login.shop.test/realms/shop", Audience: "merlon", Rules: []Rule{{map[string]string{"sub": "ci"}, role.Role{Name: role.Viewer}}}}
	}
	if err := good().Validate(); err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(*Issuer){
		`issuer: ""`:         func(i *Issuer) { i.URL = "" },
		"issuer: \"http:":    func(i *Issuer) { i.URL = "http://login.shop.test" },
		"issuer: \"https://": func(i *Issuer) { i.URL = "https://u:p@login.shop.test" },
		"more than host":     func(i *Issuer) { i.URL = "https://login.shop.test?x=1" },
		"keys_url":           func(i *Issuer) { i.KeysURL = "http://169.254.169.254/keys" },
		"audience":           func(i *Issuer) { i.Audience = "" },
		"roles: are":         func(i *Issuer) { i.Rules = nil },
		"claims: are":        func(i *Issuer) { i.Rules[0].Claims = nil },
		"claims: aud":        func(i *Issuer) { i.Rules[0].Claims["aud"] = "x" },
		"claims: \"hd\"":     func(i *Issuer) { i.Rules[0].Claims["hd"] = "" },
		"role: ":             func(i *Issuer) { i.Rules[0].Role.Name = "admin" },
		"prefix: ":           func(i *Issuer) { i.Rules[0].Role.Name = role.Registrar },
	} {
		i := good()
		change(&i)
		if err := i.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Validate() = %v; want %s", err, want)
		}
	}
	if (Rule{}).matches(map[string]any{"sub": "ci"}) {
		t.Error("a rule without claims matches")
	}
}

func FuzzVerify(f *testing.F) {
	f.Add("eyJhbGciOiJFUzI1NiIsImtpZCI6ImVjLTEifQ.e30.AA")
	f.Add("eyJhbGciOiJFUzI1NiIsImtpZCI6ImVjLTEiLCJ0eXAiOltdfQ.e30.AA")
	v := New([]Issuer{{URL: "https://127.0.0.1:1", Audience: audience}}, nil)
	f.Fuzz(func(t *testing.T, token string) {
		if id, err := v.Verify(t.Context(), token, noon); err == nil {
			t.Errorf("Verify(%q) = %+v", token, id)
		}
	})
}

// Whatever an issuer signs: no claims make judge panic, and without its own
// issuer, audience and end nothing is taken.
func FuzzJudge(f *testing.F) {
	f.Add([]byte(`{"iss":"https://a.test","aud":["merlon-ca"],"sub":"ci","exp":1893589200,"groups":[["shop"]]}`))
	f.Add([]byte(`{"iss":{},"aud":[[]],"sub":null,"exp":"1","nbf":-1,"email":[]}`))
	i := Issuer{URL: "https://a.test", Audience: audience, Rules: []Rule{{map[string]string{"groups": "shop", "email": "x"}, role.Role{Name: role.Operator}}}}
	f.Fuzz(func(t *testing.T, text []byte) {
		var claims map[string]any
		if json.Unmarshal(text, &claims) != nil {
			return
		}
		id, err := i.judge(claims, noon)
		if err != nil {
			return
		}
		if claims["iss"] != i.URL || id.Subject != claims["sub"] || id.Expiry.Before(noon.Add(-leeway)) || len(id.Roles) > 0 && claims["email_verified"] != true {
			t.Errorf("judge(%s) = %+v", text, id)
		}
	})
}
