// What settings are taken, and what is said about the others.

package sidecar

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"merlon.dev/sdk/settings"
)

const validConfig = `
inbound:
  - {listen: ":8443", app: "127.0.0.1:8080", protocol: tcp}
outbound:
  - listen: unix:///run/app/orders.sock
    to: ns/shop/orders
    upstreams: ["orders-1.example.org:8443", "[::1]:8443"]
    protocol: tcp
    limits: {max_connections: 100, max_requests: 0, upstream_connections: 50, upstream_requests: 0}
    timeouts: {connect: 3s, idle: 4s}
    retry: {attempts: 2, methods: [], budget_percent: 30, budget_floor: 5}
    health_check: {kind: http, path: "/healthz?deep=1", host: orders, statuses: [200, 204], interval: 5s, timeout: 1s, healthy_after: 2, unhealthy_after: 3}
strip_headers: [x-user]
idle_timeout: 5s
`

func TestConfigIsReadStrictly(t *testing.T) {
	cfg, err := settings.Parse[Config]("sidecar.yaml", []byte(validConfig))
	if err != nil {
		t.Fatal(err)
	}
	if err := cfg.Validate(); err != nil {
		t.Error(err)
	}
	for name, tc := range map[string]struct{ from, to, want string }{
		"unknown key":             {"idle_timeout", "idle_timout", `did you mean "idle_timeout"?`},
		"unknown key of a list":   {"app:", "ap:", `did you mean "app"?`},
		"app elsewhere":           {"127.0.0.1:8080", "10.0.0.1:8080", `inbound[0].app: "10.0.0.1:8080" is not on loopback`},
		"app by name":             {"127.0.0.1:8080", "localhost:8080", "is not on loopback"},
		"app nowhere":             {"127.0.0.1:8080", "", `is neither host:port nor unix:///PATH`},
		"app on a relative path":  {"127.0.0.1:8080", "unix://app.sock", "is not unix:///PATH"},
		"app on a long path":      {"127.0.0.1:8080", "unix:///" + strings.Repeat("a", 200), "a socket path at most 107"},
		"protocol":                {"protocol: tcp", "protocol: udp", `inbound[0].protocol: "udp" is none of`},
		"protocol missing":        {", protocol: tcp", "", "inbound[0].protocol: is missing"},
		"outbound to the world":   {"unix:///run/app/orders.sock", "0.0.0.0:9001", "outbound[0].listen: \"0.0.0.0:9001\" is not on loopback"},
		"outbound for anybody":    {"    to: ns/shop/orders\n", "", "outbound[0].to: is missing"},
		"outbound to a domain":    {"ns/shop/orders", "spiffe://shop.test", "names a trust domain"},
		"outbound to nobody":      {"ns/shop/orders", "/orders", "neither a SPIFFE ID nor the name of a service"},
		"bad SPIFFE ID":           {"ns/shop/orders", "spiffe://shop.test//x", "is not a SPIFFE ID"},
		"upstream":                {"orders-1.example.org:8443", "orders-1.example.org", "outbound[0].upstreams[0]"},
		"upstream, port":          {"orders-1.example.org:8443", "orders-1.example.org:99999", "outbound[0].upstreams[0]"},
		"upstream, port 0":        {"orders-1.example.org:8443", "orders-1.example.org:0", "outbound[0].upstreams[0]"},
		"app is the listener":     {"127.0.0.1:8080", "127.0.0.1:8443", "inbound[0].app: 127.0.0.1:8443 is where the sidecar itself listens"},
		"health is a listener":    {"idle_timeout", "health_address: 127.0.0.1:8443\nidle_timeout", "health_address: 127.0.0.1:8443 is the address of inbound[0].listen"},
		"everywhere and here":     {"unix:///run/app/orders.sock", "127.0.0.1:8443", "outbound[0].listen: 127.0.0.1:8443 is the address of inbound[0].listen"},
		"everywhere twice":        {"inbound:\n", "inbound:\n  - {listen: \"0.0.0.0:8443\", app: \"127.0.0.1:8080\", protocol: tcp}\n", "inbound[1].listen: :8443 is the address of inbound[0].listen, 0.0.0.0:8443"},
		"listen":                  {":8443\", app", "8443\", app", "inbound[0].listen"},
		"header name":             {"x-user", "X-User", "strip_headers[0]"},
		"negative time":           {"idle_timeout: 5s", "idle_timeout: -5s", "idle_timeout: -5s is negative"},
		"a duration without unit": {"idle_timeout: 5s", "idle_timeout: 5", "idle_timeout"},

		"limits, unknown key": {"upstream_connections", "upstream_conections", `did you mean "upstream_connections"?`},
		"limits, negative":    {"max_connections: 100", "max_connections: -1", "outbound[0].limits.max_connections: -1 is not between"},
		"limits, too much":    {"max_connections: 100", "max_connections: 2000000", "outbound[0].limits.max_connections"},
		"limits of no use":    {"max_requests: 0", "max_requests: 1", "outbound[0].limits: protocol tcp knows no requests"},

		"timeouts, unknown key": {"idle: 4s", "ilde: 4s", `did you mean "idle"?`},
		"timeouts, negative":    {"connect: 3s", "connect: -3s", "outbound[0].timeouts.connect: -3s is negative"},
		"timeouts of no use":    {"idle: 4s", "request: 4s", "outbound[0].timeouts.request: protocol tcp knows no requests"},

		"retry, attempts": {"attempts: 2", "attempts: -1", "outbound[0].retry.attempts: -1 is not between 1 and 100"},
		"retry, share":    {"budget_percent: 30", "budget_percent: 101", "outbound[0].retry.budget_percent"},
		"retry, floor":    {"budget_floor: 5", "budget_floor: -5", "outbound[0].retry.budget_floor"},
		"retry, POST":     {"methods: []", "methods: [GET, POST]", `outbound[0].retry.methods[1]: "POST" is not idempotent`},
		"retry, protocol": {"methods: []", "methods: [GET]", "outbound[0].retry.methods: is not for protocol tcp"},

		"check, unknown key":     {"unhealthy_after", "unhealthy_aftr", `did you mean "unhealthy_after"?`},
		"check of no kind":       {"kind: http, ", "", "outbound[0].health_check.kind: is missing"},
		"check of another kind":  {"kind: http", "kind: ping", `health_check.kind: "ping" is none of tcp, http, grpc`},
		"check, not that":        {"kind: http", "kind: tcp", "health_check.path: is not for checks of kind tcp"},
		"check, no service":      {"kind: http", "kind: http, service: x", "health_check.service: is not for checks of kind http"},
		"check, protocol":        {"protocol: tcp\n    limits", "protocol: grpc\n    limits", `health_check.kind: "http" is none of tcp, grpc, which protocol grpc allows`},
		"check, ambiguous path":  {"/healthz", "/a/../healthz", "health_check.path"},
		"check, path":            {"/healthz", "healthz", "health_check.path"},
		"check, query":           {"deep=1", "deep=1 HTTP/1.1", "health_check.path"},
		"check, host":            {"host: orders", "host: or/ders", "health_check.host"},
		"check, status":          {"[200, 204]", "[200, 100]", "health_check.statuses[1]: 100 is not between 200 and 599"},
		"check, interval":        {"interval: 5s", "interval: 5ms", "health_check.interval: 5ms is less than 10ms"},
		"check, timeout":         {"timeout: 1s", "timeout: -1s", "health_check.timeout: -1s is negative"},
		"check, healthy_after":   {" healthy_after: 2", " healthy_after: -1", "health_check.healthy_after"},
		"check, unhealthy_after": {"unhealthy_after: 3", "unhealthy_after: 101", "health_check.unhealthy_after"},
	} {
		t.Run(name, func(t *testing.T) {
			text := strings.Replace(validConfig, tc.from, tc.to, 1)
			if text == validConfig {
				t.Fatalf("%q is not in the valid configuration", tc.from)
			}
			cfg, err := settings.Parse[Config]("sidecar.yaml", []byte(text))
			if err == nil {
				err = cfg.Validate()
			}
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v; want one with %q", err, tc.want)
			}
		})
	}
}

