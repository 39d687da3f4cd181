package bundle

// This file serves policy bundles by OPA's bundle protocol over HTTP: entity
// tags, 304, long polling and the exact content type, and always whole
// bundles: a delta cannot be signed, and an empty one wipes all data.
// Who may read and write is decided around this handler.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// Published is a signed bundle as it is served. It never changes.
type Published struct {
	Raw        []byte
	ETag       string // quoted, strong
	Generation uint64
}

// Source is where a server has its bundles from. The functions are safe for
// concurrent use.
type Source struct {
	// Load returns the active bundle called name and a channel that is closed
	// when another becomes active. Without one it returns ErrNotFound, and
	// the channel where clients may wait for the first.
	Load func(ctx context.Context, name string) (*Published, <-chan struct{}, error)
	// LoadCandidate is Load for the bundle's candidate. Nil: none are served.
	LoadCandidate func(ctx context.Context, name string) (*Published, <-chan struct{}, error)
	// Put checks, signs and activates an unsigned bundle. Its errors of type
	// *RejectedError are shown to the client. Nil: PUT is not offered.
	Put func(ctx context.Context, name string, unsigned []byte) (Metadata, error)
	// MaxWait bounds long polls; zero means one minute.
	MaxWait time.Duration
	// Logger receives what clients are not told; nil discards it.
	Logger *slog.Logger
}

// RejectedError is returned by Source.Put for a bundle that is at fault.
type RejectedError struct{ Err error }

func (e *RejectedError) Error() string { return e.Err.Error() }

// Unwrap returns the fault.
func (e *RejectedError) Unwrap() error { return e.Err }

type server struct{ src Source }

// NewServer serves GET, HEAD and PUT of /v1/policy/bundles/{name}, and GET and HEAD
// of /v1/policy/candidates/{name}.
func NewServer(src Source) http.Handler {
	if src.MaxWait <= 0 {
		src.MaxWait = time.Minute
	}
	if src.Logger == nil {
		src.Logger = slog.New(slog.DiscardHandler)
	}
	s := &server{src: src}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/policy/bundles/{name}", s.get(src.Load)) // and HEAD
	if src.LoadCandidate != nil {
		mux.HandleFunc("GET /v1/policy/candidates/{name}", s.get(src.LoadCandidate))
	}
	if src.Put != nil {
		mux.HandleFunc("PUT /v1/policy/bundles/{name}", s.put)
	}
	return mux
}

