// Connections that the CA does not take any more.

package agent

import (
	"io"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
)

// A connection whose SVID was revoked is left, although it is used again and again.
func TestRefusedConnectionIsLeft(t *testing.T) {
	var mu sync.Mutex
	connections := map[string]int{}
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		connections[r.RemoteAddr]++
		if len(connections) == 1 && connections[r.RemoteAddr] > 1 {
			http.Error(w, "revoked", http.StatusUnauthorized)
		}
	}))
	srv.EnableHTTP2 = true
	srv.StartTLS()
	defer srv.Close()
	client := srv.Client()
	client.Transport = current{client.Transport.(*http.Transport)}
	for i, want := range []int{200, 401, 200, 200} {
		resp, err := client.Get(srv.URL)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != want || err != nil || want == 401 && string(body) != "revoked\n" || resp.ProtoMajor != 2 {
			t.Errorf("call %d: %s %q, %v; want %d", i, resp.Status, body, err, want)
		}
	}
	if len(connections) != 2 {
		t.Errorf("%d connections were made; want 2", len(connections))
	}
}
