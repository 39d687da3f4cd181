package etcd

// What the operator says of etcd, and what of it is refused.

import (
	"errors"
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
	// RequestTimeout is how long one request may take, whatever its context
	// allows. Zero means 5 s.
	RequestTimeout time.Duration
	// KeepHistory is how long changes are kept for those who watch them; older
	// ones are compacted. Zero means an hour.
	KeepHistory time.Duration
	// Logger takes what the store has to say. Nil discards it.
	Logger *slog.Logger
}

// Validate tells whether a store can be opened with c; it does not look at the
// files or at etcd.
func (c Config) Validate() error {
	if len(c.Endpoints) == 0 {
		return errors.New("etcd: no endpoints; name the client URLs of its members, https://host:2379")
	}
	secure := false
	seen := make(map[string]bool)
	for _, e := range c.Endpoints {
		if seen[e] {
			return fmt.Errorf("etcd: endpoint %s is named twice", e)
		}
		seen[e] = true
		u, err := checkEndpoint(e)
		if err != nil {
			return err
		}
		secure = secure || u.Scheme == "https"
	}
	for name, file := range map[string]string{"CA of its members": c.CAFile, "client certificate": c.CertFile, "client key": c.KeyFile} {
		if secure && file == "" {
			return fmt.Errorf("etcd: no file with the %s; https endpoints need mutual TLS", name)
		}
	}
	if c.Prefix == "" {
		return nil
	}
	if len(c.Prefix) > maxPrefixBytes || !strings.HasSuffix(c.Prefix, "/") || strings.ContainsFunc(c.Prefix, unprintable) {
		return fmt.Errorf("etcd: prefix %q: up to %d printable characters that end with a slash", c.Prefix, maxPrefixBytes)
	}
	return nil
}

func unprintable(r rune) bool { return r <= ' ' || r > '~' }

func checkEndpoint(text string) (*url.URL, error) {
	u, err := url.Parse(text)
	if err != nil {
		return nil, fmt.Errorf("etcd: endpoint %q: %v", text, err)
	}
	switch {
	case u.Scheme != "https" && u.Scheme != "http", u.Port() == "", u.Hostname() == "",
		u.User != nil, u.Path != "" && u.Path != "/", u.RawQuery != "", u.Fragment != "":
		return nil, fmt.Errorf("etcd: endpoint %q is not of the form https://host:2379", text)
	case u.Scheme == "http" && !loopback(u.Hostname()):
		return nil, fmt.Errorf("etcd: endpoint %q: plain http is for loopback only", text)
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
