// Package jwtcase is a corpus of JWT-SVIDs: what a validator has to accept, and what
// to refuse, by the JWT-SVID standard and RFC 7519. All are signed by the key that
// they name, unless the case is about that.
package jwtcase

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"merlon.dev/sdk/svid/forge"
)

// Audience is the one that every token is judged for.
const Audience = "conform"

// Case is one token and the verdict. It is read-only.
type Case struct {
	// ID is the requirement of the checklist that decides, a slash, and a name.
	ID     string
	Accept bool
	Token  string
	// Prudence: the standard leaves it open, and refusing is what a careful validator
	// does.
	Prudence bool
}

// All makes every case with the JWT key of ca. other is an authority of another trust
// domain, whose keys the validator does not know.
func All(ca, other *forge.Authority) []Case {
	m := &maker{ca: ca, now: time.Now().Unix()}
	m.sound()
	m.serialization()
	m.headers()
	m.claims()
	m.keys(other)
	return m.cases
}

type maker struct {
	ca    *forge.Authority
	now   int64
	cases []Case
}

func (m *maker) accept(id, token string) {
	m.cases = append(m.cases, Case{ID: id, Accept: true, Token: token})
}
func (m *maker) refuse(id, token string) { m.cases = append(m.cases, Case{ID: id, Token: token}) }
func (m *maker) wary(id, token string) {
	m.cases = append(m.cases, Case{ID: id, Token: token, Prudence: true})
}

// lifetime leaves time to run the cases.
const lifetime = 3600

// fields are sound claims.
func (m *maker) fields() forge.Fields {
	return m.ca.Claims("/a", forge.Fields{"aud": []string{Audience}, "exp": m.now + lifetime})
}

func (m *maker) head(changes forge.Fields) string {
	return m.ca.JWT(m.ca.Header(changes), m.fields())
}

func (m *maker) body(changes forge.Fields) string {
	claims := m.fields()
	for name, value := range changes {
		if value == nil {
			delete(claims, name)
			continue
		}
		claims[name] = value
	}
	return m.ca.JWT(m.ca.Header(nil), claims)
}

// raw signs these very claims.
func (m *maker) raw(claims string) string {
	return m.ca.Token(m.ca.JWTKey, fmt.Appendf(nil, `{"alg":"ES256","kid":%q,"typ":"JWT"}`, m.ca.KeyID), []byte(claims))
}

func (m *maker) good() string {
	return fmt.Sprintf(`"sub":%q,"aud":[%q],"exp":%d`, m.id("/a"), Audience, m.now+lifetime)
}

func (m *maker) sound() {
	m.accept("J5/a-workload", m.body(nil))
	m.accept("J13/aud-as-a-string", m.body(forge.Fields{"aud": Audience}))
	m.accept("J6/one-of-two", m.body(forge.Fields{"aud": []string{"other", Audience}}))
	m.accept("J4/no-typ", m.head(forge.Fields{"typ": nil}))
	m.accept("J4/jose", m.head(forge.Fields{"typ": "JOSE"}))
	m.accept("J9/no-iat-no-jti", m.body(forge.Fields{"iat": nil, "jti": nil}))
	m.accept("J9/other-claims", m.body(forge.Fields{"x": forge.Fields{"a": []any{1, true}}}))
	m.accept("ID5/every-character", m.body(forge.Fields{"sub": m.id("/AZ/az/09/.../-_./a")}))
}

func (m *maker) id(path string) string { return "spiffe://" + m.ca.TrustDomain.Name() + path }

func (m *maker) serialization() {
	sound := m.body(nil)
	parts := strings.Split(sound, ".")
	m.refuse("J1/json", fmt.Sprintf(`{"payload":%q,"protected":%q,"signature":%q}`, parts[1], parts[0], parts[2]))
	m.refuse("J1/five-parts", sound+".AA.AA")
	m.refuse("J1/no-signature", parts[0]+"."+parts[1]+".")
	m.refuse("J1/two-parts", parts[0]+"."+parts[1])
	m.refuse("J1/padding", sound+"==")
	m.refuse("J1/nested", m.raw(`"`+sound+`"`))
	m.refuse("ID11/rubbish", "v4.public.AAAA")
	m.refuse("ID10/signature-altered", parts[0]+"."+parts[1]+"."+flip(parts[2]))
	m.refuse("ID10/subject-altered", parts[0]+"."+strings.Split(m.body(forge.Fields{"sub": m.id("/b")}), ".")[1]+"."+parts[2])
}

func flip(part string) string {
	raw, err := base64.RawURLEncoding.DecodeString(part)
	if err != nil {
		panic("jwtcase: " + err.Error())
	}
	raw[0] ^= 1
	return base64.RawURLEncoding.EncodeToString(raw)
}

