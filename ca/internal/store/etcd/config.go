package etcd

// What the operator says of etcd, and what of it is refused.

import (
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"strings"
	"time"
)

// DefaultPrefix begins all keys in etcd.
const DefaultPrefix = "/merlon/"

const (
	defaultRequestTimeout = 5 * time.Second
	defaultKeepHistory    = time.Hour
	maxPrefixBytes        = 64
)

// Config says where etcd is.
type Config struct {
	// Endpoints are the members' client URLs, https://host:2379 or, on
	// loopback, http://. The first is asked as long as it works.
	Endpoints []string
	// CAFile, CertFile and KeyFile are PEM files of mutual TLS; they are needed
	// unless all endpoints are http:// on loopback. They are read again for
	// each connection, so that they can be replaced while the CA runs.
	CAFile, CertFile, KeyFile string
	// Prefix begins all keys; empty means DefaultPrefix.
	Prefix string
	// Existing makes Open refuse, with store.ErrNone, to begin a new store.
	Existing bool
	// RequestTimeout is how long one request may take, whatever its context
	// allows. Zero means 5 s.
	RequestTimeout time.Duration
	// KeepHistory is how long changes are kept for those who watch them; older
	// ones are compacted. Zero means an hour.
	KeepHistory time.Duration
	// Logger takes what the store has to say. Nil discards it.
	Logger *slog.Logger
}

// InvalidError reports a setting that the store cannot be opened with.
type InvalidError struct {
	Field  string // of Config, in snake case
	Reason string
}

// Error implements error.
func (e *InvalidError) Error() string { return "etcd " + e.Field + ": " + e.Reason }

func invalid(field, format string, args ...any) error {
	return &InvalidError{Field: field, Reason: fmt.Sprintf(format, args...)}
}

// Validate tells, by an *InvalidError, whether a store can be opened with c; it does not look at the
// files or at etcd.
func (c Config) Validate() error {
	if len(c.Endpoints) == 0 {
		return invalid("endpoints", "there are no endpoints; name the client URLs of the members, https://host:2379")
	}
	secure := false
	seen := make(map[string]bool)
	for _, e := range c.Endpoints {
		if seen[e] {
			return invalid("endpoints", "%q is named twice", e)
		}
		seen[e] = true
		u, err := checkEndpoint(e)
		if err != nil {
			return err
		}
		secure = secure || u.Scheme == "https"
	}
	for _, file := range []struct{ field, path, what string }{
		{"ca_file", c.CAFile, "CA of the members"},
		{"cert_file", c.CertFile, "client certificate"},
		{"key_file", c.KeyFile, "client key"},
	} {
		if secure && file.path == "" {
			return invalid(file.field, "there is no file with the %s; https endpoints need mutual TLS", file.what)
		}
	}
	if c.Prefix == "" {
		return nil
	}
	if len(c.Prefix) > maxPrefixBytes || !strings.HasSuffix(c.Prefix, "/") || strings.ContainsFunc(c.Prefix, unprintable) {
		return invalid("prefix", "%q: want up to %d printable characters that end with a slash", c.Prefix, maxPrefixBytes)
	}
	return nil
}

func unprintable(r rune) bool { return r <= ' ' || r > '~' }

func checkEndpoint(text string) (*url.URL, error) {
	u, err := url.Parse(text)
	if err != nil {
		return nil, invalid("endpoints", "%q: %v", text, err)
	}
	switch {
	case u.Scheme != "https" && u.Scheme != "http", u.Port() == "", u.Hostname() == "",
		u.User != nil, u.Path != "" && u.Path != "/", u.RawQuery != "", u.Fragment != "":
		return nil, invalid("endpoints", "%q: want https://host:2379", text)
	case u.Scheme == "http" && !loopback(u.Hostname()):
		return nil, invalid("endpoints", "%q: whoever is between us and etcd could write the store: https, but for loopback", text)
	}
	return u, nil
}

func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

func (c Config) withDefaults() Config {
	if c.Prefix == "" {
		c.Prefix = DefaultPrefix
	}
	if c.RequestTimeout <= 0 {
		c.RequestTimeout = defaultRequestTimeout
	}
	if c.KeepHistory <= 0 {
		c.KeepHistory = defaultKeepHistory
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}
