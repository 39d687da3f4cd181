// The node's picture, with a CA in memory and virtual time.

package cache

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/agent/internal/workload"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const td = "example.test"

// signer is a CA in memory.
type signer struct {
	root *forge.Authority

	mu       sync.Mutex
	ids      map[string]string // entry ID → SPIFFE ID
	ttl      time.Duration
	err      error
	revision uint64
	requests []int // items of each
	jwts     int
	change   func(*x509.Certificate)
	warning  string
}

func (s *signer) Sign(_ context.Context, items []*capb.SignItem) ([]*capb.SignResult, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests = append(s.requests, len(items))
	if s.err != nil {
		return nil, s.err
	}
	var out []*capb.SignResult
	for _, item := range items {
		csr, err := x509.ParseCertificateRequest(item.Csr)
		if err != nil {
			return nil, err
		}
		serial, err := svid.NewSerial(7, s.revision)
		if err != nil {
			return nil, err
		}
		uri, err := url.Parse(s.ids[item.EntryId])
		if err != nil {
			return nil, err
		}
		template := s.root.Leaf("/x").Chain[0]
		template.SerialNumber, template.URIs, template.ExtraExtensions = serial.Big(), []*url.URL{uri}, nil
		template.NotAfter = time.Now().Add(s.ttl)
		ski := sha256.Sum256(item.Csr)
		template.SubjectKeyId = ski[:20]
		template.PublicKey = nil // the template's own, unless change sets another
		pub := csr.PublicKey
		if s.change != nil {
			s.change(template)
			if template.PublicKey != nil {
				pub = template.PublicKey
			}
		}
		der, err := x509.CreateCertificate(rand.Reader, template, s.root.Cert, pub, s.root.Key)
		if err != nil {
			return nil, err
		}
		out = append(out, &capb.SignResult{X509Svid: [][]byte{der}, Warning: s.warning})
	}
	return out, nil
}

func (s *signer) SignJWT(_ context.Context, items []*capb.SignJWTItem) (results []*capb.SignJWTResult, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.jwts++
	if s.err != nil {
		return nil, s.err
	}
	for _, item := range items {
		serial, err := svid.NewSerial(7, s.revision)
		if err != nil {
			return nil, err
		}
		results = append(results, &capb.SignJWTResult{Token: s.root.JWT(s.root.Header(nil), s.root.Claims("", forge.Fields{
			"sub": s.ids[item.GetEntryId()], "aud": item.GetAudience(), "jti": serial.String(),
		}))})
	}
	return results, nil
}

func (s *signer) set(f func(*signer)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(s)
}

func (s *signer) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.requests)
}

// fixture is a running cache in sync with its CA.
type fixture struct {
	*Cache
	t        *testing.T
	ca       *signer
	revision uint64
}

// run runs f in a bubble of virtual time.
func run(t *testing.T, f func(*testing.T, *fixture)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		root := forge.New(t, td, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(1000 * time.Hour) })
		ca := &signer{root: root, ids: map[string]string{}, ttl: time.Hour, revision: 1}
		c := New(Options{
			TrustDomain: spiffeid.RequireTrustDomainFromString(td), Authority: ca,
			Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- c.Run(ctx) }()
		defer func() {
			cancel()
			<-done
		}()
		f(t, &fixture{Cache: c, t: t, ca: ca, revision: 1})
	})
}

func (f *fixture) apply(m *capb.SyncResponse) {
	f.t.Helper()
	f.revision++
	m.Revision, m.Synced = f.revision, true
	for _, e := range m.Entries {
		if e.Revision == 0 {
			e.Revision = f.revision
		}
		f.ca.set(func(s *signer) { s.ids[e.EntryId] = e.SpiffeId; s.revision = f.revision })
	}
	if err := f.Apply(f.t.Context(), m); err != nil {
		f.t.Fatal(err)
	}
}

// sync makes the first listing.
func (f *fixture) sync(entries ...*capb.Entry) {
	f.t.Helper()
	f.apply(&capb.SyncResponse{Reset_: true, TrustBundle: f.trust(1), Entries: entries})
}

func (f *fixture) trust(sequence uint64) *capb.TrustBundle {
	f.t.Helper()
	jwks, err := f.ca.root.Bundle().Marshal()
	if err != nil {
		f.t.Fatal(err)
	}
	return &capb.TrustBundle{TrustDomain: td, Sequence: sequence, Jwks: jwks}
}

