// Trust bundles that come by themselves: two trust domains that have exchanged one token
// each way, and other implementations' endpoints and clients.

package federation_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/federation"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"merlon.dev/integration/measure"
	"merlon.dev/integration/services"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk"
	"merlon.dev/sdk/httpauth"
	"merlon.dev/sdk/svid/forge"
)

// followed is one line of `merlon federation status -o json`.
type followed struct {
	TrustDomain string `json:"trust_domain"`
	In, Out     string
	Sequence    uint64
	RootHashes  []string `json:"root_hashes"`
	Source      *struct{ Failure string }
	Reader      *struct{ Sequence uint64 }
}

// healthOf is d's federation with other; the zero value: there is none.
func healthOf(t *testing.T, d *stage.Domain, other string) followed {
	t.Helper()
	out, stderr, err := d.Try("federation", "status", "-o", "json")
	var all []followed
	if jsonErr := json.Unmarshal([]byte(out), &all); jsonErr != nil {
		t.Fatalf("%v, %v: %s%s", err, jsonErr, out, stderr)
	}
	for _, h := range all {
		if h.TrustDomain == other {
			return h
		}
	}
	return followed{}
}

// invites has by's operator invite to's, who accepts.
func invites(t *testing.T, by, to *stage.Domain) {
	t.Helper()
	token := by.Merlon("federation", "invite", to.TrustDomain, "--profile", "https_spiffe", "--url", by.HTTPS+"/v1/trust/bundle")
	to.Merlon("federation", "accept", strings.TrimSpace(token))
}

