// The picture of an identity: what is known of each connection and the calls on it.

package sdk_test

import (
	"net"
	"net/http"
	"testing"
	"time"

	"merlon.dev/sdk"
	"merlon.dev/sdk/httpauth"
	"merlon.dev/sdk/sdktest"
)

func TestStateShowsConnectionsAndCalls(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	orders, web := td.Workload("orders"), td.Workload("web")
	release := make(chan struct{})
	srv := &http.Server{ReadHeaderTimeout: 10 * time.Second, TLSConfig: orders.ServerTLS(), Handler: httpauth.Handler(orders, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusOK)
		w.(http.Flusher).Flush()
		<-release
	}))}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go srv.ServeTLS(lis, "", "")
	t.Cleanup(func() { srv.Close() })
	client := httpauth.Client(web, sdk.Service("orders"))
	res, err := client.Get("https://" + lis.Addr().String() + "/a")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	before := orders.State(10)
	if len(before.Connections) != 1 {
		t.Fatalf("%+v", before)
	}
	c := before.Connections[0]
	if c.SPIFFEID != td.ID("web").String() || len(c.Authorities) == 0 || c.Serial == "" || c.Calls != 1 || c.PolicyGeneration == 0 ||
		c.TrustGeneration == 0 || c.TrustGeneration != before.TrustGeneration || !c.Drains.Before(c.Ends) || !c.Drains.After(time.Now()) {
		t.Errorf("connection = %+v of %+v", c, before)
	}
	td.RotateRoot()
	eventually(t, "another generation of trust bundles", func() bool { return orders.State(10).TrustGeneration > before.TrustGeneration })
	if s := orders.State(10); len(s.Connections) > 0 && s.Connections[0].TrustGeneration != c.TrustGeneration {
		t.Errorf("a connection of before was verified by %+v", s.Connections[0])
	}
	close(release)
	eventually(t, "no call is under way", func() bool {
		for _, c := range orders.State(10).Connections {
			if c.Calls != 0 || c.PolicyGeneration != 0 {
				return false
			}
		}
		return true
	})
}
