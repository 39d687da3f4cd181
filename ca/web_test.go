// HTTPS: policy bundles for those who may read or write them, the trust bundle
// for all.

package ca_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"io"
	"maps"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/capb"
	"merlon.dev/policy/bundle"
)

func (c *testCA) url(path string) string { return "https://" + c.srv.HTTPSAddress().String() + path }

// do sends one request and returns status, headers and body.
func do(t *testing.T, client *http.Client, method, url string, header http.Header, body []byte) (int, http.Header, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	maps.Copy(req.Header, header)
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, resp.Header, string(b)
}

// identities are HTTPS clients by kind of caller.
func identities(t *testing.T, c *testCA) map[string]*http.Client {
	a := c.agent("n1")
	admin := newEntry("n1", "console")
	admin.Admin = true
	created, err := c.admin.CreateEntry(t.Context(), &capb.CreateEntryRequest{Entry: admin})
	if err != nil {
		t.Fatal(err)
	}
	with := func(key *ecdsa.PrivateKey, chain [][]byte) *http.Client { return httpClient(t, key, chain) }
	return map[string]*http.Client{
		"anonymous": with(nil, nil), "agent": with(a.key, a.chain),
		"workload": with(a.svid(c.entry("n1", "web"))), "admin": with(a.svid(created.GetEntry())),
	}
}

func readerToken(t *testing.T, c *testCA, name string, ttl int64) http.Header {
	t.Helper()
	resp, err := c.admin.CreateToken(t.Context(), &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_BUNDLE_READER, PolicyBundle: name, TtlSeconds: ttl})
	if err != nil {
		t.Fatal(err)
	}
	return http.Header{"Authorization": {"Bearer " + resp.GetToken()}}
}

func TestPolicyBundlesAreForThoseWhoMay(t *testing.T) {
	c := startCA(t, tempDir(t))
	who := identities(t, c)
	pushPolicy(t, c)
	main, other := c.url("/v1/policy/bundles/main"), c.url("/v1/policy/bundles/other")
	expired := readerToken(t, c, "main", 1)
	time.Sleep(1100 * time.Millisecond)
	unsigned := policyBundle(t)
	for _, test := range []struct {
		what, client, method, url string
		header                    http.Header
		body                      []byte
		want                      int
	}{
		{"agent reads", "agent", "GET", main, nil, nil, 200},
		{"admin reads", "admin", "GET", main, nil, nil, 200},
		{"head", "agent", "HEAD", main, nil, nil, 200},
		{"none of that name", "agent", "GET", other, nil, nil, 404},
		{"anonymous", "anonymous", "GET", main, nil, nil, 401},
		{"workload", "workload", "GET", main, nil, nil, 403},
		{"token", "anonymous", "GET", main, readerToken(t, c, "main", 0), nil, 200},
		{"token of another bundle", "anonymous", "GET", main, readerToken(t, c, "other", 0), nil, 403},
		{"expired token", "anonymous", "GET", main, expired, nil, 401},
		{"made-up token", "anonymous", "GET", main, http.Header{"Authorization": {"Bearer mbr-aaaa"}}, nil, 401},
		{"join token", "anonymous", "GET", main, http.Header{"Authorization": {"Bearer " + c.joinToken("x")}}, nil, 401},
		{"basic", "anonymous", "GET", main, http.Header{"Authorization": {"Basic YTpi"}}, nil, 401},
		{"token writes", "anonymous", "PUT", main, readerToken(t, c, "main", 0), unsigned, 401},
		{"agent writes", "agent", "PUT", main, nil, unsigned, 403},
		{"workload writes", "workload", "PUT", main, nil, unsigned, 403},
		{"admin writes noise", "admin", "PUT", main, nil, []byte("noise"), 422},
		{"admin writes too much", "admin", "PUT", main, nil, make([]byte, bundle.MaxBytes+1), 413},
		{"delete", "admin", "DELETE", main, nil, nil, 405},
		{"trailing slash", "admin", "GET", main + "/", nil, nil, 404},
		{"encoded", "admin", "GET", c.url("/v1/policy/bundles/m%61in"), nil, nil, 404},
		{"double slash", "admin", "GET", c.url("/v1//policy/bundles/main"), nil, nil, 404},
		{"dots", "admin", "GET", c.url("/v1/x/../policy/bundles/main"), nil, nil, 404},
		{"elsewhere", "admin", "GET", c.url("/"), nil, nil, 404},
	} {
		code, header, body := do(t, who[test.client], test.method, test.url, test.header, test.body)
		if code != test.want {
			t.Errorf("%s: status %d; want %d (%s)", test.what, code, test.want, body)
		}
		if (code == 401 || code == 403) && (header.Get("Content-Type") != "application/problem+json" || !strings.Contains(body, `"detail"`)) {
			t.Errorf("%s: refused with %s %s; want problem+json with a detail", test.what, header.Get("Content-Type"), body)
		}
	}
	got, err := c.admin.GetPolicy(t.Context(), &capb.GetPolicyRequest{})
	if err != nil || got.GetPolicyBundle().GetGeneration() != 1 {
		t.Errorf("after refusals: %v, %v; want generation 1", got, err)
	}
}

