// Plaintext beside TLS on one port: who is let in as what, and that nobody who
// begins with TLS ends up without.

package sdk_test

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"merlon.dev/policy"
	"merlon.dev/sdk"
	"merlon.dev/sdk/sdktest"
)

// adopting are the options of a service that still takes plaintext.
func adopting(plaintext time.Duration) []sdk.Option {
	now := time.Now()
	return []sdk.Option{sdk.WithAuditUntil(now.Add(time.Hour)), sdk.WithPlaintextUntil(now.Add(plaintext))}
}

func plain(t *testing.T, address string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func TestPlaintextIsTakenUntilTheDateAndNoLonger(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	for name, test := range map[string]struct {
		opts    []sdk.Option
		plain   bool // a plaintext client is served
		refused uint64
	}{
		"by default":     {nil, false, 0},
		"in audit mode":  {[]sdk.Option{sdk.WithAuditUntil(time.Now().Add(time.Hour))}, false, 0},
		"until a date":   {adopting(time.Hour), true, 0},
		"after the date": {adopting(-time.Minute), false, 1},
	} {
		t.Run(name, func(t *testing.T) {
			orders := td.Workload("orders", test.opts...)
			address := listen(t, orders)
			if err := say(plain(t, address), "hello"); (err == nil) != test.plain {
				t.Errorf("plaintext: %v", err)
			}
			if err := call(address, stranger(td.SVID("web"))); err != nil {
				t.Errorf("TLS: %v", err)
			}
			stats := orders.Stats()
			var calls, refused uint64
			for _, c := range stats.Plaintext {
				if c.Address != "127.0.0.1" || c.Last.IsZero() {
					t.Errorf("a caller: %+v", c)
				}
				calls, refused = calls+c.Calls, refused+c.Refused
			}
			if (calls == 1) != test.plain || refused != test.refused || (stats.WouldDeny[policy.NoIdentity] == 1) != test.plain {
				t.Errorf("stats: %+v", stats)
			}
		})
	}
}

// A client that begins with TLS gets TLS with a verified peer, or nothing.
func TestNobodyIsDowngradedToPlaintext(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	address := listen(t, td.Workload("orders", adopting(time.Hour)...))
	anonymous := stranger(td.SVID("web"))
	anonymous.Certificates = nil
	if err := call(address, anonymous); err == nil {
		t.Error("a TLS client without a certificate was let in")
	}
	foreign := sdktest.New(t)
	if err := call(address, stranger(foreign.SVID("web"))); err == nil {
		t.Error("a TLS client of another root was let in")
	}
	old := stranger(td.SVID("web"))
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	if err := call(address, old); err == nil {
		t.Error("TLS 1.2 was let in")
	}
	for _, first := range []byte{20, 21, 22, 23, 24} {
		conn := plain(t, address)
		if err := say(conn, string([]byte{first})+"\x03\x01\x00\x04GET / HTTP/1.1\r\n\r\n"); err == nil {
			t.Errorf("bytes that begin with %d, a TLS record, were served as plaintext", first)
		}
	}
	// And from the other side: a client of ours says nothing in plaintext.
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if conn, err := td.Workload("web").DialTLS(sdk.Service("orders"))(t.Context(), "tcp", echo(t, inner)); err == nil {
		conn.Close()
		t.Error("a client took a plaintext server")
	}
}

// In audit mode the policy alone is not enforced.
func TestAuditModeStillDemandsAnIdentity(t *testing.T) {
	td := sdktest.New(t)
	orders := td.Workload("orders", sdk.WithAuditUntil(time.Now().Add(time.Hour)))
	address := listen(t, orders)
	web := stranger(td.SVID("web"))
	if err := call(address, web); err != nil {
		t.Errorf("a call that no grant allows: %v", err)
	}
	if n := orders.Stats().WouldDeny[policy.NoGrant]; n != 1 {
		t.Errorf("%d calls would be denied; want 1", n)
	}
	if err := call(address, stranger(sdktest.New(t).SVID("web"))); err == nil {
		t.Error("a stranger was let in")
	}
	td.Revoke("web")
	eventually(t, "the revoked peer is refused", func() bool { return call(address, web) != nil })
}

// A plaintext connection that is open at the date ends with it.
func TestPlaintextConnectionsEndAtTheDate(t *testing.T) {
	td := sdktest.New(t)
	for life := time.Second; ; life *= 2 {
		address := listen(t, td.Workload("orders", adopting(life)...))
		conn := plain(t, address)
		if err := say(conn, "hello"); err != nil {
			if life > time.Minute {
				t.Fatal(err)
			}
			continue // this machine was too slow for that date
		}
		cutWithin(t, conn, life+20*time.Second)
		return
	}
}

// Close ends what it can: nobody is left who would look after the date.
func TestPlaintextEndsWithTheIdentity(t *testing.T) {
	td := sdktest.New(t)
	orders := td.Workload("orders", adopting(time.Hour)...)
	address := listen(t, orders)
	conn := plain(t, address)
	if err := say(conn, "hello"); err != nil {
		t.Fatal(err)
	}
	orders.Close()
	cutWithin(t, conn, 20*time.Second)
	if err := say(plain(t, address), "hello"); err == nil {
		t.Error("a closed identity lets plaintext in")
	}
}

func TestOpenRefusesAnAuditModeWithoutEnd(t *testing.T) {
	for _, opt := range []sdk.Option{sdk.WithAuditUntil(time.Time{}), sdk.WithPlaintextUntil(time.Now().Add(time.Hour))} {
		_, err := sdk.Open(t.Context(), sdk.WithAgentAddress("unix:///nowhere"), opt)
		var notReady *sdk.NotReadyError
		if !errors.As(err, &notReady) || notReady.Reason != sdk.BadOption || notReady.Hint == "" {
			t.Errorf("Open = %v", err)
		}
	}
}

// A connection that says nothing is not waited for, and one that hides its bytes is refused.
func TestPlaintextNeedsAFirstByte(t *testing.T) {
	td := sdktest.New(t)
	orders := td.Workload("orders", adopting(time.Hour)...)
	here, there := net.Pipe()
	defer there.Close()
	if _, err := orders.Plaintext(t.Context(), here); err == nil {
		t.Error("a connection without a first byte to look at was taken")
	}
	if _, err := there.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the refused connection is not closed: %v", err)
	}
}

// Calls under way that the agent decides end with audit mode too.
func TestAuditModeEndsWhereTheAgentDecides(t *testing.T) {
	td := sdktest.New(t)
	td.Decide(func(*policy.Input) policy.Decision { return policy.Decision{Reason: policy.DenyRule} })
	in := &policy.Input{Source: td.ID("web").String(), Destination: td.ID("orders").String(), Protocol: policy.HTTP, Method: "GET", Path: "/"}
	// Longer than a new policy has every call decided again.
	for life := 4 * time.Second; ; life *= 2 {
		orders := td.Workload("orders", sdk.WithAuditUntil(time.Now().Add(life)))
		d := orders.Authorize(t.Context(), in)
		if !sdk.Audited(d) {
			if life > time.Minute {
				t.Fatalf("%+v", d)
			}
			continue // this machine was too slow for that date
		}
		ended := make(chan policy.Decision, 1)
		defer orders.Follow(in, d, func(d policy.Decision) { ended <- d })()
		select {
		case d := <-ended:
			if d.Allow || d.Reason != policy.DenyRule {
				t.Errorf("%+v", d)
			}
		case <-time.After(life + 20*time.Second):
			t.Error("the call goes on")
		}
		return
	}
}
