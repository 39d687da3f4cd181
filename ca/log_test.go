// The log from outside: what was issued is proven, by gRPC and from the tiles
// over HTTPS, to those who may read it; and a CA that is killed has every SVID
// in it that a client received.

package ca_test

import (
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/tlog"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca"
	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/merkle"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk/checkpoint"
)

// logState is the checkpoint of an answer, verified under the CA's root.
func logState(t testing.TB, root *x509.Certificate, signed []byte, chain [][]byte) checkpoint.Checkpoint {
	t.Helper()
	key, err := checkpoint.VerifyChain(chain[:len(chain)-1], []*x509.Certificate{root}, "shop.test", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	state, err := key.Open(signed)
	if err != nil {
		t.Fatal(err)
	}
	return state
}

// proven asks for SVIDs by their serials and checks the proofs; it returns by
// serial what the records say was signed.
func proven(t testing.TB, admin capb.AdminClient, state func(signed []byte, chain [][]byte) checkpoint.Checkpoint, serials []string) map[string]string {
	t.Helper()
	found := make(map[string]string)
	for some := range slices.Chunk(serials, 1000) {
		resp, err := admin.ProveIssuances(t.Context(), &capb.ProveIssuancesRequest{Serials: some})
		if err != nil {
			t.Fatal(err)
		}
		c := state(resp.GetCheckpoint(), resp.GetCertificates())
		for _, p := range resp.GetProofs() {
			hashes, err := checkpoint.HashesFromBytes(p.GetHashes())
			if err == nil {
				err = c.Holds(p.GetEntry(), p.GetIndex(), hashes)
			}
			var r struct {
				Serial     string `json:"serial"`
				SignedHash string `json:"signed_sha256"`
			}
			if err == nil {
				err = json.Unmarshal(p.GetEntry(), &r)
			}
			if err != nil || r.Serial != p.GetSerial() {
				t.Fatalf("proof of %s: %v", p.GetSerial(), err)
			}
			found[r.Serial] = r.SignedHash
		}
	}
	return found
}

// svidNames are serial number and hash of an SVID.
func svidNames(t testing.TB, der []byte) (serial, hash string) {
	t.Helper()
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	if hash, err = checkpoint.CertificateHash(der); err != nil {
		t.Fatal(err)
	}
	return cert.SerialNumber.Text(16), hash
}

func TestIssuedSVIDsAreProven(t *testing.T) {
	c := startCA(t, tempDir(t))
	a := c.agent("n1")
	e := c.entry("n1", "web")
	_, chain := a.svid(e)
	jwt, err := a.jwt(e.GetEntryId(), []string{"db"})
	if err != nil {
		t.Fatal(err)
	}
	serial, hash := svidNames(t, chain[0])
	agentSerial, agentHash := svidNames(t, a.chain[0])
	jwtHash, err := checkpoint.TokenHash(jwt.GetToken())
	if err != nil {
		t.Fatal(err)
	}
	var jti string
	for _, r := range c.auditRecords() {
		if r["detail"] == "JWT" {
			jti = r["serial"].(string)
		}
	}
	want := map[string]string{serial: hash, agentSerial: agentHash, jti: jwtHash}
	asked := append(slices.Collect(maps.Keys(want)), "123abc")
	state := func(signed []byte, chain [][]byte) checkpoint.Checkpoint {
		return logState(t, c.srv.Root(), signed, chain)
	}
	if got := proven(t, c.admin, state, asked); !maps.Equal(got, want) {
		t.Errorf("proven: %v; want %v", got, want)
	}
	if err := revokeSerial(t, c, serial); err != nil { // a record with that serial, and no issuance
		t.Fatal(err)
	}
	if got := proven(t, c.admin, state, []string{serial}); !maps.Equal(got, map[string]string{serial: hash}) {
		t.Errorf("proven after a revocation: %v", got)
	}
	_, err = c.admin.ProveIssuances(t.Context(), &capb.ProveIssuancesRequest{})
	wantCode(t, err, codes.InvalidArgument)
	_, err = c.admin.ProveIssuances(t.Context(), &capb.ProveIssuancesRequest{Serials: make([]string, 1001)})
	wantCode(t, err, codes.InvalidArgument)
	_, err = a.admin.ProveIssuances(t.Context(), &capb.ProveIssuancesRequest{Serials: []string{serial}})
	wantCode(t, err, codes.PermissionDenied)
}

func revokeSerial(t *testing.T, c *testCA, serial string) error {
	t.Helper()
	_, err := c.admin.Revoke(t.Context(), &capb.RevokeRequest{Subject: &capb.RevokeRequest_Serial{Serial: serial}})
	return err
}

// tiles reads a log over HTTPS.
type tiles struct {
	t      testing.TB
	client *http.Client
	url    string
}

func (l tiles) get(path string) (int, []byte) {
	l.t.Helper()
	resp, err := l.client.Get(l.url + path)
	if err != nil {
		l.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		l.t.Fatal(err)
	}
	return resp.StatusCode, body
}

func (l tiles) Height() int { return merkle.Height }

func (l tiles) ReadTiles(wanted []tlog.Tile) (contents [][]byte, err error) {
	for _, w := range wanted {
		code, content := l.get(merkle.Tile{Level: w.L, N: w.N, Width: w.W}.Path())
		if code != http.StatusOK {
			return nil, fmt.Errorf("tile %+v: %d %s", w, code, content)
		}
		contents = append(contents, content)
	}
	return contents, nil
}

func (l tiles) SaveTiles([]tlog.Tile, [][]byte) {}

// TestLogIsServedAsTiles: an auditor with a role needs nothing but what is
// served to check every record.
func TestLogIsServedAsTiles(t *testing.T) {
	c := startCA(t, tempDir(t))
	a := c.agent("n1")
	viewer := newEntry("n1", "auditor")
	viewer.Role = capb.Role_ROLE_VIEWER
	created, err := c.admin.CreateEntry(t.Context(), &capb.CreateEntryRequest{Entry: viewer})
	if err != nil {
		t.Fatal(err)
	}
	e := c.entry("n1", "web")
	_, csr := newCSR(t)
	for range 2 {
		req := &capb.SignRequest{}
		for range 300 {
			req.Items = append(req.Items, &capb.SignItem{EntryId: e.GetEntryId(), Csr: csr})
		}
		if _, err := a.node.Sign(t.Context(), req); err != nil {
			t.Fatal(err)
		}
	}
	key, chain := a.svid(created.GetEntry())
	log := tiles{t, httpClient(t, key, chain), c.url("/log/ca/")}
	_, signed := log.get("checkpoint")
	resp, err := c.admin.ProveIssuances(t.Context(), &capb.ProveIssuancesRequest{Serials: []string{"1"}})
	if err != nil {
		t.Fatal(err)
	}
	state := logState(t, c.srv.Root(), signed, resp.GetCertificates())
	if state.Size < 600 {
		t.Fatalf("checkpoint = %+v; want more than 600 records", state)
	}
	leaves := tlog.TileHashReader(tlog.Tree{N: state.Size, Hash: state.Root}, log)
	index := int64(0)
	for n := int64(0); index < state.Size; n++ {
		width := min(merkle.TileWidth, int(state.Size-n*merkle.TileWidth))
		code, bundle := log.get(merkle.Tile{Level: merkle.EntriesLevel, N: n, Width: width}.Path())
		entries, err := merkle.ParseBundle(bundle)
		if code != http.StatusOK || err != nil || len(entries) != width {
			t.Fatalf("bundle %d: %d, %d entries, %v", n, code, len(entries), err)
		}
		for _, entry := range entries {
			hash, err := leaves.ReadHashes([]int64{tlog.StoredHashIndex(0, index)})
			if err != nil || hash[0] != tlog.RecordHash(entry) {
				t.Fatalf("record %d is not the leaf: %v", index+1, err)
			}
			index++
		}
	}
	for path, want := range map[string]int{
		"tile/0/000": 200, "tile/0/000.p/17": 200, "tile/0/999": 404, "tile/entries/999": 404, "tile/9/000": 404, "tile": 404, "": 404, "../x": 404,
	} {
		if code, body := log.get(path); code != want {
			t.Errorf("GET %s = %d %s; want %d", path, code, body, want)
		}
	}
	log.url = c.url("/log/ca-2/")
	if code, body := log.get("checkpoint"); code != 404 || !strings.Contains(string(body), "/log/ca/") {
		t.Errorf("another replica's log: %d %s", code, body)
	}
	checkReaders(t, c, a, e)
}

// checkReaders: without a role, nobody reads the log.
func checkReaders(t *testing.T, c *testCA, a *testClient, e *capb.Entry) {
	t.Helper()
	key, chain := a.svid(e)
	for name, test := range map[string]struct {
		client *http.Client
		want   int
	}{
		"anonymous": {httpClient(t, nil, nil), 401},
		"agent":     {httpClient(t, a.key, a.chain), 403},
		"workload":  {httpClient(t, key, chain), 403},
	} {
		for _, path := range []string{"checkpoint", "tile/0/000", "tile/entries/000"} {
			if code, _ := (tiles{t, test.client, c.url("/log/ca/")}).get(path); code != test.want {
				t.Errorf("%s: GET %s = %d; want %d", name, path, code, test.want)
			}
		}
	}
}

// TestKilledCAHasLoggedWhatLeft: whatever a client received before a SIGKILL is
// proven by the log of the CA that comes back.
func TestKilledCAHasLoggedWhatLeft(t *testing.T) {
	dir := tempDir(t)
	address := fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t))
	received := make(map[string]string)
	var a *testClient
	var e *capb.Entry
	const rounds = 4
	for round := range rounds {
		cmd, admin := startProcess(t, dir, "-address", address)
		c := &testCA{t: t, dir: dir, admin: admin, address: address}
		if a == nil {
			a, e = c.agent("n1"), c.entry("n1", "web")
		} else {
			a = c.client(a.key, a.chain)
		}
		checkAllLogged(t, admin, received)
		kill := time.AfterFunc(time.Duration(50+rand.IntN(200))*time.Millisecond, func() { _ = cmd.Process.Kill() })
		var mu sync.Mutex
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for {
					got := a.signMany(e, 1+rand.IntN(20))
					mu.Lock()
					for _, der := range got {
						serial, hash := svidNames(t, der)
						received[serial] = hash
					}
					mu.Unlock()
					if got == nil {
						return
					}
				}
			})
		}
		wg.Wait()
		kill.Stop()
		_ = cmd.Wait() // killed, as it should be
		t.Logf("round %d: %d SVIDs received so far", round, len(received))
	}
	cmd, admin := startProcess(t, dir, "-address", address)
	checkAllLogged(t, admin, received)
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	r, err := audit.Verify(filepath.Join(dir, "data", "audit.jsonl"))
	if err != nil || r.Last < uint64(len(received)) || len(received) < rounds {
		t.Errorf("Verify = %+v, %v with %d SVIDs received", r, err, len(received))
	}
}

