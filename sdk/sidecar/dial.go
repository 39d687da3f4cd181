// How upstreams are connected to.

package sidecar

import (
	"context"
	"fmt"
	"net"

	"merlon.dev/sdk"
	"merlon.dev/sdk/sidecar/internal/sock"
)

// connect is net.Dial for connections that the sidecar carries.
func connect(ctx context.Context, network, address string) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return sock.New(conn), nil
}

// reach connects to a service by mutual TLS.
func reach(ctx context.Context, id *sdk.Identity, to sdk.Target, address string, alpn []string) (net.Conn, error) {
	raw, err := connect(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		host = "" // not reached: it could not be connected to
	}
	conn, err := id.ClientHandshake(ctx, raw, to, host, alpn...)
	if err != nil {
		return nil, fmt.Errorf("connect to %s at %s: %w", to, address, err)
	}
	return conn, nil
}
