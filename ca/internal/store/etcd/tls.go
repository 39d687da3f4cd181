package etcd

// Mutual TLS with files that may be replaced at any time: each handshake reads
// them, and goes on with the last good ones while they do not fit together.

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"

	"google.golang.org/grpc/credentials"
)

// fileCredentials is safe for concurrent use.
type fileCredentials struct {
	caFile, certFile, keyFile string
	log                       *slog.Logger

	mu   sync.Mutex
	good *tls.Config // guarded by mu; what was last read without an error
}

func newFileCredentials(cfg Config) (*fileCredentials, error) {
	c := &fileCredentials{caFile: cfg.CAFile, certFile: cfg.CertFile, keyFile: cfg.KeyFile, log: cfg.Logger}
	good, err := c.load()
	if err != nil {
		return nil, fmt.Errorf("etcd: %w", err)
	}
	c.good = good
	return c, nil
}

func (c *fileCredentials) load() (*tls.Config, error) {
	cert, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err != nil {
		return nil, fmt.Errorf("read the client certificate: %v", err)
	}
	text, err := os.ReadFile(c.caFile)
	if err != nil {
		return nil, fmt.Errorf("read the CA of the members: %v", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("read the CA of the members: %s has no PEM certificate", c.caFile)
	}
	return &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots, Certificates: []tls.Certificate{cert}}, nil
}

// latest returns what the files say now, or said when they last made sense.
func (c *fileCredentials) latest(ctx context.Context) *tls.Config {
	config, err := c.load()
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		c.log.LogAttrs(ctx, slog.LevelWarn, "certificate files for etcd cannot be read, the last good ones are used", slog.Any("err", err))
		return c.good
	}
	c.good = config
	return config
}

// ClientHandshake implements credentials.TransportCredentials.
func (c *fileCredentials) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return credentials.NewTLS(c.latest(ctx)).ClientHandshake(ctx, authority, conn)
}

// ServerHandshake implements credentials.TransportCredentials.
func (c *fileCredentials) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("credentials of a client")
}

// Info implements credentials.TransportCredentials.
func (c *fileCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone implements credentials.TransportCredentials.
func (c *fileCredentials) Clone() credentials.TransportCredentials { return c }

// OverrideServerName implements credentials.TransportCredentials.
func (c *fileCredentials) OverrideServerName(string) error {
	return errors.New("the server name is that of the endpoint")
}