// signMany returns what came, nil once the CA is gone.
func (a *testClient) signMany(e *capb.Entry, n int) (svids [][]byte) {
	_, csr := newCSR(a.t)
	req := &capb.SignRequest{}
	for range n {
		req.Items = append(req.Items, &capb.SignItem{EntryId: e.GetEntryId(), Csr: csr})
	}
	resp, err := a.node.Sign(a.t.Context(), req)
	if err != nil {
		return nil
	}
	for _, r := range resp.GetResults() {
		svids = append(svids, r.GetX509Svid()[0])
	}
	return svids
}

func checkAllLogged(t *testing.T, admin capb.AdminClient, received map[string]string) {
	t.Helper()
	state := func(signed []byte, chain [][]byte) checkpoint.Checkpoint {
		root, err := x509.ParseCertificate(chain[len(chain)-1])
		if err != nil {
			t.Fatal(err)
		}
		return logState(t, root, signed, chain)
	}
	if len(received) == 0 {
		return
	}
	if found := proven(t, admin, state, slices.Collect(maps.Keys(received))); !maps.Equal(found, received) {
		t.Fatalf("%d SVIDs left the CA, and its log holds %d of them", len(received), len(found))
	}
}

// TestAsyncIssuesWithoutWaiting: all the same everything is in the log of a CA
// that stops in order.
func TestAsyncIssuesWithoutWaiting(t *testing.T) {
	dir := tempDir(t)
	c := startCA(t, dir, func(cfg *ca.Config) { cfg.IssuanceLog = "async" })
	a := c.agent("n1")
	e := c.entry("n1", "web")
	svids := a.signMany(e, 50)
	c.stop()
	r, err := audit.Verify(filepath.Join(dir, "data", "audit.jsonl"))
	if err != nil || r.Checkpoint.Size != int64(r.Last) {
		t.Fatalf("Verify = %+v, %v", r, err)
	}
	logged := make(map[string]bool)
	for _, record := range c.auditRecords() {
		if hash, ok := record["signed_sha256"].(string); ok {
			logged[hash] = true
		}
	}
	for _, der := range svids {
		if _, hash := svidNames(t, der); !logged[hash] {
			t.Fatal("an SVID is not in the log")
		}
	}
}

