// The client against servers that mean no good: each costs bounded time and memory, and
// nothing of it is taken.

package federation

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"merlon.dev/ca/internal/trust"
	"merlon.dev/sdk/svid/forge"
)

var partner = spiffeid.RequireTrustDomainFromString("partner.test")

// web is a https_web server with a certificate for 127.0.0.1, and its source.
func web(t *testing.T, handler http.HandlerFunc) (*httptest.Server, *Source) {
	t.Helper()
	srv := httptest.NewUnstartedServer(handler)
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.StartTLS()
	t.Cleanup(srv.Close)
	return srv, &Source{
		TrustDomain: partner, URL: srv.URL + "/bundle", Profile: Web, SetAt: time.Now(),
		Authorities: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})),
	}
}

func none() x509bundle.Source { return x509bundle.NewSet() }

func TestFetchByTheWeb(t *testing.T) {
	_, src := web(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet || r.URL.Path != "/bundle" || r.Header.Get("Authorization") != "" || r.Header.Get("Accept-Encoding") != "" || len(r.TLS.PeerCertificates) > 0 {
			t.Errorf("asked with %s %s, %v", r.Method, r.URL, r.Header)
		}
		fmt.Fprint(w, `{"keys":[]}`)
	})
	if body, err := Fetch(t.Context(), src, none()); err != nil || string(body) != `{"keys":[]}` {
		t.Errorf("%q, %v", body, err)
	}
}

func TestHostileServers(t *testing.T) {
	endless := func(w http.ResponseWriter, _ *http.Request) {
		for part := bytes.Repeat([]byte("a"), 1<<16); ; {
			if _, err := w.Write(part); err != nil {
				return
			}
		}
	}
	for name, tt := range map[string]struct {
		handler http.HandlerFunc
		reason  string
	}{
		"100 MB announced": {func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Content-Length", "100000000") }, TooLarge},
		"without an end":   {endless, TooLarge},
		"status 500": {func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusInternalServerError)
			fmt.Fprint(w, `{"keys":[]}`)
		}, BadStatus},
		"status 203": {func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusNonAuthoritativeInfo)
			fmt.Fprint(w, `{"keys":[]}`)
		}, BadStatus},
		"status 204": {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }, BadStatus},
		"gzip": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			fmt.Fprint(w, "x")
		}, BadStatus},
		"moved for good": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "/other", http.StatusMovedPermanently)
		}, Redirected},
		"308": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "/other", http.StatusPermanentRedirect)
		}, Redirected},
		"to http": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://"+r.Host+"/x", http.StatusFound)
		}, Redirected},
		"to a user": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://u:p@"+r.Host+"/x", http.StatusFound)
		}, Redirected},
		"to a file": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "file:///etc/passwd", http.StatusFound)
		}, Redirected},
		"in a circle": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, r.URL.Path, http.StatusTemporaryRedirect)
		}, Redirected},
		"to nowhere": {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusFound) }, Redirected},
		"to loopback": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://127.0.0.1:1/", http.StatusFound)
		}, Redirected},
		"to localhost": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://localhost:1/", http.StatusFound)
		}, Redirected},
		"to metadata": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://169.254.169.254/", http.StatusFound)
		}, Redirected},
		"huge header": {func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X", strings.Repeat("a", 1<<20)) }, Unreachable},
		"cut off": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			fmt.Fprint(w, "x")
		}, Unreachable},
	} {
		t.Run(name, func(t *testing.T) {
			_, src := web(t, tt.handler)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			body, err := Fetch(t.Context(), src, none())
			runtime.ReadMemStats(&after)
			if got := ReasonOf(err); got != tt.reason || body != nil {
				t.Errorf("%s, %.40q; want %s", got, body, tt.reason)
			}
			if used := after.TotalAlloc - before.TotalAlloc; used > 16*trust.MaxDocumentBytes {
				t.Errorf("it took %d bytes of memory", used)
			}
		})
	}
}

