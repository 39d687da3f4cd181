// Policies on the claims of a JWT-SVID: those of one that is good reach the policy,
// and nothing else does.

package agent_test

import (
	"maps"
	"testing"
	"time"

	"merlon.dev/agent/agentpb"
	"merlon.dev/agent/internal/fakeca"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

func TestPoliciesReadVerifiedJWTSVIDs(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/orders", uidSelector))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	key := newPolicyKey(t)
	ca.PublishPolicy(key.bundleOf("authz.rego", `package authz

allow if input.jwt.sub == "spiffe://example.test/buyer"
`, 1), key.announcement(1))
	n.policyIs(t, 1)

	serial, err := svid.NewSerial(7, 1)
	if err != nil {
		t.Fatal(err)
	}
	claims := func(change forge.Fields) forge.Fields {
		fields := forge.Fields{"sub": "spiffe://" + td + "/buyer", "aud": []string{"spiffe://" + td + "/orders"}, "jti": serial.String()}
		maps.Copy(fields, change)
		return ca.Root.Claims("", fields)
	}
	token := func(change forge.Fields) string { return "Bearer " + ca.Root.JWT(ca.Root.Header(nil), claims(change)) }
	decide := func(authorization ...string) string {
		t.Helper()
		req := &agentpb.AuthorizeRequest{Source: "spiffe://" + td + "/web", Protocol: "http", Method: "GET", Path: "/orders"}
		if authorization != nil {
			req.Headers = map[string]*agentpb.HeaderValues{"authorization": {Values: authorization}}
		}
		d, err := n.authorize(t, req)
		if err != nil {
			t.Fatal(err)
		}
		return d.GetReason()
	}
	good, stranger := token(nil), forge.New(t, td)
	for name, tt := range map[string]struct {
		authorization []string
		want          string
	}{
		"a good one":           {[]string{good}, "ALLOWED"},
		"lower-case scheme":    {[]string{"bearer" + good[len("Bearer"):]}, "ALLOWED"},
		"none":                 {nil, "NO_GRANT"},
		"another subject":      {[]string{token(forge.Fields{"sub": "spiffe://" + td + "/eve"})}, "NO_GRANT"},
		"for another service":  {[]string{token(forge.Fields{"aud": []string{"spiffe://" + td + "/stock"}})}, "NO_GRANT"},
		"one that has ended":   {[]string{token(forge.Fields{"exp": time.Now().Add(-time.Hour).Unix()})}, "NO_GRANT"},
		"an altered one":       {[]string{good[:len(good)-3] + "AAA"}, "NO_GRANT"},
		"two headers (J10)":    {[]string{good, good}, "NO_GRANT"},
		"no scheme":            {[]string{good[len("Bearer "):]}, "NO_GRANT"},
		"of a stranger's keys": {[]string{"Bearer " + stranger.JWT(stranger.Header(nil), claims(nil))}, "NO_GRANT"},
	} {
		if got := decide(tt.authorization...); got != tt.want {
			t.Errorf("%s: %s; want %s", name, got, tt.want)
		}
	}
	ca.Revoke(&capb.Revocation{Subject: &capb.Revocation_Serial{Serial: serial.String()}})
	eventually(t, "the token is revoked", func() bool { return decide(good) == "NO_GRANT" })
}
