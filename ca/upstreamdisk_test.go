// A CA below an authority in PEM files: what is that one's to decide, and what
// happens when its key is not there.

package ca_test

import (
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"

	"merlon.dev/ca"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

// Below an upstream authority its root signs: it is on the list, and is replaced
// there. JWT keys are the CA's own.
func TestUpstreamRootIsNotReplacedHere(t *testing.T) {
	t.Parallel() // it mostly waits
	root, onDisk := diskUpstream(t)
	c := startCA(t, tempDir(t), onDisk)
	if got := c.authority(rootKind, "active", "").GetRootHash(); got != svid.KeyHash(root.Cert) {
		t.Errorf("the root that signs has hash %s; want the upstream's", got)
	}
	_, err := c.admin.PrepareAuthority(t.Context(), &capb.PrepareAuthorityRequest{Kind: rootKind})
	wantCode(t, err, codes.FailedPrecondition)
	jwt := c.prepare(jwtKind)
	if err := c.activate(jwt, true); err != nil {
		t.Fatal(err)
	}
	agent := c.agent("n1")
	entry := c.entry("n1", "web")
	eventually(t, "the new JWT key signs", func() bool { return agent.jwtKeyID(entry) == jwt })
}

// diskUpstream is a CA in PEM files, and what lets it sign.
func diskUpstream(t *testing.T) (*forge.Authority, func(*ca.Config)) {
	t.Helper()
	root := forge.New(t, "shop.test")
	dir := t.TempDir()
	key, err := x509.MarshalPKCS8PrivateKey(root.Key)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{
		"root.pem": {Type: "CERTIFICATE", Bytes: root.Cert.Raw}, "key.pem": {Type: "PRIVATE KEY", Bytes: key},
	} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root, func(cfg *ca.Config) {
		cfg.Upstream, cfg.UpstreamRootFile = "disk", filepath.Join(dir, "root.pem")
		cfg.UpstreamCertFile, cfg.UpstreamKeyFile = cfg.UpstreamRootFile, filepath.Join(dir, "key.pem")
	}
}

// That the next intermediate could not be signed is noticed while the one at hand
// has half of its life left.
func TestLostUpstreamKeyIsNoticedAtOnce(t *testing.T) {
	_, onDisk := diskUpstream(t)
	dir := tempDir(t)
	c := startCA(t, dir, onDisk)
	if code, body := c.get("/ready"); code != http.StatusOK {
		t.Fatalf("/ready = %d %s", code, body)
	}
	var cfg ca.Config
	onDisk(&cfg)
	aside := cfg.UpstreamKeyFile + ".aside"
	if err := os.Rename(cfg.UpstreamKeyFile, aside); err != nil {
		t.Fatal(err)
	}
	noticed := func(c *testCA) {
		t.Helper()
		if code, body := c.get("/ready"); code == http.StatusOK || !strings.Contains(body, "upstream_key_file") || !strings.Contains(body, cfg.UpstreamKeyFile) {
			t.Errorf("/ready = %d %s; want it to name the file", code, body)
		}
	}
	noticed(c)
	c.agent("n1") // it goes on meanwhile
	c.stop()
	var log sink
	c = startCA(t, dir, onDisk, func(cfg *ca.Config) { cfg.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
	noticed(c)
	eventually(t, "the log says so", func() bool {
		return strings.Contains(log.String(), "upkeep failed") && strings.Contains(log.String(), cfg.UpstreamKeyFile)
	})
	if err := os.Rename(aside, cfg.UpstreamKeyFile); err != nil {
		t.Fatal(err)
	}
	if code, body := c.get("/ready"); code != http.StatusOK {
		t.Errorf("/ready with the key back = %d %s", code, body)
	}
}
