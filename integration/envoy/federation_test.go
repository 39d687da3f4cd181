// A real Envoy that takes calls from another trust domain, and what it does when
// the federation ends: a gateway of shop.test in front of its orders, for the
// partner's /web alone.

package envoy_test

import (
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"merlon.dev/integration/services"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk"
	"merlon.dev/sdk/svid/forge"
)

// across makes one call over a connection of its own.
func (e *envoy) across(id *sdk.Identity, gateway string) (string, error) {
	transport := &http.Transport{DialTLSContext: id.DialTLS(sdk.ID(gateway)), DisableKeepAlives: true}
	defer transport.CloseIdleConnections()
	resp, err := (&http.Client{Transport: transport, Timeout: 20 * time.Second}).Get("https://" + e.inbound + "/")
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", resp.Status, text)
	}
	return string(text), err
}

func TestEnvoyTakesCallsFromAFederatedTrustDomain(t *testing.T) {
	binary := envoyBinary(t)
	shop, partner := stage.Separate(t), stage.SeparateOf(t, "partner.test")
	shop.Trusts(partner, "jwks")
	partner.Trusts(shop, "jwks")
	shop.Entry("/orders")
	shop.Entry("/web", "--federates-with", partner.TrustDomain)
	partner.Entry("/web", "--federates-with", shop.TrustDomain)
	shop.Merlon("entry", "create", "--parent", shop.AgentID(), "--spiffe-id", shop.ID("/gateway"),
		"--selector", "unix:path:"+binary, "--federates-with", partner.TrustDomain)
	theirs, ours := services.Open(t, partner), services.Open(t, shop)
	orders := newUpstream(t, shop)

	inbound, outbound := "validation_context_sds_secret_config: &roots {name: ROOTCA, sds_config: *agent}", "validation_context_sds_secret_config: *roots"
	caller := []string{"spiffe://shop.test/web", partner.ID("/web")}
	byName := append(caller, inbound, `validation_context_sds_secret_config: {name: "spiffe://partner.test", sds_config: *agent}`,
		outbound, "validation_context_sds_secret_config: {name: ROOTCA, sds_config: *agent}")
	envoys := map[string]*envoy{
		"delta, by name":              startEnvoy(t, shop, orders.address, byName...),
		"state of the world, by name": startEnvoy(t, shop, orders.address, append(byName, "DELTA_GRPC", "GRPC")...),
		"state of the world, ALL":     startEnvoy(t, shop, orders.address, append(caller, "name: ROOTCA", "name: ALL", "DELTA_GRPC", "GRPC")...),
	}
	works := func(e *envoy) error {
		body, err := e.across(theirs, shop.ID("/gateway"))
		if err == nil && !strings.Contains(body, "URI="+partner.ID("/web")) {
			err = fmt.Errorf("orders saw %q", body)
		}
		return err
	}
	refuses := func(e *envoy) error {
		if body, err := e.across(theirs, shop.ID("/gateway")); err == nil {
			return fmt.Errorf("orders saw %q", body)
		}
		return nil
	}
	each := func(what string, check func(*envoy) error) {
		t.Helper()
		for name, e := range envoys {
			stage.Eventually(t, name+": "+what, func() error { return check(e) })
		}
	}
	each("a call from the partner", works)
	// The name alone opens nothing: neither by roots of a stranger's, nor by ours.
	stranger := forge.New(t, partner.TrustDomain)
	own, err := ours.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	for name, e := range envoys {
		for who, cert := range map[string]tls.Certificate{
			"a stranger": stranger.Leaf("/web").Certificate(), "the own trust domain": {Certificate: raw(own), PrivateKey: own.PrivateKey},
		} {
			if err := e.try(&tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{cert}}); err == nil || !strings.Contains(err.Error(), "tls:") {
				t.Errorf("%s: %s: %v; want a refusal by TLS", name, who, err)
			}
		}
	}
	shop.Merlon("federation", "remove", partner.TrustDomain)
	each("the federation was removed", refuses)
	shop.Trusts(partner, "pem")
	each("it is there again", works)
}