// A body that never comes to an end ends with the deadline, also where it drips and the
// context has none; a fetch that nobody wants any more ends at once.
func TestSlowServer(t *testing.T) {
	for what, tt := range map[string]struct {
		path string
		most time.Duration
		stop bool
	}{
		"nothing more":   {"/hangs", 200 * time.Millisecond, false},
		"drop by drop":   {"/drips", 200 * time.Millisecond, false},
		"in a circle":    {"/circle", 200 * time.Millisecond, false},
		"no more wanted": {"/drips", time.Hour, true},
	} {
		t.Run(what, func(t *testing.T) {
			begun, left := make(chan struct{}, maxRedirects+1), make(chan struct{}, maxRedirects+1)
			_, src := web(t, func(w http.ResponseWriter, r *http.Request) {
				defer func() { left <- struct{}{} }()
				if strings.HasPrefix(r.URL.Path, "/circle") { // each answer well within the deadline
					time.Sleep(100 * time.Millisecond)
					http.Redirect(w, r, r.URL.Path+"x", http.StatusFound)
					return
				}
				fmt.Fprint(w, `{"keys":`)
				w.(http.Flusher).Flush()
				begun <- struct{}{}
				for r.Context().Err() == nil {
					if r.URL.Path == "/drips" {
						fmt.Fprint(w, " ")
						w.(http.Flusher).Flush()
					}
					time.Sleep(10 * time.Millisecond)
				}
			})
			src.URL = strings.Replace(src.URL, "/bundle", tt.path, 1)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if tt.stop {
				go func() {
					<-begun
					cancel()
				}()
			}
			if body, err := fetchWithin(ctx, tt.most, src, none()); ReasonOf(err) != Unreachable {
				t.Errorf("%q, %v", body, err)
			}
			<-left // the connection was given up
		})
	}
}

// Temporary redirects on one host are followed, and not remembered.
func TestTemporaryRedirect(t *testing.T) {
	for _, code := range []int{http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect} {
		asked := 0
		_, src := web(t, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/bundle" {
				asked++
				http.Redirect(w, r, "/elsewhere", code)
				return
			}
			fmt.Fprint(w, "{}")
		})
		for range 2 {
			if body, err := Fetch(t.Context(), src, none()); err != nil || string(body) != "{}" {
				t.Errorf("%d: %q, %v", code, body, err)
			}
		}
		if asked != 2 {
			t.Errorf("%d: the URL was asked %d times of 2", code, asked)
		}
	}
}

func TestAnotherWebServer(t *testing.T) {
	_, src := web(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "{}") })
	other := *src
	other.URL = strings.Replace(src.URL, "127.0.0.1", "localhost", 1) // its certificate has no such name
	if _, err := Fetch(t.Context(), &other, none()); ReasonOf(err) != Untrusted {
		t.Errorf("another name: %v", err)
	}
	unknown := *src
	unknown.Authorities = ""
	if _, err := Fetch(t.Context(), &unknown, none()); ReasonOf(err) != Untrusted {
		t.Errorf("an authority that the system does not know: %v", err)
	}
}

// By https_spiffe only the configured SPIFFE ID answers, verified by the latest bundle
// of its own trust domain, by our own verifier.
func TestFetchBySPIFFE(t *testing.T) {
	ca, other := forge.New(t, partner.Name()), forge.New(t, partner.Name())
	id := spiffeid.RequireFromString("spiffe://partner.test/ca")
	serve := func(leaf *forge.SVID) *Source {
		srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "{}") }))
		srv.Config.ErrorLog = log.New(io.Discard, "", 0)
		srv.TLS = &tls.Config{Certificates: []tls.Certificate{leaf.Certificate()}}
		srv.StartTLS()
		t.Cleanup(srv.Close)
		return &Source{TrustDomain: partner, URL: srv.URL, Profile: SPIFFE, EndpointID: id}
	}
	latest := x509bundle.NewSet(ca.Bundle().X509Bundle())
	for name, tt := range map[string]struct {
		leaf      *forge.SVID
		verifiers x509bundle.Source
		reason    string
	}{
		"the server":                {ca.Leaf("/ca"), latest, "ok"},
		"another SPIFFE ID":         {ca.Leaf("/web"), latest, Untrusted},
		"an earlier root":           {other.Leaf("/ca"), latest, Untrusted},
		"without a path":            {ca.Leaf(""), latest, Untrusted},
		"of another trust domain":   {ca.Leaf("/", forge.URIs("spiffe://other.test/ca")), latest, Untrusted},
		"nobody to verify it by":    {ca.Leaf("/ca"), none(), Untrusted},
		"what go-spiffe would take": {ca.Leaf("/ca", forge.Extension(forge.KeyUsage, false, []byte{3, 2, 7, 128})), latest, Untrusted},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := Fetch(t.Context(), serve(tt.leaf), tt.verifiers); ReasonOf(err) != tt.reason {
				t.Errorf("%v; want %s", err, tt.reason)
			}
		})
	}
}

