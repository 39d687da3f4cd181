// The key of the log: whoever issues vouches for it, and what it signed is
// verified from the folder.

package ca

import (
	"bytes"
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/offline"
	"merlon.dev/sdk/checkpoint"
)

// TestLogKeyIsCertifiedByWhoIssuesNow: the log stays the same one when the
// authority is another, and what it signs is verified under either.
func TestLogKeyIsCertifiedByWhoIssuesNow(t *testing.T) {
	p, path := openParts(t)
	now := time.Now()
	before := logChain(t, p)
	first, err := p.audit.Checkpoint()
	if err != nil {
		t.Fatal(err)
	}
	later := now.Add(13 * time.Hour) // past half of the intermediate's life
	p.everything(t, later)
	after := logChain(t, p)
	if bytes.Equal(before[1], after[1]) || !bytes.Equal(after[1], p.keys.X509().Chain[0].Raw) {
		t.Error("the log's key is not certified by the authority that issues now")
	}
	for _, chain := range [][][]byte{before, after} {
		key, err := checkpoint.VerifyChain(chain[:len(chain)-1], []*x509.Certificate{p.keys.X509().Root}, "shop.test", later)
		if err != nil {
			t.Fatal(err)
		}
		if c, err := key.Open(first.Note); err != nil || c != first.Checkpoint {
			t.Errorf("checkpoint = %+v, %v", c, err)
		}
	}
	if n := countRecords(t, path, "certificate of the log's key"); n != 2 {
		t.Errorf("%d certificates are recorded; want 2", n)
	}
}

func logChain(t *testing.T, p *parts) [][]byte {
	t.Helper()
	chain, err := p.audit.Chain()
	if err != nil || len(chain) < 3 {
		t.Fatalf("chain of %d certificates, %v", len(chain), err)
	}
	return chain
}

func countRecords(t *testing.T, path, detail string) (n int) {
	t.Helper()
	for line, err := range audit.Lines(path, 1) {
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(line.Text, []byte(`"detail":"`+detail+`"`)) {
			n++
		}
	}
	return n
}

// TestVerifyNamesWhatIsThere: from the folder alone; and a log that had a
// checkpoint and has none is not whole.
func TestVerifyNamesWhatIsThere(t *testing.T) {
	p, path := openParts(t)
	cfg := Config{DataDir: filepath.Dir(path)}
	r, err := offline.VerifyAuditLog(cfg)
	if err != nil || r.Problem != "" || r.Last < 3 || r.Size < 1 || uint64(r.Size) >= r.Last || r.RootHash == "" {
		t.Errorf("with the checkpoint of the start: %+v, %v", r, err)
	}
	if err := p.audit.Close(); err != nil {
		t.Fatal(err)
	}
	r, err = offline.VerifyAuditLog(cfg)
	if err != nil || r.Problem != "" || r.Size != int64(r.Last) || r.Origin == "" || r.VerifierKey == "" || len(r.RootHash) != 64 {
		t.Errorf("with the last checkpoint: %+v, %v", r, err)
	}
	if err := os.Remove(filepath.Join(cfg.DataDir, "audit.tree", "checkpoint")); err != nil {
		t.Fatal(err)
	}
	if r, err = offline.VerifyAuditLog(cfg); err != nil || !strings.Contains(r.Problem, "it was taken away") {
		t.Errorf("without it: %+v, %v", r, err)
	}
	if _, err := offline.VerifyAuditLog(Config{DataDir: t.TempDir()}); err == nil {
		t.Error("a log that is not there is verified")
	}
}
