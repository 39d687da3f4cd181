// A bundle endpoint that says anything: what is served, and by which certificate, is
// changed between two visits of the consumer that is judged.

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// answer is what a visitor gets. It is not changed once it is served.
type answer struct {
	// pages are by path; a visitor begins at bundlePath.
	pages map[string]http.HandlerFunc
	// certs are shown to one connection after the other, and then again.
	certs []*tls.Certificate
}

// bundlePath is where the consumer is told that the bundle is.
const bundlePath = "/bundle"

// rogue is such an endpoint. It is safe for concurrent use.
type rogue struct {
	td  spiffeid.TrustDomain
	lis net.Listener
	srv *http.Server

	mu sync.Mutex // guards what follows
	// now is served to connections that begin; of it came connections, and asked
	// requests for bundlePath.
	now         *answer
	came, asked int
}

// visit is one connection. What was served when it began goes for all of it: a page
// must not come over a connection whose certificate is that of the answer before.
type visit struct{ of *answer }

type visitKey struct{}

// startRogue serves at host until ctx ends.
func startRogue(ctx context.Context, host string, td spiffeid.TrustDomain) (*rogue, error) {
	lis, err := new(net.ListenConfig).Listen(ctx, "tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		return nil, err
	}
	s := &rogue{td: td, lis: lis}
	s.srv = &http.Server{
		Handler: s, ReadHeaderTimeout: patience, ErrorLog: log.New(io.Discard, "", 0),
		TLSConfig:    &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: s.certificate},
		TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){}, // HTTP/1.1: a visit is a connection
	}
	s.srv.ConnContext = func(ctx context.Context, _ net.Conn) context.Context {
		return context.WithValue(ctx, visitKey{}, new(visit))
	}
	s.srv.SetKeepAlivesEnabled(false)
	go func() { _ = s.srv.ServeTLS(lis, "", "") }() // it ends with close
	return s, nil
}

func (s *rogue) close() error { return s.srv.Close() }

func (s *rogue) url() string { return s.base() + bundlePath }

// host is where it is, without the port.
func (s *rogue) host() string { return s.lis.Addr().(*net.TCPAddr).IP.String() }

func (s *rogue) base() string { return "https://" + s.lis.Addr().String() }

// serve replaces the answer; visits are counted anew.
func (s *rogue) serve(a answer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now, s.came, s.asked = &a, 0, 0
}

// certificate implements tls.Config.GetCertificate.
func (s *rogue) certificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.now == nil || len(s.now.certs) == 0 {
		return nil, errors.New("nothing is served yet")
	}
	if v, ok := hello.Context().Value(visitKey{}).(*visit); ok {
		v.of = s.now
	}
	cert := s.now.certs[s.came%len(s.now.certs)]
	s.came++
	return cert, nil
}

// ServeHTTP implements http.Handler.
func (s *rogue) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	v, ok := r.Context().Value(visitKey{}).(*visit)
	if !ok || v.of == nil {
		http.Error(w, "nothing was served when this connection began", http.StatusServiceUnavailable)
		return
	}
	s.mu.Lock()
	if v.of == s.now && r.URL.Path == bundlePath {
		s.asked++
	}
	s.mu.Unlock()
	page, ok := v.of.pages[r.URL.Path]
	if !ok {
		http.NotFound(w, r)
		return
	}
	page(w, r)
}

// visits is how often the consumer has come for the bundle: by requests, or, where no
// request should get through, by connections.
func (s *rogue) visits(byConnection bool) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if byConnection {
		return max(s.came, s.asked)
	}
	return s.asked
}

// page is one with this text.
func page(text []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(text) // whoever left does not want it
	}
}

// redirect is a page that leads elsewhere.
func redirect(code int, to string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Location", to)
		w.WriteHeader(code)
	}
}

// plainServer is a server without TLS that counts who comes.
type plainServer struct {
	url string
	srv *http.Server

	mu   sync.Mutex // guards hits
	hits int
}

func startPlain(ctx context.Context, host string, text []byte) (*plainServer, error) {
	lis, err := new(net.ListenConfig).Listen(ctx, "tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		return nil, err
	}
	p := &plainServer{url: "http://" + lis.Addr().String() + bundlePath}
	serve := page(text)
	p.srv = &http.Server{ReadHeaderTimeout: patience, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		p.hits++
		p.mu.Unlock()
		serve(w, r)
	})}
	go func() { _ = p.srv.Serve(lis) }() // it ends with close
	return p, nil
}

func (p *plainServer) seen() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.hits
}

// waitUntil asks again and again, for at most limit, whether done.
func waitUntil(ctx context.Context, limit time.Duration, what string, done func() bool) error {
	deadline := time.Now().Add(limit)
	for !done() {
		if err := ctx.Err(); err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s: not within %s", what, limit)
		}
		time.Sleep(20 * time.Millisecond)
	}
	return nil
}