// TestAgentsWitnessTheLog: an agent gets the log's checkpoint with the proof that
// it goes on from what the agent has, and a CA whose log is not what an agent
// has seen refuses that agent and nobody else (SECURITY.md T43).
func TestAgentsWitnessTheLog(t *testing.T) {
	dir := tempDir(t)
	c := startCA(t, dir)
	a, other := c.agent("n1"), c.agent("n2")
	e := c.entry("n1", "web")
	first, before := announced(t, c, a, nil)
	if first.GetBeforeSize() != 0 || before.Size == 0 {
		t.Fatalf("first checkpoint: %+v from %d on", before, first.GetBeforeSize())
	}
	c.stop()
	old := filepath.Join(dir, "old")
	copyLog(t, filepath.Join(dir, "data"), old)

	c = startCA(t, dir)
	a, other = c.client(a.key, a.chain), c.client(other.key, other.chain)
	a.id = "spiffe://shop.test/agent/n1"
	a.svid(e)
	grown, now := announced(t, c, a, &before)
	growth, err := checkpoint.HashesFromBytes(grown.GetGrowth())
	if err == nil {
		err = now.Follows(before, growth)
	}
	if err != nil || now.Size <= before.Size || grown.GetBeforeSize() != before.Size {
		t.Fatalf("checkpoint %+v after %+v: %v", now, before, err)
	}
	if _, err := firstAnswer(t, a, seenLog(now)); err != nil {
		t.Errorf("an agent that has seen all: %v", err)
	}
	forked := now
	forked.Root[0] ^= 1
	foreign := now
	foreign.Origin, foreign.Size = "shop.test/log/ca-2/00000000", 1<<40
	if _, err := firstAnswer(t, a, seenLog(foreign)); err != nil {
		t.Errorf("an agent that has seen another replica's log: %v", err)
	}
	longer := now
	longer.Size += 1000
	for name, seen := range map[string]checkpoint.Checkpoint{"other records": forked, "more records": longer} {
		_, err := firstAnswer(t, a, seenLog(seen))
		wantCode(t, err, codes.FailedPrecondition)
		if !strings.Contains(status.Convert(err).Message(), "put the newest copy of the audit log back") {
			t.Errorf("%s: %v; want what to do", name, err)
		}
	}
	if _, err := firstAnswer(t, other, seenLog(before)); err != nil {
		t.Errorf("another agent suffers: %v", err)
	}
	c.stop()

	// The machine's snapshot is put back, the store is another one's matter.
	copyLog(t, old, filepath.Join(dir, "data"))
	c = startCA(t, dir)
	a = c.client(a.key, a.chain)
	_, err = firstAnswer(t, a, seenLog(now))
	wantCode(t, err, codes.FailedPrecondition)
	if _, err := firstAnswer(t, a, seenLog(before)); err != nil {
		t.Errorf("an agent that has seen no more than this: %v", err)
	}
	c.stop()

	// What the message says to do begins another log.
	for _, name := range []string{"audit.jsonl", "audit.tree", "keys/log-1"} {
		if err := os.Rename(filepath.Join(dir, "data", name), filepath.Join(dir, strings.ReplaceAll(name, "/", "-")+".lost")); err != nil {
			t.Fatal(err)
		}
	}
	c = startCA(t, dir)
	if _, another := announced(t, c, c.client(a.key, a.chain), &now); another.Origin == now.Origin || another.Size == 0 {
		t.Errorf("the new log is %+v", another)
	}
}