// One token each way is all that two operators do: calls work, of the SDK and of sidecars,
// roots are replaced twice under them, the one that the token brought included, and each side sees whether its
// trust bundle arrives at the other.
func TestOneTokenEachWay(t *testing.T) {
	t.Parallel()
	const often = "trust_refresh_hint: 10s"
	shop, partner := stage.Separate(t, often), stage.SeparateOf(t, "partner.test", often)
	shop.Entry("/me", "--federates-with", partner.TrustDomain)
	partner.Entry("/me", "--federates-with", shop.TrustDomain, "--ttl", "6s")
	for _, d := range []struct{ own, other *stage.Domain }{{shop, partner}, {partner, shop}} {
		d.own.Merlon("entry", "create", "--parent", d.own.AgentID(), "--spiffe-id", d.own.ID("/app"), "--selector", "unix:path:"+stage.Bin(t, "merlon-sidecar"), "--federates-with", d.other.TrustDomain, "--ttl", "6s")
	}
	invites(t, shop, partner)
	invites(t, partner, shop)
	ours, theirs := services.Open(t, shop), services.Open(t, partner)
	partnerGrants(t, shop, partner, "/me", "/app")
	url := services.Serve(t, ours, http.HandlerFunc(services.OK))
	transport := httpauth.Transport(theirs, sdk.ID(shop.ID("/me")))
	c := &http.Client{Transport: transport, Timeout: 20 * time.Second}
	defer c.CloseIdleConnections()
	services.WantReason(t, "a grant names the partner's trust domain", c, url, "200 OK")
	callers := append(sidecarCallers(t, shop, partner, theirs, url), func() string {
		c.CloseIdleConnections() // each call is a handshake
		return services.Reason(c, url)
	})

	// Calls go on while the partner's root is replaced, twice: of the SDK and of a
	// sidecar to both.
	ctx, stop := context.WithCancel(t.Context())
	var calls, failed atomic.Int64
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			for i, call := range callers {
				if got := call(); got != "200 OK" && ctx.Err() == nil {
					failed.Add(1)
					t.Logf("caller %d: a call failed: %s", i, got)
				}
				calls.Add(1)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}()
	first, err := stage.AuthorityIn(partner, "x509-root", "active")
	if err != nil {
		t.Fatal(err)
	}
	for round := range 2 {
		partner.Merlon("authority", "prepare", "--kind", "x509-root")
		var next stage.Authority
		stage.Eventually(t, "the new root is published", func() (err error) {
			next, err = stage.AuthorityIn(partner, "x509-root", "published")
			return err
		})
		waitLong(t, "the shop has fetched it", func() error {
			if h := healthOf(t, shop, partner.TrustDomain); len(h.RootHashes) != round+2 {
				return fmt.Errorf("%+v", h)
			}
			return nil
		})
		partner.Merlon("authority", "activate", next.ID, "--force")
		waitLong(t, "SVIDs under the new root", func() error {
			own, err := theirs.GetX509SVID()
			if err == nil && fmt.Sprintf("%x", own.Certificates[len(own.Certificates)-1].AuthorityKeyId) != next.ID {
				err = errors.New("it is under the old root")
			}
			return err
		})
	}
	stop()
	<-done
	if failed.Load() > 0 || calls.Load() < 20 {
		t.Errorf("%d of %d calls failed", failed.Load(), calls.Load())
	}
	t.Logf("%d calls", calls.Load())

	// The root that the token brought is gone; the latest one verifies the endpoint.
	partner.Merlon("authority", "taint", first.ID)
	partner.Merlon("authority", "revoke", first.ID, "--force")
	waitLong(t, "the shop has heard of it", func() error {
		if h := healthOf(t, shop, partner.TrustDomain); h.In != "ok" || len(h.RootHashes) != 2 {
			return fmt.Errorf("%+v", h)
		}
		return nil
	})
	services.WantReason(t, "without the first root", c, url, "200 OK")
	waitLong(t, "both sides see it", func() error {
		a, b := healthOf(t, shop, partner.TrustDomain), healthOf(t, partner, shop.TrustDomain)
		if a.In != "ok" || a.Out != "ok" || b.In != "ok" || b.Out != "ok" || b.Reader.Sequence != a.Sequence {
			return fmt.Errorf("%+v, %+v", a, b)
		}
		return nil
	})

	// Removed on one side: nobody of theirs is let in, and nothing is fetched any more.
	shop.Merlon("federation", "remove", partner.TrustDomain)
	c.CloseIdleConnections()
	stage.Eventually(t, "the partner is refused", func() error {
		if got := services.Reason(c, url); got == "200 OK" {
			return errors.New(got)
		}
		return nil
	})
	if h := healthOf(t, shop, partner.TrustDomain); h.TrustDomain != "" {
		t.Errorf("something is left: %+v", h)
	}
}

// sidecarCallers are calls from the partner's trust domain to the shop's of which one
// end, or both, is a sidecar; the shop's service that links the SDK is at url.
func sidecarCallers(t *testing.T, shop, partner *stage.Domain, theirs *sdk.Identity, url string) []func() string {
	t.Helper()
	app := httptest.NewServer(http.HandlerFunc(services.OK))
	t.Cleanup(app.Close)
	var free [3]string
	for i := range free {
		free[i] = fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t))
	}
	inbound, toSidecar, toSDK := free[0], free[1], free[2]
	stage.Start(t, "merlon-sidecar", []string{"SPIFFE_ENDPOINT_SOCKET=" + shop.WorkloadAPI}, "-health-address", "off", "-inbound", inbound+","+app.Listener.Addr().String()+",http")
	for _, outbound := range []string{toSidecar + "," + shop.ID("/app") + ",http," + inbound, toSDK + "," + shop.ID("/me") + ",http," + strings.TrimPrefix(url, "https://")} {
		stage.Start(t, "merlon-sidecar", []string{"SPIFFE_ENDPOINT_SOCKET=" + partner.WorkloadAPI}, "-health-address", "off", "-outbound", outbound)
	}
	plain := &http.Client{Timeout: 20 * time.Second}
	linked := &http.Client{Transport: httpauth.Transport(theirs, sdk.ID(shop.ID("/app"))), Timeout: 20 * time.Second}
	t.Cleanup(plain.CloseIdleConnections)
	t.Cleanup(linked.CloseIdleConnections)
	callers := []func() string{
		func() string { return services.Reason(plain, "http://"+toSidecar) },
		func() string { return services.Reason(plain, "http://"+toSDK) },
		func() string {
			linked.CloseIdleConnections()
			return services.Reason(linked, "https://"+inbound)
		},
	}
	for i, call := range callers {
		stage.Eventually(t, fmt.Sprintf("caller %d is let in", i), func() error {
			if got := call(); got != "200 OK" {
				return errors.New(got)
			}
			return nil
		})
	}
	return callers
}

