// Package hop is what the sidecar's door and its engines agree on. A hop is one
// configured way through the sidecar: from the mesh to the app (inbound), or from
// the app to a service (outbound). The door accepts, does the handshake of inbound
// connections and hands each to the engine of the hop's protocol; the engine reads
// requests, has Identity decide those of an inbound hop, and forwards.
package hop

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"net"
	"strings"
	"sync/atomic"
	"time"

	"merlon.dev/policy"
	"merlon.dev/sdk"
)

// Engine speaks one protocol for one hop.
type Engine interface {
	// Serve serves one connection until its end, and closes it: a *tls.Conn after
	// its handshake on an inbound hop, else a plain one. When ctx ends it begins no
	// further request, finishes those under way, and returns; the door closes conn
	// if that takes too long.
	Serve(ctx context.Context, conn net.Conn)
	// Close drops connections that are kept for reuse. It is called after ctx of
	// every Serve has ended.
	Close()
}

// Direction says which way a hop goes.
type Direction string

// The directions. An inbound hop decides; what leaves by an outbound one is decided
// where it arrives.
const (
	Inbound  Direction = "inbound"
	Outbound Direction = "outbound"
)

// Hop is what an engine needs to know, and counts its requests. Nothing else of it
// changes.
type Hop struct {
	// Name is the hop in logs, metrics and the admin socket: its listener's address.
	Name      string
	Direction Direction
	// Protocol is what the listener was configured with, and what policy.Input says.
	Protocol policy.Protocol
	Identity *sdk.Identity
	// To is the service behind an outbound hop as the configuration spells it; the own
	// SPIFFE ID on an inbound one.
	To        string
	Upstreams *Upstreams
	Limits    Limits
	Retry     Retry
	// Strip says whether a header or trailer field of this name, in lower case, is
	// taken out of requests on an inbound hop: those that claim an identity, and
	// those that are configured.
	Strip func(name string) bool
	// Record takes in a request, or for L4 a connection, that is over. The Entry is
	// not kept.
	Record func(*Entry)
	// Count counts the failure of what is no request yet.
	Count func(*Failure)

	requests atomic.Int64 // under way
}

// Begin counts a request that has come, and says whether it may go on: there are not
// more than may be under way. If so End has to follow.
func (h *Hop) Begin() bool {
	n := h.requests.Add(1)
	if h.Limits.Requests > 0 && n > int64(h.Limits.Requests) {
		h.requests.Add(-1)
		return false
	}
	return true
}

// End counts a request that is over.
func (h *Hop) End() { h.requests.Add(-1) }

// Requests is the number of requests under way.
func (h *Hop) Requests() int64 { return h.requests.Load() }

// Limits bound what one connection can cost, and a hop as a whole. Zero is no limit for
// a time and for Requests, and nowhere else allowed.
type Limits struct {
	Connections  int // of callers at the same time
	Requests     int // likewise
	HeadBytes    int // of request line and header fields, or of an HPACK list
	HeaderFields int
	Streams      int // of one HTTP/2 connection at the same time
	// HandshakeTimeout is for connecting to an upstream, TLS included; HeadTimeout
	// for a whole head from its first byte; IdleTimeout between requests, and for an
	// upstream's kept connections.
	HandshakeTimeout, HeadTimeout, IdleTimeout time.Duration
	// StallTimeout ends a request of which neither side moves a byte for so long,
	// ResponseTimeout one whose answer does not begin, QuietTimeout a connection that
	// carries anything: of protocol tcp, or a WebSocket.
	StallTimeout, ResponseTimeout, QuietTimeout time.Duration
	// RequestTimeout ends a request that is not over, whatever moves.
	RequestTimeout time.Duration
}

// Entry is a line of the access log, and one observation of the metrics.
type Entry struct {
	Begun          time.Time
	Trace          *Trace
	Took           time.Duration
	Source         string // SPIFFE ID; empty on an outbound hop
	Remote         string
	Upstream       string // address; empty where none was asked
	Method, Path   string // Path without the query
	Host           string
	Status         int // of HTTP; 0 for L4, and where no answer was sent
	GRPCStatus     string
	Reason         policy.Reason // of the decision; empty on an outbound hop
	DecisionID     policy.DecisionID
	BytesIn        int64 // of bodies, from the caller
	BytesOut       int64
	Err            string // why it went wrong; empty where it did not
	Denied, Failed bool   // refused by a decision; went wrong
	Retries        int32  // tries beyond the first
	// Failure is why the sidecar itself has answered; nil where it has not, and after a
	// denial.
	Failure *Failure
}

// Caller is who is at the other end of an inbound connection.
type Caller struct {
	// State is what Identity knows the connection by; nil on an outbound hop.
	State *tls.ConnectionState
	// ID is the verified SPIFFE ID, and Cert how x-forwarded-client-cert tells of it;
	// both empty on an outbound hop, and where the connection has been cut already.
	ID, Cert      string
	Remote, Local string
}

// CallerOf says who has connected. It is asked once per connection.
func (h *Hop) CallerOf(conn net.Conn) Caller {
	c := Caller{Remote: addressOf(conn.RemoteAddr()), Local: addressOf(conn.LocalAddr())}
	secured, ok := conn.(*tls.Conn)
	if !ok {
		return c
	}
	state := secured.ConnectionState()
	c.State = &state
	if peer, ok := h.Identity.Peer(&state); ok {
		c.ID = peer.ID.String()
		sum := sha256.Sum256(state.PeerCertificates[0].Raw)
		c.Cert = "By=" + h.To + ";Hash=" + hex.EncodeToString(sum[:]) + ";URI=" + c.ID
	}
	return c
}

// addressOf is empty for an unnamed Unix socket.
func addressOf(a net.Addr) string {
	if a == nil {
		return ""
	}
	return strings.TrimPrefix(a.String(), "@")
}

// The names of the header fields that tell the app who calls. Callers' own are
// always taken out.
const (
	IDField   = "x-spiffe-id"
	CertField = "x-forwarded-client-cert"
)
