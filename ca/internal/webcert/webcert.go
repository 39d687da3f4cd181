// Package webcert has the certificate of the public endpoint, by which those who know
// nothing of SPIFFE yet verify it: from files, which may be replaced at any time, or
// by ACME (RFC 8555), which renews by itself.
package webcert

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"
)

// Source gives the certificate for a handshake. It is safe for concurrent use.
type Source interface {
	GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error)
	// Protocols are the ALPN names that the source needs beside those of HTTP.
	Protocols() []string
}

// Config is the configuration of a server that anybody may come to, by Mozilla's
// intermediate recommendations: TLS 1.2 with forward secrecy and AEAD, and 1.3. There
// are no session tickets.
func Config(s Source) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		CipherSuites: []uint16{
			tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
			tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
			tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
		},
		CurvePreferences:       []tls.CurveID{tls.X25519MLKEM768, tls.X25519, tls.CurveP256, tls.CurveP384},
		SessionTicketsDisabled: true,
		GetCertificate:         s.GetCertificate,
		NextProtos:             append([]string{"h2", "http/1.1"}, s.Protocols()...),
	}
}

// lookAgain is how long a certificate from files is used before the files are looked
// at again.
const lookAgain = 10 * time.Second

// maxPEM bounds what is read of a file.
const maxPEM = 1 << 20

// Files is a certificate chain and its key in PEM. Files that were replaced take effect
// within lookAgain; where they are no pair, or have ended, the last good ones stay.
type Files struct {
	cert, key string
	log       *slog.Logger

	mu      sync.Mutex // guards the rest
	current *tls.Certificate
	looked  time.Time
	stamps  [2]time.Time // when the files in use were written
	failing bool         // it was said
}

// OpenFiles reads the files, which have to be a pair.
func OpenFiles(cert, key string, log *slog.Logger, now time.Time) (*Files, error) {
	f := &Files{cert: cert, key: key, log: log}
	stamps, err := f.stamp()
	if err != nil {
		return nil, err
	}
	if f.current, err = readPair(cert, key, now); err != nil {
		return nil, err
	}
	f.looked, f.stamps = now, stamps
	return f, nil
}

// Protocols implements Source.
func (*Files) Protocols() []string { return nil }

// GetCertificate implements Source.
func (f *Files) GetCertificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if now := time.Now(); now.Sub(f.looked).Abs() >= lookAgain {
		f.looked = now
		err := f.look(now)
		switch {
		case err != nil && !f.failing:
			f.log.LogAttrs(hello.Context(), slog.LevelError, "bundle_endpoint: the certificate was replaced by one that cannot be used; the last one stays", slog.Any("err", err))
		case err == nil && f.failing:
			f.log.LogAttrs(hello.Context(), slog.LevelInfo, "bundle_endpoint: the certificate can be used again")
		}
		f.failing = err != nil
	}
	return f.current, nil
}

// look reads the files if they were written since. mu is held.
func (f *Files) look(now time.Time) error {
	stamps, err := f.stamp()
	if err != nil || stamps == f.stamps {
		return err
	}
	pair, err := readPair(f.cert, f.key, now)
	if err != nil {
		return err
	}
	f.current, f.stamps = pair, stamps
	return nil
}

func (f *Files) stamp() (stamps [2]time.Time, err error) {
	for i, path := range []string{f.cert, f.key} {
		fi, err := os.Stat(path)
		if err != nil {
			return stamps, err
		}
		if fi.Size() > maxPEM || !fi.Mode().IsRegular() {
			return stamps, fmt.Errorf("%s is no regular file of at most %d bytes", path, maxPEM)
		}
		if path == f.key && fi.Mode().Perm()&0o007 != 0 {
			return stamps, fmt.Errorf("%s is a private key that everybody on this machine may read: chmod o= %s", path, path)
		}
		stamps[i] = fi.ModTime()
	}
	return stamps, nil
}

func readPair(cert, key string, now time.Time) (*tls.Certificate, error) {
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("%s and %s: %w", cert, key, err)
	}
	leaf := pair.Leaf
	switch {
	case !now.Before(leaf.NotAfter):
		return nil, fmt.Errorf("%s: it has ended at %s", cert, leaf.NotAfter.Format(time.RFC3339))
	case leaf.IsCA:
		return nil, fmt.Errorf("%s: its first certificate is an authority's, not a server's", cert)
	case len(leaf.DNSNames) == 0 && len(leaf.IPAddresses) == 0:
		return nil, fmt.Errorf("%s: it names no host, so no client could verify it", cert)
	case !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageServerAuth):
		return nil, fmt.Errorf("%s: it is not for servers (extended key usage serverAuth)", cert)
	}
	return &pair, nil
}