func TestPublicOnly(t *testing.T) {
	for address, public := range map[string]bool{
		"93.184.216.34:443": true, "[2606:2800:220:1::1]:443": true,
		"127.0.0.1:443": false, "127.9.9.9:443": false, "[::1]:443": false, "0.0.0.0:443": false, "[::]:443": false, "10.1.2.3:443": false, "172.16.0.1:443": false,
		"192.168.1.1:443": false, "169.254.169.254:443": false, "100.64.0.1:443": false, "[fe80::1]:443": false, "[fc00::1]:443": false, "224.0.0.1:443": false,
		"[::ffff:127.0.0.1]:443": false, "[::ffff:10.0.0.1]:443": false, "[64:ff9b::7f00:1]:443": false, "[2002:7f00:1::]:443": false, "198.18.0.1:443": false, "240.0.0.1:443": false,
	} {
		if err := publicOnly("tcp", address, syscall.RawConn(nil)); (err == nil) != public {
			t.Errorf("%s: %v; want public = %t", address, err, public)
		}
	}
}

// The metadata service of a cloud is asked nothing, whoever names it.
func TestLinkLocalAddressesAreNotAsked(t *testing.T) {
	for address, ok := range map[string]bool{
		"127.0.0.1:443": true, "10.1.2.3:443": true, "169.254.169.254:443": false, "[fe80::1]:443": false, "[::ffff:169.254.169.254]:443": false, "0.0.0.0:443": false, "224.0.0.1:443": false,
	} {
		if err := notLinkLocal("tcp", address, syscall.RawConn(nil)); (err == nil) != ok {
			t.Errorf("%s: %v; want asked = %t", address, err, ok)
		}
	}
}

// What the other side writes moves no cursor (T36).
func TestErrorsArePrintable(t *testing.T) {
	err := failure(Refused, "what it says: %s", "\x1b[2K\nforged\u2028line")
	if got := err.Error(); strings.ContainsAny(got, "\x1b\n\u2028") || !strings.Contains(got, "forged") {
		t.Errorf("%q", got)
	}
	_, src := web(t, func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		fmt.Fprint(conn, "HTTP/1.1 500 \x1b]0;owned\a\r\nContent-Length: 0\r\n\r\n")
	})
	if _, err := Fetch(t.Context(), src, none()); err == nil || strings.Contains(err.Error(), "\x1b") || strings.Contains(err.Error(), "owned") {
		t.Errorf("%q", err)
	}
}

func TestSourcesThatMakeNoSense(t *testing.T) {
	id := spiffeid.RequireFromString("spiffe://partner.test/ca")
	for want, s := range map[string]Source{
		"https://":    {URL: "http://partner.test/", Profile: Web},
		"user":        {URL: "https://u@partner.test/", Profile: Web},
		"no host":     {URL: "https:///x", Profile: Web},
		"fragment":    {URL: "https://partner.test/#x", Profile: Web},
		"inferred":    {URL: "https://partner.test/"},
		"profile":     {URL: "https://partner.test/", Profile: "https"},
		"no SPIFFE":   {URL: "https://partner.test/", Profile: Web, EndpointID: id},
		"endpoint_sp": {URL: "https://partner.test/", Profile: SPIFFE},
		"web_author":  {URL: "https://partner.test/", Profile: SPIFFE, EndpointID: id, Authorities: "x"},
		"in PEM":      {URL: "https://partner.test/", Profile: Web, Authorities: "x"},
		"bytes":       {URL: "https://partner.test/" + strings.Repeat("a", maxURLBytes), Profile: Web},
	} {
		if err := s.Check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v; want %q", s, err, want)
		}
	}
}

