// A CA below another CA, each with a store, an agent and a workload of its own: what
// holds on the one side holds on the other, also while one of the two is away.

package integration_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"merlon.dev/integration/services"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk"
	"merlon.dev/sdk/svid"
)

// side is one of the two CAs with a workload below it.
type side struct {
	*stage.Domain
	path    string
	id      *sdk.Identity
	address string // where the workload echoes
}

func newSide(t *testing.T, d *stage.Domain, path string) *side {
	t.Helper()
	d.Entry(path)
	id := services.Open(t, d, sdk.WithLogger(slog.New(slog.DiscardHandler)))
	return &side{d, path, id, echo(t, id)}
}

// twoSides starts a CA with another one below it. The store of the upper one is
// well ahead: its revisions are the higher ones.
func twoSides(t *testing.T) (up, down *side) {
	t.Helper()
	root := stage.Separate(t, "trust_refresh_hint: 1s")
	below := root.Below(t, "eu", "trust_refresh_hint: 1s")
	for i := range 20 {
		root.Entry(fmt.Sprintf("/ahead/%d", i), "--selector", "unix:uid:4294967294")
	}
	return newSide(t, root, "/up"), newSide(t, below, "/down")
}

// call makes a connection from s to another side, and waits until both have
// accepted each other.
func (s *side) call(ctx context.Context, to *side) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	conn, err := s.id.DialTLS(sdk.Service(strings.TrimPrefix(to.path, "/")))(ctx, "tcp", to.address)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	_, err = io.ReadFull(conn, make([]byte, 1))
	return err
}

// meet: both accept each other, whoever calls.
func meet(t *testing.T, what string, a, b *side) {
	t.Helper()
	for _, pair := range [][2]*side{{a, b}, {b, a}} {
		stage.Eventually(t, fmt.Sprintf("%s: %s calls %s", what, pair[0].path, pair[1].path), func() error { return pair[0].call(t.Context(), pair[1]) })
	}
}

