// What comes back from the disk, and what does not: in virtual time.

package cache

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid/forge"
)

// saved is a picture with one served X509-SVID of /a and a JWT-SVID of it.
func saved(t *testing.T, f *fixture) (*Snapshot, *SVID, string) {
	t.Helper()
	f.sync(newEntry("e1", "/a", "unix:uid:1"), newEntry("e2", "/b", "unix:uid:2"))
	f.apply(&capb.SyncResponse{Revocations: []*capb.Revocation{{
		Subject: &capb.Revocation_SpiffeId{SpiffeId: "spiffe://" + td + "/gone"}, BeforeRevision: 2, ExpiresAt: timestamppb.New(time.Now().Add(time.Hour)),
	}}})
	s := f.Subscribe()
	defer s.Close()
	s.View(proves("unix:uid:1"), true)
	v := take(t, s, "unix:uid:1")
	if paths(v) != "/a" {
		t.Fatalf("SVIDs = %q", paths(v))
	}
	token, err := f.JWTSVID(t.Context(), v.Entries[0], []string{"db"}, freely)
	if err != nil {
		t.Fatal(err)
	}
	return onDisk(t, f.Snapshot("", true)), v.SVIDs[0], token
}

// onDisk is s as it comes back.
func onDisk(t *testing.T, s *Snapshot) *Snapshot {
	t.Helper()
	content, err := s.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	back, err := ParseSnapshot(content, td)
	if err != nil {
		t.Fatal(err)
	}
	return back
}

// restarted is the cache of an agent that was restarted while the CA is away.
func restarted(t *testing.T, f *fixture) (*fixture, *bytes.Buffer) {
	t.Helper()
	var log bytes.Buffer
	f.ca.set(func(s *signer) { s.err = status.Error(codes.Unavailable, "the CA is away") })
	c := New(Options{
		TrustDomain: spiffeid.RequireTrustDomainFromString(td), Authority: f.ca,
		Logger: slog.New(slog.NewTextHandler(&log, nil)), Registerer: prometheus.NewRegistry(),
	})
	trust, err := ParseTrust(f.trust(1), td)
	if err != nil {
		t.Fatal(err)
	}
	c.SetTrust(t.Context(), trust)
	t.Cleanup(c.stop)
	return &fixture{Cache: c, t: t, ca: f.ca, revision: f.revision}, &log
}

func TestRestoredPictureIsServed(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		s, before, token := saved(t, f)
		heard := f.Heard()
		time.Sleep(10 * time.Minute)
		again, _ := restarted(t, f)
		if err := again.Restore(t.Context(), s); err != nil {
			t.Fatal(err)
		}
		sub := again.Subscribe()
		v := sub.View(proves("unix:uid:1"), true)
		if paths(v) != "/a" || !bytes.Equal(v.SVIDs[0].Chain, before.Chain) || !bytes.Equal(v.SVIDs[0].Key, before.Key) {
			t.Fatalf("SVIDs = %q; want the one from before", paths(v))
		}
		if v.Current {
			t.Error("the picture counts as current")
		}
		// The CA's word on who has none is not known: no PermissionDenied.
		if v := sub.View(proves("unix:uid:9"), true); v.Current || len(v.Entries) != 0 {
			t.Errorf("View() of a stranger = %+v", v)
		}
		if got, err := again.JWTSVID(t.Context(), v.Entries[0], []string{"db"}, freely); err == nil {
			t.Errorf("a JWT-SVID from 10 minutes ago was served: %s", got) // 5 minutes is its life
		}
		if len(again.Revocations().All()) != 1 {
			t.Errorf("revocations = %v", again.Revocations().All())
		}
		if !again.Heard().Equal(heard) {
			t.Errorf("heard %v, before the restart %v: revocations would look fresher", again.Heard(), heard)
		}
		if again.Resume() != 0 {
			t.Error("what was on the disk was resumed from; want a full listing")
		}
		if st := again.State(); !st.Synced || st.Connected || st.Revision != s.Revision || again.Seen() != s.Revision {
			t.Errorf("state = %+v", st)
		}
		// What was not asked for yet is not lost with the next write.
		third, _ := restarted(t, f)
		if err := third.Restore(t.Context(), s); err != nil {
			t.Fatal(err)
		}
		if next := third.Snapshot("", true); len(next.SVIDs) != 1 || len(next.Entries) != 2 {
			t.Errorf("the next snapshot has %d SVIDs and %d entries", len(next.SVIDs), len(next.Entries))
		}
		_ = token
	})
}

