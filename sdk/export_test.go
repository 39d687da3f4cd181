package sdk

import "net"

// SetHandshakes changes how many connections of lis may be on their way to Accept,
// before its first use.
func SetHandshakes(lis net.Listener, n int) { lis.(*listener).slots = make(chan struct{}, n) }

// LiveConns is how many connections are in the table, for tests.
func (id *Identity) LiveConns() int64 { return id.conns.size.Load() }
