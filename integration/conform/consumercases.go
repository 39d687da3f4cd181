// What is served to a bundle consumer by https_web, in turn, and what it has to have
// then.

package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"time"

	"merlon.dev/sdk/svid/forge"
)

func encodeCert(a *forge.Authority) string {
	return base64.StdEncoding.EncodeToString(a.Cert.Raw)
}

// stand is the endpoint of one trust domain with all that can be served there. Once err
// is set, because the consumer cannot be asked any more, nothing is done.
type stand struct {
	*relation
	r    *report
	keys ring
	cert *tls.Certificate // the server's own
	err  error
}

// answers is one document at the bundle's place, shown by the server's own certificate.
func (s *stand) answers(doc any) answer { return s.shown(page(encodeJSON(doc)), s.cert) }

func (s *stand) shown(at http.HandlerFunc, certs ...*tls.Certificate) answer {
	return answer{pages: map[string]http.HandlerFunc{bundlePath: at}, certs: certs}
}

// offer serves a, and gives what the consumer has then.
func (s *stand) offer(ctx context.Context, a answer, byConnection bool) held {
	if s.err != nil {
		return nil
	}
	var got held
	got, s.err = s.after(ctx, a, byConnection)
	return got
}

// takes serves what has to be taken: then the consumer has want.
func (s *stand) takes(ctx context.Context, id, what string, a answer, want held) {
	got := s.offer(ctx, a, false)
	if s.err != nil {
		return
	}
	s.r.check(id, consumer, failIf(!slices.Equal(got, want), "%s: the consumer has %s; want %s", what, got, want))
	s.has = got // what follows is judged by what is so
}

// next is takes for a sound document of these names, of the next sequence.
func (s *stand) next(ctx context.Context, id, what string, names ...string) {
	s.takesWith(ctx, id, what, names)
}

// takesWith is next with more keys, which are to be ignored.
func (s *stand) takesWith(ctx context.Context, id, what string, names []string, ignored ...any) {
	s.sequence++
	doc := s.keys.bundle(s.sequence, names...)
	doc["keys"] = append(doc["keys"].([]any), ignored...)
	s.takes(ctx, id, what, s.answers(doc), s.keys.want(names...))
}

// keeps serves what must not be taken: the consumer has what it had.
func (s *stand) keeps(ctx context.Context, id, what string, a answer) {
	s.keepsOf(ctx, id, what, a, false)
}

// refuses is keeps where the consumer should not get as far as to ask for anything.
func (s *stand) refuses(ctx context.Context, id, what string, a answer) {
	s.keepsOf(ctx, id, what, a, true)
}

func (s *stand) keepsOf(ctx context.Context, id, what string, a answer, byConnection bool) {
	changed := s.changes(ctx, a, byConnection)
	if s.err == nil {
		s.r.check(id, consumer, failIf(changed != "", "%s is taken: %s", what, changed))
	}
}

// wary is keeps for what the standards leave open.
func (s *stand) wary(ctx context.Context, id, what string, a answer) {
	if changed := s.changes(ctx, a, false); s.err == nil && changed != "" {
		s.r.remark(id, "%s is taken: %s", what, changed)
	}
}

// changes says what a has changed, if anything, and puts it right again.
func (s *stand) changes(ctx context.Context, a answer, byConnection bool) string {
	before := s.has
	got := s.offer(ctx, a, byConnection)
	if s.err != nil || slices.Equal(got, before) {
		return ""
	}
	s.sequence += 2 // what was taken had the next one
	names := slices.DeleteFunc(slices.Clone(before), func(name string) bool { return s.keys[name] == nil })
	s.has = s.offer(ctx, s.answers(s.keys.bundle(s.sequence, names...)), false)
	return fmt.Sprintf("the consumer had %s, and has %s", before, got)
}

// checkWeb makes the checks by https_web.
func (o consumerOptions) checkWeb(ctx context.Context, r *report, l *relation, dir string) error {
	authority := forge.New(failing{}, "authority.invalid")
	file := filepath.Join(dir, "web-ca.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: authority.Cert.Raw}), 0o600); err != nil {
		return err
	}
	s := &stand{relation: l, r: r, keys: newRing(l, webDomain, "root a", "root b", "root c", "root d"), cert: webCert(authority, l.host())}
	s.serve(s.answers(s.undefined()))
	if _, _, err := o.driver.call(ctx, "follow", webDomain, "https_web", l.url(), file); err != nil {
		return err
	}
	s.takes(ctx, "B1", "a document without sequence and hint, and with members that no standard defines", s.answers(s.undefined()), s.keys.want("root a"))
	s.next(ctx, "F-6", "a sound bundle, by https_web", "root a", "root b")
	s.takesWith(ctx, "B6", "an empty list of keys", nil)
	s.next(ctx, "B6", "a sound bundle after an empty one", "root a")
	s.checkIgnored(ctx)
	s.checkOrder(ctx)
	s.checkRedirects(ctx)
	s.checkNames(ctx, authority)
	s.checkPrudence(ctx)
	s.checkPolling(ctx, o.polling)
	// Without an end that is taken, what was kept before would say nothing.
	s.next(ctx, "F-6", "a sound bundle in the end, by https_web", "root a", "root d")
	return s.err
}

