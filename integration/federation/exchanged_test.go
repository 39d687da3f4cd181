// Two trust domains, each with its CA and agent, whose operators have exchanged
// trust bundles by hand: go-spiffe and the SDK on both sides, and what happens when
// one side withdraws its trust. The test process is a workload of both.

package federation_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"merlon.dev/integration/services"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk"
	"merlon.dev/sdk/httpauth"
)

// knows waits until the source has a trust bundle of other, or has none any more.
func knows(t *testing.T, s *workloadapi.X509Source, other *stage.Domain, want bool) {
	t.Helper()
	stage.Eventually(t, fmt.Sprintf("a trust bundle of %s: %t", other.TrustDomain, want), func() error {
		_, err := s.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString(other.TrustDomain))
		if (err == nil) != want {
			return fmt.Errorf("there: %t", !want)
		}
		return nil
	})
}

// partners are two trust domains that trust each other, with /me in each.
func partners(t *testing.T) (shop, partner *stage.Domain) {
	t.Helper()
	shop, partner = stage.Separate(t), stage.SeparateOf(t, "partner.test")
	shop.Entry("/me", "--federates-with", partner.TrustDomain)
	partner.Entry("/me", "--federates-with", shop.TrustDomain)
	shop.Trusts(partner, "jwks")
	partner.Trusts(shop, "jwks")
	return shop, partner
}

// Why a call across does not work, as far as the agent knows.
func TestExplainIdentitySaysWhichTrustBundlesAreMissing(t *testing.T) {
	shop, partner := stage.Separate(t), stage.SeparateOf(t, "partner.test")
	shop.Entry("/me", "--federates-with", partner.TrustDomain, "--federates-with", "absent.test")
	shop.Trusts(partner, "jwks")
	want := []string{"federates with partner.test, absent.test", "has no trust bundle of absent.test: merlon federation set absent.test FILE"}
	stage.Eventually(t, "the agent says so", func() error {
		out := shop.Explain("identity", "--pid", strconv.Itoa(os.Getpid()))
		for _, text := range want {
			if !strings.Contains(out, text) {
				return fmt.Errorf("%q is not in\n%s", text, out)
			}
		}
		return nil
	})
}

// goSPIFFEServer answers who calls it, to the one peer that it expects.
func goSPIFFEServer(t *testing.T, d *stage.Domain, s *workloadapi.X509Source, peer string) string {
	t.Helper()
	lis, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(s, s, tlsconfig.AuthorizeID(spiffeid.RequireFromString(peer))))
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s to %s", r.TLS.PeerCertificates[0].URIs[0], d.ID("/me"))
	})}
	go srv.Serve(lis)
	t.Cleanup(func() { srv.Close() })
	return "https://" + lis.Addr().String()
}

func getOnce(client *http.Client, url string) (string, error) {
	resp, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return string(text), err
}

func goSPIFFEClient(t *testing.T, s *workloadapi.X509Source, peer string) *http.Client {
	transport := &http.Transport{TLSClientConfig: tlsconfig.MTLSClientConfig(s, s, tlsconfig.AuthorizeID(spiffeid.RequireFromString(peer))), DisableKeepAlives: true}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 20 * time.Second}
}

func TestGoSPIFFECallsAcrossTrustDomains(t *testing.T) {
	shop, partner := partners(t)
	ours, theirs := services.Source(t, shop), services.Source(t, partner)
	knows(t, ours, partner, true)
	knows(t, theirs, shop, true)
	for _, way := range []struct {
		server, client   *stage.Domain
		serves, connects *workloadapi.X509Source
	}{{shop, partner, ours, theirs}, {partner, shop, theirs, ours}} {
		url := goSPIFFEServer(t, way.server, way.serves, way.client.ID("/me"))
		got, err := getOnce(goSPIFFEClient(t, way.connects, way.server.ID("/me")), url)
		if want := way.client.ID("/me") + " to " + way.server.ID("/me"); err != nil || got != want {
			t.Errorf("%q, %v; want %q", got, err, want)
		}
	}

	// A JWT-SVID of the partner is validated here.
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	token, err := workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "shop"}, workloadapi.WithAddr(partner.WorkloadAPI))
	if err != nil {
		t.Fatal(err)
	}
	valid, err := workloadapi.ValidateJWTSVID(ctx, token.Marshal(), "shop", workloadapi.WithAddr(shop.WorkloadAPI))
	if err != nil || valid.ID.String() != partner.ID("/me") {
		t.Errorf("ValidateJWTSVID = %v, %v; want %s", valid, err, partner.ID("/me"))
	}
	bundles, err := workloadapi.FetchJWTBundles(ctx, workloadapi.WithAddr(shop.WorkloadAPI))
	if err != nil || bundles.Len() != 2 {
		t.Errorf("FetchJWTBundles = %v, %v; want two trust domains", bundles, err)
	}

	shop.Merlon("federation", "remove", partner.TrustDomain)
	knows(t, ours, partner, false)
	url := goSPIFFEServer(t, shop, ours, partner.ID("/me"))
	if got, err := getOnce(goSPIFFEClient(t, theirs, shop.ID("/me")), url); err == nil {
		t.Errorf("after the removal the call is answered %q", got)
	}
	if _, err := workloadapi.ValidateJWTSVID(ctx, token.Marshal(), "shop", workloadapi.WithAddr(shop.WorkloadAPI)); err == nil {
		t.Error("after the removal the JWT-SVID is valid")
	}
}

