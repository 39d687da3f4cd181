// Implementations that accept everything: what is about refusing does not pass.

package main

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	workload "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"merlon.dev/sdk/svid/forge"
)

// acceptAll serves TLS to whoever has a certificate, of which it verifies nothing.
func acceptAll(t *testing.T) string {
	t.Helper()
	own := forge.New(t, "server.invalid").Leaf("/server").Certificate()
	lis, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{own}, ClientAuth: tls.RequireAnyClientCert,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { lis.Close() })
	go func() {
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			go answerOnce(conn)
		}
	}()
	return lis.Addr().String()
}

func answerOnce(conn net.Conn) {
	defer conn.Close()
	if _, err := conn.Read(make([]byte, 1024)); err == nil {
		_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
	}
}

// A validator that validates nothing passes nothing that is about refusing.
func TestAcceptAllServerPassesNothing(t *testing.T) {
	f, _, _, err := makeForgery(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	r := newReport()
	if err := checkServer(t.Context(), r, acceptAll(t), f); err != nil {
		t.Fatal(err)
	}
	refusing := make(map[string]bool)
	for _, p := range f.Paths {
		refusing[p.Requirement] = refusing[p.Requirement] || !p.Accept
	}
	o := options{server: "s", forge: "f"}
	for _, res := range r.list(o.given, o.missing) {
		if refusing[res.ID] && (res.Status == pass || res.Status == skip) {
			t.Errorf("%s (%s): %s of a server that accepts everything (%d checks)", res.ID, res.Level, res.Status, res.Checks)
		}
	}
	if x7 := r.of("X7"); x7.Status != fail {
		t.Errorf("X7: %s, %q", x7.Status, x7.Findings)
	}
}

// believing is a Workload API whose ValidateJWTSVID takes everything for valid.
type believing struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
}

// ValidateJWTSVID implements workload.SpiffeWorkloadAPIServer.
func (believing) ValidateJWTSVID(context.Context, *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	return &workload.ValidateJWTSVIDResponse{SpiffeId: "spiffe://example.org/a"}, nil
}

func TestAcceptAllTokensPassesNothing(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(srv, believing{})
	go srv.Serve(lis)
	defer srv.Stop()
	e, err := dialEndpoint(lis.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer e.cc.Close()
	f, _, _, err := makeForgery(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	r := newReport()
	if err := e.checkValidate(t.Context(), r, spiffeid.RequireTrustDomainFromString("own.test"), f); err != nil {
		t.Fatal(err)
	}
	refusing := map[string]bool{"E16": true, "E19": true}
	for _, c := range f.Tokens {
		id, _, _ := strings.Cut(c.ID, "/")
		refusing[id] = refusing[id] || !c.Accept
	}
	for id, refuses := range refusing {
		if p := r.of(id).part(tokens); refuses && p.Status != fail {
			t.Errorf("%s: %s of a validator that accepts everything (%d checks)", id, p.Status, p.Checks)
		}
	}
}
