// A cache with its CA, both in memory: what the tests here are made of.

package cache

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"log/slog"
	"maps"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
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
	claims   forge.Fields // of JWT-SVIDs, in place of what was asked for
	warning  string
	before   func() // each answer
}

func (s *signer) Sign(_ context.Context, items []*capb.SignItem) ([]*capb.SignResult, error) {
	s.mu.Lock()
	before := s.before
	s.mu.Unlock()
	if before != nil {
		before()
	}
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
		claims := forge.Fields{"sub": s.ids[item.GetEntryId()], "aud": item.GetAudience(), "jti": serial.String()}
		maps.Copy(claims, s.claims)
		results = append(results, &capb.SignJWTResult{Token: s.root.JWT(s.root.Header(nil), s.root.Claims("", claims))})
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