// hold keeps a connection from a to b open, and tells who saw its end.
func hold(t *testing.T, from, to *side) (cut <-chan error) {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	ended := make(chan error, 2)
	until := func(conn net.Conn) {
		_, err := conn.Read(make([]byte, 1)) // nothing ever comes
		ended <- err
		conn.Close()
	}
	accepted := make(chan error, 1)
	go func() {
		raw, err := lis.Accept()
		if err != nil {
			accepted <- err
			return
		}
		conn, err := to.id.ServerHandshake(context.Background(), raw)
		accepted <- err
		if err == nil {
			until(conn)
		}
	}()
	conn, err := from.id.DialTLS(sdk.Service(strings.TrimPrefix(to.path, "/")))(t.Context(), "tcp", lis.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if err := <-accepted; err != nil {
		t.Fatal(err)
	}
	go until(conn)
	return ended
}

func wantCut(t *testing.T, what string, cut <-chan error, since time.Time) {
	t.Helper()
	select {
	case <-cut:
		t.Logf("%s: cut after %s", what, time.Since(since).Round(time.Millisecond))
	case <-time.After(30 * time.Second):
		t.Errorf("%s: the live connection is still there after 30 s", what)
	}
}

func (s *side) serial() svid.Serial {
	own, err := s.id.GetX509SVID()
	if err != nil {
		s.TB.Fatal(err)
	}
	serial, ok := svid.SerialFromBig(own.Certificates[0].SerialNumber)
	if !ok {
		s.TB.Fatalf("serial number %x is none of ours", own.Certificates[0].SerialNumber)
	}
	return serial
}

// wantNewSVID waits until the workload has another SVID than the one of before.
func (s *side) wantNewSVID(before svid.Serial) {
	s.TB.Helper()
	stage.Eventually(s.TB, s.path+" has a new SVID", func() error {
		if s.serial() == before {
			return errors.New("still the one before")
		}
		return nil
	})
}

func TestNestedCA(t *testing.T) {
	t.Parallel()
	up, down := twoSides(t)
	meet(t, "at first", up, down)
	if got := down.serial().Realm; got != 1 || up.serial().Realm != 0 {
		t.Errorf("realms %d and %d; want 0 above and 1 below", up.serial().Realm, got)
	}

	// openssl, which knows nothing of us, accepts the chain by the root alone.
	own, err := fetch(t, down.Domain)
	if err != nil {
		t.Fatal(err)
	}
	var chain bytes.Buffer
	for _, c := range own.Certificates {
		pem.Encode(&chain, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
	}
	opensslVerify(t, chain.String(), up.Merlon("trust", "show", "-o", "pem"))

	// A JWT-SVID of either side is valid on the other, once everybody knows the key.
	jwtKeySigns(t, down)
	for _, pair := range [][2]*side{{up, down}, {down, up}} {
		token, err := workloadapi.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: "db"}, workloadapi.WithAddr(pair[0].WorkloadAPI))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := workloadapi.ValidateJWTSVID(t.Context(), token.Marshal(), "db", workloadapi.WithAddr(pair[1].WorkloadAPI)); err != nil || got.ID.Path() != pair[0].path {
			t.Errorf("JWT-SVID of %s on the other side: %v, %v", pair[0].path, got, err)
		}
		if number, ok := new(big.Int).SetString(fmt.Sprint(token.Claims["jti"]), 16); !ok {
			t.Errorf("jti of %s: %v", pair[0].path, token.Claims["jti"])
		} else if got, _ := svid.SerialFromBig(number); got.Realm != pair[0].serial().Realm {
			t.Errorf("jti of %s is of realm %d; want %d", pair[0].path, got.Realm, pair[0].serial().Realm)
		}
	}

	// Made above, of what was issued below: it binds there at the revision of
	// there, so that the next SVID is good, although the record's own revision
	// is far higher than any below.
	before, cut, begun := down.serial(), hold(t, down, up), time.Now()
	revoked := up.Merlon("revoke", "--spiffe-id", down.ID("/down"), "-o", "json")
	wantCut(t, "revoked above", cut, begun)
	down.wantNewSVID(before)
	meet(t, "after a revocation above", up, down)
	var record struct {
		BeforeRevision uint64 `json:"before_revision"`
	}
	stage.Decode(t, revoked, &record)
	if after := down.serial().Revision; after >= record.BeforeRevision {
		t.Errorf("the SVID from below is of revision %d, the record of %d: nothing was shown about lower ones", after, record.BeforeRevision)
	}

	// Made below, of what was issued above.
	before, cut, begun = up.serial(), hold(t, up, down), time.Now()
	down.Merlon("revoke", "--spiffe-id", up.ID("/up"))
	wantCut(t, "revoked below", cut, begun)
	up.wantNewSVID(before)
	meet(t, "after a revocation below", up, down)

	// One SVID by its number, made on the other side.
	before, cut, begun = down.serial(), hold(t, up, down), time.Now()
	up.Merlon("revoke", "--serial", before.String())
	wantCut(t, "revoked by its number", cut, begun)
	down.wantNewSVID(before)

	// What is not a nested CA's to do.
	for _, refused := range []struct {
		words string
		args  []string
	}{
		{"the root is that of the CA above, at " + up.GRPC + ": prepare the next one there", []string{"authority", "prepare", "--kind", "x509-root"}},
		{"only the CA whose own root signs can have nested CAs", []string{"token", "create", "--kind", "nested-ca", "--name", "eu-1"}},
		{"does not hold the root key", []string{"token", "create", "--kind", "replica", "--name", "ca-2"}},
	} {
		if _, stderr, err := down.Try(refused.args...); err == nil || !strings.Contains(stderr, refused.words) {
			t.Errorf("merlon %s: %v, %s; want %q", strings.Join(refused.args, " "), err, stderr, refused.words)
		}
	}
}

