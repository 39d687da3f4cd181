// A session that is resumed skips what has changed since it began: a peer that was let
// in once does not come back by it, in neither direction. go-spiffe's stock
// configurations fail all of this (SECURITY.md section 0, T20; see sdk/svid).

package sdk_test

import (
	"crypto/tls"
	"errors"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"merlon.dev/sdk"
	"merlon.dev/sdk/sdktest"
)

// ends are the four ways in which a peer, web or orders, loses what let it in. That
// orders is denied is up to who calls it: see the test.
var ends = map[string]func(td *sdktest.TD, peer string){
	"denied":       func(td *sdktest.TD, peer string) { td.Deny(peer, "orders") },
	"revoked":      func(td *sdktest.TD, peer string) { td.Revoke(peer) },
	"root removed": func(td *sdktest.TD, _ string) { td.RemoveRoot() },
	"expired":      func(td *sdktest.TD, peer string) { time.Sleep(time.Hour); td.Rotate(other[peer]) },
}

var other = map[string]string{"web": "orders", "orders": "web"}

// at makes calls, one connection each, and says whether they resumed a session.
type at struct {
	dial func() (net.Conn, error)
	cfg  *tls.Config
}

func (a at) call() (resumed bool, err error) {
	raw, err := a.dial()
	if err != nil {
		return false, err
	}
	conn := tls.Client(raw, a.cfg)
	defer conn.Close()
	err = say(conn, "hello")
	return conn.ConnectionState().DidResume, err
}

// each runs a test of each of the four ways in a bubble, in which td's servers
// listen at "orders:1".
func each(t *testing.T, test func(t *testing.T, td *sdktest.TD, way string, end func(*sdktest.TD, string))) {
	for way, end := range ends {
		t.Run(way, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { test(t, sdktest.NewInMemory(t), way, end) })
		})
	}
}

func dialer(t *testing.T, id *sdk.Identity) func() (net.Conn, error) {
	return func() (net.Conn, error) { return id.Dialer()(t.Context(), "tcp", "orders:1") }
}

// Towards our server: a client that keeps sessions gets none, and comes in no more.
func TestSessionCacheBringsNobodyBackIn(t *testing.T) {
	each(t, func(t *testing.T, td *sdktest.TD, _ string, end func(*sdktest.TD, string)) {
		td.Allow("web", "orders")
		orders := td.Workload("orders")
		echo(t, orders.Listener(td.Listen("orders:1")))
		web := at{dialer(t, orders), stranger(td.SVID("web"))}
		for range 3 {
			if resumed, err := web.call(); err != nil || resumed {
				t.Fatalf("before: %v, resumed %v", err, resumed)
			}
		}
		end(td, "web")
		time.Sleep(time.Second)
		for range 3 {
			if _, err := web.call(); err == nil {
				t.Error("let in again")
			}
		}
	})
}

// From our client: a server that gives sessions is not taken by one, also where the
// program has switched them on and shares one cache between its targets.
func TestSessionsOfServersBringNobodyBackIn(t *testing.T) {
	each(t, func(t *testing.T, td *sdktest.TD, way string, end func(*sdktest.TD, string)) {
		own, web := td.SVID("orders"), td.Workload("web")
		echo(t, tls.NewListener(td.Listen("orders:1"), &tls.Config{
			MinVersion:   tls.VersionTLS13,
			ClientAuth:   tls.RequireAnyClientCert,
			Certificates: []tls.Certificate{{Certificate: [][]byte{own.Certificates[0].Raw}, PrivateKey: own.PrivateKey}},
		}))
		client := func(cache tls.ClientSessionCache, to string) at {
			cfg := web.ClientTLS(sdk.Service(to))
			cfg.ClientSessionCache, cfg.ServerName = cache, "orders"
			return at{dialer(t, web), cfg}
		}
		careless := client(tls.NewLRUClientSessionCache(8), "orders")
		reckless := client(tls.NewLRUClientSessionCache(8), "orders")
		reckless.cfg.SessionTicketsDisabled = false
		for i := range 3 {
			if resumed, err := careless.call(); err != nil || resumed {
				t.Fatalf("with a cache: %v, resumed %v", err, resumed)
			}
			if resumed, err := reckless.call(); err != nil || resumed != (i > 0) {
				t.Fatalf("with sessions switched on: %v, resumed %v, so this shows nothing", err, resumed)
			}
		}
		if way == "denied" { // by the client, for which it is somebody else
			for _, c := range []*at{&careless, &reckless} {
				cfg := client(c.cfg.ClientSessionCache, "refunds").cfg
				cfg.SessionTicketsDisabled, c.cfg = c.cfg.SessionTicketsDisabled, cfg
			}
		}
		end(td, "orders")
		time.Sleep(time.Second)
		for range 3 {
			if err := errors.Join(refused(careless), refused(reckless)); err != nil {
				t.Error(err)
			}
		}
	})
}

func refused(a at) error {
	if resumed, err := a.call(); err == nil {
		return errors.New(map[bool]string{false: "taken again", true: "taken again by its session"}[resumed])
	}
	return nil
}
