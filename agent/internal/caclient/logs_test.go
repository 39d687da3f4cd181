// A log that was forked, put back or replaced is noticed, also by an agent that
// was restarted; one that grows, or is another's, is not.

package caclient

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"log/slog"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/mod/sumdb/tlog"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/agent/internal/datadir"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/checkpoint"
)

var logTD = spiffeid.RequireTrustDomainFromString("shop.test")

// testLog is a log as a CA has it.
type testLog struct {
	t      *testing.T
	key    checkpoint.Key
	signer ed25519.PrivateKey
	chain  [][]byte
	hashes []tlog.Hash
	size   int64
}

// testRoot vouches for the keys of logs.
type testRoot struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newTestRoot(t *testing.T) *testRoot {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(96 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &testRoot{cert, key}
}

func (r *testRoot) trust() *cache.Trust {
	return &cache.Trust{Bundle: spiffebundle.FromX509Authorities(logTD, []*x509.Certificate{r.cert})}
}

// log makes an empty log of a replica with a key of its own.
func (r *testRoot) log(t *testing.T, replica string) *testLog {
	t.Helper()
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: replica, OrganizationalUnit: []string{checkpoint.Unit}},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(96 * time.Hour), BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, r.cert, public, r.key)
	if err != nil {
		t.Fatal(err)
	}
	return &testLog{t: t, key: checkpoint.Key{TrustDomain: "shop.test", Replica: replica, Public: public}, signer: private, chain: [][]byte{der}}
}

func (l *testLog) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	var out []tlog.Hash
	for _, i := range indexes {
		out = append(out, l.hashes[i])
	}
	return out, nil
}

func (l *testLog) grow(entries ...string) *testLog {
	l.t.Helper()
	for _, e := range entries {
		hashes, err := tlog.StoredHashes(l.size, []byte(e), l)
		if err != nil {
			l.t.Fatal(err)
		}
		l.hashes, l.size = append(l.hashes, hashes...), l.size+1
	}
	return l
}

// fork is a log under the same key that goes on by itself.
func (l *testLog) fork() *testLog {
	f := *l
	f.hashes = append([]tlog.Hash(nil), l.hashes...)
	return &f
}

// message is what a CA sends to an agent that has before entries.
func (l *testLog) message(before int64) *capb.LogCheckpoint {
	l.t.Helper()
	root, err := tlog.TreeHash(l.size, l)
	if err != nil {
		l.t.Fatal(err)
	}
	signed, err := l.key.Sign(l.size, root, l.signer)
	if err != nil {
		l.t.Fatal(err)
	}
	m := &capb.LogCheckpoint{Checkpoint: signed, Certificates: l.chain, BeforeSize: before}
	if before > 0 && before < l.size {
		growth, err := tlog.ProveTree(l.size, before, l)
		if err != nil {
			l.t.Fatal(err)
		}
		m.Growth = checkpoint.HashesToBytes(growth)
	}
	return m
}

// memory is an agent's, with the log that it writes.
type memory struct {
	*logs
	t    *testing.T
	text *bytes.Buffer
	reg  *prometheus.Registry
}

// counted is the metric of forks.
func (m *memory) counted() float64 {
	m.t.Helper()
	families, err := m.reg.Gather()
	if err != nil || len(families) != 1 {
		m.t.Fatalf("metrics: %v, %v", families, err)
	}
	return families[0].GetMetric()[0].GetCounter().GetValue()
}

func openMemory(t *testing.T, dir *datadir.Dir) *memory {
	t.Helper()
	var text bytes.Buffer
	reg := prometheus.NewRegistry()
	l, err := openLogs(Config{
		TrustDomain: logTD, DataDir: dir, Logger: slog.New(slog.NewTextHandler(&text, nil)), Registerer: reg,
	})
	if err != nil {
		t.Fatal(err)
	}
	return &memory{l, t, &text, reg}
}

// wants takes a message and compares what is remembered and said then.
func (m *memory) wants(root *testRoot, msg *capb.LogCheckpoint, at time.Time, size int64, forks float64, words string) {
	m.t.Helper()
	m.text.Reset()
	m.take(context.Background(), msg, root.trust(), at)
	c, err := checkpoint.Unverified(msg.GetCheckpoint())
	if err != nil {
		m.t.Fatal(err)
	}
	if got := m.seen[c.Origin].Size; got != size {
		m.t.Errorf("remembers %d entries; want %d (%s)", got, size, m.text)
	}
	if got := m.counted(); got != forks {
		m.t.Errorf("%v forks counted; want %v", got, forks)
	}
	if got := m.text.String(); (words == "") != (got == "") || !strings.Contains(got, words) {
		m.t.Errorf("the log says %q; want %q", got, words)
	}
}

