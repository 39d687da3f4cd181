// The command line of merlon-sidecar: flags win over the environment, the
// environment over the file, the file over the defaults.

package sidecar

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"merlon.dev/sdk/sidecar/capture"
)

// envPrefix begins the environment variable of each setting: access_log is
// MERLON_SIDECAR_ACCESS_LOG.
const envPrefix = "MERLON_SIDECAR_"

// setting is one field of Config that flags and environment can set.
type setting struct {
	key   string // as in the file
	usage string
	set   func(c *Config, value string) error
}

var settings = []setting{
	{key: "inbound", usage: "`listen,app,protocol`, such as :8443,127.0.0.1:8080,http: where callers reach the app; more than one separated by spaces", set: setInbound},
	{key: "outbound", usage: "`listen,service,protocol,upstream…`, such as 127.0.0.1:9001,orders,http,orders-1:8443: where the app reaches a service; more than one separated by spaces", set: setOutbound},
	{key: "captured_port", usage: "`port` on 127.0.0.1 and ::1 for captured connections, whose outbounds are in the file, by their captures (default: none)", set: number(func(c *Config) *int { return &c.CapturedPort })},
	{key: "agent_socket", usage: "the agent's socket, `unix:///path` (default $SPIFFE_ENDPOINT_SOCKET)", set: text(func(c *Config) *string { return &c.AgentSocket })},
	{key: "agent_uid", usage: "`uid` whose agent is trusted beside root's and the own (default: none)", set: setAgentUID},
	{key: "strip_headers", usage: "comma-separated `names` of header fields that no caller brings to the app, beside those that claim an identity", set: list(func(c *Config) *[]string { return &c.StripHeaders })},
	{key: "max_connections", usage: "connections of a listener at the same time (default 10000)", set: number(func(c *Config) *int { return &c.MaxConnections })},
	{key: "max_streams", usage: "requests of an HTTP/2 connection at the same time (default 100)", set: number(func(c *Config) *int { return &c.MaxStreams })},
	{key: "max_head_bytes", usage: "bytes of a request's or an answer's head (default 16384)", set: number(func(c *Config) *int { return &c.MaxHeadBytes })},
	{key: "max_header_fields", usage: "fields in it (default 100)", set: number(func(c *Config) *int { return &c.MaxHeaderFields })},
	{key: "connect_timeout", usage: "for connecting to an upstream, TLS included (default 5s)", set: duration(func(c *Config) *time.Duration { return &c.ConnectTimeout })},
	{key: "head_timeout", usage: "for a whole head, from its first byte (default 10s)", set: duration(func(c *Config) *time.Duration { return &c.HeadTimeout })},
	{key: "idle_timeout", usage: "after which a connection without a request is closed (default 60s)", set: duration(func(c *Config) *time.Duration { return &c.IdleTimeout })},
	{key: "stall_timeout", usage: "after which a request is ended of which nothing moves (default 60s)", set: duration(func(c *Config) *time.Duration { return &c.StallTimeout })},
	{key: "response_timeout", usage: "after which a request is ended whose answer has not begun (default 60s)", set: duration(func(c *Config) *time.Duration { return &c.ResponseTimeout })},
	{key: "tcp_idle_timeout", usage: "after which a connection of protocol tcp is closed on which nothing moves, or a WebSocket (default 1h)", set: duration(func(c *Config) *time.Duration { return &c.TCPIdleTimeout })},
	{key: "drain_timeout", usage: "for requests under way at the end of the process (default 10s)", set: duration(func(c *Config) *time.Duration { return &c.DrainTimeout })},
	{key: "health_address", usage: "`host:port` of health and metrics, or off (default " + DefaultHealthAddress + ")", set: text(func(c *Config) *string { return &c.HealthAddress })},
	{key: "metrics_by_source", usage: "true: metrics tell callers apart by SPIFFE ID (default false)", set: setMetricsBySource},
	{key: "admin_socket", usage: "`path` of a Unix socket for operators, and for a successor; off for none (default off)", set: text(func(c *Config) *string { return &c.AdminSocket })},
	{key: "access_log", usage: "`file` for a line of JSON per request, stdout, or off (default off)", set: text(func(c *Config) *string { return &c.AccessLog })},
	{key: "log_level", usage: "debug, info, warn or error (default info)", set: text(func(c *Config) *string { return &c.LogLevel })},
	{key: "log_format", usage: "text or json (default text)", set: text(func(c *Config) *string { return &c.LogFormat })},
}

