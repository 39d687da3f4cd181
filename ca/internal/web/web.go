// Package web is the CA's HTTPS side: policy bundles for agents and stock OPAs
// (the OPA bundle protocol), the trust bundle for everyone, the log for auditors,
// and what enforcement points report.
package web

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/api"
	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/release"
	"merlon.dev/ca/internal/report"
	"merlon.dev/ca/internal/store"
	"merlon.dev/sdk/svid"
)

// Limits of a request (SECURITY.md T38). A bundle may take a while to travel,
// and a long poll to be answered.
const (
	headerTimeout  = 5 * time.Second
	readTimeout    = 30 * time.Second
	idleTimeout    = time.Minute
	writeTimeout   = MaxWait + time.Minute
	maxHeaderBytes = 16 << 10
	drainTimeout   = 3 * time.Second
)

// MaxWait bounds the long poll for a policy bundle.
const MaxWait = 5 * time.Minute

const (
	bundlesPath    = "/v1/policy/bundles/"
	candidatesPath = "/v1/policy/candidates/"
)

// Options are the parts of a Server. All are required.
type Options struct {
	Service  *api.Service
	Registry *registry.Registry
	Store    store.Store
	Audit    *audit.Log
	Log      *slog.Logger
	// Statuses keeps what enforcement points say of themselves, and Decisions what
	// they decided.
	Statuses  *report.Statuses
	Decisions *report.Log
	// Bundles serves GET and PUT below /v1/policy/bundles/ to whoever has been
	// let through; CallerFrom tells it whom.
	Bundles http.Handler
}

// Server serves HTTPS. Its methods are safe for concurrent use.
type Server struct {
	opts    Options
	uploads uploads
}

// New makes a server.
func New(o Options) *Server { return &Server{opts: o} }

// Serve answers on lis until ctx ends, then lets running requests finish for a
// moment and returns nil. It closes lis.
func (s *Server) Serve(ctx context.Context, lis net.Listener, cfg *tls.Config) error {
	return serveTLS(ctx, lis, cfg, s.Handler(), s.opts.Log)
}

func serveTLS(ctx context.Context, lis net.Listener, cfg *tls.Config, h http.Handler, log *slog.Logger) error {
	srv := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		TLSConfig:         cfg,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		// Long polls end with the server.
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	done := make(chan error, 1)
	go func() { done <- srv.ServeTLS(lis, "", "") }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
	defer cancel()
	if err := srv.Shutdown(drain); err != nil {
		srv.Close()
	}
	if err := <-done; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// Handler routes. Paths are taken literally: no cleaning, no redirects, which
// a mux would do.
func (s *Server) Handler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Content-Type-Options", "nosniff")
		if err := s.opts.Service.Standing(); err != nil {
			problem(w, http.StatusServiceUnavailable, err.Error())
			return
		}
		path := r.URL.EscapedPath()
		name, isBundle := strings.CutPrefix(path, bundlesPath)
		candidate, isCandidate := strings.CutPrefix(path, candidatesPath)
		switch {
		case isTrustBundle(path):
			s.trustBundle(w, r)
		case isBundle && release.CheckName(name) == nil:
			s.policyBundle(w, r, name, http.MethodGet, http.MethodHead, http.MethodPut)
		case isCandidate && release.CheckName(candidate) == nil:
			s.policyBundle(w, r, candidate, http.MethodGet, http.MethodHead)
		case isReport(path, statusPath):
			s.takeReport(w, r, s.takeStatus)
		case isReport(path, logsPath):
			s.takeReport(w, r, s.takeDecisions)
		case strings.HasPrefix(path, logPath):
			s.auditLog(w, r, strings.TrimPrefix(path, logPath))
		default:
			problem(w, http.StatusNotFound, "nothing is served at this path")
		}
	})
}

// trustBundle answers everyone (SECURITY.md F-10): the keys are public.
func (s *Server) trustBundle(w http.ResponseWriter, r *http.Request) {
	if !allow(w, r, http.MethodGet, http.MethodHead) {
		return
	}
	b := s.opts.Registry.Trust()
	if b == nil {
		problem(w, http.StatusServiceUnavailable, "no trust bundle is published yet")
		return
	}
	noteReader(s.opts.Service, r, b)
	writeDocument(w, r, b, b.JWKS)
}