func newEntry(id, path string, selectors ...string) *capb.Entry {
	e := &capb.Entry{EntryId: id, SpiffeId: "spiffe://" + td + path, CreatedAt: timestamppb.New(time.Unix(int64(id[len(id)-1]), 0))}
	for _, s := range selectors {
		typ, value, _ := strings.Cut(s, ":")
		e.Selectors = append(e.Selectors, &capb.Selector{Type: typ, Value: value})
	}
	return e
}

// proves is the proof of a process that was asked for nothing but what it proved.
func proves(selectors ...string) workload.Proof {
	p := workload.Proof{Selectors: sorted(selectors)}
	for _, s := range selectors {
		p.Read |= workload.KindOf(s)
	}
	return p
}

// take expects that s is woken, and returns its view when nothing more comes.
func take(t *testing.T, s *Subscription, proved ...string) View {
	t.Helper()
	synctest.Wait()
	select {
	case <-s.Woken():
	default:
		t.Fatal("the stream was not woken")
	}
	v := s.View(proves(proved...), true)
	for {
		synctest.Wait() // what the view ordered may have come
		select {
		case <-s.Woken():
			v = s.View(proves(proved...), true)
		default:
			return v
		}
	}
}

func asleep(t *testing.T, s *Subscription) {
	t.Helper()
	synctest.Wait()
	select {
	case <-s.Woken():
		t.Fatal("the stream was woken without need")
	default:
	}
}

func paths(v View) string {
	var out []string
	for _, s := range v.SVIDs {
		out = append(out, s.Peer.ID.Path())
	}
	return strings.Join(out, " ")
}

func TestFirstDemandOrdersOneRequest(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		f.sync(newEntry("e1", "/a", "unix:uid:1"), newEntry("e2", "/b", "unix:uid:1"), newEntry("e3", "/c", "unix:uid:2"))
		s := f.Subscribe()
		defer s.Close()
		if v := s.View(proves("unix:uid:1"), true); !v.Pending || len(v.SVIDs) != 0 {
			t.Fatalf("View() = %+v; want SVIDs pending", v)
		}
		v := take(t, s, "unix:uid:1")
		if paths(v) != "/a /b" || v.Pending {
			t.Errorf("SVIDs = %q, pending %v; want /a /b", paths(v), v.Pending)
		}
		if !slices.Equal(f.ca.requests, []int{2}) {
			t.Errorf("requests with items %v; want one with 2", f.ca.requests)
		}
	})
}

// An SVID that the CA had to cut short is served like any other, and the log says
// why it is short.
func TestSVIDsThatWereCutAreServedAndLogged(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		var log bytes.Buffer
		f.log = slog.New(slog.NewTextHandler(&log, nil))
		f.ca.set(func(s *signer) { s.warning = "cut at the end of the registration entry" })
		f.sync(newEntry("e1", "/a", "unix:uid:1"))
		s := f.Subscribe()
		defer s.Close()
		s.View(proves("unix:uid:1"), true)
		if v := take(t, s, "unix:uid:1"); paths(v) != "/a" {
			t.Errorf("SVIDs = %q", paths(v))
		}
		if text := log.String(); !strings.Contains(text, "level=WARN") || !strings.Contains(text, "cut at the end of the registration entry") {
			t.Errorf("the log says %s", text)
		}
	})
}

func TestOnlyConcernedStreamsAreWoken(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		f.sync(newEntry("e1", "/a", "unix:uid:1"), newEntry("e2", "/b", "unix:uid:2"))
		s1, s2 := f.Subscribe(), f.Subscribe()
		defer s1.Close()
		defer s2.Close()
		s1.View(proves("unix:uid:1"), true)
		s2.View(proves("unix:uid:2"), true)
		take(t, s1, "unix:uid:1")
		take(t, s2, "unix:uid:2")
		f.apply(&capb.SyncResponse{Entries: []*capb.Entry{newEntry("e3", "/c", "unix:uid:2")}})
		synctest.Wait()
		asleep(t, s1)
		take(t, s2, "unix:uid:2")
		f.apply(&capb.SyncResponse{RemovedEntryIds: []string{"e1"}})
		asleep(t, s2)
		if v := take(t, s1, "unix:uid:1"); len(v.Entries) != 0 || !v.Current {
			t.Errorf("View() = %+v; want no entries, for certain", v)
		}
		// An entry by digest concerns whoever was not hashed yet.
		f.apply(&capb.SyncResponse{Entries: []*capb.Entry{newEntry("e4", "/d", "unix:sha256:00", "unix:uid:1")}})
		asleep(t, s2)
		if v := take(t, s1, "unix:sha256:00", "unix:uid:1"); len(v.Entries) != 1 || f.Wants() != workload.Digest {
			t.Errorf("View() = %+v; want the entry by digest", v)
		}
	})
}

