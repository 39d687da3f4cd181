// The agent without its CA: restarted, with what is on its disk, and with what
// somebody else put there.

package agent_test

import (
	"bytes"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"

	"merlon.dev/agent"
	"merlon.dev/agent/internal/fakeca"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/seal"
)

// logText is a log that tests read.
type logText struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logText) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(b)
}

func (l *logText) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func logTo(l *logText) *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

func (n *node) jwt(t *testing.T, audience string) (string, error) {
	t.Helper()
	cc, ctx := conn(t, n.socket)
	answer, err := workload.NewSpiffeWorkloadAPIClient(cc).FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{audience}})
	if err != nil {
		return "", err
	}
	return answer.Svids[0].Svid, nil
}

func TestAgentRestartedWithoutTheCAServesTheSame(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	cfg := newConfig(t, ca)
	n := start(t, cfg)
	before := receive(t, n.x509Stream(t), "/web").Svids[0]
	token, err := n.jwt(t, "db")
	if err != nil {
		t.Fatal(err)
	}
	n.stop()
	ca.Stop()
	for range 2 { // what came from the disk goes back to it
		cfg.Logger = testLogger(t)
		n = start(t, cfg)
		n.waitReady(t)
		after := receive(t, n.x509Stream(t), "/web").Svids[0]
		if !bytes.Equal(after.X509Svid, before.X509Svid) || !bytes.Equal(after.X509SvidKey, before.X509SvidKey) {
			t.Error("another SVID is served after the restart")
		}
		if got, err := n.jwt(t, "db"); err != nil || got != token {
			t.Errorf("JWT-SVID after the restart = %q, %v; want the one from before", got, err)
		}
		_, err = n.jwt(t, "another")
		wantError(t, err, codes.Unavailable, "CA_UNAVAILABLE")
		if n != nil {
			n.stop()
		}
	}
	cfg.Logger = testLogger(t)
	n = start(t, cfg)
	stream := n.x509Stream(t)
	receive(t, stream, "/web")
	ca.PutEntry(ca.Entry("e2", "/more", uidSelector))
	ca.Start()
	receive(t, stream, "/web", "/more")
	if attests, _, _ := ca.Counts(); attests != 1 {
		t.Errorf("attestations = %d; want 1", attests)
	}
}

// Whatever lies there instead of the cache: no crash, no SVID of it, evidence
// kept, and the CA's picture is taken when it comes.
func TestCacheThatIsNotTakenUp(t *testing.T) {
	for name, tt := range map[string]struct {
		spoil func(t *testing.T, path, older string)
		want  string
	}{
		"flipped bit": {func(t *testing.T, path, _ string) {
			content, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			content[len(content)/2] ^= 1
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
		}, "it is damaged"},
		"cut off":   {func(t *testing.T, path, _ string) { must(t, os.Truncate(path, 100)) }, "it is damaged"},
		"not ours":  {func(t *testing.T, path, _ string) { must(t, os.WriteFile(path, bytes.Repeat([]byte{1}, 500), 0o600)) }, ""},
		"put back":  {func(t *testing.T, path, older string) { must(t, os.Rename(older, path)) }, "an older copy was put in its place"},
		"of nobody": {func(t *testing.T, path, _ string) { must(t, os.Truncate(path, 0)) }, "too short"},
	} {
		t.Run(name, func(t *testing.T) {
			ca := fakeca.New(t, td)
			ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
			cfg := newConfig(t, ca)
			n := start(t, cfg)
			stream := n.x509Stream(t)
			receive(t, stream, "/web")
			n.stop()
			path := filepath.Join(cfg.DataDir, "cache.sealed")
			older := filepath.Join(cfg.DataDir, "older")
			content, err := os.ReadFile(path)
			must(t, err)
			must(t, os.WriteFile(older, content, 0o600))
			cfg.Logger = testLogger(t)
			n = start(t, cfg)
			stream = n.x509Stream(t)
			receive(t, stream, "/web")
			ca.PutEntry(ca.Entry("e2", "/more", uidSelector))
			receive(t, stream, "/web", "/more")
			n.stop()
			ca.Stop()
			tt.spoil(t, path, older)
			log := &logText{}
			cfg.Logger = logTo(log)
			n = start(t, cfg)
			stream = n.x509Stream(t)
			next := quiet(t, stream)
			if !strings.Contains(log.String(), "set aside") || !strings.Contains(log.String(), tt.want) {
				t.Errorf("the log does not say %q: %s", tt.want, log)
			}
			if aside, _ := filepath.Glob(path + ".set-aside-*"); len(aside) != 1 {
				t.Errorf("evidence: %q", aside)
			}
			ca.Start()
			until(t, 2, next, stream.Recv)
		})
	}
}

