// The command line of merlon-sidecar: flags win over the environment, the
// environment over the file, the file over the defaults.

package sidecar

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"syscall"

	"merlon.dev/sdk/settings"
	"merlon.dev/sdk/sidecar/capture"
)

const about = `merlon-sidecar gives an unmodified program an identity, mutual TLS and policy.

Examples:
  merlon-sidecar -inbound :8443,127.0.0.1:8080,http
  merlon-sidecar -outbound 127.0.0.1:9001,orders,http,orders-1.example.org:8443
  merlon-sidecar -config /etc/merlon/sidecar.yaml
  merlon-sidecar capture -h
  merlon-sidecar exec -config /etc/merlon/sidecar.yaml -- nginx -g 'daemon off;'

With exec it starts the command once identity and policy are there, and ends with
it. SIGHUP has the settings read again.
`

var program = settings.Program[Config]{
	Name: "merlon-sidecar", Env: "MERLON_SIDECAR_", About: about,
	Settings: []settings.Setting[Config]{
		{Key: "inbound", Usage: "`listen,app,protocol`, such as :8443,127.0.0.1:8080,http: where callers reach the app; more than one by as many flags, or separated by spaces", Join: " ", Set: setInbound},
		{Key: "outbound", Usage: "`listen,service,protocol,upstream…`, such as 127.0.0.1:9001,orders,http,orders-1:8443: where the app reaches a service; more than one by as many flags, or separated by spaces", Join: " ", Set: setOutbound},
		{Key: "captured_port", Usage: "`port` on 127.0.0.1 and ::1 for captured connections, whose outbounds are in the file, by their captures (default: none)"},
		{Key: "agent_socket", Usage: "the agent's socket, `unix:///path` (default $SPIFFE_ENDPOINT_SOCKET)"},
		{Key: "agent_uid", Usage: "`uid` whose agent is trusted beside root's and the own (default: none)"},
		{Key: "strip_headers", Usage: "comma-separated `names` of header fields that no caller brings to the app, beside those that claim an identity"},
		{Key: "max_connections", Usage: "connections of a listener at the same time; more are reset (default 10000)"},
		{Key: "max_streams", Usage: "requests of an HTTP/2 connection at the same time (default 100)"},
		{Key: "max_head_bytes", Usage: "bytes of a request's or an answer's head (default 16384)"},
		{Key: "max_header_fields", Usage: "fields in it (default 100)"},
		{Key: "connect_timeout", Usage: "for connecting to an upstream, TLS included (default 5s)"},
		{Key: "head_timeout", Usage: "for a whole head, from its first byte (default 10s)"},
		{Key: "idle_timeout", Usage: "after which a connection without a request is closed (default 60s)"},
		{Key: "stall_timeout", Usage: "after which a request is ended of which nothing moves (default 60s)"},
		{Key: "response_timeout", Usage: "after which a request is ended whose answer has not begun (default 60s)"},
		{Key: "tcp_idle_timeout", Usage: "after which a connection of protocol tcp is closed on which nothing moves, or a WebSocket (default 1h)"},
		{Key: "drain_timeout", Usage: "for requests under way at the end of the process (default 10s)"},
		{Key: "health_address", Usage: "`host:port` of health and metrics, or off (default " + DefaultHealthAddress + ")"},
		{Key: "metrics_by_source", Usage: "true: metrics tell callers apart by SPIFFE ID (default false)"},
		{Key: "admin_socket", Usage: "`path` of a Unix socket for operators, and for a successor; off for none (default off)"},
		{Key: "access_log", Usage: "`file` for a line of JSON per request, stdout, or off (default off)"},
		{Key: "log_level", Usage: "debug, info, warn or error (default info)"},
		{Key: "log_format", Usage: "text or json (default text)"},
	},
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
	line, err := program.Read(&cl.Config, args, getenv, usage)
	if err != nil {
		return nil, err
	}
	cl.ValidateOnly = line.ValidateOnly
	switch {
	case !executes:
		err = program.Unexpected(line)
	case len(line.Args) == 0:
		err = program.Mistake(errors.New("exec without a command: merlon-sidecar exec [FLAGS] -- COMMAND"))
	default:
		cl.Command = line.Args
	}
	if err != nil {
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
	if err := s.meetManager(); err != nil {
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
			reloaded := s.announceReload()
			if err := cl.reload(s); err != nil {
				s.log.LogAttrs(ctx, slog.LevelError, "configuration not reloaded; the last one stays", slog.Any("err", err), slog.String("hint", Hint(err)))
			}
			reloaded()
		}
	}
}

// reload has s take in what the command line says by now.
func (cl *CommandLine) reload(s *Sidecar) error {
	again, err := ParseCommandLine(cl.args, cl.getenv, io.Discard)
	if err != nil {
		s.metrics.reloaded(err)
		return err
	}
	return s.Reload(again.Config)
}

// Hint returns what to do about an error of this package; empty if it says so
// itself.
func Hint(err error) string {
	if hint := settings.Hint(err); hint != "" {
		return hint
	}
	if e, ok := errors.AsType[*capture.InvalidError](err); ok {
		return e.Hint
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
	case errors.Is(err, fs.ErrPermission):
		return "choose ports above 1023 and folders that this user can write"
	}
	return ""
}