func (m *maker) headers() {
	m.wary("J2/jku", m.head(forge.Fields{"jku": "https://forge.invalid/keys"}))
	m.wary("J2/x5u", m.head(forge.Fields{"x5u": "https://forge.invalid/keys"}))
	m.refuse("J2/crit", m.head(forge.Fields{"crit": []string{"exp"}, "exp": 1}))
	for name, alg := range map[string]any{
		"none": "none", "none-in-other-case": "None", "eddsa": "EdDSA", "es256k": "ES256K", "ml-dsa-65": "ML-DSA-65", "missing": nil,
		"a-list": []string{"ES256"}, "lower-case": "es256", "of-another-kind-of-key": "RS256", "of-another-curve": "ES384",
	} {
		m.refuse("J3/"+name, m.head(forge.Fields{"alg": alg}))
	}
	m.refuse("J3/hs256-with-the-public-key", m.ca.HMACToken(m.ca.Header(forge.Fields{"alg": "HS256"}), m.fields()))
	for name, typ := range map[string]any{"wit": "wit+jwt", "at": "at+jwt", "lower-case": "jwt", "number": 1} {
		m.refuse("J4/"+name, m.head(forge.Fields{"typ": typ}))
	}
	m.refuse("ID11/a-wit-svid", m.ca.JWT(m.ca.Header(forge.Fields{"typ": "wit+jwt"}), m.ca.Claims("/a", forge.Fields{"aud": nil, "cnf": forge.Fields{"jwk": forge.Fields{"kty": "EC"}}})))
}

func (m *maker) claims() {
	for name, sub := range map[string]any{
		"none": nil, "empty": "", "a-number": 1, "https": "https://" + m.ca.TrustDomain.Name() + "/a", "no-path": m.id(""), "trailing-slash": m.id("/a/"),
	} {
		m.refuse("J5/sub-"+name, m.body(forge.Fields{"sub": sub}))
	}
	m.refuse("ID1/query", m.body(forge.Fields{"sub": m.id("/a?b")}))
	m.refuse("ID1/fragment", m.body(forge.Fields{"sub": m.id("/a#b")}))
	m.refuse("ID2/port", m.body(forge.Fields{"sub": "spiffe://" + m.ca.TrustDomain.Name() + ":1/a"}))
	m.refuse("ID2/user", m.body(forge.Fields{"sub": "spiffe://u@" + m.ca.TrustDomain.Name() + "/a"}))
	m.refuse("ID3/upper-case", m.body(forge.Fields{"sub": "spiffe://" + strings.ToUpper(m.ca.TrustDomain.Name()) + "/a"}))
	m.refuse("ID5/dot-dot", m.body(forge.Fields{"sub": m.id("/a/../b")}))
	m.refuse("ID5/percent-encoded", m.body(forge.Fields{"sub": m.id("/%61")}))
	for name, aud := range map[string]any{
		"none": nil, "empty": "", "empty-list": []string{}, "longer": Audience + "s", "shorter": Audience[1:], "other-case": strings.ToUpper(Audience),
		"a-number": 1, "nested": []any{[]string{Audience}},
	} {
		m.refuse("J6/aud-"+name, m.body(forge.Fields{"aud": aud}))
	}
	for name, exp := range map[string]any{
		"none": nil, "null": json.RawMessage("null"), "an-hour-past": m.now - 3600, "text": fmt.Sprint(m.now + lifetime), "beyond-any-number": json.RawMessage("1e400"), "negative": -1,
	} {
		m.refuse("J8/exp-"+name, m.body(forge.Fields{"exp": exp}))
	}
	m.refuse("J9/nbf-in-an-hour", m.body(forge.Fields{"nbf": m.now + 3600}))
	m.wary("J9/iat-in-an-hour", m.body(forge.Fields{"iat": m.now + 3600}))
	m.wary("J9/sub-twice", m.raw(`{`+m.good()+`,"sub":"`+m.id("/b")+`"}`))
	m.refuse("J9/bytes-behind", m.raw(`{`+m.good()+`}{}`))
}

func (m *maker) keys(other *forge.Authority) {
	m.refuse("J12/no-kid", m.head(forge.Fields{"kid": nil}))
	m.refuse("J12/unknown-kid", m.head(forge.Fields{"kid": "../" + m.ca.KeyID}))
	header := fmt.Appendf(nil, `{"alg":"ES256","kid":%q,"typ":"JWT"}`, m.ca.KeyID)
	m.refuse("J12/by-another-key", m.ca.Token(other.JWTKey, header, []byte(`{`+m.good()+`}`)))
	m.refuse("J12/by-the-x509-key", m.ca.Token(m.ca.Key, header, []byte(`{`+m.good()+`}`)))
	m.refuse("E19/of-another-trust-domain", m.body(forge.Fields{"sub": other.TrustDomain.IDString() + "/a"}))
}
