// What the sidecar reads at start and at each reload: a YAML file, the environment,
// flags.

package sidecar

import (
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/sdk"
	"merlon.dev/sdk/settings"
	"merlon.dev/sdk/sidecar/internal/hop"
	"merlon.dev/sdk/unixsock"
)

// Config is what the sidecar reads. The zero value of every optional field is safe.
type Config struct {
	// Inbound is where others reach the app of this sidecar.
	Inbound []Inbound `yaml:"inbound"`

	// Outbound is where the app reaches others.
	Outbound []Outbound `yaml:"outbound"`

	// CapturedPort is where merlon-sidecar capture install -outbound-port brings what
	// the app connects to, on 127.0.0.1 and ::1. Zero means that nothing is captured.
	CapturedPort int `yaml:"captured_port"`

	// AgentSocket is the agent's socket, unix:///path. Empty means
	// SPIFFE_ENDPOINT_SOCKET, and without that unix:///run/merlon/agent/public/api.sock.
	AgentSocket string `yaml:"agent_socket"`

	// AgentUID is a user whose agent is trusted beside root's and the own one.
	AgentUID uint32 `yaml:"agent_uid"`

	// StripHeaders names, in lower case, further fields of header and trailers that an
	// inbound request never brings to the app. x-spiffe-id and x-forwarded-client-cert
	// are always the sidecar's own.
	StripHeaders []string `yaml:"strip_headers"`

	// MaxConnections is how many connections a listener serves at the same time, where
	// its own limits do not say; more are reset. Zero means 10000.
	MaxConnections int `yaml:"max_connections"`

	// MaxStreams is how many requests one HTTP/2 connection makes at the same time.
	// Zero means 100.
	MaxStreams int `yaml:"max_streams"`

	// MaxHeadBytes bounds a request's or an answer's head. Zero means 16384.
	MaxHeadBytes int `yaml:"max_head_bytes"`

	// MaxHeaderFields bounds the fields in it. Zero means 100.
	MaxHeaderFields int `yaml:"max_header_fields"`

	// ConnectTimeout is for connecting to an upstream, TLS included. Zero means 5s.
	ConnectTimeout time.Duration `yaml:"connect_timeout"`

	// HeadTimeout is for a whole head, from its first byte. Zero means 10s.
	HeadTimeout time.Duration `yaml:"head_timeout"`

	// IdleTimeout closes a connection between two requests. Zero means 60s.
	IdleTimeout time.Duration `yaml:"idle_timeout"`

	// StallTimeout ends a request of which nothing moves any more. Zero means 60s.
	StallTimeout time.Duration `yaml:"stall_timeout"`

	// ResponseTimeout ends a request whose answer does not begin. Zero means 60s.
	ResponseTimeout time.Duration `yaml:"response_timeout"`

	// TCPIdleTimeout closes a connection of protocol tcp, or a WebSocket, on which
	// nothing moves. Zero means 1h.
	TCPIdleTimeout time.Duration `yaml:"tcp_idle_timeout"`

	// DrainTimeout is how long requests under way may take at the end of the process.
	// Zero means 10s.
	DrainTimeout time.Duration `yaml:"drain_timeout"`

	// HealthAddress serves /live, /ready and /metrics over plain HTTP. Empty means
	// 127.0.0.1:9445; "off" means not at all.
	HealthAddress string `yaml:"health_address"`

	// MetricsBySource has the metrics of inbound listeners tell callers apart by SPIFFE
	// ID, at most some thousand series of each listener.
	MetricsBySource bool `yaml:"metrics_by_source"`

	// AdminSocket is a Unix socket for operators, and for the sidecar that is to take
	// this one's place: root and the own user reach it. Empty means off.
	AdminSocket string `yaml:"admin_socket"`

	// AccessLog is where one line of JSON per request goes: a file, "stdout", or "off".
	// Empty means off.
	AccessLog string `yaml:"access_log"`

	// LogLevel is debug, info, warn or error. Empty means info.
	LogLevel string `yaml:"log_level"`

	// LogFormat is text or json. Empty means text.
	LogFormat string `yaml:"log_format"`

	// Logger is where the sidecar reports instead of standard error.
	Logger *slog.Logger `yaml:"-"`
}

