// Connections between sidecars that hang on a tainted root run out before it is
// withdrawn, and no request fails.

package sidecar

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"merlon.dev/sdk"
)

func TestConnectionsRunOutBeforeTheirRootIsWithdrawn(t *testing.T) {
	t.Parallel()
	hello := func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") }
	for protocol, make := range map[string]func(*testing.T) (app string, c *http.Client){
		"http": func(t *testing.T) (string, *http.Client) {
			app, _ := httpApp(t, hello)
			return app, client(t)
		},
		"http2": func(t *testing.T) (string, *http.Client) {
			return h2cServer(t, hello), h2c(t, func(ctx context.Context, network, address string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, network, address)
			})
		},
	} {
		t.Run(protocol, func(t *testing.T) {
			t.Parallel()
			app, c := make(t)
			p := startPair(t, protocol, app)
			call := func(when string) {
				t.Helper()
				res, err := c.Post("http://"+p.outbound.addrs[0]+"/", "", nil)
				if err != nil {
					t.Fatalf("%s: %v", when, err)
				}
				defer res.Body.Close()
				if body, err := io.ReadAll(res.Body); err != nil || res.StatusCode != http.StatusOK {
					t.Fatalf("%s: %s, %q, %v", when, res.Status, body, err)
				}
			}
			call("at first")
			old := authorities(p.inbound.sidecar.id, p.outbound.sidecar.id)
			if len(old) != 1 {
				t.Fatalf("connections hang on %v; want one root", old)
			}
			p.td.AddRoot()
			p.td.TaintOldRoots()
			p.td.Rotate("web")
			await(t, "another X509-SVID of web", func() bool { return p.outbound.hasLeft(old) })
			call("web has another")
			p.td.Rotate("orders")
			await(t, "nothing that hangs on the tainted root", func() bool {
				call("meanwhile")
				for root := range authorities(p.inbound.sidecar.id, p.outbound.sidecar.id) {
					if old[root] {
						return false
					}
				}
				return true
			})
			p.td.RemoveOldRoots()
			await(t, "the root's end", func() bool {
				call("the root is withdrawn")
				return p.outbound.sidecar.id.State(0).TrustGeneration >= 3 && p.inbound.sidecar.id.State(0).TrustGeneration >= 3
			})
			call("after that")
		})
	}
}

// hasLeft says whether the sidecar shows an X509-SVID of none of these authorities.
func (r *running) hasLeft(old map[string]bool) bool {
	own, err := r.sidecar.id.GetX509SVID()
	return err == nil && !old[fmt.Sprintf("%x", own.Certificates[0].AuthorityKeyId)]
}

// authorities are those that the connections of these identities hang on.
func authorities(ids ...*sdk.Identity) map[string]bool {
	all := make(map[string]bool)
	for _, id := range ids {
		for _, c := range id.State(1000).Connections {
			for _, a := range c.Authorities {
				all[strings.ToLower(a)] = true
			}
		}
	}
	return all
}