// webCert is a certificate of the web for host.
func webCert(authority *forge.Authority, host string) *tls.Certificate {
	cert := authority.Leaf("/web", forge.URIs(), forHost(host)).Certificate()
	return &cert
}

// undefined is the first document: it has nothing that is not needed, and members that
// no standard knows.
func (s *stand) undefined() map[string]any {
	return map[string]any{
		"org.example/other": map[string]any{"a": 1},
		"keys":              []any{s.keys.changed("root a", map[string]any{"org.example/other": true}), s.keys.keysOf("root a")[1]},
	}
}

// checkIgnored: what is to be ignored takes nothing else with it.
func (s *stand) checkIgnored(ctx context.Context) {
	a, b := []string{"root a"}, []string{"root a", "root b"}
	second := map[string]any{"x5c": []string{encodeCert(s.keys["root c"]), encodeCert(s.keys["root d"])}}
	s.sequence++
	doc := s.keys.bundle(s.sequence, a...)
	doc["keys"] = append(doc["keys"].([]any), s.keys.changed("root c", second))
	s.takes(ctx, "X16", "two certificates in x5c, of which the first counts", s.answers(doc), held{"root a", "root a's JWT key", "root c"})
	for _, c := range []struct {
		id, what string
		change   map[string]any
	}{
		{"X16", "a key without x5c", map[string]any{"x5c": nil}},
		{"X16", "a key whose x5c is empty", map[string]any{"x5c": []string{}}},
		{"B5", "a key of an unknown kty", map[string]any{"kty": "MOON"}},
		{"B5", "a key of an unknown use", map[string]any{"use": "moon-svid"}},
		{"B5", "a key without use", map[string]any{"use": nil}},
		{"B5", "a key of use X509-SVID, in capitals", map[string]any{"use": "X509-SVID"}},
	} {
		s.takesWith(ctx, c.id, c.what+" beside sound ones", b, s.keys.changed("root d", c.change))
		a, b = b, a
	}
}

// checkOrder: what is older is not taken, also where numbers are beyond what a float64
// tells apart.
func (s *stand) checkOrder(ctx context.Context) {
	older := func(sequence uint64) answer { return s.answers(s.keys.bundle(sequence, "root d")) }
	s.keeps(ctx, "F-4", "an older sequence", older(s.sequence-1))
	s.sequence = 1<<53 + 1
	s.next(ctx, "F-4", "sequence 2^53+2", "root a", "root b")
	s.keeps(ctx, "F-4", "sequence 2^53+1 after 2^53+2", older(1<<53+1))
}

// checkRedirects: to what is no URL of a bundle endpoint nobody goes; a temporary
// redirect is followed, and none is remembered.
func (s *stand) checkRedirects(ctx context.Context) {
	evil := s.keys.bundle(s.sequence+1, "root d")
	plain, err := startPlain(ctx, s.host(), encodeJSON(evil))
	if err != nil {
		s.err = err
		return
	}
	defer plain.srv.Close()
	s.keeps(ctx, "F-9", "what a redirect to http leads to", s.shown(redirect(http.StatusFound, plain.url), s.cert))
	s.r.check("F-9", consumer, failIf(plain.seen() > 0, "a redirect to http is followed: %d requests", plain.seen()))
	withUser := url.URL{Scheme: "https", User: url.UserPassword("u", "p"), Host: s.lis.Addr().String(), Path: "/user"}
	s.keeps(ctx, "F-9", "what a redirect to a URL with a user leads to", s.leads(http.StatusFound, withUser.String(), "/user", s.keys.bundle(s.sequence+1, "root d")))

	s.sequence++
	s.takes(ctx, "F-12", "a temporary redirect", s.leads(http.StatusTemporaryRedirect, s.base()+"/elsewhere", "/elsewhere", s.keys.bundle(s.sequence, "root a", "root c")), s.keys.want("root a", "root c"))
	s.back(ctx, "a temporary redirect", "/elsewhere", "root a", "root b")
	s.sequence++
	moved := s.leads(http.StatusMovedPermanently, s.base()+"/moved", "/moved", s.keys.bundle(s.sequence, "root a", "root c"))
	s.has = s.offer(ctx, moved, false) // followed or not
	s.back(ctx, "a permanent redirect", "/moved", "root a")
}