func copyDir(t *testing.T, from, to string) {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
}

// swap exchanges two folders.
func swap(t *testing.T, a, b string) {
	t.Helper()
	for _, move := range [][2]string{{a, a + ".aside"}, {b, a}, {a + ".aside", b}} {
		if err := os.Rename(move[0], move[1]); err != nil {
			t.Fatal(err)
		}
	}
}

// keepCalling has both sides call each other until stop, and counts.
func keepCalling(t *testing.T, a, b *side) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var made, failed atomic.Int64
	var running sync.WaitGroup
	for _, pair := range [][2]*side{{a, b}, {b, a}} {
		running.Go(func() {
			pace := time.NewTicker(50 * time.Millisecond)
			defer pace.Stop()
			for {
				select {
				case <-ctx.Done():
					return
				case <-pace.C:
				}
				made.Add(1)
				if err := pair[0].call(context.WithoutCancel(ctx), pair[1]); err != nil && failed.Add(1) <= 5 {
					t.Errorf("%s calls %s: %v", pair[0].path, pair[1].path, err)
				}
			}
		})
	}
	return func() {
		cancel()
		running.Wait()
		t.Logf("%d handshakes between the two sides, %d failed", made.Load(), failed.Load())
		if made.Load() == 0 {
			t.Error("nobody called anybody")
		}
	}
}

