// Administering with an OIDC token, from where there is no agent: the token goes
// to no CA but the one whose root is pinned.

package main

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid"
)

const maxTokenBytes = 16 << 10

func (o *options) withToken(do func(capb.AdminClient) error) error {
	if !o.pinned() {
		return usageError{"--root-hash is missing or no SHA-256 in hex: a token is shown to no CA that cannot be told from another", "on the CA's host, merlon trust show prints root_hashes; give one with --root-hash or MERLON_ROOT_HASH"}
	}
	token, err := readToken(o.tokenFile)
	if err != nil {
		const hint = "name a file with an OIDC token with --token-file or MERLON_TOKEN_FILE"
		return hintError{notThere(err, hint), hint}
	}
	cfg := svid.TLS{}.Client()
	cfg.GetClientCertificate = nil
	cfg.VerifyConnection = o.verifyPinned
	cc, err := grpc.NewClient(o.ca, grpc.WithTransportCredentials(credentials.NewTLS(cfg)), grpc.WithPerRPCCredentials(bearer(token)))
	if err != nil {
		return err
	}
	defer cc.Close()
	err = do(capb.NewAdminClient(cc))
	switch status.Code(err) {
	case codes.Unauthenticated:
		return hintError{err, "get a new token; its issuer and audience are those under oidc in the CA's configuration"}
	case codes.PermissionDenied:
		return hintError{err, "which claims have which role is under oidc in the CA's configuration"}
	}
	return err
}

// rootHashes are the pinned roots: two while one replaces the other.
func (o *options) rootHashes() []string { return strings.Split(o.rootHash, ",") }

func (o *options) pinned() bool {
	return !slices.ContainsFunc(o.rootHashes(), func(hash string) bool {
		b, err := hex.DecodeString(hash)
		return err != nil || len(b) != sha256.Size
	})
}

// verifyPinned lets the connection through to a CA under a pinned root, which
// names its trust domain.
func (o *options) verifyPinned(cs tls.ConnectionState) error {
	if len(cs.PeerCertificates) == 0 {
		return errors.New("it shows no certificate")
	}
	root := cs.PeerCertificates[len(cs.PeerCertificates)-1]
	if len(root.URIs) != 1 {
		return errors.New("its root names no trust domain")
	}
	td, err := spiffeid.TrustDomainFromURI(root.URIs[0])
	if err != nil {
		return err
	}
	peer, err := o.verifyRoots(cs.PeerCertificates, td)
	if err != nil {
		return err
	}
	caID, err := spiffeid.FromSegments(td, "ca")
	if err != nil {
		return err
	}
	return svid.AdmitID(caID)(peer)
}

// verifyRoots is svid.VerifyPinned with whichever of the pinned roots it is.
func (o *options) verifyRoots(presented []*x509.Certificate, td spiffeid.TrustDomain) (peer *svid.Peer, err error) {
	for _, hash := range o.rootHashes() {
		if peer, err = svid.VerifyPinned(presented, td, hash, time.Now()); err == nil {
			return peer, nil
		}
	}
	return nil, err
}

func readToken(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("read the token: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxTokenBytes+1))
	if err != nil {
		return "", fmt.Errorf("read the token: %w", err)
	}
	token := strings.TrimSpace(string(b))
	if token == "" || len(b) > maxTokenBytes || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", fmt.Errorf("read the token: %s does not hold one token of at most %d bytes", path, maxTokenBytes)
	}
	return token, nil
}

// bearer shows a token with each call.
type bearer string

// GetRequestMetadata implements credentials.PerRPCCredentials.
func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(b)}, nil
}

// RequireTransportSecurity implements credentials.PerRPCCredentials.
func (bearer) RequireTransportSecurity() bool { return true }