var validName = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,63}$`)

// ValidName reports whether name can be the name of a policy bundle: lower
// case letters, digits, ".", "_" and "-", at most 64.
func ValidName(name string) bool { return validName.MatchString(name) }

// load is Source.Load or Source.LoadCandidate.
type load func(ctx context.Context, name string) (*Published, <-chan struct{}, error)

func (s *server) get(from load) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) { s.serve(w, r, from) }
}

func (s *server) serve(w http.ResponseWriter, r *http.Request, from load) {
	name := r.PathValue("name")
	if !ValidName(name) {
		s.fail(w, http.StatusNotFound, ErrNotFound.Error())
		return
	}
	p, err := s.current(w, r, name, from)
	switch {
	case r.Context().Err() != nil:
		return // nobody is there to answer
	case errors.Is(err, ErrNotFound):
		s.fail(w, http.StatusNotFound, ErrNotFound.Error())
	case err != nil:
		s.src.Logger.LogAttrs(r.Context(), slog.LevelError, "load policy bundle", slog.String("name", name), slog.Any("err", err))
		w.Header().Set("Retry-After", "5")
		s.fail(w, http.StatusServiceUnavailable, "the policy bundle cannot be read now")
	default:
		write(w, r, p)
	}
}

// current loads the bundle, and where the client has it already and is ready
// to wait, waits for the next one.
func (s *server) current(w http.ResponseWriter, r *http.Request, name string, from load) (*Published, error) {
	p, changed, err := from(r.Context(), name)
	if err != nil || changed == nil || !matches(r.Header, p.ETag) {
		return p, err
	}
	wait := min(preferredWait(r.Header), s.src.MaxWait)
	if wait <= 0 {
		return p, nil
	}
	// The server's own write deadline must not end the wait; where it cannot
	// be moved, the client polls again.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(wait + 30*time.Second))
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-changed:
		p, _, err = from(r.Context(), name)
		return p, err
	case <-timer.C:
		return p, nil
	case <-r.Context().Done():
		return p, nil
	}
}

func write(w http.ResponseWriter, r *http.Request, p *Published) {
	h := w.Header()
	h.Set("Content-Type", ContentType)
	h.Set("ETag", p.ETag)
	h.Set("Cache-Control", "private, no-cache")
	h.Set("X-Content-Type-Options", "nosniff")
	if matches(r.Header, p.ETag) {
		w.WriteHeader(http.StatusNotModified)
		return
	}
	h.Set("Content-Length", strconv.Itoa(len(p.Raw)))
	if r.Method != http.MethodHead {
		_, _ = w.Write(p.Raw) //nolint:gosec // a gzipped tarball under its own content type, with nosniff
	}
}

// matches reports whether If-None-Match, a list or "*", has etag. The
// comparison is the weak one of RFC 9110 section 13.1.2.
func matches(h http.Header, etag string) bool {
	for _, line := range h.Values("If-None-Match") {
		for rest := line; rest != ""; {
			var tag string
			tag, rest = nextTag(rest)
			if tag == "*" || tag == etag {
				return true
			}
		}
	}
	return false
}

// nextTag takes one entity tag off a list; tags may contain commas.
func nextTag(s string) (tag, rest string) {
	s = strings.TrimLeft(s, " \t,")
	s = strings.TrimPrefix(s, "W/")
	if !strings.HasPrefix(s, `"`) {
		tag, rest, _ = strings.Cut(s, ",")
		return strings.TrimSpace(tag), rest
	}
	end := strings.IndexByte(s[1:], '"')
	if end < 0 {
		return "", ""
	}
	return s[:end+2], s[end+2:]
}

// preferredWait reads wait=SECONDS of Prefer (RFC 7240), as OPA sends it:
// "modes=snapshot,delta;wait=10".
func preferredWait(h http.Header) time.Duration {
	for _, line := range h.Values("Prefer") {
		for _, p := range strings.FieldsFunc(line, func(r rune) bool { return r == ';' || r == ',' }) {
			key, value, _ := strings.Cut(strings.TrimSpace(p), "=")
			if !strings.EqualFold(strings.TrimSpace(key), "wait") {
				continue
			}
			n, err := strconv.ParseUint(strings.Trim(strings.TrimSpace(value), `"`), 10, 31)
			if err == nil {
				return time.Duration(n) * time.Second
			}
		}
	}
	return 0
}

func (s *server) put(w http.ResponseWriter, r *http.Request) {
	name := r.PathValue("name")
	if !ValidName(name) {
		s.fail(w, http.StatusBadRequest, "the name of a policy bundle has lower-case letters, digits, '.', '_' and '-'")
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, MaxBytes))
	if err != nil {
		status, text := http.StatusBadRequest, "the body ends early"
		if _, large := errors.AsType[*http.MaxBytesError](err); large {
			status, text = http.StatusRequestEntityTooLarge, fmt.Sprintf("a policy bundle has at most %d bytes", MaxBytes)
		}
		s.fail(w, status, text)
		return
	}
	md, err := s.src.Put(r.Context(), name, body)
	if rejected, ok := errors.AsType[*RejectedError](err); ok {
		s.fail(w, http.StatusUnprocessableEntity, rejected.Error())
		return
	}
	if err != nil {
		s.src.Logger.LogAttrs(r.Context(), slog.LevelError, "store policy bundle", slog.String("name", name), slog.Any("err", err))
		s.fail(w, http.StatusInternalServerError, "internal error")
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{"name": md.Name, "generation": md.Generation})
}

func (s *server) fail(w http.ResponseWriter, status int, text string) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]string{"error": text})
}