// A stuck agent below holds the root above back, and is named there; then the root
// is replaced while both CAs are killed in between, and no handshake fails.
func TestRootAboveWaitsForAgentsBelow(t *testing.T) {
	t.Parallel() // it mostly waits
	up, down := twoSides(t)
	stop := keepCalling(t, up, down)
	if err := syscall.Kill(down.Agent.PID(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	up.Merlon("authority", "prepare", "--kind", "x509-root")
	want := down.AgentID() + " below nested CA eu"
	var next stage.Authority
	stage.Eventually(t, "the next root waits for the agent below alone", func() (err error) {
		next, err = stage.AuthorityIn(up.Domain, "x509-root", "published")
		if err == nil && (next.Pending == nil || fmt.Sprint(next.Pending.Agents) != "["+want+"]") {
			err = fmt.Errorf("pending = %+v", next.Pending)
		}
		return err
	})
	if status := up.Merlon("authority", "status"); !strings.Contains(status, want) {
		t.Errorf("status = %s; want it to name %s", status, want)
	}
	if _, stderr, err := up.Try("authority", "activate", next.ID); err == nil || !strings.Contains(stderr, want) {
		t.Errorf("activate: %v %s; want it to name %s", err, stderr, want)
	}
	// Whoever is killed meanwhile has forgotten nothing.
	kill(up)
	if _, stderr, err := up.Try("authority", "activate", next.ID); err == nil || !strings.Contains(stderr, want) {
		t.Errorf("activate after a kill: %v %s; want it to name %s", err, stderr, want)
	}
	if err := syscall.Kill(down.Agent.PID(), syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	kill(down)
	before := mustBe(t, up.Domain, "active")
	stage.Done(up.Domain, "authority", "activate", next.ID)
	kill(up)
	for _, s := range []*side{up, down} {
		stage.Eventually(t, "the CA of "+s.path+" signs under the new root", func() error {
			i, err := stage.AuthorityIn(s.Domain, "x509-intermediate", "active")
			if err == nil && i.Root != next.ID {
				err = fmt.Errorf("the intermediate is under %s, not %s", i.Root, next.ID)
			}
			return err
		})
	}
	stage.Done(up.Domain, "authority", "taint", before.ID)
	kill(down)
	stage.Done(up.Domain, "authority", "revoke", before.ID)
	stop()
	meet(t, "under the new root", up, down)
	own, err := fetch(t, down.Domain)
	if err != nil || fmt.Sprintf("%x", own.Certificates[1].AuthorityKeyId) != next.ID {
		t.Errorf("the SVID below is not under the new root: %v", err)
	}
}

// kill ends the CA of s with SIGKILL, and starts it again.
func kill(s *side) {
	s.TB.Helper()
	s.CA.Kill()
	s.CA.Restart()
	stage.Eventually(s.TB, "the CA of "+s.path+" is back", func() error { _, _, err := s.Try("agent", "list"); return err })
}

// The next JWT key of the nested CA signs when everybody knows it, above too.
func TestJWTKeyBelowWaitsForAgentsAbove(t *testing.T) {
	t.Parallel() // it mostly waits
	up, down := twoSides(t)
	jwtKeySigns(t, down)
	if err := syscall.Kill(up.Agent.PID(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	down.Merlon("authority", "prepare", "--kind", "jwt")
	next, err := stage.AuthorityIn(down.Domain, "jwt", "published")
	if err != nil {
		t.Fatal(err)
	}
	stage.Eventually(t, "the agent above is waited for, and nobody else", func() error {
		_, stderr, err := down.Try("authority", "activate", next.ID)
		if err == nil {
			t.Fatal("the key signs, and the agent above has not acknowledged it")
		}
		if !strings.Contains(stderr, "1 agents have not acknowledged: "+up.AgentID()) {
			return errors.New(stderr)
		}
		return nil
	})
	if err := syscall.Kill(up.Agent.PID(), syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	stage.Done(down.Domain, "authority", "activate", next.ID)
	stage.Eventually(t, "a JWT-SVID by the new key", func() error {
		token, err := workloadapi.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: "late"}, workloadapi.WithAddr(down.WorkloadAPI))
		if err != nil {
			return err
		}
		if !strings.Contains(header(t, token.Marshal()), next.ID) {
			return errors.New("by another key")
		}
		_, err = workloadapi.ValidateJWTSVID(t.Context(), token.Marshal(), "late", workloadapi.WithAddr(up.WorkloadAPI))
		return err
	})
	// What is no JWT key of its own is not its to change.
	for _, kind := range []string{"x509-root", "jwt"} {
		a, err := stage.AuthorityIn(up.Domain, kind, "active")
		if err != nil {
			t.Fatal(err)
		}
		if _, stderr, err := down.Try("authority", "taint", a.ID); err == nil || !strings.Contains(stderr, "no JWT key of nested CA eu") {
			t.Errorf("taint the %s above from below: %v, %s", kind, err, stderr)
		}
	}
}

// jwtKeySigns waits until the key with which a nested CA has joined signs.
func jwtKeySigns(t *testing.T, s *side) {
	t.Helper()
	stage.Eventually(t, "the JWT key of the nested CA signs", func() error {
		_, err := workloadapi.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: "first"}, workloadapi.WithAddr(s.WorkloadAPI))
		return err
	})
}

func header(t *testing.T, token string) string {
	t.Helper()
	text, _, _ := strings.Cut(token, ".")
	var h struct{ Kid string }
	raw, err := base64.RawURLEncoding.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(raw, &h); err != nil {
		t.Fatal(err)
	}
	return h.Kid
}

// While the CA above is away the one below goes on and says so; what happened
// meanwhile is made up for; and one that is withdrawn serves nobody.
func TestNestedCAAlone(t *testing.T) {
	t.Parallel() // it mostly waits
	up, down := twoSides(t)
	up.CA.Kill()
	stage.Eventually(t, "/ready, metrics and log say that the CA above is away", func() error {
		page, status, err := healthPage(down.Domain, "/ready")
		if err != nil || status != 200 || !strings.Contains(page, "the CA above, at "+up.GRPC+", is away") || !strings.Contains(page, "goes on until its intermediate ends at ") {
			return fmt.Errorf("/ready: %d, %v: %s", status, err, page)
		}
		metrics, _, err := healthPage(down.Domain, "/metrics")
		if err != nil || !strings.Contains(metrics, "merlon_ca_upstream_connected 0") || !strings.Contains(down.CA.Log(), "the CA above is away") {
			return errors.New("metrics or log do not say so")
		}
		return nil
	})
	kill(down) // nor does a start need it
	before := up.serial()
	if _, stderr, err := down.Try("revoke", "--spiffe-id", up.ID("/up")); err != nil || !strings.Contains(stderr, "hint: not told yet: the CA above.") {
		t.Errorf("revoke while the CA above is away: %v, %s; want it to say so", err, stderr)
	}
	old := down.serial()
	down.Merlon("revoke", "--spiffe-id", down.ID("/down"))
	down.wantNewSVID(old)
	if _, stderr, err := down.Try("authority", "prepare", "--kind", "jwt"); err == nil || !strings.Contains(stderr, "does not answer") {
		t.Errorf("prepare a JWT key while the CA above is away: %v, %s", err, stderr)
	}

	up.CA.Restart()
	stage.Eventually(t, "the CA above is followed again", func() error {
		page, status, err := healthPage(down.Domain, "/ready")
		if err != nil || status != 200 || strings.Contains(page, "away") {
			return fmt.Errorf("/ready: %d, %v: %s", status, err, page)
		}
		return nil
	})
	up.wantNewSVID(before) // the revocation has come up
	meet(t, "after the outage", up, down)

	// A store that was put back behind the back of the CA above is noticed below.
	data := filepath.Join(setting(t, up.Domain, "data_dir"), "store")
	up.CA.Stop()
	copyDir(t, data, data+".old")
	up.CA.Restart()
	for i := range 20 { // so that it cannot make up for it by what a start writes
		stage.Done(up.Domain, "entry", "create", "--spiffe-id", up.ID(fmt.Sprintf("/later/%d", i)), "--selector", "unix:uid:4294967294", "--parent", up.AgentID())
	}
	old = down.serial()
	stage.Done(up.Domain, "revoke", "--spiffe-id", down.ID("/down"))
	down.wantNewSVID(old) // so the record is below
	up.CA.Stop()
	swap(t, data, data+".old")
	up.CA.Restart()
	stage.Eventually(t, "the CA below follows no older store", func() error {
		page, _, err := healthPage(down.Domain, "/ready")
		if err != nil || !strings.Contains(page, "the store was put back to an earlier state") {
			return fmt.Errorf("/ready: %v: %s", err, page)
		}
		return nil
	})
	up.CA.Stop()
	swap(t, data, data+".old")
	up.CA.Restart()
	stage.Eventually(t, "the CA above is followed again", func() error {
		page, status, err := healthPage(down.Domain, "/ready")
		if err != nil || status != 200 || strings.Contains(page, "away") || strings.Contains(page, "put back") {
			return fmt.Errorf("/ready: %d, %v: %s", status, err, page)
		}
		return nil
	})
	meet(t, "with the right store", up, down)

	cut, begun := hold(t, down, up), time.Now()
	up.Merlon("replica", "evict", "eu")
	wantCut(t, "withdrawn", cut, begun)
	if err := down.call(t.Context(), up); err == nil {
		t.Error("a workload below a withdrawn CA is accepted above")
	}
	stage.Eventually(t, "the withdrawn CA serves nobody", func() error {
		page, status, err := healthPage(down.Domain, "/ready")
		if err != nil || status == 200 || !strings.Contains(page, "has been evicted") {
			return fmt.Errorf("/ready: %d, %v: %s", status, err, page)
		}
		return nil
	})
	down.CA.Kill()
	down.CA.Restart()
	stage.Eventually(t, "it does not start either", func() error {
		if !strings.Contains(down.CA.Log(), "error: replica eu: this replica has been evicted") {
			return errors.New("its log does not say so")
		}
		return nil
	})
}
