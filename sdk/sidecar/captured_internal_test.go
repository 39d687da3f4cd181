// Which outbound a captured connection is for. That the kernel tells where it was meant
// to go is seen in integration/sidecars/capture_test.go.

package sidecar

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"merlon.dev/sdk/sidecar/internal/hop"
)

// namedEngine is an engine that says who it is, and ends the connection.
type namedEngine struct{ name string }

func (n *namedEngine) Serve(_ context.Context, conn net.Conn) {
	io.WriteString(conn, n.name)
	conn.Close()
}
func (n *namedEngine) Close() {}

func TestRouter(t *testing.T) {
	c := &Config{Outbound: []Outbound{
		{To: "all", Captures: []string{"0.0.0.0/0:80", "[::/0]:80"}},
		{To: "net", Captures: []string{"10.1.0.0/16:80"}},
		{To: "host", Captures: []string{"10.1.2.3:80", "[fd00::7]:80", "10.1.2.3:81"}},
		{To: "plain", Listen: "127.0.0.1:9001"},
	}}
	r := newRouter(c, slog.New(slog.DiscardHandler), func(out Outbound) hop.Engine { return &namedEngine{out.To} })
	if len(r.engines) != 3 {
		t.Errorf("%d engines; want one for each outbound with captures", len(r.engines))
	}
	for to, want := range map[string]string{
		"10.1.2.3:80": "host", "10.1.2.3:81": "host", "10.1.2.4:80": "net", "192.0.2.1:80": "all",
		"[fd00::7]:80": "host", "[fd00::8]:80": "all", "10.1.2.3:82": "", "192.0.2.1:443": "",
	} {
		got := ""
		if e := r.find(netip.MustParseAddrPort(to)); e != nil {
			got = e.(*namedEngine).name
		}
		if got != want {
			t.Errorf("connections to %s are for %q; want %q", to, got, want)
		}
	}
}

// Whoever comes to the port by himself is refused, and not ended: nobody serves him.
func TestUncapturedConnectionIsRefused(t *testing.T) {
	lis := listen(t)
	c := &Config{Outbound: []Outbound{{To: "all", Captures: []string{"0.0.0.0/0:" + strings.Split(lis.Addr().String(), ":")[1]}}}}
	r := newRouter(c, slog.New(slog.DiscardHandler), func(out Outbound) hop.Engine { return &namedEngine{out.To} })
	conn := dial(t, lis.Addr().String())
	accepted, err := lis.Accept()
	if err != nil {
		t.Fatal(err)
	}
	r.Serve(t.Context(), accepted)
	if text, err := io.ReadAll(conn); len(text) != 0 || err == nil {
		t.Errorf("who connects by himself gets %q, %v; want a reset", text, err)
	}
}

func TestCapturesAreChecked(t *testing.T) {
	valid := func() Config {
		return Config{CapturedPort: 15001, Outbound: []Outbound{
			{To: "orders", Captures: []string{"10.0.0.7:80", "[fd00::/64]:80"}, Upstreams: []string{"10.0.0.7:80"}, Protocol: "http"},
		}}
	}
	for want, change := range map[string]func(*Config){
		"":                                    func(*Config) {},
		"captured_port: is missing":           func(c *Config) { c.CapturedPort = 0 },
		"captured_port: 65536 is no port":     func(c *Config) { c.CapturedPort = 65536 },
		"captured_port: is set":               func(c *Config) { c.Outbound[0].Captures, c.Outbound[0].Listen = nil, "127.0.0.1:9001" },
		"outbound[0].listen":                  func(c *Config) { c.Outbound[0].Captures = nil },
		"outbound[0].captures[1]: \"10.0.0\"": func(c *Config) { c.Outbound[0].Captures[1] = "10.0.0" },
		"captured_port: 127.0.0.1:15001 is the address of outbound[0].listen,": func(c *Config) { c.Outbound[0].Listen = "127.0.0.1:15001" },
		"captured_port: 127.0.0.1:15001 is the address of inbound[0].listen,": func(c *Config) {
			c.Inbound = []Inbound{{Listen: "127.0.0.1:15001", App: "127.0.0.1:8080", Protocol: "http"}}
		},
		"is that of outbound[0].captures[0]": func(c *Config) { c.Outbound[0].Captures[1] = c.Outbound[0].Captures[0] },
	} {
		c := valid()
		change(&c)
		err := c.Validate()
		if _, invalid := errors.AsType[*InvalidError](err); invalid != (want != "") || invalid && !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q", err, want)
		}
	}
}

func FuzzParseDestination(f *testing.F) {
	for _, s := range []string{"10.0.0.7:80", "10.1.0.0/16:80", "[fd00::/64]:80", "[fd00::1]:80", "10.0.0.7/8:80", "[::ffff:10.0.0.7]:80", "[fe80::1%eth0]:80", ":80", "10.0.0.7:0"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		d, err := parseDestination(s)
		if err == nil && (d.port == 0 || !d.net.IsValid() || d.net != d.net.Masked() || d.net.Addr().Is4In6() || d.net.Addr().Zone() != "") {
			t.Errorf("parseDestination(%q) = %v", s, d)
		}
	})
}

// What is written is read.
func TestDestinationsAreRead(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var addr netip.Addr
		if rapid.Bool().Draw(t, "v4") {
			addr = netip.AddrFrom4([4]byte(rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, "addr")))
		} else {
			addr = netip.AddrFrom16([16]byte(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "addr")))
		}
		if addr.Is4In6() {
			return
		}
		prefix, err := addr.Prefix(rapid.IntRange(0, addr.BitLen()).Draw(t, "bits"))
		if err != nil {
			t.Fatal(err)
		}
		want := destination{prefix, rapid.Uint16Range(1, 65535).Draw(t, "port")}
		got, err := parseDestination(net.JoinHostPort(prefix.String(), strconv.Itoa(int(want.port))))
		if err != nil || got != want {
			t.Fatalf("%v, %v; want %v", got, err, want)
		}
	})
}
