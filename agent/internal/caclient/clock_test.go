// Clocks that are apart are an alarm before anybody's SVID is refused for it, and where
// one is (SECURITY.md T41); messages that are late are none.

package caclient

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

const (
	year   = 365 * 24 * time.Hour
	differ = `level=ERROR msg="clocks of CA and node differ"`
)

// heardBy is a stream's side of a CA that answers each question after a while.
type heardBy struct {
	*stream
	ahead    time.Duration // of the node's clock
	there    time.Duration // how long a question takes
	back     time.Duration // and how long a message does
	answered uint64
	old      bool // knows of no questions
}

// speak is a message of the CA, and a question if there is one.
func (h *heardBy) speak(t *testing.T) {
	t.Helper()
	if ask := h.clock.ask(time.Now()); ask != 0 {
		time.Sleep(h.there)
		h.answered = ask
	}
	m := &capb.SyncResponse{SentAt: timestamppb.New(time.Now().Add(-h.ahead))}
	if !h.old {
		m.Answers = h.answered
	}
	time.Sleep(h.back)
	h.checkClock(t.Context(), m)
}

// It is said once when they come apart, also by years and in both directions, and once
// more when they do after they were together; and never for less than half a minute.
func TestClocksThatDifferAreAnAlarm(t *testing.T) {
	for _, far := range []time.Duration{31 * time.Second, -31 * time.Second, time.Hour, -time.Hour, 5 * year, -5 * year} {
		synctest.Test(t, func(t *testing.T) {
			var log bytes.Buffer
			h := &heardBy{stream: newStream(slog.New(slog.NewTextHandler(&log, nil)))}
			said := 0
			for i, step := range []struct {
				ahead time.Duration
				alarm bool
			}{{0, false}, {30 * time.Second, false}, {far, true}, {far, false}, {-30 * time.Second, false}, {far, true}} {
				h.ahead = step.ahead
				for range 3 { // as a clock that was set is noticed by a question
					h.speak(t)
					time.Sleep(askPause)
				}
				if got, known := h.ClockAhead(); !known || got.Abs() > step.ahead.Abs() || step.ahead == far && got != far {
					t.Errorf("step %d: ClockAhead() = %s, %t; want %s", i, got, known, step.ahead)
				}
				if step.alarm {
					said++
				}
				if got := strings.Count(log.String(), differ); got != said {
					t.Errorf("step %d, apart by %s: %d alarms; want %d:\n%s", i, step.ahead, got, said, &log)
				}
			}
			before, _ := h.ClockAhead()
			h.checkClock(t.Context(), &capb.SyncResponse{}) // without a time
			if ahead, _ := h.ClockAhead(); ahead != before {
				t.Errorf("a message without a time: %s; want what is known to stay", ahead)
			}
		})
	}
}

// A loaded CA, or a loaded agent, is late, for as long as it likes.
func TestMessagesThatAreLateAreNoAlarm(t *testing.T) {
	for name, h := range map[string]heardBy{
		"the CA's come late":   {back: 10 * time.Minute},
		"the agent's do":       {there: 10 * time.Minute},
		"both":                 {there: time.Hour, back: time.Hour},
		"a little apart":       {ahead: 29 * time.Second, back: time.Minute},
		"a CA before answers":  {old: true, back: time.Minute},
		"such a one, in a row": {old: true, back: time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var log bytes.Buffer
				h.stream = newStream(slog.New(slog.NewTextHandler(&log, nil)))
				back := h.back
				h.back = 0
				h.speak(t) // the first was in time
				h.back = back
				for range 5 {
					h.speak(t)
				}
				if strings.Contains(log.String(), differ) {
					t.Errorf("an alarm: %s", &log)
				}
			})
		})
	}
}

// Whatever the clocks are, and however late messages come: what is said is never more
// than what is, and an answer without delay says all of it.
func TestOfClocksNoMoreIsSaidThanIs(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c, now := newClock(), time.Now()
		ahead := time.Duration(rapid.Int64Range(-int64(year), int64(year)).Draw(t, "ahead"))
		late := rapid.Int64Range(0, int64(time.Hour))
		answered := uint64(0)
		for range rapid.IntRange(1, 20).Draw(t, "messages") {
			if ask := c.ask(now); ask != 0 {
				now = now.Add(time.Duration(late.Draw(t, "there")))
				answered = ask
			}
			sent := now.Add(-ahead).Round(0)
			now = now.Add(time.Duration(late.Draw(t, "back")))
			said, _ := c.heard(sent, answered, now)
			if said.Abs() > ahead.Abs() || said != 0 && (said < 0) != (ahead < 0) {
				t.Fatalf("the node is said to be ahead by %s; it is by %s", said, ahead)
			}
		}
		c.mu.Lock()
		c.wanted = true
		c.mu.Unlock()
		ask := c.ask(now)
		if said, _ := c.heard(now.Add(-ahead).Round(0), ask, now); said != ahead {
			t.Fatalf("after an answer that took no time the node is said to be ahead by %s; it is by %s", said, ahead)
		}
	})
}