// An entry that asks for more than was read of a process, which came while the
// process was looked at: it is looked at again, and nothing is certain before.
func TestProcessIsReadAgainForANewKindOfSelector(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		f.sync()
		if got := f.Wants(); got != 0 {
			t.Fatalf("Wants() = %b without entries; want nothing", got)
		}
		s, other := f.Subscribe(), f.Subscribe()
		defer s.Close()
		defer other.Close()
		before := proves("unix:uid:1")
		f.apply(&capb.SyncResponse{Entries: []*capb.Entry{newEntry("e1", "/a", "systemd:unit:web.service", "unix:user:web")}})
		if got := f.Wants(); got != workload.Names|workload.ControlGroups {
			t.Errorf("Wants() = %b; want names and control groups", got)
		}
		if v := s.View(before, true); v.Current || len(v.Entries) != 0 {
			t.Errorf("View() = %+v of a process that was not asked; want nothing that is certain", v)
		}
		if entries, current := f.Entitled(before); current || len(entries) != 0 {
			t.Errorf("Entitled() = %v, current=%t; want none, and not certain", entries, current)
		}
		if v := take(t, s, "systemd:unit:web.service", "unix:uid:1", "unix:user:web"); paths(v) != "/a" {
			t.Errorf("SVIDs = %q; want /a", paths(v))
		}
		// Asked for everything, and not meant by the next one.
		other.View(workload.Proof{Selectors: []string{"unix:uid:2"}, Read: workload.AllKinds}, true)
		f.apply(&capb.SyncResponse{Entries: []*capb.Entry{newEntry("e2", "/b", "unix:user:web")}})
		asleep(t, other)
		if v := take(t, s, "systemd:unit:web.service", "unix:uid:1", "unix:user:web"); paths(v) != "/a /b" {
			t.Errorf("SVIDs = %q; want /a /b", paths(v))
		}
		f.apply(&capb.SyncResponse{RemovedEntryIds: []string{"e1"}})
		if got := f.Wants(); got != workload.Names {
			t.Errorf("Wants() = %b with one entry by user name; want names", got)
		}
	})
}

func TestRenewalAtHalfLife(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		f.sync(newEntry("e1", "/a", "unix:uid:1"))
		s := f.Subscribe()
		s.View(proves("unix:uid:1"), true)
		first := take(t, s, "unix:uid:1").SVIDs[0]
		time.Sleep(26 * time.Minute) // half an hour - 10 % and a little
		asleep(t, s)
		time.Sleep(8 * time.Minute)
		second := take(t, s, "unix:uid:1").SVIDs[0]
		if second.Peer.SerialHex == first.Peer.SerialHex {
			t.Error("not renewed after half of the life + 10 %")
		}
		// Nobody looks any more: nothing is renewed.
		s.Close()
		n := f.ca.count()
		time.Sleep(24 * time.Hour)
		synctest.Wait()
		if f.ca.count() != n || len(f.slots) != 0 {
			t.Errorf("%d requests and %d slots without a stream; want %d and 0", f.ca.count(), len(f.slots), n)
		}
	})
}