// partnerGrants lets the partner's trust domain, and nobody else, call paths of the shop:
// /me where none are named.
func partnerGrants(t *testing.T, shop, partner *stage.Domain, paths ...string) {
	t.Helper()
	dir, to := t.TempDir(), []string{shop.ID("/me")}
	if len(paths) > 0 {
		to = nil
		for _, path := range paths {
			to = append(to, shop.ID(path))
		}
	}
	text := fmt.Sprintf("grants:\n  - id: partner-to-me\n    from: [spiffe://%s]\n    to: [%s]\n    http: {methods: [GET]}\n", partner.TrustDomain, strings.Join(to, ", "))
	if err := os.WriteFile(filepath.Join(dir, "grants.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	shop.Merlon("policy", "push", dir)
}

// streams answers at /stream until the connection is cut, and elsewhere at once.
func streams(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != "/stream" {
		io.WriteString(w, "ok")
		return
	}
	w.WriteHeader(http.StatusOK)
	w.(http.Flusher).Flush()
	<-r.Context().Done()
}

// openStream begins a call that lasts. What is returned says how it ended.
func openStream(t *testing.T, c *http.Client, url string) (ended chan error) {
	t.Helper()
	resp, err := c.Get(url + "/stream")
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("the stream is answered %s", resp.Status)
	}
	ended = make(chan error, 1)
	go func() {
		defer resp.Body.Close()
		_, err := io.Copy(io.Discard, resp.Body)
		ended <- err
	}()
	return ended
}

// isCut waits for the end of a stream that the server did not end.
func isCut(t *testing.T, ended chan error) {
	t.Helper()
	select {
	case err := <-ended:
		if err == nil {
			t.Error("the stream ended as if the server had said all")
		}
	case <-time.After(30 * time.Second):
		t.Fatal("the live connection goes on")
	}
}

// A grant names a trust domain; its peers are verified by its own trust bundle, and
// what is open is cut when that is withdrawn, whatever is under way.
func TestRemovedFederationCutsLiveConnections(t *testing.T) {
	shop, partner := partners(t)
	ours, theirs := services.Open(t, shop), services.Open(t, partner)
	partnerGrants(t, shop, partner)
	url := services.Serve(t, ours, http.HandlerFunc(streams))
	transport := httpauth.Transport(theirs, sdk.ID(shop.ID("/me")))
	c := &http.Client{Transport: transport}
	defer c.CloseIdleConnections()
	services.WantReason(t, "a grant names the partner's trust domain", c, url+"/a", "200 OK")

	ended := openStream(t, c, url)
	shop.Merlon("federation", "remove", partner.TrustDomain)
	at := time.Now()
	isCut(t, ended)
	t.Logf("cut %v after merlon federation remove had answered", time.Since(at).Round(time.Millisecond))
	if got := services.Reason(c, url+"/a"); got == "200 OK" {
		t.Error("a new connection is let in")
	}

	// And back, by the roots alone.
	shop.Trusts(partner, "pem")
	services.WantReason(t, "trusted again", c, url+"/a", "200 OK")

	// The partner revokes an identity of its own: that reaches its own workloads, and
	// not the shop's, which ends the trust, or denies it in its policy.
	partner.Merlon("revoke", "--spiffe-id", partner.ID("/me"))
	services.WantReason(t, "a revocation of the partner's", c, url+"/a", "200 OK")
	if _, stderr, err := shop.Try("revoke", "--spiffe-id", partner.ID("/me")); err == nil || !strings.Contains(stderr, "trust domain") {
		t.Errorf("the shop revokes what is the partner's: %v, %s", err, stderr)
	}
}

// The partner's new root is handed over in time, and what is older is not taken.
func TestPartnersRootIsReplaced(t *testing.T) {
	shop, partner := partners(t)
	ours, theirs := services.Open(t, shop), services.Open(t, partner)
	partnerGrants(t, shop, partner)
	url := services.Serve(t, ours, http.HandlerFunc(services.OK))
	c := &http.Client{Transport: httpauth.Transport(theirs, sdk.ID(shop.ID("/me")))}
	defer c.CloseIdleConnections()
	services.WantReason(t, "before", c, url, "200 OK")
	old := filepath.Join(t.TempDir(), "old")
	if err := os.WriteFile(old, []byte(partner.Merlon("trust", "show", "-o", "jwks")), 0o600); err != nil {
		t.Fatal(err)
	}
	partner.Merlon("authority", "prepare", "--kind", "x509-root")
	var next stage.Authority
	stage.Eventually(t, "the new root is published", func() (err error) {
		next, err = stage.AuthorityIn(partner, "x509-root", "published")
		return err
	})
	shop.Trusts(partner, "jwks")
	stage.Eventually(t, "the shop knows it", func() error {
		b, err := ours.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString(partner.TrustDomain))
		if err == nil && len(b.X509Authorities()) != 2 {
			err = errors.New("only the old one")
		}
		return err
	})
	partner.Merlon("authority", "activate", next.ID, "--force")
	partner.Merlon("revoke", "--spiffe-id", partner.ID("/me")) // a new SVID at once
	stage.Eventually(t, "an SVID under the new root", func() error {
		own, err := theirs.GetX509SVID()
		if err == nil && fmt.Sprintf("%x", own.Certificates[len(own.Certificates)-1].AuthorityKeyId) != next.ID {
			err = errors.New("it is under the old root")
		}
		return err
	})
	c.CloseIdleConnections()
	services.WantReason(t, "under the new root", c, url, "200 OK")
	_, stderr, err := shop.Try("federation", "set", partner.TrustDomain, old)
	if err == nil || !strings.Contains(stderr, "older") || !strings.Contains(stderr, "hint: get the document anew") {
		t.Errorf("an older trust bundle: %v, %s; want a refusal with a hint", err, stderr)
	}
	services.WantReason(t, "after the refusal", c, url, "200 OK")
}