func TestUploadedPolicyIsSignedAndServed(t *testing.T) {
	c := startCA(t, tempDir(t))
	who := identities(t, c)
	main := c.url("/v1/policy/bundles/main")
	code, _, body := do(t, who["admin"], "PUT", main, nil, policyBundle(t))
	if code != 200 || !strings.Contains(body, `"generation":1`) {
		t.Fatalf("PUT: %d %s", code, body)
	}
	head, err := c.admin.GetPolicy(t.Context(), &capb.GetPolicyRequest{})
	if err != nil {
		t.Fatal(err)
	}
	raw, etag, err := bundle.Fetch(t.Context(), who["admin"], main, "")
	if err != nil || etag != head.GetEtag() {
		t.Fatalf("Fetch: etag %s, %v; want %s", etag, err, head.GetEtag())
	}
	pub, err := x509.ParsePKIXPublicKey(head.GetPolicyBundle().GetKeys()[0].GetPublicKey())
	if err != nil {
		t.Fatal(err)
	}
	key := bundle.Key{KID: head.GetPolicyBundle().GetKeys()[0].GetKid(), PublicKey: pub.(*ecdsa.PublicKey)}
	contents, err := bundle.Verify(raw, []bundle.Key{key}, bundle.Expect{Name: "main", TrustDomain: "shop.test", MinGeneration: 1})
	if err != nil || contents.Metadata.Generation != 1 || !contents.Metadata.NotAfter.After(time.Now()) {
		t.Errorf("Verify: %+v, %v", contents, err)
	}
	if code, _, _ := do(t, who["admin"], "GET", main, http.Header{"If-None-Match": {etag}}, nil); code != 304 {
		t.Errorf("with the current ETag: %d; want 304", code)
	}

	// A long poll ends with the next push, not with its time.
	polled := make(chan string, 1)
	go func() {
		req, _ := http.NewRequest("GET", main, nil)
		req.Header.Set("If-None-Match", etag)
		req.Header.Set("Prefer", "modes=snapshot,delta;wait=60")
		resp, err := who["admin"].Do(req)
		if err != nil {
			polled <- err.Error()
			return
		}
		defer resp.Body.Close()
		polled <- resp.Header.Get("ETag")
	}()
	time.Sleep(50 * time.Millisecond) // let it begin to wait; if it has not, it gets the new one all the same
	pushPolicy(t, c)
	select {
	case got := <-polled:
		if !strings.HasPrefix(got, `"2-`) {
			t.Errorf("long poll: ETag %s; want that of generation 2", got)
		}
	case <-time.After(10 * time.Second):
		t.Error("the long poll did not end with the push")
	}
}

