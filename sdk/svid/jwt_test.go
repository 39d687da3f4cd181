// Each MUST of the JWT-SVID standard for a validator, by a forged token that
// breaks it, and what go-spiffe v2.9.0 alone makes of it.

package svid_test

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

func TestForgedTokensAreRefused(t *testing.T) {
	ca := forge.New(t, "example.org")
	head := func(changes forge.Fields) string { return ca.JWT(ca.Header(changes), ca.Claims("/a", nil)) }
	body := func(changes forge.Fields) string { return ca.JWT(ca.Header(nil), ca.Claims("/a", changes)) }
	sound := body(nil)
	parts := strings.Split(sound, ".")
	jwsJSON := fmt.Sprintf(`{"payload":%q,"protected":%q,"signature":%q}`, parts[1], parts[0], parts[2])
	now := time.Now().Unix()
	rawClaims := func(text string) string {
		return ca.Token(ca.JWTKey, fmt.Appendf(nil, `{"alg":"ES256","kid":%q,"typ":"JWT"}`, ca.KeyID), []byte(text))
	}
	good := fmt.Sprintf(`"sub":"spiffe://example.org/a","aud":["aud"],"exp":%d`, now+60)
	other := forge.New(t, "example.org")
	tests := map[string]struct {
		token    string
		rule     string
		goSPIFFE bool // go-spiffe alone accepts it
	}{
		"J1 JSON serialization":         {jwsJSON, "J1", false},
		"J1 five parts, a JWE":          {sound + ".AA.AA", "J1", false},
		"J1 no signature":               {parts[0] + "." + parts[1] + ".", "J1", false},
		"J1 two parts":                  {parts[0] + "." + parts[1], "J1", false},
		"J1 padding":                    {sound + "==", "J1", false},
		"J1 line end":                   {sound + "\n", "J1", true},
		"J1 line end within":            {parts[0] + ".\n" + parts[1] + "." + parts[2], "J1", true},
		"J1 space":                      {" " + sound, "J1", false},
		"J1 nested token":               {rawClaims(`"` + sound + `"`), "J9", false},
		"J1 empty":                      {"", "J1", false},
		"J1 header is no object":        {ca.Token(ca.JWTKey, []byte(`[]`), []byte(`{`+good+`}`)), "J1", false},
		"J1 alg twice":                  {ca.Token(ca.JWTKey, fmt.Appendf(nil, `{"alg":"ES256","alg":"ES256","kid":%q}`, ca.KeyID), []byte(`{`+good+`}`)), "J1", false},
		"J2 jku":                        {head(forge.Fields{"jku": "https://evil.org/keys"}), "J2", true},
		"J2 x5u":                        {head(forge.Fields{"x5u": "https://evil.org/keys"}), "J2", true},
		"J2 jwk":                        {head(forge.Fields{"jwk": forge.Fields{"kty": "oct", "k": "AA"}}), "J2", false},
		"J2 crit":                       {head(forge.Fields{"crit": []string{"exp"}, "exp": 1}), "J2", false},
		"J2 b64":                        {head(forge.Fields{"b64": false}), "J2", false},
		"J2 cty":                        {head(forge.Fields{"cty": "JWT"}), "J2", true},
		"J2 Alg in other case":          {head(forge.Fields{"Alg": "none"}), "J2", true},
		"J3 none":                       {head(forge.Fields{"alg": "none"}), "J3", false},
		"J3 none, before any key":       {head(forge.Fields{"alg": "none", "kid": "unknown"}), "J3", false},
		"J1 bits behind the end":        {sound[:len(sound)-1] + loose(sound[len(sound)-1]), "J1", true},
		"J3 None":                       {head(forge.Fields{"alg": "None"}), "J3", false},
		"J3 HS256 with public key":      {ca.HMACToken(ca.Header(forge.Fields{"alg": "HS256"}), ca.Claims("/a", nil)), "J3", false},
		"J3 EdDSA":                      {head(forge.Fields{"alg": "EdDSA"}), "J3", false},
		"J3 ES256K":                     {head(forge.Fields{"alg": "ES256K"}), "J3", false},
		"J3 ML-DSA-65":                  {head(forge.Fields{"alg": "ML-DSA-65"}), "J3", false},
		"J3 missing":                    {head(forge.Fields{"alg": nil}), "J3", false},
		"J3 array":                      {head(forge.Fields{"alg": []string{"ES256"}}), "J3", false},
		"J3 lower case":                 {head(forge.Fields{"alg": "es256"}), "J3", false},
		"J3 RS256 with an EC key":       {head(forge.Fields{"alg": "RS256"}), "J3", false},
		"J3 ES384 with a P-256 key":     {head(forge.Fields{"alg": "ES384"}), "J3", false},
		"J4 wit+jwt":                    {head(forge.Fields{"typ": "wit+jwt"}), "J4", false},
		"J4 at+jwt":                     {head(forge.Fields{"typ": "at+jwt"}), "J4", false},
		"J4 jwt":                        {head(forge.Fields{"typ": "jwt"}), "J4", false},
		"J4 number":                     {head(forge.Fields{"typ": 1}), "J4", false},
		"J4 null":                       {head(forge.Fields{"typ": json.RawMessage("null")}), "J4", true},
		"J5 no sub":                     {body(forge.Fields{"sub": nil}), "J5", false},
		"J5 empty sub":                  {body(forge.Fields{"sub": ""}), "J5", false},
		"J5 sub is a number":            {body(forge.Fields{"sub": 1}), "J5", false},
		"J5 sub is no SPIFFE ID":        {body(forge.Fields{"sub": "https://example.org/a"}), "J5", false},
		"J5 root path":                  {body(forge.Fields{"sub": "spiffe://example.org"}), "J5", true},
		"J5 trailing slash":             {body(forge.Fields{"sub": "spiffe://example.org/a/"}), "J5", false},
		"J6 no aud":                     {body(forge.Fields{"aud": nil}), "J6", false},
		"J6 empty string":               {body(forge.Fields{"aud": ""}), "J6", false},
		"J6 empty array":                {body(forge.Fields{"aud": []string{}}), "J6", false},
		"J6 empty element":              {body(forge.Fields{"aud": []string{"aud", ""}}), "J6", true},
		"J6 longer":                     {body(forge.Fields{"aud": "audience"}), "J6", false},
		"J6 prefix":                     {body(forge.Fields{"aud": "au"}), "J6", false},
		"J6 other case":                 {body(forge.Fields{"aud": "AUD"}), "J6", false},
		"J6 number":                     {body(forge.Fields{"aud": 1}), "J6", false},
		"J6 number beside":              {body(forge.Fields{"aud": []any{"aud", 1}}), "J6", false},
		"J6 nested":                     {body(forge.Fields{"aud": []any{[]string{"aud"}}}), "J6", false},
		"J8 no exp":                     {body(forge.Fields{"exp": nil}), "J8", false},
		"J8 exp null":                   {body(forge.Fields{"exp": json.RawMessage("null")}), "J8", false},
		"J8 50 s past":                  {body(forge.Fields{"exp": now - 50}), "J8", true},
		"J8 an hour past":               {body(forge.Fields{"exp": now - 3600}), "J8", false},
		"J8 string":                     {body(forge.Fields{"exp": fmt.Sprint(now + 60)}), "J8", false},
		"J8 fraction":                   {body(forge.Fields{"exp": json.RawMessage(fmt.Sprint(now+60) + ".5")}), "J8", true},
		"J8 exponent":                   {body(forge.Fields{"exp": json.RawMessage("1e10")}), "J8", true},
		"J8 beyond any number":          {body(forge.Fields{"exp": json.RawMessage("1e400")}), "J8", false},
		"J8 beyond any calendar":        {body(forge.Fields{"exp": json.RawMessage("253402300800")}), "J8", true},
		"J8 negative":                   {body(forge.Fields{"exp": -1}), "J8", false},
		"J9 nbf in the future":          {body(forge.Fields{"nbf": now + 30}), "J9", true},
		"J9 nbf is a string":            {body(forge.Fields{"nbf": "0"}), "J9", false},
		"J9 iat in the future":          {body(forge.Fields{"iat": now + 30}), "J9", true},
		"J9 sub twice":                  {rawClaims(`{` + good + `,"sub":"spiffe://example.org/b"}`), "J9", false},
		"J9 sub twice, escaped":         {rawClaims(`{` + good + `,"\u0073ub":"spiffe://example.org/b"}`), "J9", false},
		"J9 twice further down":         {rawClaims(`{` + good + `,"x":{"a":1,"a":2}}`), "J9", false},
		"J9 bytes after":                {rawClaims(`{` + good + `}{}`), "J9", false},
		"J9 not UTF-8":                  {rawClaims("{" + good + ",\"x\":\"\xff\"}"), "J9", true},
		"J9 nested too deep":            {rawClaims(`{` + good + `,"x":` + strings.Repeat("[", 40) + strings.Repeat("]", 40) + `}`), "J9", true},
		"J9 number too large":           {rawClaims(`{` + good + `,"x":1e400}`), "J9", false},
		"J11 no kid":                    {head(forge.Fields{"kid": nil}), "J11", false},
		"J11 kid is a number":           {head(forge.Fields{"kid": 1}), "J11", false},
		"J12 unknown kid":               {head(forge.Fields{"kid": "../" + ca.KeyID}), "J12", false},
		"J12 kid in other case":         {head(forge.Fields{"kid": strings.ToUpper(ca.KeyID) + "A"}), "J12", false},
		"J12 key of another":            {ca.Token(other.JWTKey, fmt.Appendf(nil, `{"alg":"ES256","kid":%q}`, ca.KeyID), []byte(`{`+good+`}`)), "J12", false},
		"J12 the X.509 key":             {ca.Token(ca.Key, fmt.Appendf(nil, `{"alg":"ES256","kid":%q}`, ca.KeyID), []byte(`{`+good+`}`)), "J12", false},
		"J12 other trust domain":        {body(forge.Fields{"sub": "spiffe://other.org/a"}), "J12", false},
		"J12 signature altered":         {parts[0] + "." + parts[1] + "." + flip(parts[2]), "J12", false},
		"ID6 2049 bytes":                {body(forge.Fields{"sub": "spiffe://example.org/" + strings.Repeat("a", 2049-len("spiffe://example.org/"))}), "ID6", true},
		"ID7 trust domain of 256 bytes": {body(forge.Fields{"sub": "spiffe://" + strings.Repeat("a", 256) + "/a"}), "ID7", false},
		"CAP too large":                 {body(forge.Fields{"x": strings.Repeat("a", svid.MaxJWTBytes)}), "CAP", true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := svid.VerifyJWT(tt.token, ca.Bundle(), []string{"aud"}, time.Now())
			checkRule(t, err, tt.rule)
			if _, err := jwtsvid.ParseAndValidate(tt.token, ca.Bundle(), []string{"aud"}); (err == nil) != tt.goSPIFFE {
				t.Errorf("go-spiffe alone: %v; want accepted = %t", err, tt.goSPIFFE)
			}
		})
	}
}

