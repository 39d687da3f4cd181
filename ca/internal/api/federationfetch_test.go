// What a bundle endpoint, or a token, may not bring: a key of our own, and an older
// trust bundle. The last one stays, and the reason is told apart from rubbish.

package api

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/federation"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
	"merlon.dev/sdk/svid/forge"
)

// numbered is the document with the keys of b.
func numbered(t *testing.T, b *spiffebundle.Bundle, sequence uint64) string {
	t.Helper()
	b = b.Clone()
	b.SetSequenceNumber(sequence)
	text, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// fetches are the counts of fetches from td, by result.
func fetches(t *testing.T, s *Service, td string) map[string]float64 {
	t.Helper()
	families, err := s.opts.Metrics.(*prometheus.Registry).Gather()
	if err != nil {
		t.Fatal(err)
	}
	counts := make(map[string]float64)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if labels := m.GetLabel(); f.GetName() == "merlon_ca_federation_fetches_total" && labels[0].GetValue() == td {
				counts[labels[1].GetValue()] = m.GetCounter().GetValue()
			}
		}
	}
	return counts
}

func TestFetchedDocumentsThatAreRefused(t *testing.T) {
	s, _ := newService(t)
	logged := logTo(s)
	// Roots of companies name no trust domain, and could be anybody's.
	own := forge.New(t, td.Name(), func(c *x509.Certificate) { c.URIs = []*url.URL{} })
	published, err := trust.Publish(t.Context(), s.opts.Store, own.Bundle())
	if err == nil {
		err = s.registry.Wait(t.Context(), published.Revision)
	}
	if err != nil {
		t.Fatal(err)
	}
	theirs, others := forge.New(t, partner.Name()), forge.New(t, partner.Name())
	with := func(add func(*spiffebundle.Bundle) error) string {
		b := theirs.Bundle().Clone()
		if err := add(b); err != nil {
			t.Fatal(err)
		}
		return numbered(t, b, 8)
	}
	var answer atomic.Pointer[string]
	src := served(t, partner.Name(), func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, *answer.Load()) })
	keepSources(t, s, src)
	fetch := func(text string) (federation.Outcome, error) {
		answer.Store(&text)
		return s.fetch(t.Context(), partner)
	}
	if _, err := fetch(numbered(t, theirs.Bundle(), 7)); err != nil {
		t.Fatal(err)
	}
	known, _, err := s.heldFederated(t.Context(), partner)
	if err != nil {
		t.Fatal(err)
	}
	for i, tt := range []struct{ what, text, reason string }{
		{"rubbish", `{"keys":7}`, federation.Refused},
		{"our JWT key", with(func(b *spiffebundle.Bundle) error { return b.AddJWTAuthority("theirs", own.JWTKey.Public()) }), federation.OwnKey},
		{"rubbish again", `{"keys":8}`, federation.Refused},
		{"our root", with(func(b *spiffebundle.Bundle) error { b.AddX509Authority(own.Cert); return nil }), federation.OwnKey},
		{"older", numbered(t, theirs.Bundle(), 6), federation.Older},
		{"other keys", numbered(t, others.Bundle(), 7), federation.SameSequence},
		{"no number", `{"keys":[]}`, federation.NoSequence},
	} {
		outcome, err := fetch(tt.text)
		if federation.ReasonOf(err) != tt.reason || outcome.Reason != tt.reason {
			t.Errorf("%s: %v, %+v; want %s", tt.what, err, outcome, tt.reason)
		}
		if b, _, err := s.heldFederated(t.Context(), partner); err != nil || b.Digest() != known.Digest() || b.Revision != known.Revision {
			t.Errorf("%s: %+v, %v; want what was known to stay", tt.what, b, err)
		}
		if counts := fetches(t, s, partner.Name()); counts[tt.reason] < 1 {
			t.Errorf("%s: %v; want it counted as %s", tt.what, counts, tt.reason)
		}
		if got := logged.count("not fetched"); got != i+1 {
			t.Errorf("%s: %d lines in the log; want %d, one for each reason", tt.what, got, i+1)
		}
	}
}

