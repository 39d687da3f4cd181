// Two trust domains whose programs know nothing of Merlon: each has a sidecar, and they
// call each other by a grant that names the other side's SPIFFE ID, until the
// federation ends.

package federation_test

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"

	"merlon.dev/integration/services"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk"
	"merlon.dev/sdk/httpauth"
)

func TestSidecarsAcrossTrustDomains(t *testing.T) {
	t.Parallel()
	shop, partner := stage.Separate(t), stage.SeparateOf(t, "partner.test")
	for _, d := range []struct{ own, other *stage.Domain }{{shop, partner}, {partner, shop}} {
		d.own.Merlon("entry", "create", "--parent", d.own.AgentID(), "--spiffe-id", d.own.ID("/app"), "--selector", "unix:path:"+stage.Bin(t, "merlon-sidecar"), "--federates-with", d.other.TrustDomain)
		invites(t, d.other, d.own)
	}
	partner.Entry("/me", "--federates-with", shop.TrustDomain)
	grants := fmt.Sprintf("grants:\n  - {id: partner, from: [%s, %s], to: [%s], http: {methods: [GET], paths: [/open]}}\n", partner.ID("/app"), partner.ID("/me"), shop.ID("/app"))
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "grants.yaml"), []byte(grants), 0o600); err != nil {
		t.Fatal(err)
	}
	shop.Merlon("policy", "push", dir)

	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/open" {
			t.Errorf("the app saw %s", r.URL.Path)
		}
		fmt.Fprint(w, r.Header.Get("X-Spiffe-Id"))
	}))
	defer app.Close()
	inbound, outbound := fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t)), fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t))
	stage.Start(t, "merlon-sidecar", []string{"SPIFFE_ENDPOINT_SOCKET=" + shop.WorkloadAPI},
		"-health-address", "off", "-inbound", inbound+","+app.Listener.Addr().String()+",http")
	stage.Start(t, "merlon-sidecar", []string{"SPIFFE_ENDPOINT_SOCKET=" + partner.WorkloadAPI},
		"-health-address", "off", "-outbound", outbound+","+shop.ID("/app")+",http,"+inbound)

	stage.Eventually(t, "a call across", func() error { return services.Wants("http://"+outbound+"/open", "200 "+partner.ID("/app")) })
	if err := services.Wants("http://"+outbound+"/closed", `"reason":"PATH"`); err != nil {
		t.Errorf("what no grant names: %v", err)
	}
	// A service that links the SDK calls the sidecar of the other trust domain.
	c := httpauth.Client(services.Open(t, partner), sdk.ID(shop.ID("/app")))
	defer c.CloseIdleConnections()
	services.WantReason(t, "the SDK calls a sidecar across trust domains", c, "https://"+inbound+"/open", "200 OK")

	shop.Merlon("federation", "remove", partner.TrustDomain)
	stage.Eventually(t, "nobody of the partner's is let in", func() error {
		if services.Wants("http://"+outbound+"/open", "200") == nil {
			return errors.New("it is")
		}
		return nil
	})
	invites(t, partner, shop)
	stage.Eventually(t, "a call across, again", func() error { return services.Wants("http://"+outbound+"/open", "200 "+partner.ID("/app")) })
}