func TestRestoredJWTIsServed(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		s, _, token := saved(t, f)
		again, _ := restarted(t, f)
		if err := again.Restore(t.Context(), s); err != nil {
			t.Fatal(err)
		}
		entries, _ := again.Entitled(proves("unix:uid:1"))
		if got, err := again.JWTSVID(t.Context(), entries[0], []string{"db"}, freely); err != nil || got != token {
			t.Errorf("JWTSVID() = %q, %v; want the one from before", got, err)
		}
	})
}

// Never an expired SVID: neither one that was in the file, nor one that came
// back and then expired.
func TestRestoredSVIDEndsAtNotAfter(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		s, before, _ := saved(t, f)
		again, _ := restarted(t, f)
		if err := again.Restore(t.Context(), s); err != nil {
			t.Fatal(err)
		}
		sub := again.Subscribe()
		defer sub.Close()
		if v := sub.View(proves("unix:uid:1"), true); len(v.SVIDs) != 1 {
			t.Fatal("nothing was served")
		}
		time.Sleep(time.Until(before.Peer.NotAfter))
		if v := sub.View(proves("unix:uid:1"), true); len(v.SVIDs) != 0 {
			t.Error("an expired SVID was served")
		}
		late, log := restarted(t, f)
		if err := late.Restore(t.Context(), s); err != nil {
			t.Fatal(err)
		}
		other := late.Subscribe()
		defer other.Close()
		if v := other.View(proves("unix:uid:1"), true); len(v.SVIDs) != 0 {
			t.Error("an SVID that had expired on the disk was served")
		}
		if !strings.Contains(log.String(), "SVID from the disk is not used") {
			t.Errorf("log: %s", log)
		}
		if next := late.Snapshot("", true); len(next.SVIDs) != 0 {
			t.Error("an expired SVID is written again")
		}
	})
}

// What the CA says later counts, also of what has not been asked for yet.
func TestRestoredPictureGivesWayToTheCA(t *testing.T) {
	for name, change := range map[string]*capb.SyncResponse{
		"entry deleted":  {Entries: []*capb.Entry{newEntry("e2", "/b", "unix:uid:2")}},
		"another ID":     {Entries: []*capb.Entry{newEntry("e1", "/other", "unix:uid:1")}},
		"another DNS":    {Entries: []*capb.Entry{withDNS(newEntry("e1", "/a", "unix:uid:1"))}},
		"agent revoked":  {Entries: []*capb.Entry{newEntry("e1", "/a", "unix:uid:1")}, Revocations: []*capb.Revocation{{Subject: &capb.Revocation_SpiffeId{SpiffeId: "spiffe://" + td + "/a"}, BeforeRevision: 100}}},
		"selector moved": {Entries: []*capb.Entry{newEntry("e1", "/a", "unix:uid:3")}},
	} {
		t.Run(name, func(t *testing.T) {
			run(t, func(t *testing.T, f *fixture) {
				s, before, _ := saved(t, f)
				again, _ := restarted(t, f)
				if err := again.Restore(t.Context(), s); err != nil {
					t.Fatal(err)
				}
				change.Reset_, change.TrustBundle = true, f.trust(1)
				again.apply(change)
				sub := again.Subscribe()
				defer sub.Close()
				if v := sub.View(proves("unix:uid:1"), true); len(v.SVIDs) != 0 {
					t.Errorf("served %s of before", v.SVIDs[0].Peer.ID)
				}
				_ = before
			})
		})
	}
}

func withDNS(e *capb.Entry) *capb.Entry {
	e.DnsNames = []string{"a.example.test"}
	return e
}

func TestRestoreRefuses(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		good, _, _ := saved(t, f)
		for name, tt := range map[string]struct {
			spoil func(*Snapshot, *Cache)
			want  string
		}{
			"an older copy":   {func(s *Snapshot, c *Cache) { c.Remember(s.Revision+1, time.Time{}) }, "an older copy was put in its place"},
			"a garbled entry": {func(s *Snapshot, _ *Cache) { s.Entries[0] = []byte{1, 2, 3} }, "an entry"},
			"a bad revocation": {func(s *Snapshot, _ *Cache) {
				s.Revocations[0].Serial = "7"
			}, "exactly one subject"},
		} {
			s := onDisk(t, good)
			again, _ := restarted(t, f)
			tt.spoil(s, again.Cache)
			if err := again.Restore(t.Context(), s); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%s: Restore() = %v; want %q", name, err, tt.want)
			}
			if again.State().Synced {
				t.Errorf("%s: the picture is served", name)
			}
		}
	})
}

