// A user's test with a trust domain in memory.

package sdktest_test

import (
	"errors"
	"net"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"merlon.dev/sdk"
	"merlon.dev/sdk/httpauth"
	"merlon.dev/sdk/sdktest"
)

// A test of a service: nothing but this package has to run.
func Example() {
	_ = func(t *testing.T) { // func TestOrders(t *testing.T)
		td := sdktest.New(t)
		td.Allow("web", "orders")
		orders, web := td.Workload("orders"), td.Workload("web")

		lis, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		srv := &http.Server{
			Handler:           httpauth.Handler(orders, http.NotFoundHandler()), // your own
			TLSConfig:         orders.ServerTLS(),
			ReadHeaderTimeout: 10 * time.Second,
		}
		go srv.ServeTLS(lis, "", "")
		t.Cleanup(func() { srv.Close() })

		td.Revoke("web")
		_, err = httpauth.Client(web, sdk.Service("orders")).Get("https://" + lis.Addr().String() + "/orders/1")
		var denied *sdk.DeniedError
		if err == nil || errors.As(err, &denied) {
			t.Errorf("a revoked caller got past TLS: %v", err)
		}
	}
}

// A test of what an hour brings: in a bubble it takes no time.
func ExampleNewInMemory() {
	_ = func(t *testing.T) { // func TestOrdersAfterAnHour(t *testing.T)
		synctest.Test(t, func(t *testing.T) {
			td := sdktest.NewInMemory(t)
			td.Allow("web", "orders")
			orders, web := td.Workload("orders"), td.Workload("web")
			srv := &http.Server{Handler: httpauth.Handler(orders, http.NotFoundHandler()), TLSConfig: orders.ServerTLS(), ReadHeaderTimeout: 10 * time.Second}
			go srv.ServeTLS(td.Listen("orders:443"), "", "")
			t.Cleanup(func() { srv.Close() })

			time.Sleep(time.Hour) // the X509-SVIDs end, and nothing renews them
			if _, err := httpauth.Client(web, sdk.Service("orders")).Get("https://orders/1"); err == nil {
				t.Error("called with an X509-SVID that has ended")
			}
		})
	}
}