// What is kept comes back.
func TestRecords(t *testing.T) {
	now := time.Now().UTC().Round(0)
	src := Source{TrustDomain: partner, URL: "https://partner.test/", Profile: SPIFFE, EndpointID: spiffeid.RequireFromString("spiffe://partner.test/ca"), SetAt: now}
	src.Outcome = src.After(nil, failure(BadStatus, "away"), now).After(nil, errors.New("still"), now.Add(time.Minute))
	if src.Failure != "still" || src.Reason != "error" || !src.FailingSince.Equal(now) || !src.FetchedAt.IsZero() {
		t.Errorf("outcome of two failures: %+v", src.Outcome)
	}
	op, err := src.Put()
	if err != nil {
		t.Fatal(err)
	}
	got, err := DecodeSource(kvOf(op))
	if err != nil || got.URL != src.URL || got.EndpointID != src.EndpointID || got.Failure != "still" || got.Reason != "error" || !got.SetAt.Equal(now) {
		t.Errorf("%+v, %v", got, err)
	}
	minute := &trust.Document{RefreshHint: time.Minute, Ignored: make([]string, maxIgnored+3)}
	if src.Outcome = src.After(minute, nil, now).After(nil, errors.New("x"), now); len(src.Ignored) != maxIgnored+1 || src.Ignored[maxIgnored] != "and 3 more" {
		t.Errorf("keys ignored by the last document that was had: %q", src.Ignored)
	}
	if src.Outcome = src.After(minute, nil, now); src.RefreshHint != time.Minute || src.Failure != "" || !src.FailingSince.IsZero() || !src.FetchedAt.Equal(now) {
		t.Errorf("outcome of a success: %+v", src.Outcome)
	}
}

// An invite counts who comes by the URL that was given out, and by an earlier one until
// the new one is seen.
func TestInvitesAreReplaced(t *testing.T) {
	now := time.Now().UTC().Round(0)
	first := NewInvite(partner, now, nil)
	if unseen := NewInvite(partner, now, first); unseen.Previous != "" || unseen.Is(first.Reader) {
		t.Errorf("an earlier invite that nobody came by counts: %+v", unseen)
	}
	if first = first.Saw(first.Reader, 7, now); !first.FetchedAt.Equal(now) || first.Sequence != 7 {
		t.Errorf("seen: %+v", first)
	}
	second := NewInvite(partner, now, first)
	third := NewInvite(partner, now, second) // nobody has come by the second
	for _, i := range []*Invite{second, third} {
		if i.Previous != first.Reader || !i.FetchedAt.Equal(now) || i.Sequence != 7 || !i.Is(first.Reader) || !i.Is(i.Reader) || i.Is("") {
			t.Errorf("a new invite: %+v; want that of before to count", i)
		}
	}
	later := now.Add(time.Minute)
	third = third.Saw(first.Reader, 8, later)
	if third.Previous != first.Reader || third.Sequence != 8 || !third.FetchedAt.Equal(later) {
		t.Errorf("seen by the earlier URL: %+v", third)
	}
	op, err := third.Put()
	if err != nil {
		t.Fatal(err)
	}
	back, err := DecodeInvite(kvOf(op))
	if err != nil || back.Reader != third.Reader || back.Previous != third.Previous || !IsReader(back.Reader) {
		t.Errorf("%+v, %v; want %+v", back, err, third)
	}
	if seen := third.Saw(third.Reader, 9, later); seen.Previous != "" || seen.Is(first.Reader) {
		t.Errorf("seen by the new URL: %+v", seen)
	}
}

