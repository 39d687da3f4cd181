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
	"time"

	"merlon.dev/policy"
	"merlon.dev/sdk/sdktest"
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