func text(field func(*Config) *string) func(*Config, string) error {
	return func(c *Config, v string) error { *field(c) = v; return nil }
}

func number(field func(*Config) *int) func(*Config, string) error {
	return func(c *Config, v string) (err error) {
		if *field(c), err = strconv.Atoi(v); err != nil {
			return fmt.Errorf("%q is not a number", v)
		}
		return nil
	}
}

func duration(field func(*Config) *time.Duration) func(*Config, string) error {
	return func(c *Config, v string) (err error) {
		if *field(c), err = time.ParseDuration(v); err != nil {
			return fmt.Errorf("%q is not a duration such as 10s", v)
		}
		return nil
	}
}

func list(field func(*Config) *[]string) func(*Config, string) error {
	return func(c *Config, v string) error {
		*field(c) = splitList(v)
		return nil
	}
}

func splitList(v string) (parts []string) {
	for part := range strings.SplitSeq(v, ",") {
		if part = strings.TrimSpace(part); part != "" {
			parts = append(parts, part)
		}
	}
	return parts
}

func setInbound(c *Config, v string) error {
	c.Inbound = nil
	for each := range strings.FieldsSeq(v) {
		parts := strings.Split(each, ",")
		if len(parts) != 3 {
			return fmt.Errorf("%q is not listen,app,protocol", each)
		}
		c.Inbound = append(c.Inbound, Inbound{Listen: parts[0], App: parts[1], Protocol: parts[2]})
	}
	return nil
}

func setOutbound(c *Config, v string) error {
	c.Outbound = nil
	for each := range strings.FieldsSeq(v) {
		parts := strings.Split(each, ",")
		if len(parts) < 4 {
			return fmt.Errorf("%q is not listen,service,protocol,upstream", each)
		}
		c.Outbound = append(c.Outbound, Outbound{Listen: parts[0], To: parts[1], Protocol: parts[2], Upstreams: parts[3:]})
	}
	return nil
}

func setMetricsBySource(c *Config, v string) (err error) {
	if c.MetricsBySource, err = strconv.ParseBool(v); err != nil {
		return fmt.Errorf("%q is neither true nor false", v)
	}
	return nil
}

func setAgentUID(c *Config, v string) error {
	uid, err := strconv.ParseUint(v, 10, 32)
	if err != nil {
		return fmt.Errorf("%q is not a uid", v)
	}
	c.AgentUID = uint32(uid)
	return nil
}

// CommandLine is what merlon-sidecar was told.
type CommandLine struct {
	Config Config
	// ValidateOnly asks to check the settings and do nothing else.
	ValidateOnly bool
	// Command is what exec is to start.
	Command []string

	args   []string
	getenv func(string) string
}

// ParseCommandLine reads flags, then the environment, then the file that
// either names, and checks the result. flag.ErrHelp means that help was asked
// for and printed to usage.
func ParseCommandLine(args []string, getenv func(string) string, usage io.Writer) (*CommandLine, error) {
	cl := &CommandLine{args: args, getenv: getenv}
	executes := len(args) > 0 && args[0] == "exec"
	if executes {
		args = args[1:]
	}
	set := flag.NewFlagSet("merlon-sidecar", flag.ContinueOnError)
	set.SetOutput(io.Discard) // the caller reports mistakes, once
	path := set.String("config", getenv(envPrefix+"CONFIG"), "YAML `file` with the settings")
	set.BoolVar(&cl.ValidateOnly, "validate", false, "check the settings and exit")
	given := map[string]string{}
	for _, s := range settings {
		set.Func(flagOf(s.key), s.usage, func(v string) error { given[s.key] = v; return nil })
	}
	if err := set.Parse(args); errors.Is(err, flag.ErrHelp) {
		printUsage(usage, set)
		return nil, err
	} else if err != nil {
		return nil, &usageError{err.Error()}
	}
	switch {
	case executes && set.NArg() == 0:
		return nil, &usageError{"exec without a command: merlon-sidecar exec [FLAGS] -- COMMAND"}
	case executes:
		cl.Command = set.Args()
	case set.NArg() > 0:
		return nil, &usageError{fmt.Sprintf("unexpected argument %q", set.Arg(0))}
	}
	if *path != "" {
		var err error
		if cl.Config, err = ReadConfig(*path); err != nil {
			return nil, err
		}
	}
	if err := cl.apply(given); err != nil {
		return nil, err
	}
	return cl, cl.Config.Validate()
}

