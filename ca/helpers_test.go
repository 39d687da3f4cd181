// Small things: policies, TLS, paths.

package ca_test

import (
	"bytes"
	"crypto/tls"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	"merlon.dev/ca"
	"merlon.dev/ca/capb"
	"merlon.dev/policy/bundle"
)

// policyBundle is a small unsigned bundle.
func policyBundle(t testing.TB) []byte {
	t.Helper()
	dir := t.TempDir()
	grants := "grants:\n  - id: web-reads-orders\n    from: [spiffe://shop.test/web]\n    to: [spiffe://shop.test/orders]\n    http: {methods: [GET]}\n"
	if err := os.WriteFile(filepath.Join(dir, "grants.yaml"), []byte(grants), 0o600); err != nil {
		t.Fatal(err)
	}
	b, err := bundle.Build(dir)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func pushPolicy(t testing.TB, c *testCA) uint64 {
	t.Helper()
	resp, err := c.admin.PushPolicy(t.Context(), &capb.PushPolicyRequest{Bundle: policyBundle(t)})
	if err != nil {
		t.Fatal(err)
	}
	return resp.GetGeneration()
}

func dialTLS(t testing.TB, address string) tls.ConnectionState {
	t.Helper()
	conn, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	return conn.ConnectionState()
}

func longPath(i int) string {
	return "path:/" + strings.Repeat(string(rune('a'+i)), 3000)
}

func withAdminService(register func(grpc.ServiceRegistrar)) func(*ca.Config) {
	return func(cfg *ca.Config) { cfg.AdminServices = append(cfg.AdminServices, register) }
}

func withAgentTTL(ttl time.Duration) func(*ca.Config) {
	return func(cfg *ca.Config) { cfg.AgentSVIDTTL = ttl }
}

// grep names a file below dir that holds text.
func grep(t *testing.T, dir, text string) (found string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if bytes.Contains(b, []byte(text)) {
			found = path
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}