// leads is an answer that redirects to a page of its own.
func (s *stand) leads(code int, to, path string, doc any) answer {
	a := s.shown(redirect(code, to), s.cert)
	a.pages[path] = page(encodeJSON(doc))
	return a
}

// back: after a redirect it is the configured URL that counts.
func (s *stand) back(ctx context.Context, what, path string, names ...string) {
	s.sequence++
	a := s.answers(s.keys.bundle(s.sequence, names...))
	a.pages[path] = page(encodeJSON(s.keys.bundle(s.sequence+1, "root d")))
	s.takes(ctx, "F-12", "the URL itself after "+what, a, s.keys.want(names...))
}

// checkNames: a https_web server is who the URL says.
func (s *stand) checkNames(ctx context.Context, authority *forge.Authority) {
	evil := func() http.HandlerFunc { return page(encodeJSON(s.keys.bundle(s.sequence+1, "root d"))) }
	s.refuses(ctx, "F-13", "what a server says whose certificate is for another host", s.shown(evil(), webCert(authority, "other.conform.test")))
	s.refuses(ctx, "F-13", "what a server says whose certificate is of an authority that is not known", s.shown(evil(), webCert(forge.New(failing{}, "authority.invalid"), s.host())))
}

// largeDocument is more than any trust bundle needs.
const largeDocument = 32 << 20

// checkPrudence: what the standards do not say, and a careful consumer refuses.
func (s *stand) checkPrudence(ctx context.Context) {
	evil := func() []byte { return encodeJSON(s.keys.bundle(s.sequence+1, "root d")) }
	s.wary(ctx, "F-4", "a document with other keys and the sequence of the last one", s.answers(s.keys.bundle(s.sequence, "root d")))
	text := evil()
	s.wary(ctx, "F-11", "a bundle that comes with status 500", s.shown(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusInternalServerError)
		_, _ = w.Write(text)
	}, s.cert))
	s.wary(ctx, "F-11", "a document of 32 MiB", s.shown(page(append(bytes.Repeat([]byte(" "), largeDocument), evil()...)), s.cert))
	s.wary(ctx, "B4", "a document with two lists of keys", s.shown(page(append([]byte(`{"keys":[],`), evil()[1:]...)), s.cert))
}

// hint is the refresh hint of documents here, the least that consumers go by.
const hint = 10 * time.Second

// checkPolling counts visits: as often as the hint says, and not more often while the
// endpoint fails; without a hint every five minutes.
func (s *stand) checkPolling(ctx context.Context, watch time.Duration) {
	if watch == 0 || s.err != nil {
		return
	}
	most := int(watch/(hint/2)) + 1
	s.sequence++
	well := s.count(ctx, watch, s.answers(s.keys.bundle(s.sequence, "root a")))
	broken := s.count(ctx, watch, s.shown(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) }, s.cert))
	s.sequence++
	doc := s.keys.bundle(s.sequence, "root a", "root b")
	delete(doc, "spiffe_refresh_hint")
	unhinted := s.count(ctx, watch, s.answers(doc))
	if s.err != nil {
		return
	}
	s.has = s.keys.want("root a", "root b")
	s.r.check("F-3", consumer, failIf(well > most || watch >= 3*hint && well == 0, "%d visits in %s by a hint of %s", well, watch, hint))
	s.r.check("F-3", consumer, failIf(broken > most, "%d visits in %s while the endpoint fails, by a hint of %s", broken, watch, hint))
	s.r.check("B10", consumer, failIf(unhinted > 1+int(watch/(4*time.Minute)) || watch > 6*time.Minute && unhinted == 0, "%d visits in %s without a hint", unhinted, watch))
}

// count is how often the consumer comes by itself, while a is served.
func (s *stand) count(ctx context.Context, watch time.Duration, a answer) int {
	s.offer(ctx, a, false)
	if s.err != nil {
		return 0
	}
	before := s.visits(false)
	select {
	case <-ctx.Done():
		s.err = ctx.Err()
	case <-time.After(watch):
	}
	return s.visits(false) - before
}

// forHost makes a certificate one for host.
func forHost(host string) forge.Change {
	return func(c *x509.Certificate) {
		if ip := net.ParseIP(host); ip != nil {
			c.IPAddresses = []net.IP{ip}
			return
		}
		c.DNSNames = []string{host}
	}
}