// A token, or a first trust bundle, from before the other side rotated its keys brings
// none of them back, and changes nothing of where the bundle is fetched.
func TestOlderTokenIsRefused(t *testing.T) {
	s, _ := newService(t)
	ctx := asAdmin(t)
	before, after := forge.New(t, partner.Name()), forge.New(t, partner.Name())
	src := served(t, partner.Name(), func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, numbered(t, after.Bundle(), 9)) })
	keepSources(t, s, src)
	if _, err := s.fetch(ctx, partner); err != nil {
		t.Fatal(err)
	}
	elsewhere := src.URL + "/elsewhere"
	token, err := federation.Token{
		For: td.Name(), TrustDomain: partner.Name(), URL: elsewhere, Profile: src.Profile, Authorities: src.Authorities,
		Bundle: []byte(numbered(t, before.Bundle(), 5)), Expires: time.Now().Add(time.Hour).UTC().Truncate(time.Second),
	}.String()
	if err != nil {
		t.Fatal(err)
	}
	_, accepted := s.AcceptFederationInvite(ctx, &capb.AcceptFederationInviteRequest{Token: token})
	_, followed := s.SetFederationSource(ctx, &capb.SetFederationSourceRequest{
		TrustDomain: partner.Name(), Document: []byte(numbered(t, before.Bundle(), 5)),
		Source: &capb.FederationSource{Url: elsewhere, Profile: string(src.Profile), WebAuthorities: src.Authorities},
	})
	for what, err := range map[string]error{"accepted": accepted, "followed": followed} {
		if order, ok := errors.AsType[*trust.OrderError](err); !ok || order.Kind != trust.Older {
			t.Errorf("%s: %v; want it refused as older", what, err)
		}
	}
	b, err := s.describeFederated(ctx, partner)
	if err != nil || b.GetTrustBundle().GetSequence() != 9 || b.GetSource().GetUrl() != src.URL {
		t.Errorf("%v, %v; want what was known to stay", b, err)
	}
}

