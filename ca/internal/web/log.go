// The log of this replica, read-only, as C2SP tlog-tiles has it: below
// /log/REPLICA/ the checkpoint, tiles and bundles of entries. Entries name who
// got which identity when, so reading them takes a role, as reading the same by
// gRPC does.

package web

import (
	"errors"
	"log/slog"
	"net/http"
	"os"
	"strconv"
	"strings"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/merkle"
)

const logPath = "/log/"

func (s *Server) auditLog(w http.ResponseWriter, r *http.Request, path string) {
	if !allow(w, r, http.MethodGet, http.MethodHead) {
		return
	}
	caller := s.callerOf(r)
	if !s.opts.Service.Permits(caller, capb.Admin_ProveIssuances_FullMethodName) {
		code, reason := deny(caller, "reading the log needs the X509-SVID of a viewer or operator")
		s.opts.Service.Refused(r.Context(), caller, r.Method+" "+logPath, reason)
		problem(w, code, reason)
		return
	}
	name, file, _ := strings.Cut(path, "/")
	if name != s.opts.Service.LogName() {
		problem(w, http.StatusNotFound, "this replica has the log "+logPath+s.opts.Service.LogName()+"/ and no other: ask the replica that is meant")
		return
	}
	if file == "checkpoint" {
		s.checkpoint(w, r)
		return
	}
	tile, err := merkle.ParseTile(file)
	if err != nil {
		problem(w, http.StatusNotFound, "nothing is served at this path")
		return
	}
	content, err := s.opts.Audit.Tile(tile)
	if errors.Is(err, os.ErrNotExist) {
		problem(w, http.StatusNotFound, err.Error())
		return
	}
	if err != nil {
		s.opts.Log.LogAttrs(r.Context(), slog.LevelError, "tile of the log not served", slog.Any("err", err))
		problem(w, http.StatusInternalServerError, "the log cannot be read")
		return
	}
	serve(w, r, "application/octet-stream", "private, max-age=31536000, immutable", content)
}

func (s *Server) checkpoint(w http.ResponseWriter, r *http.Request) {
	signed, err := s.opts.Audit.Checkpoint()
	if errors.Is(err, audit.ErrNoKey) {
		problem(w, http.StatusServiceUnavailable, err.Error())
		return
	}
	if err != nil {
		s.opts.Log.LogAttrs(r.Context(), slog.LevelError, "checkpoint not signed", slog.Any("err", err))
		problem(w, http.StatusInternalServerError, "the checkpoint cannot be signed")
		return
	}
	serve(w, r, "text/plain; charset=utf-8", "no-store", signed.Note)
}

func serve(w http.ResponseWriter, r *http.Request, kind, caching string, content []byte) {
	w.Header().Set("Content-Type", kind)
	w.Header().Set("Cache-Control", caching)
	w.Header().Set("Content-Length", strconv.Itoa(len(content)))
	if r.Method != http.MethodHead {
		_, _ = w.Write(content) //nolint:gosec // no HTML, and said not to be; the client may be gone
	}
}
