// Connections that hang on a tainted root run out before it is withdrawn, and no call
// fails.

package httpauth_test

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"merlon.dev/sdk"
	"merlon.dev/sdk/httpauth"
	"merlon.dev/sdk/sdktest"
)

func TestConnectionsRunOutBeforeTheirRootIsWithdrawn(t *testing.T) {
	for _, protocol := range []string{"http/1.1", "h2"} {
		t.Run(protocol, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				td := sdktest.NewInMemory(t)
				td.Allow("web", "orders")
				orders, web := td.Workload("orders"), td.Workload("web")
				srv := &http.Server{
					Handler: httpauth.Handler(orders, whoami), TLSConfig: orders.ServerTLS(protocol),
					ReadHeaderTimeout: time.Minute, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError),
				}
				go srv.ServeTLS(td.Listen("orders:443"), "", "")
				t.Cleanup(func() { srv.Close() })

				busy, idle := client(t, web, sdk.Service("orders")), client(t, web, sdk.Service("orders"))
				if _, _, err := get(idle, "https://orders/"); err != nil {
					t.Fatal(err)
				}
				var calling sync.WaitGroup
				over := make(chan struct{})
				for range 2 {
					calling.Go(func() { keepPosting(t, busy, over) })
				}
				time.Sleep(time.Second)
				before := connections(orders, web)
				td.AddRoot()
				td.TaintOldRoots()
				td.Rotate("web") // which then makes connections to what orders still shows
				time.Sleep(5 * time.Second)
				td.Rotate("orders")
				time.Sleep(45 * time.Second) // what HTTP/2 has had in use ends when it is idle for long
				now := connections(orders, web)
				for c := range before {
					if now[c] {
						t.Errorf("%s is still open; want it to have run out", c)
					}
				}
				if len(before) == 0 || len(now) == 0 {
					t.Errorf("connections before: %v, now: %v", before, now)
				}
				td.RemoveOldRoots()
				time.Sleep(time.Second)
				close(over)
				calling.Wait()
				if _, _, err := get(idle, "https://orders/"); err != nil {
					t.Errorf("the client that was idle: %v", err)
				}
			})
		})
	}
}

// keepPosting makes calls that net/http sends once only.
func keepPosting(t *testing.T, c *http.Client, over <-chan struct{}) {
	for {
		select {
		case <-over:
			return
		case <-time.After(50 * time.Millisecond):
		}
		res, err := c.Post("https://orders/", "", nil)
		if err != nil {
			t.Errorf("POST: %v", err)
			return
		}
		_, _ = io.Copy(io.Discard, res.Body)
		res.Body.Close()
	}
}

// connections are those of both ends.
func connections(ids ...*sdk.Identity) map[string]bool {
	all := make(map[string]bool)
	for _, id := range ids {
		for _, c := range id.State(1000).Connections {
			all[fmt.Sprintf("a connection with %s, %s, by %s", c.SPIFFEID, c.Serial, c.Authorities)] = true
		}
	}
	return all
}