// Inbound is a listener for callers, by mutual TLS, and the app behind it.
type Inbound struct {
	// Listen is host:port; every address of the machine without a host.
	Listen string `yaml:"listen"`
	// App is where the app listens: host:port on loopback, or unix:///path.
	App string `yaml:"app"`
	// Protocol is what the app speaks. The listener offers this and nothing else by
	// ALPN, so nothing is translated; and it is what the policy is asked about.
	Protocol string `yaml:"protocol"`
	// HealthCheck is how the app is asked whether it is well.
	HealthCheck HealthCheck `yaml:"health_check"`
	// Limits are of this listener, and of what is behind it.
	Limits Limits `yaml:"limits"`
	// Timeouts are those of this listener.
	Timeouts Timeouts `yaml:"timeouts"`
	// Retry is when a request is tried once more.
	Retry Retry `yaml:"retry"`
}

// Outbound is a listener for the app, and the service behind it.
type Outbound struct {
	// Listen is host:port on loopback, or unix:///path. It may be empty where there are
	// Captures.
	Listen string `yaml:"listen"`
	// Captures are where the app thinks that the service is: addresses or networks with
	// a port, such as 10.0.0.7:80 or [fd00::/64]:80. Captured connections meant for
	// there are this outbound's.
	Captures []string `yaml:"captures"`
	// To is the one peer that is accepted: a SPIFFE ID, or the name of a service in
	// the own trust domain, such as orders or ns/shop/orders.
	To string `yaml:"to"`
	// Upstreams are the host:port of its replicas. Names are looked up at each
	// connection.
	Upstreams []string `yaml:"upstreams"`
	// Protocol is what the app and the service speak.
	Protocol string `yaml:"protocol"`
	// HealthCheck is how each of the upstreams is asked whether it is well.
	HealthCheck HealthCheck `yaml:"health_check"`
	// Limits are of this listener, and of what is behind it.
	Limits Limits `yaml:"limits"`
	// Timeouts are those of this listener.
	Timeouts Timeouts `yaml:"timeouts"`
	// Retry is when a request is tried once more.
	Retry Retry `yaml:"retry"`
}

// InvalidError reports a setting that the sidecar refuses.
type InvalidError = settings.InvalidError

// DefaultHealthAddress is where health and metrics are served.
const DefaultHealthAddress = "127.0.0.1:9445"

const off = "off"

// withDefaults fills what is empty.
func (c Config) withDefaults() Config {
	number := func(field *int, value int) {
		if *field == 0 {
			*field = value
		}
	}
	duration := func(field *time.Duration, value time.Duration) {
		if *field == 0 {
			*field = value
		}
	}
	text := func(field *string, value string) {
		if *field == "" {
			*field = value
		}
	}
	number(&c.MaxConnections, 10_000)
	number(&c.MaxStreams, 100)
	number(&c.MaxHeadBytes, 16<<10)
	number(&c.MaxHeaderFields, 100)
	duration(&c.ConnectTimeout, 5*time.Second)
	duration(&c.HeadTimeout, 10*time.Second)
	duration(&c.IdleTimeout, time.Minute)
	duration(&c.StallTimeout, time.Minute)
	duration(&c.ResponseTimeout, time.Minute)
	duration(&c.TCPIdleTimeout, time.Hour)
	duration(&c.DrainTimeout, 10*time.Second)
	text(&c.HealthAddress, DefaultHealthAddress)
	text(&c.AdminSocket, off)
	text(&c.AccessLog, off)
	text(&c.LogLevel, "info")
	text(&c.LogFormat, "text")
	return c
}

