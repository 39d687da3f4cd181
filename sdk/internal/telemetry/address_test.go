// Where a client says that it connects to.

package telemetry

import (
	"fmt"
	"testing"
)

func TestServerAddress(t *testing.T) {
	for target, want := range map[string]string{
		"dns:///orders.test:8443":             "orders.test 8443",
		"dns://1.1.1.1/orders.test:8443":      "orders.test 8443",
		"passthrough:///127.0.0.1:1":          "127.0.0.1 1",
		"dns:///[::1]:8443":                   "::1 8443",
		"dns:///orders.test":                  "orders.test none",
		"dns:///orders.test:https":            "orders.test none",
		"unix:/run/orders.sock":               "/run/orders.sock none",
		"unix:///run/orders.sock":             "/run/orders.sock none",
		"xds:///orders":                       "orders none",
		"no-target-at-all":                    " none",
		"ipv4:///192.0.2.1:50051,192.0.2.2:1": "192.0.2.1:50051,192.0.2.2:1 none",
	} {
		port := "none"
		attrs := addressOf(target)
		if len(attrs) > 1 {
			port = fmt.Sprint(attrs[1].Value.AsInt64())
		}
		if got := attrs[0].Value.AsString() + " " + port; got != want {
			t.Errorf("addressOf(%q) = %q; want %q", target, got, want)
		}
	}
}
