// Validators: forged documents are presented to a TLS server, to a TLS client, and to
// ValidateJWTSVID.

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	"merlon.dev/integration/conform/jwtcase"
	"merlon.dev/integration/conform/pathcase"
)

// answerTime is how long a server has to answer a request.
const answerTime = 3 * time.Second

// checkServer presents every forged chain to a server that speaks HTTP/1.1 over mutual
// TLS. A server that answers anything has accepted the chain; whether its policy
// denies the request is another question. A chain that is sound comes first, and
// again at the end: without it, refusals would say nothing.
func checkServer(ctx context.Context, r *report, address string, f *forgery) error {
	control := func() error {
		for _, p := range f.Paths {
			if p.ID == "sound/below-the-root" {
				if err := present(ctx, address, p); err != nil {
					return fmt.Errorf("the server at %s refuses a sound X509-SVID of the forge: %w (does it trust the forge's bundle.json as example.org?)", address, err)
				}
				return nil
			}
		}
		return errors.New("the forgery has no sound X509-SVID")
	}
	if err := control(); err != nil {
		return err
	}
	for _, p := range f.Paths {
		err := present(ctx, address, p)
		if errors.Is(err, errNotSent) {
			r.leaveOut(p.Requirement, p.ID+": "+err.Error())
			continue
		}
		checkVerdict(r, p, err)
	}
	return control()
}

// checkVerdict notes what a validator made of a chain. Where the verdict is one of
// prudence, accepting is no failure of a MUST.
func checkVerdict(r *report, p forgedPath, err error) {
	switch {
	case (err == nil) == p.Accept:
		r.ok(p.Requirement, chains)
	case p.Accept:
		r.fail(p.Requirement, chains, "%s is refused: %s: %v", p.ID, p.Why, err)
	case p.By == pathcase.Prudence:
		r.accepted(p.Requirement, chains, "%s is accepted: %s", p.ID, p.Why)
	default:
		r.fail(p.Requirement, chains, "%s is accepted: %s [%s]", p.ID, p.Why, p.By)
	}
}

// errNotSent: the chain could not be presented.
var errNotSent = errors.New("crypto/tls cannot present it")

// present makes a TLS connection with the chain, and asks for /. It is nil if the
// server answers.
func present(ctx context.Context, address string, p forgedPath) error {
	signer, err := key(p.Key)
	if err != nil {
		return fmt.Errorf("%w: %w", errNotSent, err)
	}
	cert := &tls.Certificate{Certificate: p.Presented, PrivateKey: signer}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var d net.Dialer
	raw, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return fmt.Errorf("%w: %w", errNotSent, err)
	}
	defer raw.Close()
	conn := tls.Client(raw, &tls.Config{
		MinVersion:           tls.VersionTLS12,
		InsecureSkipVerify:   true, // who the server is does not matter here
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil },
	})
	if err := conn.HandshakeContext(ctx); err != nil {
		return err
	}
	if err := conn.SetDeadline(time.Now().Add(answerTime)); err != nil {
		return err
	}
	// In TLS 1.3 a client's handshake ends before the server has looked at its
	// certificate: only an answer says that it was accepted.
	if _, err := fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: conform\r\nConnection: close\r\n\r\n"); err != nil {
		return err
	}
	_, err = conn.Read(make([]byte, 1))
	return err
}

// checkClient serves at address, showing a forged chain to each client that comes, in
// turn: the client under test has to connect again and again, expecting
// spiffe://example.org/a. One that sends anything has accepted the chain.
func checkClient(ctx context.Context, r *report, address string, f *forgery) error {
	lis, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		return err
	}
	defer lis.Close()
	context.AfterFunc(ctx, func() { lis.Close() })
	sound := 0
	for _, p := range f.Paths {
		if p.Accept && p.ID != "sound/below-the-root" { // most have another SPIFFE ID
			continue
		}
		err := serveOnce(ctx, lis, p)
		switch {
		case errors.Is(err, errNobody):
			return err
		case errors.Is(err, errNotSent):
			r.leaveOut(p.Requirement, p.ID+": "+err.Error())
		case p.Accept && err == nil:
			sound++
		default:
			checkVerdict(r, p, err)
		}
	}
	if sound == 0 {
		return fmt.Errorf("the client that comes to %s refuses a sound X509-SVID of the forge: does it trust bundle.json as example.org, and expect spiffe://example.org/a?", address)
	}
	return nil
}

// clientPatience is how long a client under test may stay away.
const clientPatience = 15 * time.Second

var errNobody = errors.New("no client came")

// serveOnce shows one chain to the next client. It is nil if the client goes on.
func serveOnce(ctx context.Context, lis net.Listener, p forgedPath) error {
	signer, err := key(p.Key)
	if err != nil {
		return fmt.Errorf("%w: %w", errNotSent, err)
	}
	if err := lis.(*net.TCPListener).SetDeadline(time.Now().Add(clientPatience)); err != nil {
		return err
	}
	raw, err := lis.Accept()
	if err != nil {
		return fmt.Errorf("%w to %s: %w", errNobody, lis.Addr(), err)
	}
	defer raw.Close()
	cert := &tls.Certificate{Certificate: p.Presented, PrivateKey: signer}
	conn := tls.Server(raw, &tls.Config{
		MinVersion:     tls.VersionTLS12,
		ClientAuth:     tls.RequireAnyClientCert,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cert, nil },
	})
	if err := conn.SetDeadline(time.Now().Add(answerTime)); err != nil {
		return err
	}
	if err := conn.HandshakeContext(ctx); err != nil {
		return err
	}
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		return err
	}
	_, err = fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
	return err
}

// checkValidate has every forged token judged by ValidateJWTSVID. own is the trust
// domain of the implementation, of which the forge is none.
func (e *workloadAPI) checkValidate(ctx context.Context, r *report, own spiffeid.TrustDomain, f *forgery) error {
	if _, err := e.validate(ctx, jwtcase.Audience, f.Tokens[0].Token); err != nil {
		return fmt.Errorf("ValidateJWTSVID refuses a sound JWT-SVID of the forge: %w (does the workload's trust domain federate with example.org, by the forge's bundle.json?)", err)
	}
	for _, c := range f.Tokens {
		_, err := e.validate(ctx, jwtcase.Audience, c.Token)
		id, _, _ := strings.Cut(c.ID, "/")
		switch {
		case !c.Accept && err == nil && c.Prudence:
			r.accepted(id, tokens, "%s is accepted", c.ID)
			continue
		case !c.Accept && err == nil:
			err = fmt.Errorf("%s is accepted", c.ID)
		case !c.Accept:
			r.check("E6", api, wants(err, codes.InvalidArgument, "ValidateJWTSVID of "+c.ID))
			err = nil
		case err != nil:
			err = fmt.Errorf("%s is refused: %v", c.ID, err)
		}
		r.check(id, tokens, err)
		r.check("E16", tokens, err)
	}
	for _, foreign := range []spiffeid.TrustDomain{own, spiffeid.RequireTrustDomainFromString("nobody.invalid")} {
		token, err := f.foreign(foreign, jwtcase.Audience, time.Now())
		if err != nil {
			return err
		}
		_, err = e.validate(ctx, jwtcase.Audience, token)
		r.check("E19", tokens, failIf(err == nil, "a JWT-SVID of %s that the forge's key has signed is accepted", foreign))
	}
	return nil
}