// Validate says what is wrong with the settings, as *InvalidError.
func (c Config) Validate() error {
	c = c.withDefaults()
	if len(c.Inbound)+len(c.Outbound) == 0 {
		return &InvalidError{
			Field: "inbound", Reason: "is missing, and so is outbound: there is nothing to do",
			Hint: "merlon-sidecar -inbound :8443,127.0.0.1:8080,http, or inbound and outbound in the file of -config",
		}
	}
	for i := range c.Inbound {
		if err := c.Inbound[i].check(fmt.Sprintf("inbound[%d]", i)); err != nil {
			return err
		}
	}
	for i := range c.Outbound {
		if err := c.Outbound[i].check(fmt.Sprintf("outbound[%d]", i)); err != nil {
			return err
		}
	}
	if err := c.checkDistinct(); err != nil {
		return err
	}
	if err := c.checkCaptured(); err != nil {
		return err
	}
	if err := c.checkBounds(); err != nil {
		return err
	}
	return c.checkPlaces()
}

func (in *Inbound) check(field string) error {
	if _, err := net.ResolveTCPAddr("tcp", in.Listen); err != nil || in.Listen == "" {
		return &InvalidError{Field: field + ".listen", Reason: fmt.Sprintf("%q is not host:port, such as :8443", in.Listen)}
	}
	if err := checkLocal(field+".app", in.App, "the way to the app has no TLS, and leaves this machine nowhere"); err != nil {
		return err
	}
	if err := checkProtocol(field+".protocol", in.Protocol); err != nil {
		return err
	}
	return in.behind().validate(field, in.Protocol)
}

func (out *Outbound) check(field string) error {
	if out.Listen != "" || len(out.Captures) == 0 {
		if err := checkLocal(field+".listen", out.Listen, "whoever connects there calls in this process's name"); err != nil {
			return err
		}
	}
	if err := checkTo(field+".to", out.To); err != nil {
		return err
	}
	if len(out.Upstreams) == 0 {
		return &InvalidError{Field: field + ".upstreams", Reason: "is missing", Hint: "upstreams: [orders-1.example.org:8443]"}
	}
	for i, address := range out.Upstreams {
		if host, port, err := net.SplitHostPort(address); err != nil || host == "" || !isPort(port) {
			return &InvalidError{Field: fmt.Sprintf("%s.upstreams[%d]", field, i), Reason: fmt.Sprintf("%q is not host:port", address)}
		}
	}
	if err := checkProtocol(field+".protocol", out.Protocol); err != nil {
		return err
	}
	return out.behind().validate(field, out.Protocol)
}

// isPort says whether one can connect to the port, a number or a service's name.
func isPort(port string) bool {
	n, err := net.LookupPort("tcp", port)
	return err == nil && n != 0
}

// behind are the settings of what a listener does with what comes.
type behind struct {
	limits   Limits
	timeouts Timeouts
	retry    Retry
	check    HealthCheck
}

func (in *Inbound) behind() behind { return behind{in.Limits, in.Timeouts, in.Retry, in.HealthCheck} }

func (out *Outbound) behind() behind {
	return behind{out.Limits, out.Timeouts, out.Retry, out.HealthCheck}
}

func (b behind) validate(field, protocol string) error {
	if err := b.limits.validate(field+".limits", protocol); err != nil {
		return err
	}
	if err := b.timeouts.validate(field+".timeouts", protocol); err != nil {
		return err
	}
	if err := b.retry.validate(field+".retry", protocol); err != nil {
		return err
	}
	return b.check.validate(field+".health_check", protocol)
}

// target is whom the outbound listener's connections have to reach.
func (out *Outbound) target() sdk.Target {
	if strings.HasPrefix(out.To, "spiffe:") {
		return sdk.ID(out.To)
	}
	return sdk.Service(out.To)
}