// Where a certificate of the CA's is refused for the time alone, the log has both times,
// once; where anything else is wrong it says nothing about clocks.
func TestCertificatesThatAreNotOfThisTimeTellOfClocks(t *testing.T) {
	const ended = "the CA's certificate has ended by this node's clock"
	root := forge.New(t, td, func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = time.Now().Add(-2*year), time.Now().Add(2*year)
	})
	between := func(begin, end time.Duration) forge.Change {
		return func(c *x509.Certificate) { c.NotBefore, c.NotAfter = time.Now().Add(begin), time.Now().Add(end) }
	}
	for name, test := range map[string]struct {
		by        *forge.Authority
		path      string
		lives     forge.Change
		want, not string
	}{
		"in time":                {root, "/ca", between(-time.Hour, time.Hour), "", "clock"},
		"still to come":          {root, "/ca", between(time.Hour, 2*time.Hour), differ, ended},
		"over":                   {root, "/ca", between(-2*time.Hour, -time.Hour), ended, differ},
		"of another root":        {forge.New(t, td), "/ca", between(10*time.Minute, 20*time.Minute), "", "clock"},
		"of another SPIFFE ID":   {root, "/agent/eve", between(time.Hour, 2*time.Hour), "", "clock"},
		"over, and of a service": {root, "/eve", between(-2*time.Hour, -time.Hour), "", "clock"},
	} {
		for _, first := range []bool{true, false} {
			var out bytes.Buffer
			c, picture := trusting(t, root, slog.New(slog.NewTextHandler(&out, nil)))
			cfg, chain := c.toCA(picture), test.by.Leaf(test.path, test.lives).Chain
			if first {
				cfg, chain = c.firstContact(picture), append(slices.Clone(chain), test.by.Cert)
			}
			var err error
			for range 2 {
				err = cfg.VerifyConnection(tls.ConnectionState{PeerCertificates: chain, NegotiatedProtocol: "h2"})
			}
			if fine := name == "in time"; (err == nil) != fine {
				t.Errorf("%s: verified: %v; want success: %t", name, err, fine)
			}
			if n := strings.Count(out.String(), "level=ERROR"); test.want != "" && (n != 1 || !strings.Contains(out.String(), test.want)) {
				t.Errorf("%s: the log has %d errors; want one, %q:\n%s", name, n, test.want, &out)
			}
			if strings.Contains(out.String(), test.not) {
				t.Errorf("%s: the log says %q:\n%s", name, test.not, &out)
			}
			if test.want != "" && (!strings.Contains(out.String(), "node_clock=") || !strings.Contains(out.String(), "ca_certificate_not_")) {
				t.Errorf("%s: the log lacks one of both times:\n%s", name, &out)
			}
		}
	}
}

// trusting is a client that is not connected to anything, and holds root's trust bundle.
func trusting(t *testing.T, root *forge.Authority, log *slog.Logger) (*Client, *cache.Cache) {
	t.Helper()
	c, err := New(Config{
		TrustDomain: spiffeid.RequireTrustDomainFromString(td), Addresses: []string{"ca:1"}, DataDir: newDir(t),
		RootHash: svid.KeyHash(root.Cert), Logger: log, Registerer: prometheus.NewRegistry(),
	})
	if err != nil {
		t.Fatal(err)
	}
	picture := cache.New(cache.Options{TrustDomain: c.cfg.TrustDomain, Authority: c, Logger: log, Registerer: prometheus.NewRegistry()})
	jwks, err := root.Bundle().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	held, err := cache.ParseTrust(&capb.TrustBundle{TrustDomain: td, Sequence: 1, Jwks: jwks}, td)
	if err != nil {
		t.Fatal(err)
	}
	picture.SetTrust(t.Context(), held)
	return c, picture
}