func TestListenersAreDistinct(t *testing.T) {
	in := Inbound{Listen: "127.0.0.1:8443", App: "127.0.0.1:8080", Protocol: "tcp"}
	out := Outbound{Listen: "127.0.0.1:8443", To: "orders", Upstreams: []string{"a:1"}, Protocol: "tcp"}
	for _, cfg := range []Config{{}, {Inbound: []Inbound{in, in}}, {Inbound: []Inbound{in}, Outbound: []Outbound{out}}, {Outbound: []Outbound{out, out}}} {
		var invalid *InvalidError
		if err := cfg.Validate(); !errors.As(err, &invalid) {
			t.Errorf("Validate(%+v) = %v; want an InvalidError", cfg, err)
		}
	}
}

func TestFlagsComeBeforeEnvironmentAndThatBeforeTheFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sidecar.yaml")
	if err := os.WriteFile(path, []byte(validConfig), 0o600); err != nil {
		t.Fatal(err)
	}
	env := map[string]string{"MERLON_SIDECAR_CONFIG": path, "MERLON_SIDECAR_IDLE_TIMEOUT": "6s", "MERLON_SIDECAR_HEAD_TIMEOUT": "7s"}
	getenv := func(name string) string { return env[name] }
	cl, err := ParseCommandLine([]string{"-idle-timeout", "8s", "-inbound", ":1,127.0.0.1:2,tcp", "-inbound", ":3,[::1]:4,tcp"}, getenv, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	c := cl.Config
	if c.IdleTimeout != 8*time.Second || c.HeadTimeout != 7*time.Second || len(c.Outbound) != 1 || len(c.Inbound) != 2 || c.Inbound[1].App != "[::1]:4" {
		t.Errorf("settings: %+v", c)
	}
	for _, args := range [][]string{{"-outbound", "127.0.0.1:1,orders,tcp"}, {"-inbound", ":1,127.0.0.1:2"}, {"-max-streams", "many"}, {"-no-such"}, {"x"}, {"-agent-uid", "-1"}} {
		if _, err := ParseCommandLine(args, getenv, io.Discard); err == nil {
			t.Errorf("ParseCommandLine(%q) took it", args)
		}
	}
}

func TestEverySettingHasAFlag(t *testing.T) {
	if err := program.Check(); err != nil {
		t.Error(err)
	}
}