// waitLong is for what takes some polls.
func waitLong(t *testing.T, what string, check func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(90 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	t.Fatalf("%s: still %v", what, err)
}

// Tokens that are damaged, for somebody else, or for this CA itself change nothing.
func TestTokensThatAreNotAccepted(t *testing.T) {
	t.Parallel()
	shop, partner := stage.CAAlone(t, "", nil), stage.SeparateOf(t, "partner.test")
	token := strings.TrimSpace(partner.Merlon("federation", "invite", "other.test", "--profile", "https_spiffe", "--url", partner.HTTPS+"/v1/trust/bundle"))
	for what, tt := range map[string]struct {
		args []string
		want string
	}{
		"for another":      {[]string{"accept", token}, `invites "other.test"`},
		"damaged":          {[]string{"accept", token[:len(token)-9]}, "damaged"},
		"no token":         {[]string{"accept", "hello"}, "merlon federation invite"},
		"itself":           {[]string{"invite", "shop.test", "--profile", "https_spiffe", "--url", "https://a.test/"}, "own"},
		"a query":          {[]string{"invite", "other.test", "--profile", "https_spiffe", "--url", "https://a.test/?b=c"}, "query"},
		"an empty query":   {[]string{"invite", "other.test", "--profile", "https_spiffe", "--url", "https://a.test/b?"}, "query"},
		"no profile":       {[]string{"invite", "other.test", "--url", "https://a.test/"}, "not inferred"},
		"no URL":           {[]string{"follow", "other.test", "--profile", "https_web"}, "not inferred"},
		"http":             {[]string{"follow", "other.test", "--profile", "https_web", "--url", "http://a.test/"}, "https://"},
		"a user":           {[]string{"follow", "other.test", "--profile", "https_web", "--url", "https://u@a.test/"}, "user"},
		"no endpoint ID":   {[]string{"follow", "other.test", "--profile", "https_spiffe", "--url", "https://a.test/"}, "endpoint_spiffe_id"},
		"no first bundle":  {[]string{"follow", "other.test", "--profile", "https_spiffe", "--url", "https://a.test/", "--endpoint-id", "spiffe://other.test/x"}, "handed over"},
		"own trust domain": {[]string{"follow", "shop.test", "--profile", "https_web", "--url", "https://a.test/"}, "own"},
		"nothing to do":    {[]string{"refresh", "other.test"}, "no trust bundle of this trust domain"},
	} {
		if _, stderr, err := shop.Try(append([]string{"federation"}, tt.args...)...); err == nil || !strings.Contains(stderr, tt.want) {
			t.Errorf("%s: %v, %s; want %q", what, err, stderr, tt.want)
		}
	}
	if out := shop.Merlon("federation", "list", "-o", "json"); strings.TrimSpace(out) != "[]" {
		t.Errorf("something was kept: %s", out)
	}
}

// spire is another implementation's trust domain, with an endpoint by go-spiffe.
type spire struct {
	*forge.Authority
	bundle *spiffebundle.Bundle
	files  stage.EtcdFiles
	web    string
	spiffe string
	// spoil answers in the place of the endpoint.
	spoil atomic.Pointer[http.HandlerFunc]
}

func startSPIRE(t *testing.T) *spire {
	t.Helper()
	s := &spire{Authority: forge.New(t, "spire.test"), files: stage.Certify(t, t.TempDir(), "127.0.0.1")}
	s.bundle = s.Bundle()
	s.bundle.SetSequenceNumber(1)
	s.bundle.SetRefreshHint(10 * time.Second)
	good, err := federation.NewHandler(s.TrustDomain, s.bundle)
	if err != nil {
		t.Fatal(err)
	}
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if h := s.spoil.Load(); h != nil {
			(*h)(w, r)
			return
		}
		good.ServeHTTP(w, r)
	})
	s.web = "https://" + serveFiles(t, s.files, handler)
	leaf := s.Leaf("/server").X509SVID()
	s.spiffe = "https://" + serveTLS(t, tlsconfig.TLSServerConfig(leaf), handler)
	return s
}