func seenLog(c checkpoint.Checkpoint) *capb.Seen {
	return &capb.Seen{Logs: []*capb.LogState{{Origin: c.Origin, Size: c.Size, Root: c.Root[:]}}}
}

// announced is the checkpoint that an agent gets which has seen another.
func announced(t *testing.T, c *testCA, a *testClient, seen *checkpoint.Checkpoint) (*capb.LogCheckpoint, checkpoint.Checkpoint) {
	t.Helper()
	var has *capb.Seen
	if seen != nil {
		has = seenLog(*seen)
	}
	msg, err := firstAnswer(t, a, has)
	if err != nil {
		t.Fatal(err)
	}
	got := msg.GetLogCheckpoint()
	key, err := checkpoint.VerifyChain(got.GetCertificates(), []*x509.Certificate{c.srv.Root()}, "shop.test", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	state, err := key.Open(got.GetCheckpoint())
	if err != nil {
		t.Fatal(err)
	}
	return got, state
}

// copyLog replaces the audit log in one folder by that of another.
func copyLog(t *testing.T, from, to string) {
	t.Helper()
	if err := os.MkdirAll(to, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"audit.jsonl", "audit.tree"} {
		if err := os.RemoveAll(filepath.Join(to, name)); err != nil {
			t.Fatal(err)
		}
	}
	lines, err := os.ReadFile(filepath.Join(from, "audit.jsonl"))
	if err == nil {
		err = os.WriteFile(filepath.Join(to, "audit.jsonl"), lines, 0o600)
	}
	if err == nil {
		err = os.CopyFS(filepath.Join(to, "audit.tree"), os.DirFS(filepath.Join(from, "audit.tree")))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestRefusalOfEveryRPCIsRecorded walks the descriptors, so that a new RPC is
// walked too.
func TestRefusalOfEveryRPCIsRecorded(t *testing.T) {
	c := startCA(t, tempDir(t))
	a := c.agent("n1")
	workload := c.client(a.svid(c.entry("n1", "web")))
	want := 0
	for _, m := range rpcs() {
		method := fmt.Sprintf("/%s/%s", m.Parent().FullName(), m.Name())
		if !isDenial(call(t, workload.conn, method, m.IsStreamingClient())) {
			continue // open to everyone
		}
		want++
		records := c.auditRecords()
		if last := records[len(records)-1]; last["type"] != "refuse" || last["detail"] != method || last["actor"] != "spiffe://shop.test/web" || last["reason"] == nil {
			t.Errorf("the refusal of %s is recorded as %v", method, last)
		}
	}
	if want < 15 {
		t.Errorf("%d RPCs refuse a workload", want)
	}
}