func TestExpiredSVIDIsNeverServed(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		f.sync(newEntry("e1", "/a", "unix:uid:1"))
		s := f.Subscribe()
		defer s.Close()
		s.View(proves("unix:uid:1"), true)
		first := take(t, s, "unix:uid:1").SVIDs[0]
		f.Disconnected()
		f.ca.set(func(c *signer) { c.err = status.Error(codes.Unavailable, "away") })
		time.Sleep(59 * time.Minute)
		if v := s.View(proves("unix:uid:1"), true); len(v.SVIDs) != 1 {
			t.Fatalf("%d SVIDs a minute before the end; want the old one", len(v.SVIDs))
		}
		time.Sleep(time.Minute)
		if v := take(t, s, "unix:uid:1"); len(v.SVIDs) != 0 || len(v.Entries) != 1 || v.Pending {
			t.Fatalf("View() = %+v at %v; want the entry and no SVID (the last ended %v)", v, time.Now(), first.Peer.NotAfter)
		}
		requests := f.ca.count()
		time.Sleep(time.Hour)
		if n := f.ca.count() - requests; n > 600 || n < 100 {
			t.Errorf("%d tries in an hour without the CA; want one each 7 to 23 s", n)
		}
		// Back: at once, not at the end of the pause.
		f.ca.set(func(c *signer) { c.err = nil })
		f.apply(&capb.SyncResponse{})
		if v := take(t, s, "unix:uid:1"); paths(v) != "/a" {
			t.Errorf("SVIDs = %q after the CA is back; want /a", paths(v))
		}
	})
}

func TestAnswersThatAreNotWhatWasAskedAreRefused(t *testing.T) {
	tests := map[string]func(*x509.Certificate){
		"another SPIFFE ID":    forge.URIs("spiffe://" + td + "/other"),
		"another trust domain": forge.URIs("spiffe://other.test/a"),
		"another key": func(c *x509.Certificate) {
			c.PublicKey = forge.New(t, td).Cert.PublicKey
		},
		"an authority": func(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign },
		"expired":      func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) },
	}
	for name, change := range tests {
		t.Run(name, func(t *testing.T) {
			run(t, func(t *testing.T, f *fixture) {
				f.ca.set(func(s *signer) { s.change = change })
				f.sync(newEntry("e1", "/a", "unix:uid:1"))
				s := f.Subscribe()
				defer s.Close()
				s.View(proves("unix:uid:1"), true)
				if v := take(t, s, "unix:uid:1"); len(v.SVIDs) != 0 || v.Pending {
					t.Errorf("View() = %+v; want no SVID", v)
				}
			})
		})
	}
}

func TestRevocationRenewsAtOnce(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		f.sync(newEntry("e1", "/a", "unix:uid:1"))
		s := f.Subscribe()
		defer s.Close()
		s.View(proves("unix:uid:1"), true)
		first := take(t, s, "unix:uid:1").SVIDs[0]
		f.ca.set(func(c *signer) { c.revision = 100 })
		f.apply(&capb.SyncResponse{Revocations: []*capb.Revocation{{
			Subject: &capb.Revocation_SpiffeId{SpiffeId: "spiffe://" + td + "/a"}, BeforeRevision: 100,
			ExpiresAt: timestamppb.New(time.Now().Add(time.Hour)),
		}}})
		v := take(t, s, "unix:uid:1")
		if paths(v) != "/a" || v.SVIDs[0].Peer.SerialHex == first.Peer.SerialHex {
			t.Errorf("SVIDs = %q; want a fresh one", paths(v))
		}
	})
}

func TestListingForgetsWhatItDoesNotRepeatAtItsEnd(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		f.sync(newEntry("e1", "/a", "unix:uid:1"), newEntry("e2", "/b", "unix:uid:1"))
		if err := f.Apply(t.Context(), &capb.SyncResponse{Reset_: true, Entries: []*capb.Entry{newEntry("e2", "/b", "unix:uid:1")}}); err != nil {
			t.Fatal(err)
		}
		if got, _ := f.Entitled(proves("unix:uid:1")); len(got) != 2 {
			t.Errorf("%d entries in the middle of a listing; want 2 still", len(got))
		}
		f.Disconnected() // the listing was cut off
		f.apply(&capb.SyncResponse{})
		if got, _ := f.Entitled(proves("unix:uid:1")); len(got) != 2 {
			t.Errorf("%d entries after a listing that was cut off; want 2", len(got))
		}
		f.sync(newEntry("e2", "/b", "unix:uid:1"))
		if got, _ := f.Entitled(proves("unix:uid:1")); len(got) != 1 {
			t.Errorf("%d entries after the listing; want 1", len(got))
		}
	})
}

func TestEntryExpires(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		e := newEntry("e1", "/a", "unix:uid:1")
		e.ExpiresAt = timestamppb.New(time.Now().Add(time.Minute))
		f.sync(e)
		s := f.Subscribe()
		defer s.Close()
		s.View(proves("unix:uid:1"), true)
		take(t, s, "unix:uid:1")
		time.Sleep(time.Minute)
		if v := take(t, s, "unix:uid:1"); len(v.Entries) != 0 {
			t.Errorf("%d entries after the end; want none", len(v.Entries))
		}
	})
}

