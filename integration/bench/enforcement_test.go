// P2 again, at the place of enforcement: how long a revocation takes to cut a
// live connection, and a policy change to decide the next call.

package bench_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"merlon.dev/ca/capb"
	"merlon.dev/integration/stage"
	"merlon.dev/policy"
	"merlon.dev/policy/bundle"
	"merlon.dev/sdk"
)

// me is the benchmark's own process as workload /me, beside further entries on its node.
func me(b *testing.B, entries int) (*stage.Domain, capb.AdminClient, *sdk.Identity) {
	b.Helper()
	d := stage.Dev(b)
	admin := capb.NewAdminClient(dial(b, d.Admin))
	d.Entry("/me")
	fill(b, admin, entries)
	id, err := sdk.Open(b.Context(), sdk.WithAgentAddress(d.WorkloadAPI), sdk.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(id.Close)
	return d, admin, id
}

// built is an unsigned policy bundle with one grant for /me, and rego if it is
// not empty.
func built(b *testing.B, d *stage.Domain, rule, rego string) []byte {
	b.Helper()
	dir := b.TempDir()
	text := fmt.Sprintf("grants:\n  - id: me\n    from: [%[1]s]\n    to: [%[1]s]\n    %s\n", d.ID("/me"), rule)
	if err := os.WriteFile(filepath.Join(dir, "grants.yaml"), []byte(text), 0o600); err != nil {
		b.Fatal(err)
	}
	if rego != "" {
		if err := os.WriteFile(filepath.Join(dir, "own.rego"), []byte(rego), 0o600); err != nil {
			b.Fatal(err)
		}
	}
	raw, err := bundle.Build(dir)
	if err != nil {
		b.Fatal(err)
	}
	return raw
}

func push(b *testing.B, admin capb.AdminClient, raw []byte) {
	b.Helper()
	if _, err := admin.PushPolicy(b.Context(), &capb.PushPolicyRequest{Bundle: raw}); err != nil {
		b.Fatal(err)
	}
}

func BenchmarkPolicyReachesCall(b *testing.B) {
	beside(b, func(b *testing.B, entries int) {
		d, admin, id := me(b, entries)
		call := &policy.Input{Source: d.ID("/me"), Destination: d.ID("/me"), Protocol: policy.HTTP, Method: "GET", Path: "/"}
		for name, rego := range map[string]string{
			"grants":  "",
			"ownrego": "package authz\n\ndeny if input.attributes.request.http.method == \"TRACE\"\n",
		} {
			b.Run(name, func(b *testing.B) {
				policies := [][]byte{built(b, d, "http: {methods: [GET]}", rego), built(b, d, "http: {methods: [POST]}", rego)}
				push(b, admin, policies[1])
				reaches(b, id, call, false) // and not what another policy said
				var took []time.Duration
				for i := 0; b.Loop(); i++ {
					begun := time.Now()
					push(b, admin, policies[i%2])
					reaches(b, id, call, i%2 == 0)
					took = append(took, time.Since(begun))
				}
				report(b, "decided", took)
			})
		}
	})
}

// beside runs a benchmark without and with 100 000 further entries.
func beside(b *testing.B, bench func(b *testing.B, entries int)) {
	for _, entries := range []int{0, 100_000} {
		b.Run(fmt.Sprintf("entries=%d", entries), func(b *testing.B) { bench(b, entries) })
	}
}

// reaches makes the call until it is allowed, or is not.
func reaches(b *testing.B, id *sdk.Identity, call *policy.Input, allowed bool) {
	b.Helper()
	for begun := time.Now(); id.Authorize(b.Context(), call).Allow != allowed; {
		if time.Since(begun) > 30*time.Second {
			b.Fatal("the policy did not take effect within 30 s")
		}
	}
}

func BenchmarkRevocationCutsConnection(b *testing.B) {
	beside(b, func(b *testing.B, entries int) {
		d, admin, id := me(b, entries)
		push(b, admin, built(b, d, "tcp: {}", ""))
		inner, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			b.Fatal(err)
		}
		lis := id.Listener(inner)
		b.Cleanup(func() { lis.Close() })
		go echo(lis)
		var took []time.Duration
		for b.Loop() {
			conn := connect(b, id, inner.Addr().String())
			begun := time.Now()
			if _, err := admin.Revoke(b.Context(), &capb.RevokeRequest{Subject: &capb.RevokeRequest_SpiffeId{SpiffeId: d.ID("/me")}}); err != nil {
				b.Fatal(err)
			}
			io.Copy(io.Discard, conn) // ends when the connection is cut
			took = append(took, time.Since(begun))
			conn.Close()
		}
		report(b, "cut", took)
	})
}

func echo(lis net.Listener) {
	for {
		conn, err := lis.Accept()
		if err != nil {
			return
		}
		go func() { io.Copy(conn, conn); conn.Close() }()
	}
}

// connect returns a connection that has carried a byte there and back: after a
// revocation the first attempts can meet the withdrawn SVID.
func connect(b *testing.B, id *sdk.Identity, address string) net.Conn {
	b.Helper()
	dialTLS := id.DialTLS(sdk.Service("me"))
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); {
		conn, err := dialTLS(context.Background(), "tcp", address)
		if err != nil {
			continue
		}
		one := make([]byte, 1)
		if _, err := conn.Write(one); err == nil {
			if _, err := io.ReadFull(conn, one); err == nil {
				return conn
			}
		}
		conn.Close()
	}
	b.Fatal("no connection within 30 s")
	return nil
}