func (s *spire) write(t *testing.T) (file string) {
	t.Helper()
	text, err := s.bundle.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	file = filepath.Join(t.TempDir(), "spire.json")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// Another implementation's endpoint is followed by both profiles; what it publishes
// counts, what no bundle endpoint may say does not, and an empty bundle empties trust.
func TestAnotherImplementationIsFollowed(t *testing.T) {
	t.Parallel()
	shop, s := stage.Separate(t), startSPIRE(t)
	shop.Entry("/me", "--federates-with", "spire.test")
	shop.Merlon("federation", "follow", "spire.test", "--profile", "https_web", "--url", s.web, "--web-ca", s.files.CA)
	if h := healthOf(t, shop, "spire.test"); h.In != "ok" || h.Sequence != 1 || len(h.RootHashes) != 1 {
		t.Errorf("by https_web: %+v", h)
	}
	shop.Merlon("federation", "follow", "spire.test", "--profile", "https_spiffe", "--url", s.spiffe, "--endpoint-id", "spiffe://spire.test/server", "--bundle", s.write(t))
	if h := healthOf(t, shop, "spire.test"); h.In != "ok" {
		t.Errorf("by https_spiffe: %+v", h)
	}
	shop.Merlon("federation", "follow", "spire.test", "--profile", "https_spiffe", "--url", s.spiffe, "--endpoint-id", "spiffe://spire.test/other")
	if h := healthOf(t, shop, "spire.test"); h.In != "failing" || !strings.Contains(h.Source.Failure, "another SPIFFE ID") || len(h.RootHashes) != 1 {
		t.Errorf("by https_spiffe, another SPIFFE ID: %+v", h)
	}
	if _, stderr, err := shop.Try("federation", "status"); err == nil || codeOf(err) != 3 {
		t.Errorf("status of what fails: %v, %s; want exit code 3", err, stderr)
	}
	shop.Merlon("federation", "follow", "spire.test", "--profile", "https_web", "--url", s.web, "--web-ca", s.files.CA)

	// Hostile answers keep what is known and say why.
	root := healthOf(t, shop, "spire.test").RootHashes
	older := s.Bundle()
	older.AddX509Authority(forge.New(t, "spire.test").Cert)
	foreign := forge.New(t, "other.test").Bundle()
	_, before := measure.MemoryOf(t, shop.CA.PID())
	for what, tt := range map[string]struct {
		answer http.HandlerFunc
		reason string
	}{
		"rollback":        {document(t, older, 0), "sequence number"},
		"other keys":      {document(t, older, 1), "same sequence number"},
		"another's roots": {document(t, foreign, 9), "no trust bundle of spire.test"},
		"100 MB":          {func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Content-Length", "100000000") }, "bytes"},
		"PEM": {func(w http.ResponseWriter, _ *http.Request) {
			_ = pem.Encode(w, &pem.Block{Type: "CERTIFICATE", Bytes: s.Cert.Raw})
		}, "no JWKS"},
		"rubbish":    {func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") }, "no JWKS"},
		"keys twice": {func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"keys":[],"keys":[]}`) }, "no trust bundle"},
		"status 500": {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) }, "500"},
		"to loopback": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://127.0.0.1:1/", http.StatusFound)
		}, "not of the internet"},
		"without an end": {func(w http.ResponseWriter, _ *http.Request) {
			for part := bytes.Repeat([]byte(" "), 1<<16); ; {
				if _, err := w.Write(part); err != nil {
					return
				}
			}
		}, "sends more than"},
		"1 000 roots": {roots(t, 1000), "bytes"},
		"200 roots":   {roots(t, 200), "at most 64"}, // of one name, within what is read
	} {
		s.spoil.Store(&tt.answer)
		_, stderr, err := shop.Try("federation", "refresh", "spire.test")
		h := healthOf(t, shop, "spire.test")
		if err == nil || !strings.Contains(stderr, tt.reason) || h.In != "failing" || len(h.RootHashes) != 1 || h.RootHashes[0] != root[0] {
			t.Errorf("%s: %v, %s; %+v; want a refusal that says %q, and the last bundle", what, err, stderr, h, tt.reason)
		}
	}
	_, peak := measure.MemoryOf(t, shop.CA.PID())
	t.Logf("hostile answers cost %d MiB of memory", (peak-before)>>20)
	if peak-before > 64<<20 {
		t.Error("that is too much")
	}
	metrics := get(t, "http://"+shop.Health+"/metrics")
	for _, result := range []string{"refused", "no_sequence", "same_sequence", "too_large", "redirect", "status"} {
		if !strings.Contains(metrics, fmt.Sprintf("merlon_ca_federation_fetches_total{federated_trust_domain=%q,result=%q}", "spire.test", result)) {
			t.Errorf("no metric of a fetch that was %s", result)
		}
	}
	s.spoil.Store(nil)
	shop.Merlon("federation", "refresh", "spire.test")
	if h := healthOf(t, shop, "spire.test"); h.In != "ok" {
		t.Errorf("after it is well again: %+v", h)
	}

	// Emptied: nobody there is trusted any more, with no operator's help here.
	ours := services.Source(t, shop)
	td := spiffeid.RequireTrustDomainFromString("spire.test")
	stage.Eventually(t, "the workload knows their root", func() error {
		_, err := ours.GetX509BundleForTrustDomain(td)
		return err
	})
	partnerGrants(t, shop, &stage.Domain{TrustDomain: "spire.test"})
	url := services.Serve(t, services.Open(t, shop), http.HandlerFunc(streams))
	peer := &http.Client{Transport: &http.Transport{TLSClientConfig: tlsconfig.MTLSClientConfig(s.Leaf("/peer").X509SVID(), ours, tlsconfig.AuthorizeID(spiffeid.RequireFromString(shop.ID("/me"))))}}
	defer peer.CloseIdleConnections()
	services.WantReason(t, "a peer of theirs is let in", peer, url, "200 OK")
	stream := openStream(t, peer, url)
	// First the endpoint is out of order. Who polls comes again when it would have come
	// anyway, and not sooner (F-3): the document before said ten seconds.
	visits := make(chan time.Time, 100)
	var failing atomic.Bool
	failing.Store(true)
	var answer http.HandlerFunc = func(w http.ResponseWriter, _ *http.Request) {
		visits <- time.Now()
		if failing.CompareAndSwap(true, false) {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		fmt.Fprint(w, `{"keys":[],"spiffe_sequence":2,"spiffe_refresh_hint":10}`) // go-spiffe would write null for the list
	}
	s.spoil.Store(&answer)
	waitLong(t, "nobody of theirs is trusted", func() error {
		b, err := ours.GetX509BundleForTrustDomain(td)
		if err == nil && len(b.X509Authorities()) > 0 {
			return fmt.Errorf("%d roots", len(b.X509Authorities()))
		}
		return nil
	})
	isCut(t, stream)
	peer.CloseIdleConnections()
	if got := services.Reason(peer, url); got == "200 OK" {
		t.Error("a peer of theirs is let in still")
	}
	if first, second := <-visits, <-visits; second.Sub(first) < 7*time.Second {
		t.Errorf("after a failure it comes again within %s; want at the next poll", second.Sub(first))
	}
}

// document answers with a trust bundle of that sequence number.
func document(t *testing.T, b *spiffebundle.Bundle, sequence uint64) http.HandlerFunc {
	t.Helper()
	b = b.Clone()
	b.SetSequenceNumber(sequence)
	b.SetRefreshHint(10 * time.Second)
	text, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(text) }
}

// roots answers with n roots of one name.
func roots(t *testing.T, n int) http.HandlerFunc {
	t.Helper()
	ca := forge.New(t, "spire.test")
	b := ca.Bundle()
	for range n {
		b.AddX509Authority(ca.Again())
	}
	return document(t, b, 7)
}

// go-spiffe's watcher follows our endpoint, also over a new root.
func TestGoSPIFFEWatchesUs(t *testing.T) {
	t.Parallel()
	d := stage.CAAlone(t, "", nil, "trust_refresh_hint: 10s")
	td := spiffeid.RequireTrustDomainFromString(d.TrustDomain)
	first, err := spiffebundle.Parse(td, []byte(d.Merlon("trust", "show", "-o", "jwks")))
	if err != nil {
		t.Fatal(err)
	}
	w := &watcher{held: first, updates: make(chan *spiffebundle.Bundle, 16)}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- federation.WatchBundle(ctx, td, d.HTTPS+"/v1/trust/bundle", w, federation.WithSPIFFEAuth(w, spiffeid.RequireFromString(d.ID("/ca"))))
	}()
	defer func() {
		cancel()
		<-done
	}()
	<-w.updates
	d.Merlon("authority", "prepare", "--kind", "x509-root")
	for {
		select {
		case b := <-w.updates:
			if len(b.X509Authorities()) == 2 {
				return
			}
		case <-time.After(time.Minute):
			t.Fatal("the new root did not come")
		}
	}
}

// watcher is a go-spiffe watcher that polls quickly and verifies by what it has.
type watcher struct {
	held    *spiffebundle.Bundle
	updates chan *spiffebundle.Bundle
}

func (w *watcher) NextRefresh(time.Duration) time.Duration { return time.Second }
func (w *watcher) OnUpdate(b *spiffebundle.Bundle)         { w.updates <- b }
func (w *watcher) OnError(error)                           {}
func (w *watcher) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	return w.held.GetX509BundleForTrustDomain(td)
}

// serveTLS serves until the test ends, and gives the address.
func serveTLS(t *testing.T, config *tls.Config, handler http.Handler) string {
	t.Helper()
	lis, err := tls.Listen("tcp", "127.0.0.1:0", config)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: handler, ReadHeaderTimeout: 5 * time.Second, ErrorLog: log.New(io.Discard, "", 0)}
	go srv.Serve(lis)
	t.Cleanup(func() { srv.Close() })
	return lis.Addr().String()
}

// serveFiles is serveTLS with a certificate from files.
func serveFiles(t *testing.T, files stage.EtcdFiles, handler http.Handler) string {
	t.Helper()
	cert, err := tls.LoadX509KeyPair(files.Cert, files.Key)
	if err != nil {
		t.Fatal(err)
	}
	return serveTLS(t, &tls.Config{Certificates: []tls.Certificate{cert}}, handler)
}

// codeOf is the exit code of a command that failed.
func codeOf(err error) int {
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return exit.ExitCode()
	}
	return -1
}

func get(t *testing.T, url string) string {
	t.Helper()
	client := &http.Client{Timeout: 10 * time.Second}
	defer client.CloseIdleConnections()
	res, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// tokenOf reads what an invite says.
func tokenOf(t *testing.T, text string) (token struct{ URL string }) {
	t.Helper()
	raw, err := base64.RawURLEncoding.DecodeString(strings.TrimPrefix(strings.TrimSpace(text), "merlon-federation-1."))
	if err == nil {
		err = json.Unmarshal(raw, &token)
	}
	if err != nil {
		t.Fatal(err)
	}
	return token
}