// policyBundle answers by Options.Bundles whom it is for: the bundle called name, or
// its candidate.
func (s *Server) policyBundle(w http.ResponseWriter, r *http.Request, name string, methods ...string) {
	if !allow(w, r, methods...) {
		return
	}
	caller := s.callerOf(r)
	if code, reason := s.admit(r, caller, name); code != 0 {
		if code == http.StatusUnauthorized {
			w.Header().Set("WWW-Authenticate", "Bearer")
		}
		s.opts.Service.Refused(r.Context(), caller, r.Method+" "+r.URL.EscapedPath(), reason)
		problem(w, code, reason)
		return
	}
	s.opts.Bundles.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), callerKey{}, caller)))
}

type callerKey struct{}

// CallerFrom returns who was let through to Options.Bundles: an anonymous
// caller for the holder of a bundle-reader token.
func CallerFrom(ctx context.Context) *api.Caller {
	c, _ := ctx.Value(callerKey{}).(*api.Caller)
	return c
}

// callerOf resolves the client's SVID or OIDC token; without either the caller is
// anonymous, as is the holder of a bundle-reader token.
func (s *Server) callerOf(r *http.Request) *api.Caller {
	values := r.Header.Values("Authorization")
	token, _ := api.BearerToken(r.Header.Get("Authorization"))
	if r.TLS != nil {
		if p, ok := svid.PeerFromState(*r.TLS); ok && !api.IsJWT(token) {
			return s.opts.Service.PeerCaller(p)
		} else if ok {
			return api.TwoCredentials()
		}
	}
	switch {
	case len(values) > 1:
		return api.TwoCredentials()
	case api.IsJWT(token):
		return s.opts.Service.TokenCaller(r.Context(), token)
	}
	return api.Anonymous()
}

// admit says why the caller may not do r to the bundle called name; code 0 lets
// it through. Writing is for whom PushPolicy is for, reading for whom GetPolicy is
// for, for agents, and for the holders of a token for this very bundle.
func (s *Server) admit(r *http.Request, c *api.Caller, name string) (code int, reason string) {
	if r.Method == http.MethodPut {
		if s.opts.Service.Permits(c, capb.Admin_PushPolicy_FullMethodName) {
			return 0, ""
		}
		return deny(c, "uploading a policy bundle needs the role policy-publisher or operator")
	}
	if c.Is(capb.Caller_CALLER_AGENT) || s.opts.Service.Permits(c, capb.Admin_GetPolicy_FullMethodName) {
		return 0, ""
	}
	token, ok := api.BearerToken(r.Header.Get("Authorization"))
	if !ok || c.Fault != "" || api.IsJWT(token) {
		return deny(c, "reading a policy bundle needs the X509-SVID of an agent, viewer, policy-publisher or operator, or a bundle-reader token")
	}
	err := attest.CheckReaderToken(r.Context(), s.opts.Store, token, name, time.Now())
	switch {
	case err == nil:
		return 0, ""
	case errors.Is(err, attest.ErrTokenScope):
		return http.StatusForbidden, err.Error()
	case errors.Is(err, attest.ErrUnknownToken), errors.Is(err, attest.ErrExpiredToken):
		return http.StatusUnauthorized, err.Error()
	default:
		s.opts.Log.LogAttrs(r.Context(), slog.LevelError, "bundle-reader token not checked", slog.Any("err", err))
		return http.StatusServiceUnavailable, "the token cannot be checked now"
	}
}

func deny(c *api.Caller, needs string) (int, string) {
	switch {
	case c.Unsure != "":
		return http.StatusServiceUnavailable, c.Name + ": " + c.Unsure
	case c.Fault != "":
		return http.StatusUnauthorized, c.Name + ": " + c.Fault
	case c.Name == api.Anonymous().Name:
		return http.StatusUnauthorized, needs
	default:
		return http.StatusForbidden, c.Name + ": " + needs
	}
}

func allow(w http.ResponseWriter, r *http.Request, methods ...string) bool {
	if slices.Contains(methods, r.Method) {
		return true
	}
	w.Header().Set("Allow", strings.Join(methods, ", "))
	problem(w, http.StatusMethodNotAllowed, "the method "+strconv.Quote(r.Method)+" is not served here")
	return false
}

// problem answers as RFC 9457 says.
func problem(w http.ResponseWriter, code int, detail string) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(map[string]any{ // the client may be gone
		"type": "about:blank", "title": http.StatusText(code), "status": code, "detail": detail,
	})
}
