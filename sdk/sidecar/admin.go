// The admin socket: what runs with what, who is connected, and what became of the last
// requests, as JSON over HTTP.

package sidecar

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"reflect"
	"time"

	"merlon.dev/sdk/sidecar/internal/hop"
)

// maxShown bounds the connections that an answer lists.
const maxShown = 10_000

// adminTimeout bounds a request to the admin socket.
const adminTimeout = 10 * time.Second

// serveAdmin answers until s ends.
func (s *Sidecar) serveAdmin(lis net.Listener) {
	mux := http.NewServeMux()
	for path, answer := range map[string]func() any{
		"GET /config":    func() any { return shown(reflect.ValueOf(s.config())) },
		"GET /listeners": func() any { return s.listeners() },
		"GET /identity":  func() any { return s.id.State(maxShown) },
		"GET /health":    func() any { return s.health.Report() },
		"GET /requests": func() any {
			return map[string]any{"denied_or_failed": s.recent.lines(true), "served": s.recent.lines(false)}
		},
	} {
		mux.HandleFunc(path, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			e := json.NewEncoder(w)
			e.SetIndent("", "  ")
			_ = e.Encode(answer()) // the operator may be gone; nothing to do about it
		})
	}
	srv := &http.Server{
		Handler: mux, ReadHeaderTimeout: adminTimeout, ReadTimeout: adminTimeout, WriteTimeout: adminTimeout,
		ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	stop := context.AfterFunc(s.ctx, func() { _ = srv.Close() }) // its listener is all that matters
	defer stop()
	if err := srv.Serve(lis); !errors.Is(err, http.ErrServerClosed) {
		s.log.LogAttrs(s.ctx, slog.LevelError, "the admin socket is not served any more", slog.Any("err", err))
	}
}

// shown is a setting as it is written in a file.
func shown(v reflect.Value) any {
	switch {
	case v.Type() == reflect.TypeFor[time.Duration]():
		return v.Interface().(time.Duration).String()
	case v.Kind() == reflect.Struct:
		fields := make(map[string]any)
		for i := range v.NumField() {
			if key := v.Type().Field(i).Tag.Get("yaml"); key != "-" {
				fields[key] = shown(v.Field(i))
			}
		}
		return fields
	case v.Kind() == reflect.Slice:
		all := []any{}
		for i := range v.Len() {
			all = append(all, shown(v.Index(i)))
		}
		return all
	}
	return v.Interface()
}

// shownListener is a listener as operators see it.
type shownListener struct {
	Listen      string          `json:"listen"`
	Direction   hop.Direction   `json:"direction"`
	Protocol    string          `json:"protocol"`
	Destination string          `json:"destination"`
	Connections int             `json:"connections"`
	Requests    int64           `json:"requests"` // under way
	Upstreams   []shownUpstream `json:"upstreams"`
}

type shownUpstream struct {
	Address  string    `json:"address"`
	State    hop.State `json:"state"`
	Requests int64     `json:"requests"` // under way
	Conns    int64     `json:"connections"`
	// What checks have found; absent where there are none.
	ChecksPassed int64     `json:"checks_passed,omitempty"`
	ChecksFailed int64     `json:"checks_failed,omitempty"`
	Since        time.Time `json:"since,omitzero"`        // of the last change by checks
	CheckErr     string    `json:"check_error,omitempty"` // of the last check
}

func showUpstream(u *hop.Upstream, now time.Time) shownUpstream {
	c := u.Checked()
	return shownUpstream{
		Address: u.Address, State: u.State(now), Requests: u.Active(), Conns: u.Connections(),
		ChecksPassed: c.Passed, ChecksFailed: c.Failed, Since: c.Since, CheckErr: c.Err,
	}
}

func (s *Sidecar) listeners() []shownListener {
	s.mu.Lock()
	defer s.mu.Unlock()
	all, now := []shownListener{}, time.Now()
	for _, d := range s.doors {
		v := d.serving.Load()
		l := shownListener{Listen: d.address, Direction: v.hop.Direction, Protocol: string(v.hop.Protocol), Destination: v.hop.To, Connections: v.connections(), Requests: v.hop.Requests()}
		for _, u := range v.hop.Upstreams.All() {
			l.Upstreams = append(l.Upstreams, showUpstream(u, now))
		}
		all = append(all, l)
	}
	return all
}