// Run runs the sidecar until ctx ends, and reads the settings again at each hangup.
func (cl *CommandLine) Run(ctx context.Context, out io.Writer, hangups <-chan os.Signal) error {
	if cl.ValidateOnly {
		_, err := fmt.Fprintln(out, "the settings are valid")
		return err
	}
	s, err := New(cl.Config)
	if err != nil {
		return err
	}
	s.Command = cl.Command
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	for {
		select {
		case err := <-done:
			return err
		case <-hangups:
			again, err := ParseCommandLine(cl.args, cl.getenv, io.Discard)
			if err == nil {
				err = s.Reload(again.Config)
			}
			if err != nil {
				s.log.LogAttrs(ctx, slog.LevelError, "configuration not reloaded; the last one stays", slog.Any("err", err), slog.String("hint", Hint(err)))
			}
		}
	}
}

// apply sets what flags and environment say.
func (cl *CommandLine) apply(given map[string]string) error {
	for _, s := range settings {
		name := envPrefix + strings.ToUpper(s.key)
		value, source := cl.getenv(name), name
		if v, ok := given[s.key]; ok {
			value, source = v, "-"+flagOf(s.key)
		} else if value == "" {
			continue
		}
		if err := s.set(&cl.Config, value); err != nil {
			return fmt.Errorf("%s: %w", source, err)
		}
	}
	return nil
}

func flagOf(key string) string { return strings.ReplaceAll(key, "_", "-") }

func printUsage(w io.Writer, set *flag.FlagSet) {
	fmt.Fprintf(w, `merlon-sidecar gives an unmodified program an identity, mutual TLS and policy.

Examples:
  merlon-sidecar -inbound :8443,127.0.0.1:8080,http
  merlon-sidecar -outbound 127.0.0.1:9001,orders,http,orders-1.example.org:8443
  merlon-sidecar -config /etc/merlon/sidecar.yaml
  merlon-sidecar capture -h
  merlon-sidecar exec -config /etc/merlon/sidecar.yaml -- nginx -g 'daemon off;'

With exec it starts the command once identity and policy are there, and ends with
it. SIGHUP has the settings read again.

Each setting can also come from %sNAME in the environment.

Flags:
`, envPrefix)
	set.SetOutput(w)
	set.PrintDefaults()
}

// usageError is a mistake in the command line itself.
type usageError struct{ reason string }

func (e *usageError) Error() string { return e.reason }

// Hint returns what to do about an error of this package; empty if it says so
// itself.
func Hint(err error) string {
	if e, ok := errors.AsType[*InvalidError](err); ok {
		return e.Hint
	}
	if e, ok := errors.AsType[*capture.InvalidError](err); ok {
		return e.Hint
	}
	if _, ok := errors.AsType[*usageError](err); ok {
		return "merlon-sidecar -h, or merlon-sidecar capture -h, shows every flag and an example"
	}
	switch {
	case errors.Is(err, ErrNotInForce):
		return "merlon-sidecar capture install with the same flags, before the app starts"
	case errors.Is(err, capture.ErrNoTool):
		return "apt-get install nftables"
	case strings.Contains(err.Error(), "Operation not permitted"), strings.Contains(err.Error(), "you must be root"):
		return "run it as root, or with CAP_NET_ADMIN"
	case errors.Is(err, syscall.EADDRINUSE):
		return "another process has the address: choose another, or stop it"
	case strings.HasPrefix(err.Error(), "read config: open"):
		return "name the file with -config, or give the settings as flags: merlon-sidecar -h"
	case errors.Is(err, fs.ErrPermission):
		return "choose ports above 1023 and folders that this user can write"
	}
	return ""
}