// What can never work takes the place of nothing that does.
func TestFollowingWhatCannotWorkIsRefused(t *testing.T) {
	s, _ := newService(t)
	ctx := asAdmin(t)
	theirs := forge.New(t, partner.Name())
	src := served(t, partner.Name(), func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, numbered(t, theirs.Bundle(), 1)) })
	keepSources(t, s, src)
	if _, err := s.fetch(ctx, partner); err != nil {
		t.Fatal(err)
	}
	if _, err := s.SetFederatedBundle(ctx, &capb.SetFederatedBundleRequest{TrustDomain: "rootless.test", Document: []byte(`{"keys":[]}`)}); err != nil {
		t.Fatal(err)
	}
	const good = "https://127.0.0.1:1/x"
	for _, tt := range []struct{ td, url, id, document, want string }{
		{partner.Name(), "https://a.test:0/", "spiffe://partner.test/ca", "", "port"},
		{partner.Name(), "https://169.254.169.254/", "spiffe://partner.test/ca", "", "no address"},
		{partner.Name(), "https://a.test/#", "spiffe://partner.test/ca", "", "fragment"},
		{partner.Name(), good, "spiffe://nobody.test/ca", "", "nobody.test"},
		{partner.Name(), good, "spiffe://rootless.test/ca", "", "no X.509 authority of rootless.test"},
		{"rootless.test", good, "spiffe://rootless.test/ca", "", "no X.509 authority"},
		{"new.test", good, "spiffe://new.test/ca", "", "handed over"},
		{"new.test", good, "spiffe://new.test/ca", `{"keys":[]}`, "no X.509 authority"},
		{"new.test", good, "spiffe://partner.test/ca", "", ""},
		{partner.Name(), good, "spiffe://partner.test/ca", "", ""},
	} {
		_, err := s.SetFederationSource(ctx, &capb.SetFederationSourceRequest{
			TrustDomain: tt.td, Document: []byte(tt.document), Source: &capb.FederationSource{Url: tt.url, Profile: string(federation.SPIFFE), EndpointSpiffeId: tt.id},
		})
		if tt.want == "" {
			if err != nil {
				t.Errorf("%+v: %v", tt, err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: %v; want %q", tt, err, tt.want)
		}
		if b, err := s.describeFederated(ctx, partner); err != nil || b.GetSource().GetUrl() != src.URL {
			t.Fatalf("%+v: %v, %v; want the source to stay", tt, b, err)
		}
	}
}

func TestInvitesNameURLsThatCanWork(t *testing.T) {
	s, _ := newRootHolder(t)
	ctx := asAdmin(t)
	eventually(t, "the own trust bundle", func() error {
		if s.registry.Trust() == nil {
			return errors.New("it is not here")
		}
		return nil
	})
	invite := func(at string) (string, error) {
		resp, err := s.CreateFederationInvite(ctx, &capb.CreateFederationInviteRequest{TrustDomain: partner.Name(), Url: at, Profile: string(federation.SPIFFE)})
		return resp.GetToken(), err
	}
	for _, at := range []string{"https://ca.shop.test:0/b", "https://ca.shop.test:65536", "https://0.0.0.0:8444/b", "https://ca.shop.test/b#", "https://c a.shop.test/b", "https:///", ""} {
		if _, err := invite(at); err == nil {
			t.Errorf("%q: invited", at)
		}
	}
	for _, at := range []string{"https://ca.shop.test:8444/b", "https://ca.shop.test:8444/b/", "https://ca.shop.test:8444/b//"} {
		text, err := invite(at)
		if err != nil {
			t.Fatal(err)
		}
		token, err := federation.ParseToken(text, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if base, reader, ok := strings.Cut(token.URL, "/b/"); !ok || base != "https://ca.shop.test:8444" || !federation.IsReader(reader) {
			t.Errorf("%s: %s", at, token.URL)
		}
	}
}

// Whom nobody knows is not said to have been handed over.
func TestRefreshSaysWhatThereIs(t *testing.T) {
	s, _ := newService(t)
	ctx := asAdmin(t)
	if _, err := s.RefreshFederatedBundle(ctx, &capb.RefreshFederatedBundleRequest{TrustDomain: "nobody.test"}); !errors.Is(err, trust.ErrNoFederated) {
		t.Errorf("nobody: %v", err)
	}
	if _, err := s.SetFederatedBundle(ctx, &capb.SetFederatedBundleRequest{TrustDomain: partner.Name(), Document: []byte(`{"keys":[]}`)}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.RefreshFederatedBundle(ctx, &capb.RefreshFederatedBundleRequest{TrustDomain: partner.Name()}); err == nil || !strings.Contains(err.Error(), "handed over") {
		t.Errorf("handed over: %v", err)
	}
}

// What was set while a fetch was under way is not taken back by it.
func TestSetWhileItIsFetched(t *testing.T) {
	s, _ := newService(t)
	ctx := asAdmin(t)
	src := served(t, partner.Name(), func(w http.ResponseWriter, _ *http.Request) {
		if _, err := s.SetFederatedBundle(ctx, &capb.SetFederatedBundleRequest{TrustDomain: partner.Name(), Document: []byte(`{"keys":[],"spiffe_sequence":9}`)}); err != nil {
			t.Error(err)
		}
		fmt.Fprint(w, `{"keys":[],"spiffe_sequence":5}`)
	})
	keepSources(t, s, src)
	if _, err := s.fetch(ctx, partner); err != nil {
		t.Fatal(err)
	}
	if b, _, err := s.heldFederated(ctx, partner); err != nil || b.Sequence != 9 {
		t.Errorf("%+v, %v; want 9 to stay", b, err)
	}
}

func TestOneTrustDomainTooMany(t *testing.T) {
	s, _ := newRootHolder(t)
	ctx := asAdmin(t)
	var ops []store.Op
	for i := range trust.MaxFederated {
		b, err := trust.NewFederated(td, spiffeid.RequireTrustDomainFromString(fmt.Sprintf("d%d.test", i)), []byte(`{"keys":[]}`), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		op, err := b.Put()
		if err != nil {
			t.Fatal(err)
		}
		if ops = append(ops, op); len(ops) == 64 {
			keep(t, s, ops...)
			ops = nil
		}
	}
	follow := func(name string) error {
		_, err := s.SetFederationSource(ctx, &capb.SetFederationSourceRequest{TrustDomain: name, Source: &capb.FederationSource{Url: "https://127.0.0.1:1/", Profile: string(federation.Web)}})
		return err
	}
	invite := func(name string) error {
		_, err := s.CreateFederationInvite(ctx, &capb.CreateFederationInviteRequest{TrustDomain: name, Url: "https://ca.shop.test/b", Profile: string(federation.Web)})
		return err
	}
	set := func(name string) error {
		_, err := s.SetFederatedBundle(ctx, &capb.SetFederatedBundleRequest{TrustDomain: name, Document: []byte(`{"keys":[]}`)})
		return err
	}
	for what, do := range map[string]func(string) error{"follow": follow, "invite": invite, "set": set} {
		if err := do("d7.test"); err != nil {
			t.Errorf("%s one that is known: %v", what, err)
		}
		if err := do("more.test"); err == nil || !strings.Contains(err.Error(), "which is the most") {
			t.Errorf("%s one more: %v", what, err)
		}
	}
}

// Who was removed is counted no more, neither where that was asked for nor where it was
// followed.
func TestRemovedTrustDomainsAreNotCounted(t *testing.T) {
	s, _ := newService(t)
	src := served(t, partner.Name(), func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"keys":[]}`) })
	p := pollers{service: s, running: make(map[spiffeid.TrustDomain]poller)}
	defer p.done.Wait()
	for what, remove := range map[string]func() error{
		"asked": func() error {
			_, err := s.RemoveFederatedBundle(asAdmin(t), &capb.RemoveFederatedBundleRequest{TrustDomain: partner.Name()})
			return err
		},
		"followed": func() error { // another replica was asked
			keep(t, s, store.Delete(federation.SourcePrefix+partner.Name()))
			p.running[partner] = poller{stop: func() {}}
			p.look(t.Context())
			return nil
		},
	} {
		keepSources(t, s, src)
		if _, err := s.fetch(t.Context(), partner); err != nil {
			t.Fatal(err)
		}
		if counts := fetches(t, s, partner.Name()); counts["ok"] != 1 {
			t.Errorf("%s: counted %v", what, counts)
		}
		if err := remove(); err != nil {
			t.Fatal(err)
		}
		if counts := fetches(t, s, partner.Name()); len(counts) != 0 {
			t.Errorf("%s: still counted: %v", what, counts)
		}
	}
}
