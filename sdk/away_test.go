// An agent that is away for minutes, and what it knows when it is back. In a bubble, so
// that they take no time.

package sdk_test

import (
	"errors"
	"log/slog"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"merlon.dev/policy"
	"merlon.dev/sdk"
	"merlon.dev/sdk/httpauth"
	"merlon.dev/sdk/sdktest"
)

// Calls go on by the last compiled policy until it is too old, and then no more; the
// agent that is back brings what has changed.
func TestCallsGoOnWithoutTheAgentUntilThePolicyIsStale(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const maxAge = 10 * time.Minute
		td := sdktest.NewInMemory(t)
		td.SetPolicyMaxAge(maxAge)
		td.Allow("web", "orders")
		td.Allow("shop", "orders")
		td.CompilePolicy()
		orders := td.Workload("orders")
		srv := &http.Server{
			ReadHeaderTimeout: time.Minute, TLSConfig: orders.ServerTLS(), ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0),
			Handler: httpauth.Handler(orders, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})),
		}
		go srv.ServeTLS(td.Listen("orders:443"), "", "")
		t.Cleanup(func() { srv.Close() })
		clients := make(map[string]*http.Client)
		for _, name := range []string{"web", "shop"} {
			clients[name] = httpauth.Client(td.Workload(name), sdk.Service("orders"))
		}
		time.Sleep(time.Second) // the program comes
		call := func(when, name string, want policy.Reason) {
			t.Helper()
			got := policy.Allowed
			err := get(t.Context(), clients[name], "orders:443")
			if denied, ok := errors.AsType[*sdk.DeniedError](err); ok {
				got = denied.Reason
			} else if err != nil {
				got = "" // no connection
			}
			if got != want {
				t.Errorf("%s: %s gets %q, %v; want %q", when, name, got, err, want)
			}
		}
		call("at first", "web", policy.Allowed)
		call("at first", "shop", policy.Allowed)

		td.StopAgent("orders")
		td.Deny("web", "orders") // of which orders hears nothing
		away := time.Now()
		for time.Since(away) < maxAge-30*time.Second { // it said last up to 15 s before
			call("agent away", "web", policy.Allowed)
			time.Sleep(time.Minute)
		}
		time.Sleep(time.Until(away.Add(maxAge)))
		call("agent away for too long", "web", policy.StalePolicy)
		call("agent away for too long", "shop", policy.StalePolicy)

		td.Revoke("shop")
		td.StartAgent("orders")
		time.Sleep(time.Second)
		call("agent back", "web", policy.DenyRule)
		call("agent back", "shop", "") // revoked
		td.Forget("web", "orders")
		td.Allow("web", "orders")
		time.Sleep(time.Second)
		call("agent back", "web", policy.Allowed)
	})
}