func TestChangedEntry(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		f.sync(newEntry("e1", "/a", "unix:uid:1"))
		s := f.Subscribe()
		defer s.Close()
		s.View(proves("unix:uid:1"), true)
		first := take(t, s, "unix:uid:1").SVIDs[0]
		hinted := newEntry("e1", "/a", "unix:uid:1")
		hinted.Hint = "internal"
		f.apply(&capb.SyncResponse{Entries: []*capb.Entry{hinted}})
		if v := take(t, s, "unix:uid:1"); v.SVIDs[0].Entry.Hint != "internal" || v.SVIDs[0].Peer != first.Peer {
			t.Error("a new hint did not come with the same SVID")
		}
		f.apply(&capb.SyncResponse{Entries: []*capb.Entry{newEntry("e1", "/renamed", "unix:uid:1")}})
		if v := take(t, s, "unix:uid:1"); paths(v) != "/renamed" {
			t.Errorf("SVIDs = %q after a new name; want /renamed only", paths(v))
		}
	})
}

func TestJWTSVIDsAreUsedAgainForHalfTheirLife(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		f.sync(newEntry("e1", "/a", "unix:uid:1"))
		entries, _ := f.Entitled(proves("unix:uid:1"))
		get := func(audience ...string) string {
			t.Helper()
			token, err := f.JWTSVID(t.Context(), entries[0], audience, freely)
			if err != nil {
				t.Fatal(err)
			}
			return token
		}
		first := get("x", "y")
		if get("y", "x") != first || f.ca.jwts != 1 {
			t.Error("not used again for the same audience")
		}
		if get("x") == first {
			t.Error("used for another audience")
		}
		time.Sleep(3 * time.Minute)
		second := get("x", "y")
		if second == first {
			t.Error("used beyond half of its life")
		}
		f.ca.set(func(s *signer) { s.err = status.Error(codes.Unavailable, "away") })
		time.Sleep(4 * time.Minute)
		if get("x", "y") != second {
			t.Error("not used until its end while the CA is away")
		}
		time.Sleep(time.Minute)
		if token, err := f.JWTSVID(t.Context(), entries[0], []string{"x", "y"}, freely); status.Code(err) != codes.Unavailable {
			t.Errorf("JWTSVID() = %q, %v after its end; want Unavailable", token, err)
		}
	})
}

// freely admits every request for a JWT-SVID.
func freely() error { return nil }

// Whoever has had his share of requests to the CA gets what is held, for as long
// as it is valid, and else is told.
func TestJWTSVIDsThatAreHeldNeedNoAdmission(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		f.sync(newEntry("e1", "/a", "unix:uid:1"))
		entries, _ := f.Entitled(proves("unix:uid:1"))
		tooMany := errors.New("too many")
		never := func() error { return tooMany }
		if token, err := f.JWTSVID(t.Context(), entries[0], []string{"x"}, never); !errors.Is(err, tooMany) {
			t.Errorf("JWTSVID() = %q, %v; want the refusal", token, err)
		}
		first, err := f.JWTSVID(t.Context(), entries[0], []string{"x"}, freely)
		if err != nil {
			t.Fatal(err)
		}
		for _, age := range []time.Duration{0, 4 * time.Minute} { // at 4 min it would be renewed
			time.Sleep(age)
			if token, err := f.JWTSVID(t.Context(), entries[0], []string{"x"}, never); err != nil || token != first {
				t.Errorf("JWTSVID() = %q, %v; want the one that is held", token, err)
			}
		}
		time.Sleep(2 * time.Minute)
		if token, err := f.JWTSVID(t.Context(), entries[0], []string{"x"}, never); !errors.Is(err, tooMany) {
			t.Errorf("JWTSVID() = %q, %v after its end; want the refusal", token, err)
		}
	})
}