func TestTokens(t *testing.T) {
	now := time.Now()
	token := Token{For: "shop.test", TrustDomain: "partner.test", URL: "https://partner.test/x", Profile: Web, Bundle: []byte(`{"keys":[]}`), Expires: now.Add(time.Hour)}
	text, err := token.String()
	if err != nil {
		t.Fatal(err)
	}
	own := spiffeid.RequireTrustDomainFromString("shop.test")
	got, err := ParseToken(" "+text[:40]+"\r\n  "+text[40:]+"\n", now)
	if err != nil {
		t.Fatal(err)
	}
	if src, err := got.Source(own, now); err != nil || src.TrustDomain != partner || src.URL != token.URL {
		t.Errorf("%+v, %v", src, err)
	}
	if _, err := got.Source(partner, now); err == nil || !strings.Contains(err.Error(), "invites") {
		t.Errorf("for another CA: %v", err)
	}
	tampered := func(old, new string) string {
		raw, err := base64.RawURLEncoding.DecodeString(strings.TrimPrefix(text, tokenPrefix))
		if err != nil {
			t.Fatal(err)
		}
		changed := strings.Replace(string(raw), old, new, 1)
		if changed == string(raw) {
			t.Fatalf("%s is not in %s", old, raw)
		}
		return tokenPrefix + base64.RawURLEncoding.EncodeToString([]byte(changed))
	}
	eternal := token
	eternal.Expires = now.Add(InviteTTL + maxSkew + time.Minute)
	long, err := eternal.String()
	if err != nil {
		t.Fatal(err)
	}
	for what, text := range map[string]string{
		"expired": text, "for ever": long, "an unknown member": tampered(`{`, `{"x":1,`), "a member twice": tampered(`{`, `{"for":"shop.test",`),
		"a member in capitals": tampered(`"for"`, `"FOR"`), "text behind": tampered(`}`, `} `), "damaged": text[:len(text)-5], "nothing": "", "a join token": "abc", "too long": tokenPrefix + strings.Repeat("a", MaxTokenBytes),
	} {
		at := now
		if what == "expired" {
			at = now.Add(2 * time.Hour)
		}
		if _, err := ParseToken(text, at); err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
}

func FuzzParseToken(f *testing.F) {
	text, err := Token{For: "shop.test", TrustDomain: "partner.test", URL: "https://partner.test/x", Profile: Web, Bundle: []byte(`{}`), Expires: time.Unix(1000, 0).UTC()}.String()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add(tokenPrefix)
	f.Fuzz(func(t *testing.T, text string) {
		token, err := ParseToken(text, time.Unix(1, 0))
		if err != nil {
			return
		}
		if src, err := token.Source(spiffeid.RequireTrustDomainFromString("shop.test"), time.Unix(1, 0)); err == nil && (src.Check() != nil || token.For != "shop.test") {
			t.Errorf("%+v is a source of %q", src, text)
		}
	})
}

// A URL that can never work takes the place of none that does.
func TestURLsThatCannotWork(t *testing.T) {
	for text, ok := range map[string]bool{
		"https://a.test:1/": true, "https://a.test:65535/x": true, "https://a.test": true, "https://10.1.2.3:8443/": true, "https://[::1]/": true, "https://127.0.0.1:1/": true,
		"https://a.test:0/": false, "https://a.test:00/": false, "https://a.test:65536/": false, "https://a.test:99999999999999999999/": false,
		"https://169.254.169.254/": false, "https://[fe80::1]/": false, "https://[fe80::1%25eth0]/": false, "https://[::ffff:169.254.169.254]/": false,
		"https://0.0.0.0/": false, "https://[::]:1/": false, "https://224.0.0.1/": false, "https://[ff02::1]/": false,
		"https://a b.test/": false, "https://a.test /x": false, "https://a%20b.test/": false, "https://a\u00a0b.test/": false, "https://a\u2003.test/": false, "https:// /": false,
		"https://a.test/#": false, "https://a.test#": false, "https://a.test/x?y#": false,
	} {
		if err := CheckURL(text); (err == nil) != ok {
			t.Errorf("%q: %v; want it taken = %t", text, err, ok)
		}
	}
}

// Where an operator's name leads to is looked at when the connection is made.
func TestConnectionsAreNotMadeToUnspecifiedAddresses(t *testing.T) {
	srv, src := web(t, func(http.ResponseWriter, *http.Request) { t.Error("it was asked") })
	u, err := url.Parse(strings.Replace(srv.URL, "127.0.0.1", "0.0.0.0", 1))
	if err != nil {
		t.Fatal(err)
	}
	config, err := src.tls(none())
	if err != nil {
		t.Fatal(err)
	}
	config.ServerName = "127.0.0.1"
	if _, _, err := get(t.Context(), u, config, false); ReasonOf(err) != Redirected || !strings.Contains(err.Error(), "no address of a bundle endpoint") {
		t.Errorf("%v; want the address refused", err)
	}
}

// Whatever a URL is, what is accepted is https with a host and nobody's password.
func TestCheckURLProperty(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		text := rapid.SampledFrom([]string{"https://", "http://", "https:", "//", "HTTPS://"}).Draw(rt, "scheme") +
			rapid.SampledFrom([]string{"", "u@", "u:p@", "@"}).Draw(rt, "user") + rapid.SampledFrom([]string{"a.test", "", "[::1]", "a.test:8443", ":1"}).Draw(rt, "host") +
			rapid.SampledFrom([]string{"", "/", "/x?y", "/#z", "#"}).Draw(rt, "rest")
		if CheckURL(text) == nil && (!strings.HasPrefix(strings.ToLower(text), "https://") || strings.Contains(text, "@") || strings.Contains(text, "#")) {
			rt.Errorf("%q is accepted", text)
		}
	})
}
