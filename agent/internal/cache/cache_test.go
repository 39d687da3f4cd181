// The node's picture, with a CA in memory and virtual time.

package cache

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/agent/internal/workload"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid/forge"
)

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
		// Back: at once, not at the end of the pause; but not before calls reach it.
		requests = f.ca.count()
		f.ca.set(func(c *signer) { c.err = nil })
		f.apply(&capb.SyncResponse{})
		synctest.Wait()
		if n := f.ca.count() - requests; n != 0 {
			t.Errorf("%d requests before the CA can be asked", n)
		}
		f.TryAgain()
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

// What the CA pushes is judged here, too: a mistake there gives no identity away.
func TestEntriesThatMakeNoSenseAreLeftOut(t *testing.T) {
	good := func() *capb.Entry { return newEntry("e1", "/a", "unix:uid:1") }
	for name, spoil := range map[string]func(*capb.Entry){
		"no ID":                     func(e *capb.Entry) { e.EntryId = "" },
		"another trust domain":      func(e *capb.Entry) { e.SpiffeId = "spiffe://other.test/a" },
		"the trust domain's own ID": func(e *capb.Entry) { e.SpiffeId = "spiffe://" + td },
		"no SPIFFE ID":              func(e *capb.Entry) { e.SpiffeId = "https://" + td + "/a" },
		"a selector without value":  func(e *capb.Entry) { e.Selectors = append(e.Selectors, &capb.Selector{Type: "unix"}) },
		"a selector without type":   func(e *capb.Entry) { e.Selectors = append(e.Selectors, &capb.Selector{Value: "x"}) },
		"a delivery of later":       func(e *capb.Entry) { e.KeyDelivery = 99 },
		"no selectors":              func(e *capb.Entry) { e.Selectors = nil },
	} {
		t.Run(name, func(t *testing.T) {
			run(t, func(t *testing.T, f *fixture) {
				f.sync(good())
				if got, _ := f.Entitled(proves("unix:uid:1")); len(got) != 1 {
					t.Fatalf("%d entries; want the good one", len(got))
				}
				bad := good()
				spoil(bad)
				f.sync(bad)
				if got, current := f.Entitled(proves("unix:uid:1")); len(got) != 0 || !current {
					t.Errorf("%d entries, current %v; want none, for certain", len(got), current)
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

// A call that fails just as the CA is back says nothing of the CA that is back.
func TestOrderThatFailsAsTheCAComesBackIsMadeAgainSoon(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		f.ca.set(func(c *signer) { c.err = errBroken })
		f.sync(newEntry("e1", "/a", "unix:uid:1"))
		s := f.Subscribe()
		defer s.Close()
		s.View(proves("unix:uid:1"), true)
		time.Sleep(time.Minute) // pauses are seconds by now
		asked := make(chan struct{})
		f.ca.set(func(c *signer) {
			c.before = func() {
				close(asked)
				time.Sleep(time.Second)
			}
		})
		<-asked
		f.ca.set(func(c *signer) { c.before = nil })
		f.TryAgain()
		time.Sleep(time.Second)
		synctest.Wait() // it has failed
		f.ca.set(func(c *signer) { c.err = nil })
		time.Sleep(2 * firstRetry)
		if v := take(t, s, "unix:uid:1"); paths(v) != "/a" {
			t.Errorf("SVIDs = %q; want /a", paths(v))
		}
	})
}