func TestRevokedJWTSVIDIsForgotten(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		f.sync(newEntry("e1", "/a", "unix:uid:1"))
		entries, _ := f.Entitled(proves("unix:uid:1"))
		first, err := f.JWTSVID(t.Context(), entries[0], []string{"x"}, freely)
		if err != nil {
			t.Fatal(err)
		}
		f.ca.set(func(c *signer) { c.revision = 100 })
		f.apply(&capb.SyncResponse{Revocations: []*capb.Revocation{{
			Subject: &capb.Revocation_SpiffeId{SpiffeId: "spiffe://" + td + "/a"}, BeforeRevision: 100,
		}}})
		if second, err := f.JWTSVID(t.Context(), entries[0], []string{"x"}, freely); err != nil || second == first {
			t.Errorf("JWTSVID() = the revoked one, %v; want a fresh one", err)
		}
	})
}

func TestOlderTrustBundleIsRefused(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		f.sync()
		f.apply(&capb.SyncResponse{TrustBundle: f.trust(5)})
		f.apply(&capb.SyncResponse{TrustBundle: f.trust(4)})
		if got := f.Trust().Sequence; got != 5 {
			t.Errorf("sequence = %d; want 5", got)
		}
		empty := &capb.TrustBundle{TrustDomain: td, Sequence: 6, Jwks: []byte(`{"keys":[]}`)}
		if err := f.Apply(t.Context(), &capb.SyncResponse{TrustBundle: empty}); err == nil {
			t.Error("a trust bundle without authorities was taken")
		}
	})
}

func TestAckWaitsForTheSlowestStream(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		f.sync(newEntry("e1", "/a", "unix:uid:1"))
		s1, s2 := f.Subscribe(), f.Subscribe()
		s1.Delivered(1)
		s2.Delivered(1)
		f.apply(&capb.SyncResponse{TrustBundle: f.trust(2)})
		s1.Delivered(2)
		if _, got := f.Ack(false); got != 1 {
			t.Errorf("Ack() = %d while one stream has 1; want 1", got)
		}
		s2.Close()
		if _, got := f.Ack(false); got != 2 {
			t.Errorf("Ack() = %d; want 2", got)
		}
		s1.Close()
	})
}

func TestRevocationFeed(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		f.sync()
		revoke := func(path string) {
			f.apply(&capb.SyncResponse{Revocations: []*capb.Revocation{{
				Subject: &capb.Revocation_SpiffeId{SpiffeId: "spiffe://" + td + path}, BeforeRevision: 9,
			}}})
		}
		revoke("/a")
		all, reset, cursor, _ := f.RevocationsSince(Cursor{})
		if len(all) != 1 || !reset {
			t.Fatalf("RevocationsSince() = %v, %v; want all", all, reset)
		}
		_, _, cursor, more := f.RevocationsSince(cursor)
		revoke("/b")
		select {
		case <-more:
		default:
			t.Fatal("the watcher was not woken")
		}
		added, reset, cursor, _ := f.RevocationsSince(cursor)
		if len(added) != 1 || reset || added[0].SPIFFEID != "spiffe://"+td+"/b" {
			t.Fatalf("RevocationsSince() = %v, %v; want /b only", added, reset)
		}
		f.sync()
		if left, reset, _, _ := f.RevocationsSince(cursor); len(left) != 0 || !reset {
			t.Errorf("RevocationsSince() = %v, %v after a listing without any; want a reset to none", left, reset)
		}
	})
}

func TestMatchingCostsNothingForOthersEntries(t *testing.T) {
	x := newIndex()
	for i := range 100_000 {
		x.add(&Entry{ID: fmt.Sprint(i), Selectors: []string{fmt.Sprintf("unix:path:/%d", i), "unix:uid:1"}})
	}
	if n := len(x.buckets["unix:uid:1"]); n > 2 {
		t.Errorf("%d entries lie under the common selector; want next to none", n)
	}
}

var errBroken = errors.New("broken")

func TestRefusalsAreRetriedWithPauses(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		f.ca.set(func(s *signer) { s.err = errBroken })
		f.sync(newEntry("e1", "/a", "unix:uid:1"))
		s := f.Subscribe()
		defer s.Close()
		s.View(proves("unix:uid:1"), true)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if n := f.ca.count(); n < 3 || n > 20 {
			t.Errorf("%d requests in 10 s; want pauses that grow", n)
		}
		f.ca.set(func(s *signer) { s.err = nil })
		time.Sleep(lastRetry * 2)
		if v := take(t, s, "unix:uid:1"); paths(v) != "/a" {
			t.Errorf("SVIDs = %q; want /a", paths(v))
		}
	})
}