// until takes messages until one has n SVIDs; where one of them takes longer to
// get, the others do not wait for it.
func until(t *testing.T, n int, first, further func() (*workload.X509SVIDResponse, error)) {
	t.Helper()
	m, err := first()
	for ; err == nil && len(m.Svids) < n; m, err = further() {
	}
	if err != nil || len(m.Svids) != n {
		t.Fatalf("Recv() = %v, %v; want %d SVIDs", m, err, n)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// onDisk names a file of the agent's folder that holds secret, as it is or when it
// is opened under the agent's key; "" for none.
func onDisk(t *testing.T, cfg agent.Config, secret []byte) (found string) {
	t.Helper()
	key, err := seal.Read(seal.Source{}, cfg.DataDir)
	must(t, err)
	must(t, filepath.WalkDir(cfg.DataDir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if name, sealed := strings.CutSuffix(d.Name(), ".sealed"); sealed {
			opened, err := key.Open(content, "merlon agent file", cfg.TrustDomain, name)
			if err != nil {
				return err
			}
			content = append(content, opened...)
		}
		for _, text := range []string{string(secret), base64.StdEncoding.EncodeToString(secret), hex.EncodeToString(secret)} {
			if bytes.Contains(content, []byte(text)) {
				found = path
			}
		}
		return nil
	}))
	return found
}

// With cache_keys: never no key of a workload is on the disk, whatever was there
// before: the stream is held until the CA is back. Entries are there all the same.
func TestKeysStayOffTheDisk(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	cfg := newConfig(t, ca)
	n := start(t, cfg)
	kept := receive(t, n.x509Stream(t), "/web").Svids[0].X509SvidKey
	n.stop()
	if onDisk(t, cfg, kept) == "" {
		t.Fatal("a key that is kept is not found on the disk: the search is of no use")
	}
	cfg.CacheKeys, cfg.Logger = "never", testLogger(t)
	ca.Stop()
	n = start(t, cfg)
	n.waitReady(t)
	if path := onDisk(t, cfg, kept); path != "" {
		t.Errorf("the key from before the switch is in %s, with no CA to change anything", path)
	}
	next := quiet(t, n.x509Stream(t))
	ca.Start()
	m, err := next()
	must(t, err)
	before := m.Svids[0]
	token, err := n.jwt(t, "db")
	must(t, err)
	n.stop()
	for what, secret := range map[string][]byte{"key": before.X509SvidKey, "JWT-SVID": []byte(token)} {
		if path := onDisk(t, cfg, secret); path != "" {
			t.Errorf("the %s is in %s", what, path)
		}
	}
	ca.Stop()
	cfg.Logger = testLogger(t)
	n = start(t, cfg)
	n.waitReady(t)
	next = quiet(t, n.x509Stream(t))
	ca.Start()
	if m, err := next(); err != nil || bytes.Equal(m.Svids[0].X509SvidKey, before.X509SvidKey) {
		t.Errorf("Recv() = %v, %v; want an SVID with another key", m, err)
	}
}

// An entry whose keys become its workloads' own takes the one that the agent made
// off the disk, where cache_keys lets others stay.
func TestKeyOfAnEntryGoesFromTheDisk(t *testing.T) {
	ca := fakeca.New(t, td)
	e := ca.Entry("e1", "/web", uidSelector)
	ca.PutEntry(e)
	cfg := newConfig(t, ca)
	n := start(t, cfg)
	key := receive(t, n.x509Stream(t), "/web").Svids[0].X509SvidKey
	eventually(t, "the key is kept", func() bool { return onDisk(t, cfg, key) != "" })
	e.KeyDelivery = capb.KeyDelivery_KEY_DELIVERY_WORKLOAD
	ca.PutEntry(e)
	eventually(t, "the key is gone from the disk", func() bool { return onDisk(t, cfg, key) == "" })
	h := n.holdKeys(t)
	h.wanted()
	own := newKey(t)
	peer := h.svid(e.GetSpiffeId(), own)
	n.stop()
	pkcs8, err := x509.MarshalPKCS8PrivateKey(own)
	must(t, err)
	for what, secret := range map[string][]byte{"key": pkcs8, "X509-SVID": peer.Leaf.Raw} {
		if path := onDisk(t, cfg, secret); path != "" {
			t.Errorf("the workload's %s is in %s", what, path)
		}
	}
}

// An SVID that ended while the CA was away is never served as if it held; the
// stream is held instead, with the socket open.
func TestExpiredSVIDIsNotServedAfterRestart(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.SetTTL(2*time.Second, time.Hour)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	cfg := newConfig(t, ca)
	n := start(t, cfg)
	receive(t, n.x509Stream(t), "/web")
	n.stop()
	ca.Stop()
	time.Sleep(2 * time.Second)
	cfg.Logger = testLogger(t)
	n = start(t, cfg)
	next := quiet(t, n.x509Stream(t))
	ca.SetTTL(time.Hour, time.Hour)
	ca.Start()
	if m, err := next(); err != nil || len(m.Svids) != 1 {
		t.Errorf("Recv() = %v, %v; want a new SVID", m, err)
	}
}

// A key that is not the one of the data directory costs nothing that lies there.
func TestWrongKeyIsRefused(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	cfg := newConfig(t, ca)
	n := start(t, cfg)
	before := receive(t, n.x509Stream(t), "/web").Svids[0]
	n.stop()
	ca.Stop()
	wrong := cfg
	wrong.Logger = testLogger(t)
	wrong.KeyFile = filepath.Join(t.TempDir(), "kek")
	must(t, os.WriteFile(wrong.KeyFile, []byte(strings.Repeat("7", 64)), 0o600))
	if _, err := agent.New(wrong); err == nil || !strings.Contains(agent.Hint(err), "key_file") {
		t.Fatalf("New() = %v, hint %q; want the wrong key told", err, agent.Hint(err))
	}
	cfg.Logger = testLogger(t)
	n = start(t, cfg)
	if after := receive(t, n.x509Stream(t), "/web").Svids[0]; !bytes.Equal(after.X509Svid, before.X509Svid) {
		t.Error("another SVID is served")
	}
}

// The agent's own SVID ends while the CA is away: workloads keep theirs, a
// restart makes no difference, and when the CA is back everything goes on
// without a token.
func TestAgentComesBackAfterItsOwnSVIDEnded(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.SetTTL(time.Hour, 2*time.Second)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	cfg := newConfig(t, ca)
	n := start(t, cfg)
	stream := n.x509Stream(t)
	before := receive(t, stream, "/web").Svids[0]
	ca.Stop()
	time.Sleep(2 * time.Second)
	next := quiet(t, stream)
	if again := receive(t, n.x509Stream(t), "/web").Svids[0]; !bytes.Equal(before.X509Svid, again.X509Svid) {
		t.Error("the workload did not keep its SVID")
	}
	ca.SetTTL(time.Hour, time.Hour)
	ca.PutEntry(ca.Entry("e2", "/more", uidSelector))
	ca.Start()
	until(t, 2, next, stream.Recv)
	if got := ca.Recovered(); got != 1 {
		t.Errorf("the agent came back %d times; want once", got)
	}
}

func TestRestartedAgentComesBackAfterItsOwnSVIDEnded(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.SetTTL(time.Hour, 2*time.Second)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	cfg := newConfig(t, ca)
	n := start(t, cfg)
	before := receive(t, n.x509Stream(t), "/web").Svids[0]
	ca.Stop()
	n.stop()
	time.Sleep(2 * time.Second)
	cfg.Logger = testLogger(t)
	cfg.JoinToken = ""
	n = start(t, cfg)
	stream := n.x509Stream(t)
	if again := receive(t, stream, "/web").Svids[0]; !bytes.Equal(before.X509Svid, again.X509Svid) {
		t.Error("the workload did not keep its SVID")
	}
	ca.SetTTL(time.Hour, time.Hour)
	ca.PutEntry(ca.Entry("e2", "/more", uidSelector))
	ca.Start()
	receive(t, stream, "/web", "/more")
	if got := ca.Recovered(); got != 1 {
		t.Errorf("the agent came back %d times; want once", got)
	}
}