func checkTo(field, to string) error {
	if to == "" {
		return &InvalidError{Field: field, Reason: "is missing: an outbound connection is for one peer", Hint: "to: spiffe://example.org/orders, or orders for that service of the own trust domain"}
	}
	if strings.HasPrefix(to, "spiffe:") {
		if id, err := spiffeid.FromString(to); err != nil {
			return &InvalidError{Field: field, Reason: fmt.Sprintf("%q is not a SPIFFE ID: %v", to, err)}
		} else if id.Path() == "" {
			return &InvalidError{Field: field, Reason: fmt.Sprintf("%q names a trust domain, not a workload", to)}
		}
		return nil
	}
	if err := spiffeid.ValidatePath("/" + to); err != nil {
		return &InvalidError{Field: field, Reason: fmt.Sprintf("%q is neither a SPIFFE ID nor the name of a service: %v", to, err)}
	}
	return nil
}

// checkLocal takes Unix sockets and literal addresses of loopback. Names are not
// looked up: what "localhost" is others can decide.
func checkLocal(field, address, why string) error {
	if path, ok := strings.CutPrefix(address, "unix://"); ok {
		switch {
		case !filepath.IsAbs(path):
			return &InvalidError{Field: field, Reason: fmt.Sprintf("%q is not unix:///PATH", address)}
		case len(path) > unixsock.MaxPath:
			return &InvalidError{Field: field, Reason: fmt.Sprintf("has %d bytes, a socket path at most %d", len(path), unixsock.MaxPath), Hint: "choose a shorter folder"}
		}
		return nil
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return &InvalidError{Field: field, Reason: fmt.Sprintf("%q is neither host:port nor unix:///PATH", address)}
	}
	if ip := net.ParseIP(host); ip == nil || !ip.IsLoopback() {
		return &InvalidError{Field: field, Reason: fmt.Sprintf("%q is not on loopback: %s", address, why), Hint: "127.0.0.1:PORT, [::1]:PORT or unix:///PATH"}
	}
	return nil
}

func checkProtocol(field, protocol string) error {
	if _, ok := engines[protocol]; ok {
		return nil
	}
	reason := fmt.Sprintf("%q is none of %s", protocol, strings.Join(protocols(), ", "))
	if protocol == "" {
		reason = "is missing: it says what the policy is asked about, one of " + strings.Join(protocols(), ", ")
	}
	return &InvalidError{Field: field, Reason: reason}
}

// place is an address that is listened on, and the setting that says so.
type place struct{ field, address string }

// listened are all places of a configuration.
func (c Config) listened() (all []place) {
	for i := range c.Inbound {
		all = append(all, place{fmt.Sprintf("inbound[%d].listen", i), c.Inbound[i].Listen})
	}
	for i := range c.Outbound {
		if c.Outbound[i].Listen != "" {
			all = append(all, place{fmt.Sprintf("outbound[%d].listen", i), c.Outbound[i].Listen})
		}
	}
	for _, address := range c.capturedAddresses() {
		all = append(all, place{"captured_port", address})
	}
	return all
}

// checkDistinct: each listener has an address of its own, which is not its app's.
func (c Config) checkDistinct() error {
	places := c.listened()
	if c.HealthAddress != off {
		places = append(places, place{"health_address", c.HealthAddress})
	}
	for i, p := range places {
		for _, other := range places[:i] {
			if collide(p.address, other.address) {
				return &InvalidError{Field: p.field, Reason: fmt.Sprintf("%s is the address of %s, %s", p.address, other.field, other.address)}
			}
		}
	}
	for i := range c.Inbound {
		if in := &c.Inbound[i]; collide(in.Listen, in.App) {
			return &InvalidError{Field: fmt.Sprintf("inbound[%d].app", i), Reason: fmt.Sprintf("%s is where the sidecar itself listens, %s", in.App, in.Listen)}
		}
	}
	return nil
}

// collide says whether only one can listen at both a and b.
func collide(a, b string) bool {
	if a == b {
		return true
	}
	x, errX := net.ResolveTCPAddr("tcp", a)
	y, errY := net.ResolveTCPAddr("tcp", b)
	if errX != nil || errY != nil || x.Port != y.Port || x.Port == 0 {
		return false
	}
	everywhere := func(a *net.TCPAddr) bool { return a.IP == nil || a.IP.IsUnspecified() }
	return x.IP.Equal(y.IP) || everywhere(x) || everywhere(y)
}