func TestSnapshotOfAnotherTrustDomainOrFormIsRefused(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		good, _, _ := saved(t, f)
		content, err := good.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseSnapshot(content, td); err != nil {
			t.Fatal(err)
		}
		for name, tt := range map[string]struct{ content, td string }{
			"another trust domain": {string(content), "other.test"},
			"a later form":         {strings.Replace(string(content), `"version":1`, `"version":2`, 1), td},
			"an unknown field":     {strings.Replace(string(content), `"version":1`, `"version":1,"later":1`, 1), td},
			"more in the file":     {string(content) + "{}", td},
			"cut off":              {string(content[:len(content)-1]), td},
		} {
			if _, err := ParseSnapshot([]byte(tt.content), tt.td); err == nil {
				t.Errorf("%s was read", name)
			}
		}
	})
}

// Every part of a stored SVID has to fit, or it is not served.
func TestStoredSVIDIsJudgedAnew(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		good, before, _ := saved(t, f)
		other := f.Subscribe()
		defer other.Close()
		other.View(proves("unix:uid:2"), true)
		b := take(t, other, "unix:uid:2").SVIDs[0]
		for name, spoil := range map[string]func(*StoredSVID){
			"another's SVID": func(s *StoredSVID) { s.Chain, s.Key = b.Chain, b.Key },
			"another's key":  func(s *StoredSVID) { s.Key = b.Key },
			"no key":         func(s *StoredSVID) { s.Key = nil },
			"a flipped bit":  func(s *StoredSVID) { s.Chain = bytes.Clone(s.Chain); s.Chain[len(s.Chain)-5] ^= 1 },
			"no chain":       func(s *StoredSVID) { s.Chain = nil },
			"another form":   func(s *StoredSVID) { s.Certificate = "0 [] \"x\"" },
		} {
			s := onDisk(t, good)
			spoil(&s.SVIDs[0])
			again, log := restarted(t, f)
			if err := again.Restore(t.Context(), s); err != nil {
				t.Fatal(err)
			}
			sub := again.Subscribe()
			if v := sub.View(proves("unix:uid:1"), true); len(v.SVIDs) != 0 {
				t.Errorf("%s: served %s", name, v.SVIDs[0].Peer.ID)
			}
			if !strings.Contains(log.String(), "SVID from the disk is not used") {
				t.Errorf("%s: log: %s", name, log)
			}
			sub.Close()
		}
		_ = before
	})
}

// A picture without secrets holds none.
func TestSnapshotWithoutSecrets(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		if f.Snapshot("", true) != nil {
			t.Error("a picture before the first listing was given")
		}
		_, held, token := saved(t, f)
		content, err := f.Snapshot("spiffe://example.test/agent/n", false).Marshal()
		if err != nil {
			t.Fatal(err)
		}
		encoded, err := json.Marshal(held.Key)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(content, encoded) || bytes.Contains(content, []byte(token)) {
			t.Errorf("secrets are in %s", content)
		}
	})
}

// Each change that the disk has to know of is announced, and nothing else.
func TestChangesAreAnnounced(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		announced := func() bool {
			synctest.Wait()
			select {
			case <-f.Changed():
				return true
			default:
				return false
			}
		}
		f.sync(newEntry("e1", "/a", "unix:uid:1"))
		if !announced() {
			t.Error("a listing was not announced")
		}
		sub := f.Subscribe()
		defer sub.Close()
		sub.View(proves("unix:uid:1"), true)
		v := take(t, sub, "unix:uid:1")
		if !announced() {
			t.Error("an SVID was not announced")
		}
		if _, err := f.JWTSVID(t.Context(), v.Entries[0], []string{"db"}, freely); err != nil || !announced() {
			t.Errorf("a JWT-SVID was not announced (%v)", err)
		}
		if err := f.Apply(t.Context(), &capb.SyncResponse{Revocations: []*capb.Revocation{{
			Subject: &capb.Revocation_SpiffeId{SpiffeId: "spiffe://" + td + "/x"}, BeforeRevision: 9,
		}}}); err != nil || !announced() {
			t.Errorf("a revocation was not announced (%v)", err)
		}
		sub.View(proves("unix:uid:1"), true)
		if announced() {
			t.Error("a look was announced")
		}
	})
}

