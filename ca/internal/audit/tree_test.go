// The tree beside the chain: it is the tree of the lines whatever happens
// between, and with a checkpoint what is missing at the end is missed, too.

package audit

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/tlog"
	"pgregory.net/rapid"

	"merlon.dev/ca/internal/authority"
	"merlon.dev/sdk/checkpoint"
)

// testAuthority has a root of shop.test and an intermediate.
func testAuthority(t testing.TB) *authority.X509Authority {
	t.Helper()
	var above *x509.Certificate
	var aboveKey *ecdsa.PrivateKey
	certs := make([]*x509.Certificate, 2)
	for i := range certs {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		template := &x509.Certificate{
			SerialNumber: big.NewInt(int64(i + 1)), Subject: pkix.Name{CommonName: fmt.Sprint("authority ", i)},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
			KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{{Scheme: "spiffe", Host: "shop.test"}},
		}
		if above == nil {
			above, aboveKey = template, key
		}
		der, err := x509.CreateCertificate(rand.Reader, template, above, key.Public(), aboveKey)
		if err != nil {
			t.Fatal(err)
		}
		if certs[i], err = x509.ParseCertificate(der); err != nil {
			t.Fatal(err)
		}
		above, aboveKey = certs[i], key
	}
	return &authority.X509Authority{Chain: certs[1:], Root: certs[0], Signer: aboveKey}
}

// testKey is a log's key that a test authority vouches for.
func testKey(t testing.TB) Key {
	t.Helper()
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	ca := testAuthority(t)
	chain, err := ca.CertifyLogKey("ca-1", public, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	chain = append(chain, ca.Root.Raw)
	return Key{
		Key:    checkpoint.Key{TrustDomain: "shop.test", Replica: "ca-1", Public: public},
		Signer: private, Chain: func() ([][]byte, error) { return chain, nil },
	}
}

// openSigned opens a log that signs checkpoints.
func openSigned(t testing.TB, path string, key Key, opts Options) *Log {
	t.Helper()
	l, err := Open(path, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeLog(t, l) })
	if err := l.Publish(key); err != nil {
		t.Fatal(err)
	}
	return l
}

// signed makes a log of n records with a checkpoint, and closes it.
func signed(t testing.TB, key Key, n int) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "audit.jsonl")
	l := openSigned(t, path, key, Options{})
	var records []Record
	for i := range n {
		records = append(records, Record{Type: Issue, Serial: fmt.Sprintf("%x", i+1)})
	}
	if err := l.Append(t.Context(), records...); err != nil {
		t.Fatal(err)
	}
	closeLog(t, l)
	return path
}

// modelTree is computed naively from the lines that were acknowledged.
type modelTree struct {
	lines  []string
	hashes []tlog.Hash
}

func (m *modelTree) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	var out []tlog.Hash
	for _, i := range indexes {
		out = append(out, m.hashes[i])
	}
	return out, nil
}

// take adds the lines of the log that the model does not have, and reports
// those that it has and the log has not.
func (m *modelTree) take(t *rapid.T, path string) {
	n := 0
	for line, err := range Lines(path, 1) {
		if err != nil {
			t.Fatal(err)
		}
		if n++; n <= len(m.lines) {
			if m.lines[n-1] != string(line.Text) {
				t.Fatalf("record %d became %s", n, line.Text)
			}
			continue
		}
		hashes, err := tlog.StoredHashes(int64(n-1), line.Text, m)
		if err != nil {
			t.Fatal(err)
		}
		m.lines, m.hashes = append(m.lines, string(line.Text)), append(m.hashes, hashes...)
	}
	if n < len(m.lines) {
		t.Fatalf("%d of %d acknowledged records are left", n, len(m.lines))
	}
}

// TestTreeIsThatOfTheLines: whatever is appended, saved, rotated, and however
// often the process dies and a torn line is left, what was acknowledged is
// there, the checkpoint is that of the lines, and it goes on from all before.
func TestTreeIsThatOfTheLines(tt *testing.T) {
	key := testKey(tt)
	rapid.Check(tt, func(t *rapid.T) {
		dir := tt.TempDir()
		opts := Options{MaxBytes: rapid.SampledFrom([]int64{0, 80 << 10}).Draw(t, "max bytes")}
		m := &modelTree{}
		before := checkpoint.Checkpoint{Origin: key.Origin()}
		for range rapid.IntRange(1, 3).Draw(t, "lives") {
			path := filepath.Join(dir, "audit.jsonl")
			l, err := Open(path, opts)
			if err == nil {
				err = l.Publish(key)
			}
			if err != nil {
				t.Fatal(err)
			}
			for range rapid.IntRange(0, 2).Draw(t, "steps") {
				records := slices.Repeat([]Record{{Type: Issue, Serial: "a"}}, rapid.SampledFrom([]int{1, 3, 100, 300}).Draw(t, "records"))
				if err := l.Append(context.Background(), records...); err != nil {
					t.Fatal(err)
				}
				m.take(t, path)
				before = checkCheckpoint(t, l, key, m, before)
				if rapid.Bool().Draw(t, "save") {
					if err := l.save(); err != nil {
						t.Fatal(err)
					}
				}
			}
			// What a killed process leaves is what is on disk now.
			next := tt.TempDir()
			if err := errors.Join(os.CopyFS(next, os.DirFS(dir)), l.Close()); err != nil {
				t.Fatal(err)
			}
			dir = next
			appendRaw(tt, filepath.Join(dir, "audit.jsonl"), rapid.SampledFrom([]string{"", `{"seq":`, "\x00\x00"}).Draw(t, "torn"))
		}
	})
}

// checkCheckpoint compares what the log signs with the model, and has tlog
// check its proofs.
func checkCheckpoint(t *rapid.T, l *Log, key Key, m *modelTree, before checkpoint.Checkpoint) checkpoint.Checkpoint {
	s, err := l.Checkpoint()
	if err != nil {
		t.Fatal(err)
	}
	c, err := key.Open(s.Note)
	want, rootErr := tlog.TreeHash(int64(len(m.lines)), m)
	if err := errors.Join(err, rootErr); err != nil || c != s.Checkpoint || c.Size != int64(len(m.lines)) || c.Root != want {
		t.Fatalf("checkpoint = %+v, %v; want %d leaves with root %v", c, err, len(m.lines), want)
	}
	growth, err := l.tree.ProveGrowth(c.Size, before.Size)
	if err == nil {
		err = c.Follows(before, growth)
	}
	if err != nil {
		t.Fatal(err)
	}
	index := rapid.Int64Range(0, c.Size-1).Draw(t, "index")
	proof, err := l.tree.ProveLeaf(c.Size, index)
	if err == nil {
		err = c.Holds([]byte(m.lines[index]), index, proof)
	}
	if err != nil {
		t.Fatal(err)
	}
	return c
}

var benchLine = append(bytes.Repeat([]byte("x"), 700), '\n')
