// What is served to a bundle consumer by https_spiffe: the server is known by its
// SPIFFE ID and by the latest trust bundle, and by nothing else.

package main

import (
	"context"
	"crypto/tls"
	"net/http"

	"merlon.dev/sdk/svid/forge"
)

// checkSPIFFE makes the checks by https_spiffe.
func (o consumerOptions) checkSPIFFE(ctx context.Context, r *report, l *relation, dir string) error {
	s := &stand{relation: l, r: r, keys: newRing(l, spiffeDomain, "root a", "root b", "root c", "root d")}
	file, err := writeFirst(dir, s.keys["root a"].Bundle())
	if err != nil {
		return err
	}
	s.cert = s.server("root a", endpointPath)
	s.sequence = 1
	first := s.answers(s.keys.bundle(1, "root a", "root d"))
	s.serve(first)
	if _, _, err := o.driver.call(ctx, "follow", spiffeDomain, "https_spiffe", l.url(), "spiffe://"+spiffeDomain+endpointPath, file); err != nil {
		return err
	}
	s.takes(ctx, "F-14", "a bundle of the server with the configured SPIFFE ID", first, s.keys.want("root a", "root d"))
	s.next(ctx, "F-6", "a sound bundle, by https_spiffe", "root a")
	s.checkServers(ctx)
	s.checkRotations(ctx)
	s.next(ctx, "F-6", "a sound bundle in the end, by https_spiffe", "root c", "root b")
	return s.err
}

// server is the certificate of a server with a SPIFFE ID of this path.
func (s *stand) server(root, path string, changes ...forge.Change) *tls.Certificate {
	cert := s.keys[root].Leaf(path, changes...).Certificate()
	return &cert
}

// evil is a bundle that nobody but the real server may publish.
func (s *stand) evil(names ...string) http.HandlerFunc {
	return page(encodeJSON(s.keys.bundle(s.sequence+1, append(names, "root d")...)))
}

// checkServers: only the configured SPIFFE ID is listened to, also after a redirect.
func (s *stand) checkServers(ctx context.Context) {
	other := s.server("root a", "/other")
	for what, cert := range map[string]*tls.Certificate{
		"a server with another SPIFFE ID":                  other,
		"a server with the trust domain's own SPIFFE ID":   s.server("root a", ""),
		"a server of another trust domain":                 s.server("root a", endpointPath, forge.URIs("spiffe://other.conform.test"+endpointPath)),
		"a server with a certificate of the web":           webCert(forge.New(failing{}, "authority.invalid"), s.host()),
		"a server under a root that nobody has published":  s.server("root d", endpointPath),
		"a server with the SPIFFE ID in a second URI, too": s.server("root a", endpointPath, forge.URIs("spiffe://"+spiffeDomain+"/other", "spiffe://"+spiffeDomain+endpointPath)),
	} {
		s.refuses(ctx, "F-14", "what "+what+" says", s.shown(s.evil("root a"), cert))
	}
	elsewhere := s.shown(redirect(http.StatusTemporaryRedirect, s.base()+"/elsewhere"), s.cert, other)
	elsewhere.pages["/elsewhere"] = s.evil("root a")
	s.keeps(ctx, "F-12", "what a server with another SPIFFE ID says after a redirect", elsewhere)
}

// checkRotations replaces the root that verifies the server twice: it is the latest
// bundle that counts, and the first no more.
func (s *stand) checkRotations(ctx context.Context) {
	before := "root a"
	for _, name := range []string{"root b", "root c"} {
		old := s.cert
		s.next(ctx, "F-15", "a new root beside the one that verifies the server", before, name)
		s.cert = s.server(name, endpointPath)
		s.next(ctx, "F-15", "the new root alone, from a server under it", name)
		s.refuses(ctx, "F-15", "what a server says under a root that was withdrawn", s.shown(s.evil(name), old))
		before = name
	}
}