// SECURITY.md F-10, F-11.
func TestTrustBundleIsForEveryone(t *testing.T) {
	c := startCA(t, tempDir(t))
	client := httpClient(t, nil, nil)
	code, header, body := do(t, client, "GET", c.url("/v1/trust/bundle"), nil, nil)
	if code != 200 || header.Get("Content-Type") != "application/json" {
		t.Fatalf("GET: %d %s", code, header.Get("Content-Type"))
	}
	b, err := spiffebundle.Parse(spiffeid.RequireTrustDomainFromString("shop.test"), []byte(body))
	if err != nil {
		t.Fatal(err)
	}
	sequence, ok := b.SequenceNumber()
	hint, hasHint := b.RefreshHint()
	if !ok || sequence != 1 || !hasHint || hint != 5*time.Minute || !b.HasX509Authority(c.srv.Root()) || len(b.JWTAuthorities()) != 1 {
		t.Errorf("trust bundle = %s; want sequence 1, a refresh hint of 300, the root and a JWT key", body)
	}
	if code, _, _ := do(t, client, "POST", c.url("/v1/trust/bundle"), nil, nil); code != 405 {
		t.Errorf("POST: %d; want 405", code)
	}
	if code, _, body := do(t, client, "HEAD", c.url("/v1/trust/bundle"), nil, nil); code != 200 || body != "" {
		t.Errorf("HEAD: %d %q", code, body)
	}
}

// Ready means: can issue.
func TestHealthSaysReady(t *testing.T) {
	c := startCA(t, tempDir(t))
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	base := "http://" + c.srv.HealthAddress().String()
	code, _, body := do(t, client, "GET", base+"/ready", nil, nil)
	for _, check := range []string{"authority", "store", "audit", "picture", "keys", "replica"} {
		if code != 200 || !strings.Contains(body, check) {
			t.Errorf("/ready: %d %s; want 200 with %s", code, body, check)
		}
	}
	c.agent("n1")
	_, _, body = do(t, client, "GET", base+"/metrics", nil, nil)
	for _, metric := range []string{
		`merlon_svid_issued_total{result="ok",type="agent"} 1`, `merlon_ca_expiry_timestamp_seconds{authority="root"}`, "merlon_sync_streams 0", "merlon_agents 1",
	} {
		if !strings.Contains(body, metric) {
			t.Errorf("/metrics lacks %s", metric)
		}
	}
}

// A poll that waits outlives what let it in.
func TestRevokedAgentGetsNothingFromAPollThatWaits(t *testing.T) {
	c := startCA(t, tempDir(t))
	pushPolicy(t, c)
	a := c.agent("n1")
	url := "https://" + c.srv.HTTPSAddress().String() + "/v1/policy/bundles/main"
	client := httpClient(t, a.key, a.chain)
	first, err := client.Do(newGet(t, url))
	if err != nil {
		t.Fatal(err)
	}
	first.Body.Close()
	poll := newGet(t, url)
	poll.Header.Set("If-None-Match", first.Header.Get("ETag"))
	poll.Header.Set("Prefer", "modes=snapshot;wait=15")
	type answer struct {
		resp *http.Response
		err  error
	}
	answers := make(chan answer, 1)
	go func() {
		resp, err := client.Do(poll) //nolint:bodyclose // closed below
		answers <- answer{resp, err}
	}()
	select {
	case got := <-answers:
		t.Fatalf("the poll did not wait: %v, %v", got.resp, got.err)
	case <-time.After(300 * time.Millisecond):
	}
	if _, err := c.admin.Revoke(t.Context(), &capb.RevokeRequest{Subject: &capb.RevokeRequest_AgentId{AgentId: a.id}}); err != nil {
		t.Fatal(err)
	}
	pushPolicy(t, c)
	got := <-answers
	if got.err != nil {
		t.Fatal(got.err)
	}
	defer got.resp.Body.Close()
	if got.resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("after the revocation: %s; want 503", got.resp.Status)
	}
}

func newGet(t *testing.T, url string) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	return r
}
