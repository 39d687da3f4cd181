// Where the agent's socket is: the URI rules of the SPIFFE Workload Endpoint
// standard, section 4 (SECURITY.md E5).

package sdk

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"strings"

	"merlon.dev/sdk/unixsock"
)

// SocketEnv is the environment variable that names the agent's socket, as the
// SPIFFE standard has it: unix:///run/merlon/agent/public/api.sock.
const SocketEnv = "SPIFFE_ENDPOINT_SOCKET"

// DefaultAddress is where an agent listens that nobody configured otherwise.
const DefaultAddress = "unix:///run/merlon/agent/public/api.sock"

// agentAddress chooses option, then environment, then default.
func agentAddress(option string) string {
	if option != "" {
		return option
	}
	if env := os.Getenv(SocketEnv); env != "" {
		return env
	}
	return DefaultAddress
}

// socketPath gives the path that a unix: URI names.
func socketPath(address string) (string, error) {
	u, err := url.Parse(address)
	if err != nil {
		return "", fmt.Errorf("parse %q: %w", address, err)
	}
	switch {
	case u.Scheme == "tcp":
		return "", errors.New("over TCP an agent cannot prove who it is; use its Unix socket")
	case u.Scheme != "unix":
		return "", fmt.Errorf("%q is not a unix: URI", address)
	case u.Opaque != "" || !strings.HasPrefix(u.Path, "/"):
		return "", fmt.Errorf("%q has no absolute path; write unix:///path", address)
	case u.Host != "" || u.User != nil:
		return "", fmt.Errorf("%q has an authority; write unix:///path with three slashes", address)
	case u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || strings.Contains(address, "#"):
		return "", fmt.Errorf("%q has a query or fragment", address)
	case len(u.Path) > unixsock.MaxPath:
		return "", fmt.Errorf("%q: a socket path has at most %d bytes", address, unixsock.MaxPath)
	case strings.ContainsRune(u.Path, 0):
		return "", fmt.Errorf("%q: a socket path has no NUL", address)
	}
	return u.Path, nil
}