// loose gives the base64url digit that differs in a bit which no byte uses. The 64
// bytes of a signature leave four such bits in the last digit.
func loose(digit byte) string {
	const digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	return string(digits[strings.IndexByte(digits, digit)^1])
}

func flip(part string) string {
	raw, _ := base64.RawURLEncoding.DecodeString(part)
	raw[0] ^= 1
	return base64.RawURLEncoding.EncodeToString(raw)
}

// go-spiffe takes "no audience expected" for "any will do".
func TestJ6ExpectingNoAudienceAcceptsNothing(t *testing.T) {
	ca := forge.New(t, "example.org")
	token := ca.JWT(ca.Header(nil), ca.Claims("/a", nil))
	for _, audience := range [][]string{nil, {}, {""}} {
		_, err := svid.VerifyJWT(token, ca.Bundle(), audience, time.Now())
		checkRule(t, err, "J6")
	}
	if _, err := jwtsvid.ParseAndValidate(token, ca.Bundle(), nil); err != nil {
		t.Errorf("go-spiffe alone refuses it: %v", err)
	}
}

// J12 as bundles arrive: a key of another use validates nothing.
func TestJ12OnlyKeysOfUseJWTSVIDValidate(t *testing.T) {
	ca := forge.New(t, "example.org")
	token := ca.JWT(ca.Header(nil), ca.Claims("/a", nil))
	der, err := ca.Bundle().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for use, want := range map[string]bool{"jwt-svid": true, "JWT-SVID": false, "wit-svid": false, "sig": false} {
		text := strings.ReplaceAll(string(der), `"use":"jwt-svid"`, `"use":"`+use+`"`)
		bundle, err := spiffebundle.Parse(ca.TrustDomain, []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := svid.VerifyJWT(token, bundle, []string{"aud"}, time.Now()); (err == nil) != want {
			t.Errorf("key of use %s: %v; want accepted = %t", use, err, want)
		}
	}
	_, err = svid.VerifyJWT(token, nil, []string{"aud"}, time.Now())
	checkRule(t, err, "J12")
	others := jwtbundle.FromJWTAuthorities(spiffeid.RequireTrustDomainFromString("other.org"), ca.Bundle().JWTAuthorities())
	_, err = svid.VerifyJWT(token, wrongJWTBundle{others}, []string{"aud"}, time.Now())
	checkRule(t, err, "J12")
}

type wrongJWTBundle struct{ *jwtbundle.Bundle }

func (w wrongJWTBundle) GetJWTBundleForTrustDomain(spiffeid.TrustDomain) (*jwtbundle.Bundle, error) {
	return w.Bundle, nil
}

func TestSoundTokensAreAccepted(t *testing.T) {
	ca := forge.New(t, "example.org")
	now := time.Now().Unix()
	tests := map[string]struct{ header, claims forge.Fields }{
		"plain":                   {},
		"J13 aud is a string":     {claims: forge.Fields{"aud": "aud"}},
		"J6 one of two audiences": {claims: forge.Fields{"aud": []string{"x", "aud"}}},
		"J4 no typ":               {header: forge.Fields{"typ": nil}},
		"J4 JOSE":                 {header: forge.Fields{"typ": "JOSE"}},
		"J8 within the leeway":    {claims: forge.Fields{"exp": now - 5}},
		"J9 nbf in the leeway":    {claims: forge.Fields{"nbf": now + 5}},
		"J9 no iat, no jti":       {claims: forge.Fields{"iat": nil, "jti": nil}},
		"other claims":            {claims: forge.Fields{"x": forge.Fields{"a": []any{1, nil, true}}}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			token := ca.JWT(ca.Header(tt.header), ca.Claims("/a", tt.claims))
			got, err := svid.VerifyJWT(token, ca.Bundle(), []string{"aud"}, time.Now())
			if err != nil {
				t.Fatal(err)
			}
			want, err := jwtsvid.ParseAndValidate(token, ca.Bundle(), []string{"aud"})
			if err != nil {
				t.Fatal(err)
			}
			if got.ID != want.ID || !slices.Equal(got.Audience, want.Audience) || !got.Expiry.Equal(want.Expiry) {
				t.Errorf("got %+v; go-spiffe reads %+v", got, want)
			}
			if fmt.Sprint(got.Claims) != fmt.Sprint(want.Claims) {
				t.Errorf("claims = %v; go-spiffe reads %v", got.Claims, want.Claims)
			}
		})
	}
}

