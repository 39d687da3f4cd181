// ValidateJWTSVID as a workload calls it, with tokens that somebody forged who
// holds the trust domain's key (SECURITY.md E16, E19, J1 to J12). Every rule is
// in sdk/svid; here it is shown that the socket applies them.

package agent_test

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/agent/internal/fakeca"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid/forge"
)

func TestValidateJWTSVIDRefusesForgedTokens(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	cc, ctx := conn(t, n.socket)
	api := workload.NewSpiffeWorkloadAPIClient(cc)

	root := ca.Root
	head := func(changes forge.Fields) string { return root.JWT(root.Header(changes), root.Claims("/a", nil)) }
	body := func(changes forge.Fields) string { return root.JWT(root.Header(nil), root.Claims("/a", changes)) }
	sound := body(forge.Fields{"team": "shop", "level": 3, "jti": nil}) // without a number, any revocation of its name concerns it
	now := time.Now().Unix()

	m, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "aud", Svid: sound})
	if err != nil {
		t.Fatalf("ValidateJWTSVID(a sound one) = %v", err)
	}
	claims := m.GetClaims().AsMap()
	if m.GetSpiffeId() != "spiffe://"+td+"/a" || claims["sub"] != m.GetSpiffeId() || claims["team"] != "shop" || claims["level"] != 3.0 {
		t.Errorf("ValidateJWTSVID() = %s, claims %v; want the ID and every claim", m.GetSpiffeId(), claims)
	}
	for name, token := range map[string]string{
		"J1 JSON serialization":                  `{"payload":"` + strings.Split(sound, ".")[1] + `"}`,
		"J1 without a signature":                 sound[:strings.LastIndex(sound, ".")+1],
		"J2 jku":                                 head(forge.Fields{"jku": "https://evil.test/keys"}),
		"J2 crit":                                head(forge.Fields{"crit": []string{"exp"}}),
		"J3 none":                                head(forge.Fields{"alg": "none"}),
		"J3 HS256, the public key":               root.HMACToken(root.Header(forge.Fields{"alg": "HS256"}), root.Claims("/a", nil)),
		"J3 missing":                             head(forge.Fields{"alg": nil}),
		"J4 a WIT-SVID":                          head(forge.Fields{"typ": "wit+jwt"}),
		"J5 no subject":                          body(forge.Fields{"sub": nil}),
		"J5 the trust domain":                    body(forge.Fields{"sub": "spiffe://" + td}),
		"J6 no audience":                         body(forge.Fields{"aud": nil}),
		"J6 a longer audience":                   body(forge.Fields{"aud": []string{"audience"}}),
		"J6 an audience of one list":             body(forge.Fields{"aud": []any{[]string{"aud"}}}),
		"J8 no end":                              body(forge.Fields{"exp": nil}),
		"J8 ended 50 s ago":                      body(forge.Fields{"exp": now - 50}),
		"J8 an end in words":                     body(forge.Fields{"exp": "tomorrow"}),
		"J8 an end without end":                  body(forge.Fields{"exp": json.RawMessage("1e400")}),
		"J9 not before later":                    body(forge.Fields{"nbf": now + 600}),
		"J11 no key ID":                          head(forge.Fields{"kid": nil}),
		"J12 another's key":                      forge.New(t, td).JWT(root.Header(nil), root.Claims("/a", nil)),
		"J12 the X.509 key":                      root.Token(root.Key, []byte(`{"alg":"ES256","kid":"`+root.KeyID+`"}`), []byte(`{"sub":"spiffe://`+td+`/a","aud":["aud"],"exp":99999999999}`)),
		"E19 of a trust domain that is not ours": body(forge.Fields{"sub": "spiffe://other.test/a"}),
	} {
		if m, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "aud", Svid: token}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: ValidateJWTSVID() = %v, %v; want InvalidArgument", name, m, err)
		}
	}
	ca.Revoke(&capb.Revocation{Subject: &capb.Revocation_SpiffeId{SpiffeId: "spiffe://" + td + "/a"}})
	eventually(t, "the revocation counts", func() bool {
		_, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "aud", Svid: sound})
		return status.Code(err) == codes.InvalidArgument && strings.Contains(err.Error(), "revoked")
	})
}
