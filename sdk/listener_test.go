// Connections that are handed out are through with handshake and decision.

package sdk_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"merlon.dev/policy"
	"merlon.dev/sdk"
	"merlon.dev/sdk/sdktest"
	"merlon.dev/sdk/svid"
)

// A chain is public: whoever shows one without its key gets nothing decided,
// or recorded, in its name.
func TestListenerDecidesOnlyAboutProvedPeers(t *testing.T) {
	td := sdktest.New(t)
	var decided atomic.Int32
	td.Decide(func(*policy.Input) policy.Decision {
		decided.Add(1)
		return policy.Decision{Allow: true, Reason: policy.Allowed, DecisionID: policy.NewDecisionID()}
	})
	address := listen(t, td.Workload("orders"))
	victim := td.SVID("web")
	forged := stranger(victim)
	wrong, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	forged.Certificates[0].PrivateKey = wrong
	conn, err := tls.Dial("tcp", address, forged)
	if err == nil {
		err = say(conn, "hello")
		conn.Close()
	}
	if err == nil {
		t.Error("a chain without its key was let in")
	}
	conn, err = tls.Dial("tcp", address, stranger(victim))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := say(conn, "hello"); err != nil {
		t.Fatalf("the owner of the key: %v", err)
	}
	if got := decided.Load(); got != 1 {
		t.Errorf("%d decisions; want 1, about the peer that proved itself", got)
	}
}

// In a bubble, where time is exact: a thousand clients that say nothing hold up nobody,
// and are gone after the time that a handshake may take.
func TestManySlowHandshakesHoldUpNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		td := sdktest.NewInMemory(t)
		td.Allow("web", "orders")
		echo(t, td.Workload("orders").Listener(td.Listen("orders:1")))
		web := td.Workload("web")
		began := time.Now()
		var silent []net.Conn
		for range 1000 {
			conn, err := web.Dialer()(t.Context(), "tcp", "orders:1")
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			silent = append(silent, conn)
		}
		conn, err := web.DialTLS(sdk.Service("orders"))(t.Context(), "tcp", "orders:1")
		if err == nil {
			defer conn.Close()
			err = say(conn, "hello")
		}
		if took := time.Since(began); err != nil || took > 0 {
			t.Errorf("served after %v, %v; want at once", took, err)
		}
		for _, conn := range silent {
			if _, err := conn.Read(make([]byte, 1)); err == nil || time.Since(began) != svid.HandshakeTimeout {
				t.Fatalf("a silent client: %v after %v; want the end after %v", err, time.Since(began), svid.HandshakeTimeout)
			}
		}
	})
}

// A program that does not accept is given no more connections than fit.
func TestConnectionsWaitForAccept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const most = 3
		td := sdktest.NewInMemory(t)
		td.Allow("web", "orders")
		orders, web := td.Workload("orders"), td.Workload("web")
		lis := orders.Listener(td.Listen("orders:1"))
		t.Cleanup(func() { lis.Close() })
		sdk.SetHandshakes(lis, most)
		accepted := make(chan net.Conn)
		accept := func() {
			conn, err := lis.Accept()
			if err != nil {
				t.Error(err)
			}
			accepted <- conn
		}
		go accept()
		for range 3 * most {
			go func() {
				if conn, err := web.DialTLS(sdk.Service("orders"))(t.Context(), "tcp", "orders:1"); err == nil {
					t.Cleanup(func() { conn.Close() })
				}
			}()
		}
		(<-accepted).Close()
		synctest.Wait()
		if n := orders.LiveConns(); n > most {
			t.Errorf("%d connections wait for Accept; want %d", n, most)
		}
		go accept()
		(<-accepted).Close()
	})
}

// A client that says nothing holds up nobody, and Close does not wait for it.
func TestSlowHandshakeHoldsUpNobody(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	lis := td.Workload("orders").Listener(inner)
	address := echo(t, lis)
	for range 10 {
		silent, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer silent.Close()
	}
	conn, err := tls.Dial("tcp", address, stranger(td.SVID("web")))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := say(conn, "hello"); err != nil {
		t.Fatal(err)
	}
	closed := make(chan error, 1)
	go func() { closed <- lis.Close() }()
	select {
	case <-closed:
	case <-time.After(10 * time.Second):
		t.Fatal("Close waits for silent clients")
	}
	if _, err := lis.Accept(); err == nil {
		t.Error("a closed listener accepts")
	}
}