func (c Config) checkBounds() error {
	for _, f := range []struct {
		field           string
		value, min, max int
	}{
		{"max_connections", c.MaxConnections, 1, 1 << 20},
		{"max_streams", c.MaxStreams, 1, 10_000},
		{"max_head_bytes", c.MaxHeadBytes, 1 << 10, 1 << 20},
		{"max_header_fields", c.MaxHeaderFields, 1, 10_000},
	} {
		if f.value < f.min || f.value > f.max {
			return &InvalidError{Field: f.field, Reason: fmt.Sprintf("%d is not between %d and %d", f.value, f.min, f.max)}
		}
	}
	for _, f := range []struct {
		field string
		value time.Duration
	}{
		{"connect_timeout", c.ConnectTimeout},
		{"head_timeout", c.HeadTimeout},
		{"idle_timeout", c.IdleTimeout},
		{"stall_timeout", c.StallTimeout},
		{"response_timeout", c.ResponseTimeout},
		{"tcp_idle_timeout", c.TCPIdleTimeout},
		{"drain_timeout", c.DrainTimeout},
	} {
		if f.value < 0 {
			return &InvalidError{Field: f.field, Reason: fmt.Sprintf("%v is negative", f.value)}
		}
	}
	for i, name := range c.StripHeaders {
		if !isFieldName(name) {
			return &InvalidError{Field: fmt.Sprintf("strip_headers[%d]", i), Reason: fmt.Sprintf("%q is not the name of a header field in lower case", name)}
		}
	}
	return nil
}

func isFieldName(name string) bool {
	return name != "" && strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789!#$%&'*+-.^_`|~") == ""
}

func (c Config) checkPlaces() error {
	if c.HealthAddress != off {
		if _, err := net.ResolveTCPAddr("tcp", c.HealthAddress); err != nil {
			return &InvalidError{Field: "health_address", Reason: fmt.Sprintf("%q is neither host:port nor off", c.HealthAddress)}
		}
	}
	if c.AdminSocket != off {
		if !filepath.IsAbs(c.AdminSocket) {
			return &InvalidError{Field: "admin_socket", Reason: fmt.Sprintf("%q is neither an absolute path nor off", c.AdminSocket)}
		}
		if n := len(c.AdminSocket + handoverSuffix); n > unixsock.MaxPath {
			return &InvalidError{Field: "admin_socket", Reason: fmt.Sprintf("has %d bytes with %s, a socket path at most %d", n, handoverSuffix, unixsock.MaxPath), Hint: "choose a shorter folder"}
		}
	}
	if c.AccessLog != off && c.AccessLog != "stdout" && !filepath.IsAbs(c.AccessLog) {
		return &InvalidError{Field: "access_log", Reason: fmt.Sprintf("%q is neither the absolute path of a file, nor stdout, nor off", c.AccessLog)}
	}
	_, err := c.logger()
	return err
}

// limits are what one connection may cost.
func (c Config) limits() hop.Limits {
	return hop.Limits{
		Connections: c.MaxConnections,
		HeadBytes:   c.MaxHeadBytes, HeaderFields: c.MaxHeaderFields, Streams: c.MaxStreams,
		HandshakeTimeout: c.ConnectTimeout, HeadTimeout: c.HeadTimeout, IdleTimeout: c.IdleTimeout,
		StallTimeout: c.StallTimeout, ResponseTimeout: c.ResponseTimeout, QuietTimeout: c.TCPIdleTimeout,
	}
}

// logger is where the log goes.
func (c Config) logger() (*slog.Logger, error) {
	if c.Logger != nil {
		return c.Logger, nil
	}
	return settings.NewLogger(os.Stderr, c.LogLevel, c.LogFormat)
}