func FuzzSnapshot(f *testing.F) {
	good := &Snapshot{
		Version: snapshotVersion, TrustDomain: td, Revision: 3, Entries: [][]byte{{10, 2, 'e', '1'}},
		SVIDs: []StoredSVID{{EntryID: "e1", Chain: []byte{0x30, 0}, Key: []byte{0x30, 0}}}, JWTs: []StoredJWT{{EntryID: "e1", Audience: []string{"a"}, Token: "a.b.c"}},
	}
	content, err := good.Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(content)
	f.Add([]byte(`{"version":1,"trust_domain":"example.test","entries":[null],"revocations":[{}],"svids":[{}],"jwts":[{}]}`))
	f.Add([]byte(`{"version":2,"trust_domain":"example.test"}`))
	f.Add([]byte(`{"version":1,"trust_domain":"other.test"} {}`))
	trust := fuzzTrust(f)
	f.Fuzz(func(t *testing.T, content []byte) {
		s, err := ParseSnapshot(content, td)
		if err != nil {
			return
		}
		if s.Version != snapshotVersion || s.TrustDomain != td {
			t.Fatalf("accepted %+v", s)
		}
		c := New(Options{
			TrustDomain: spiffeid.RequireTrustDomainFromString(td), Authority: &signer{err: status.Error(codes.Unavailable, "")},
			Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
		})
		defer c.stop()
		c.SetTrust(t.Context(), trust)
		if c.Restore(t.Context(), s) != nil {
			if c.State().Synced {
				t.Fatal("refused, and served all the same")
			}
			return
		}
		sub := c.Subscribe()
		defer sub.Close()
		var all []string
		for _, e := range c.entries {
			all = append(all, e.Selectors...)
		}
		if v := sub.View(proves(all...), true); len(v.SVIDs) != 0 {
			t.Fatalf("served %s, which nobody signed", v.SVIDs[0].Peer.ID)
		}
	})
}

func fuzzTrust(f *testing.F) *Trust {
	f.Helper()
	jwks, err := forge.New(f, td).Bundle().Marshal()
	if err != nil {
		f.Fatal(err)
	}
	trust, err := ParseTrust(&capb.TrustBundle{TrustDomain: td, Sequence: 1, Jwks: jwks}, td)
	if err != nil {
		f.Fatal(err)
	}
	return trust
}

// The outlook counts what is served, and what came back from the disk and was not
// asked for yet, and nothing that has ended.
func TestOutlook(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		s, a, _ := saved(t, f)
		f.ca.set(func(s *signer) { s.ttl = 3 * time.Hour })
		sub := f.Subscribe()
		defer sub.Close()
		sub.View(proves("unix:uid:2"), true)
		b := take(t, sub, "unix:uid:2").SVIDs[0]
		o := f.Outlook()
		if o.X509 != 2 || !o.First.Equal(a.Peer.NotAfter) || !o.Median.Equal(a.Peer.NotAfter) || o.JWTs != 1 || !o.LastJWT.Equal(o.FirstJWT) || o.FirstJWT.IsZero() || len(o.Waiting) != 0 {
			t.Errorf("outlook = %+v", o)
		}
		again, _ := restarted(t, f)
		if err := again.Restore(t.Context(), s); err != nil {
			t.Fatal(err)
		}
		if o := again.Outlook(); o.X509 != 1 || !o.First.Equal(a.Peer.NotAfter.Truncate(time.Second)) {
			t.Errorf("outlook after a restart = %+v", o)
		}
		other := again.Subscribe()
		defer other.Close()
		other.View(proves("unix:uid:2"), true) // the CA is away
		if o := again.Outlook(); len(o.Waiting) != 1 || o.Waiting[0] != "e2" {
			t.Errorf("waiting = %q", o.Waiting)
		}
		time.Sleep(time.Until(a.Peer.NotAfter))
		if o := f.Outlook(); o.X509 != 1 || !o.First.Equal(b.Peer.NotAfter) || o.JWTs != 0 {
			t.Errorf("outlook after the first ended = %+v", o)
		}
	})
}

// The CA was told that nothing is left that a tainted authority signed: what lay
// on the disk does not come back then. While the CA is away it is better than
// nothing.
func TestTaintedSVIDDoesNotComeBack(t *testing.T) {
	for name, connected := range map[string]bool{"the CA is there": true, "the CA is away": false} {
		t.Run(name, func(t *testing.T) {
			run(t, func(t *testing.T, f *fixture) {
				s, before, _ := saved(t, f)
				again, _ := restarted(t, f)
				if err := again.Restore(t.Context(), s); err != nil {
					t.Fatal(err)
				}
				tainted := f.trust(2)
				tainted.TaintedAuthorityIds = before.Peer.AuthorityIDs
				again.apply(&capb.SyncResponse{Reset_: true, TrustBundle: tainted, Entries: []*capb.Entry{newEntry("e1", "/a", "unix:uid:1")}})
				if !connected {
					again.Disconnected()
				}
				sub := again.Subscribe()
				defer sub.Close()
				if v := sub.View(proves("unix:uid:1"), true); (len(v.SVIDs) == 0) != connected {
					t.Errorf("%d SVIDs are served", len(v.SVIDs))
				}
			})
		})
	}
}
