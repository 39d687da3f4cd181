// The settings of health checks.

package sidecar

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"merlon.dev/policy"
	"merlon.dev/sdk/sidecar/internal/check"
	"merlon.dev/sdk/sidecar/internal/hop"
)

// HealthCheck is how upstreams are asked whether they are well. To a service a check
// is a request like any other: its policy decides about it.
type HealthCheck struct {
	// Kind is tcp (connect, with the TLS handshake where there is one), http (a GET), or
	// grpc (grpc.health.v1). Empty means that there are no checks.
	Kind string `yaml:"kind"`
	// Path is that of http's request. Empty means /.
	Path string `yaml:"path"`
	// Host is the host of http's or grpc's request. Empty means the upstream's address.
	Host string `yaml:"host"`
	// Statuses are those of http's answers that are well. Empty means 200 and 204.
	Statuses []int `yaml:"statuses"`
	// Service is what grpc asks about. Empty means the server as a whole.
	Service string `yaml:"service"`
	// Interval is the pause between two checks; it differs by up to a fifth each time, so
	// that many sidecars do not ask at once. Zero means 10s.
	Interval time.Duration `yaml:"interval"`
	// Timeout is for one check, connecting included. Zero means 2s.
	Timeout time.Duration `yaml:"timeout"`
	// HealthyAfter is how many checks in a row have to pass before an unhealthy upstream
	// gets requests again. Zero means 2.
	HealthyAfter int `yaml:"healthy_after"`
	// UnhealthyAfter is how many have to fail before one gets no more. Zero means 3. The
	// first check of all counts at once.
	UnhealthyAfter int `yaml:"unhealthy_after"`
}

// kinds are the kinds of checks that each protocol allows: what an upstream speaks is
// what it can be asked in.
var kinds = map[string][]string{
	"tcp":   {"tcp", "http", "grpc"},
	"http":  {"tcp", "http"},
	"http2": {"tcp", "http", "grpc"},
	"grpc":  {"tcp", "grpc"},
}

const (
	minInterval    = 10 * time.Millisecond
	maxHealthAfter = 100
)

func (h HealthCheck) withDefaults() HealthCheck {
	if h.Interval == 0 {
		h.Interval = 10 * time.Second
	}
	if h.Timeout == 0 {
		h.Timeout = 2 * time.Second
	}
	if h.HealthyAfter == 0 {
		h.HealthyAfter = 2
	}
	if h.UnhealthyAfter == 0 {
		h.UnhealthyAfter = 3
	}
	if h.Kind == "http" {
		if h.Path == "" {
			h.Path = "/"
		}
		if len(h.Statuses) == 0 {
			h.Statuses = []int{http.StatusOK, http.StatusNoContent}
		}
	}
	return h
}

// validate says what is wrong with the check of an upstream that speaks protocol.
func (h HealthCheck) validate(field, protocol string) error {
	if h.Kind == "" {
		if h.Path+h.Host+h.Service != "" || len(h.Statuses)+h.HealthyAfter+h.UnhealthyAfter != 0 || h.Interval|h.Timeout != 0 {
			return &InvalidError{Field: field + ".kind", Reason: "is missing", Hint: "kind: tcp, http or grpc"}
		}
		return nil
	}
	if !slices.Contains(kinds[protocol], h.Kind) {
		return &InvalidError{Field: field + ".kind", Reason: fmt.Sprintf("%q is none of %s, which protocol %s allows", h.Kind, strings.Join(kinds[protocol], ", "), protocol)}
	}
	if err := h.checkKind(field); err != nil {
		return err
	}
	h = h.withDefaults()
	switch {
	case h.Interval < minInterval:
		return &InvalidError{Field: field + ".interval", Reason: fmt.Sprintf("%v is less than %v", h.Interval, minInterval)}
	case h.Timeout < 0:
		return &InvalidError{Field: field + ".timeout", Reason: fmt.Sprintf("%v is negative", h.Timeout)}
	case h.HealthyAfter < 1 || h.HealthyAfter > maxHealthAfter:
		return &InvalidError{Field: field + ".healthy_after", Reason: fmt.Sprintf("%d is not between 1 and %d", h.HealthyAfter, maxHealthAfter)}
	case h.UnhealthyAfter < 1 || h.UnhealthyAfter > maxHealthAfter:
		return &InvalidError{Field: field + ".unhealthy_after", Reason: fmt.Sprintf("%d is not between 1 and %d", h.UnhealthyAfter, maxHealthAfter)}
	}
	return nil
}

// checkKind is about the settings that one kind has.
func (h HealthCheck) checkKind(field string) error {
	for _, f := range []struct {
		field, kinds string
		is           bool
	}{
		{"path", "http", h.Path != ""},
		{"statuses", "http", len(h.Statuses) > 0},
		{"host", "http grpc", h.Host != ""},
		{"service", "grpc", h.Service != ""},
	} {
		if f.is && !slices.Contains(strings.Fields(f.kinds), h.Kind) {
			return &InvalidError{Field: field + "." + f.field, Reason: fmt.Sprintf("is not for checks of kind %s", h.Kind)}
		}
	}
	if path, _, _ := strings.Cut(h.Path, "?"); h.Path != "" && (policy.CheckPath(path) != nil || strings.ContainsFunc(h.Path, func(r rune) bool { return r <= ' ' || r == '#' || r >= 0x7f })) {
		return &InvalidError{Field: field + ".path", Reason: fmt.Sprintf("%q is no path that a request may have", h.Path), Hint: "path: /healthz"}
	}
	if strings.ContainsFunc(h.Host, func(r rune) bool { return r <= ' ' || r >= 0x7f || strings.ContainsRune("/?#@\\", r) }) {
		return &InvalidError{Field: field + ".host", Reason: fmt.Sprintf("%q is no host", h.Host)}
	}
	for i, status := range h.Statuses {
		if status < 200 || status > 599 {
			return &InvalidError{Field: fmt.Sprintf("%s.statuses[%d]", field, i), Reason: fmt.Sprintf("%d is not between 200 and 599", status)}
		}
	}
	return nil
}

// check is how an upstream that speaks protocol is asked.
func (h HealthCheck) check(protocol string) *check.Check {
	h = h.withDefaults()
	return &check.Check{
		Kind: check.Kind(h.Kind), HTTP2: protocol == "http2", Path: h.Path, Host: h.Host, Statuses: h.Statuses, Service: h.Service,
		Interval: h.Interval, Timeout: h.Timeout, Thresholds: hop.Thresholds{Healthy: h.HealthyAfter, Unhealthy: h.UnhealthyAfter},
	}
}