func TestLogThatIsForkedOrPutBackIsNoticed(t *testing.T) {
	root, dir, now := newTestRoot(t), newDir(t), time.Now()
	log := root.log(t, "ca-1").grow("a", "b", "c")
	m := openMemory(t, dir)
	m.wants(root, log.message(0), now, 3, 0, "")
	old := log.fork()
	m.wants(root, log.grow("d", "e").message(3), now, 5, 0, "")
	m.wants(root, log.message(5), now, 5, 0, "")

	m.wants(root, old.message(0), now, 5, 1, "level=ERROR")
	m.wants(root, old.fork().grow("x", "y").message(3), now, 5, 2, "forked or put back")
	forked := old.fork().grow("x", "y", "z")
	m.wants(root, forked.message(5), now, 5, 3, "nothing proves")
	m.wants(root, forked.message(5), now, 5, 4, "") // counted, and said once
	m.wants(root, forked.message(0), now.Add(logMemory-time.Second), 5, 5, "")

	// It is remembered across a restart, and the CA hears of it.
	ctx, end := context.WithCancel(t.Context())
	end()
	m.keep(ctx)
	m = openMemory(t, dir)
	states := m.states()
	if len(states) != 1 || states[0].GetSize() != 5 || states[0].GetOrigin() != log.key.Origin() {
		t.Fatalf("states = %v; want 5 entries of %s", states, log.key.Origin())
	}
	m.wants(root, forked.message(0), now, 5, 1, "nothing proves")
	m.wants(root, log.grow("f").message(5), now, 6, 1, "")
}

// TestOldMemoryIsReplaced: a log may have dropped what a proof would take, after
// a day.
func TestOldMemoryIsReplaced(t *testing.T) {
	root, now := newTestRoot(t), time.Now()
	log := root.log(t, "ca-1").grow("a", "b", "c")
	m := openMemory(t, newDir(t))
	m.wants(root, log.message(0), now, 3, 0, "")
	log.grow("d")
	later := now.Add(logMemory + time.Second)
	m.wants(root, log.message(0), later, 4, 0, "level=WARN")
	// Put back is put back, however old.
	m.wants(root, root.log(t, "ca-2").grow("a").message(0), later, 1, 0, "")
	small := log.fork()
	small.hashes, small.size = nil, 0
	m.wants(root, small.grow("a").message(0), later.Add(logMemory+time.Second), 4, 1, "forked or put back")
}

func TestAnotherLogOfAReplicaIsSaid(t *testing.T) {
	root, now := newTestRoot(t), time.Now()
	m := openMemory(t, newDir(t))
	m.wants(root, root.log(t, "ca-1").grow("a", "b").message(0), now, 2, 0, "")
	m.wants(root, root.log(t, "ca-2").grow("a").message(0), now, 1, 0, "")
	m.wants(root, root.log(t, "ca-1").grow("z").message(0), now, 1, 0, "another audit log")
}

func TestCheckpointOfAStrangerIsNotRemembered(t *testing.T) {
	root, stranger, now := newTestRoot(t), newTestRoot(t), time.Now()
	m := openMemory(t, newDir(t))
	m.wants(root, stranger.log(t, "ca-1").grow("a").message(0), now, 0, 0, "certificate of a log refused")
	msg := root.log(t, "ca-1").grow("a").message(0)
	msg.Certificates = root.log(t, "ca-1").chain // another key's
	m.wants(root, msg, now, 0, 0, "read a checkpoint")
	m.take(context.Background(), nil, root.trust(), now)
	if len(m.seen) != 0 {
		t.Errorf("remembers %v", m.seen)
	}
}

func TestMemoryOfLogsIsBounded(t *testing.T) {
	root, now := newTestRoot(t), time.Now()
	m := openMemory(t, newDir(t))
	first := root.log(t, "ca-0").grow("a")
	for i := range maxLogs + 1 {
		l := first
		if i > 0 {
			l = root.log(t, fmt.Sprintf("ca-%d", i)).grow("a")
		}
		m.wants(root, l.message(0), now.Add(time.Duration(i)*time.Second), 1, 0, "")
	}
	if _, there := m.seen[first.key.Origin()]; there || len(m.seen) != maxLogs {
		t.Errorf("%d logs are remembered, the oldest: %v", len(m.seen), there)
	}
}

func TestUnreadableMemoryIsAnError(t *testing.T) {
	for name, content := range map[string]string{
		"garbage": "{", "another trust domain": `{"trust_domain":"other.test","logs":{}}`,
	} {
		dir := newDir(t)
		if err := dir.Write(logsFile, []byte(content)); err != nil {
			t.Fatal(err)
		}
		if _, err := openLogs(Config{TrustDomain: logTD, DataDir: dir, Registerer: prometheus.NewRegistry()}); err == nil {
			t.Errorf("%s was read", name)
		}
	}
}
