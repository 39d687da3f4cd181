// What enforcement points report, in OPA's protocol: POST /v1/status and
// /v1/logs, each with a partition behind it or without. Who reports proves who it
// is, and reports about its own destinations alone: an agent about those of its
// node, a workload about itself, the holder of a bundle-reader token about what its
// bundle is for.

package web

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/api"
	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/release"
	"merlon.dev/ca/internal/report"
)

const (
	statusPath = "/v1/status"
	logsPath   = "/v1/logs"
)

// Uploads that are taken in at the same time: each can hold report.MaxUnpackedBytes.
const (
	maxUploads    = 16
	maxUploadsOne = 2
)

// reporter is who uploads, and about which destinations it may.
type reporter struct {
	name   string
	scope  report.Scope
	bundle string // that its token is for; empty for an SVID
}

// isReport says whether path is that of a sink. A partition is a name of the
// sender's for a part of its fleet; all are one to us.
func isReport(path, sink string) bool {
	rest, ok := strings.CutPrefix(path, sink)
	if !ok {
		return false
	}
	partition, below := strings.CutPrefix(rest, "/")
	return rest == "" || below && release.CheckName(partition) == nil
}

// takeReport admits the caller, and hands take the body. take's errors are shown
// where they are the sender's.
func (s *Server) takeReport(w http.ResponseWriter, r *http.Request, take func(context.Context, reporter, []byte) error) {
	if !allow(w, r, http.MethodPost) {
		return
	}
	caller := s.callerOf(r)
	from, code, reason := s.reporterOf(r, caller)
	if code != 0 {
		if code == http.StatusUnauthorized {
			w.Header().Set("WWW-Authenticate", "Bearer")
		}
		s.opts.Service.Refused(r.Context(), caller, r.Method+" "+r.URL.Path, reason)
		problem(w, code, reason)
		return
	}
	done, ok := s.uploads.begin(from.name)
	if !ok {
		w.Header().Set("Retry-After", "1")
		problem(w, http.StatusServiceUnavailable, "too many uploads at the same time")
		return
	}
	defer done()
	body, err := report.ReadBody(r)
	if err == nil {
		err = take(r.Context(), from, body)
	}
	malformed := (*report.InvalidError)(nil)
	switch {
	case err == nil: // 200
	case errors.Is(err, report.ErrTooLarge):
		problem(w, http.StatusRequestEntityTooLarge, err.Error())
	case errors.As(err, &malformed):
		problem(w, http.StatusBadRequest, err.Error())
	default:
		w.Header().Set("Retry-After", "5")
		problem(w, http.StatusServiceUnavailable, err.Error())
	}
}

// takeStatus keeps what an instance says of itself.
func (s *Server) takeStatus(ctx context.Context, from reporter, body []byte) error {
	in, err := report.ParseStatus(body)
	if err != nil {
		return err
	}
	in.Uploader, in.PolicyBundle, in.Received = from.name, from.bundle, time.Now()
	if !s.opts.Statuses.Put(in) {
		s.opts.Log.LogAttrs(ctx, slog.LevelWarn, "status not kept: there are too many instances", slog.String("uploader", from.name))
		return errors.New("there is no room for the status of another instance")
	}
	s.opts.Service.HeardOPA()
	return nil
}

// takeDecisions keeps a chunk of a decision log, but for what is not about the
// uploader's own destinations.
func (s *Server) takeDecisions(ctx context.Context, from reporter, body []byte) error {
	c, err := report.ParseDecisions(body, from.name, from.scope)
	if err != nil {
		return err
	}
	if c.Foreign > 0 {
		s.opts.Log.LogAttrs(ctx, slog.LevelWarn, "decisions about others' destinations left out", slog.String("uploader", from.name), slog.Int("events", c.Foreign))
	}
	return s.opts.Decisions.Put(c)
}

// reporterOf says who r's sender is, or why it may not report; code 0 lets it.
func (s *Server) reporterOf(r *http.Request, c *api.Caller) (from reporter, code int, reason string) {
	const needs = "reporting needs an X509-SVID of the trust domain or a bundle-reader token"
	switch {
	case c.Fault != "" || c.Unsure != "":
	case c.Is(capb.Caller_CALLER_AGENT):
		agent := c.Peer.ID
		return reporter{name: c.Name, scope: func(destination string) bool {
			id, err := spiffeid.FromString(destination)
			return err == nil && s.opts.Registry.Holds(agent, id, time.Now())
		}}, 0, ""
	case c.Peer != nil && !entry.Reserved(c.Peer.ID):
		return reporter{name: c.Name, scope: func(destination string) bool { return destination == c.Name }}, 0, ""
	case c.Peer == nil && c.Name == api.Anonymous().Name:
		if token, ok := api.BearerToken(r.Header.Get("Authorization")); ok {
			return s.tokenReporter(r.Context(), token)
		}
	}
	code, reason = deny(c, needs)
	return reporter{}, code, reason
}

// tokenReporter is the holder of a bundle-reader token. A policy bundle is for
// every destination of the trust domain, and so is what it reports.
func (s *Server) tokenReporter(ctx context.Context, token string) (reporter, int, string) {
	found, err := attest.FindReaderToken(ctx, s.opts.Store, token, time.Now())
	switch {
	case errors.Is(err, attest.ErrUnknownToken), errors.Is(err, attest.ErrExpiredToken):
		return reporter{}, http.StatusUnauthorized, err.Error()
	case err != nil:
		s.opts.Log.LogAttrs(ctx, slog.LevelError, "bundle-reader token not checked", slog.Any("err", err))
		return reporter{}, http.StatusServiceUnavailable, "the token cannot be checked now"
	}
	td := s.opts.Service.TrustDomain()
	return reporter{name: "token:" + found.PolicyBundle + ":" + found.ID, bundle: found.PolicyBundle, scope: func(destination string) bool {
		id, err := spiffeid.FromString(destination)
		return err == nil && id.MemberOf(td)
	}}, 0, ""
}

// uploads counts those under way. It is safe for concurrent use.
type uploads struct {
	mu sync.Mutex
	// guarded by mu
	by map[string]int
	n  int
}

// begin says whether another upload of this uploader may begin; done ends it.
func (u *uploads) begin(uploader string) (done func(), ok bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.n >= maxUploads || u.by[uploader] >= maxUploadsOne {
		return nil, false
	}
	if u.by == nil {
		u.by = map[string]int{}
	}
	u.n++
	u.by[uploader]++
	return func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		u.n--
		if u.by[uploader]--; u.by[uploader] == 0 {
			delete(u.by, uploader)
		}
	}, true
}