func TestJWTCarriesItsSerial(t *testing.T) {
	ca := forge.New(t, "example.org")
	for jti, want := range map[string]bool{
		"2000000000000640123456789abcdef": true, "0x12": false, "00ff00": false, "FF": false,
		strings.Repeat("f", 41): false, "-1": false, "a uuid": false,
	} {
		token := ca.JWT(ca.Header(nil), ca.Claims("/a", forge.Fields{"jti": jti}))
		got, err := svid.VerifyJWT(token, ca.Bundle(), []string{"aud"}, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if got.OurSerial != want || (want && got.Serial.String() != jti) {
			t.Errorf("jti %q: OurSerial = %t, %s; want %t", jti, got.OurSerial, got.Serial, want)
		}
	}
}

func TestExpiredTokensSaySo(t *testing.T) {
	ca := forge.New(t, "example.org")
	token := ca.JWT(ca.Header(nil), ca.Claims("/a", nil))
	_, err := svid.VerifyJWT(token, ca.Bundle(), []string{"aud"}, time.Now().Add(5*time.Minute+svid.JWTLeeway))
	checkRule(t, err, "J8")
	if e, _ := errors.AsType[*svid.Error](err); !e.Expired() {
		t.Errorf("Expired() = false for %v", err)
	}
	endless := ca.JWT(ca.Header(nil), ca.Claims("/a", forge.Fields{"exp": nil}))
	_, err = svid.VerifyJWT(endless, ca.Bundle(), []string{"aud"}, time.Now())
	if e, _ := errors.AsType[*svid.Error](err); e == nil || e.Expired() {
		t.Errorf("without exp: Expired() = true for %v", err)
	}
	if _, err := svid.VerifyJWT(token, ca.Bundle(), []string{"aud"}, time.Now().Add(5*time.Minute)); err != nil {
		t.Errorf("refused within the leeway: %v", err)
	}
	_, err = svid.VerifyJWT(token, ca.Bundle(), []string{"aud"}, time.Time{})
	checkRule(t, err, "J8")
}
