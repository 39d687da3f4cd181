// What it costs when nothing happens: a heartbeat, over TCP, to agents that read much
// later, so that their part is not counted. TLS is left out.

package api

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/attest"
	"merlon.dev/integration/measure"
	"merlon.dev/sdk/svid"
)

func BenchmarkHeartbeat(b *testing.B) {
	const streams = 200
	s, _ := newService(b)
	crowd := newCrowd(b, s, streams)
	b.ReportAllocs()
	b.ResetTimer()
	before := measure.CPU()
	for i := 0; b.Loop(); i++ {
		crowd.beat()
		if i%500 == 499 {
			crowd.read(b) // before what a socket takes is full
		}
	}
	b.ReportMetric(float64(measure.CPU()-before)/float64(b.N*streams), "cpu-ns/heartbeat")
}

// crowd are agents with one stream each.
type crowd struct {
	service *Service
	conns   []net.Conn // their ends
	tallies []*tally   // ours
	written atomic.Int64
}

// tally counts what is written to a connection.
type tally struct {
	net.Conn
	writes *atomic.Int64
	bytes  atomic.Int64
	read   int64 // at the other end
}

func (t *tally) Write(p []byte) (int, error) {
	n, err := t.Conn.Write(p)
	t.bytes.Add(int64(n))
	t.writes.Add(1)
	return n, err
}

func newCrowd(b *testing.B, s *Service, n int) *crowd {
	b.Helper()
	c := &crowd{service: s}
	var mu sync.Mutex
	peers := make(map[string]*svid.Peer) // by the address that they come from
	address := s.serve(b, func(raw net.Conn) tlsInfo {
		mu.Lock()
		defer mu.Unlock()
		p := peers[raw.RemoteAddr().String()]
		t := &tally{Conn: raw, writes: &c.written}
		c.tallies = append(c.tallies, t)
		return tlsInfo{Peer: p, conn: s.unread.open(t, p.ID.String())}
	})
	for i := range n {
		p := attested(b, s, fmt.Sprintf("crowd-%d", i))
		mu.Lock() // nobody is let in before it is known
		conn, err := net.Dial("tcp", address)
		if err == nil {
			peers[conn.LocalAddr().String()] = p
		}
		mu.Unlock()
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { conn.Close() })
		openSync(b, conn)
		c.conns = append(c.conns, conn)
		for _, _, _, open := s.registry.Counts(); open <= i; _, _, _, open = s.registry.Counts() {
			time.Sleep(time.Millisecond)
		}
	}
	for quiet := int64(-1); quiet != c.written.Load(); time.Sleep(100 * time.Millisecond) {
		quiet = c.written.Load()
	}
	return c
}

// attested is the peer of a new agent.
func attested(b *testing.B, s *Service, name string) *svid.Peer {
	b.Helper()
	now := time.Now()
	token, err := attest.CreateJoinToken(b.Context(), s.opts.Store, name, now.Add(time.Hour))
	if err != nil {
		b.Fatal(err)
	}
	agent, err := attest.RedeemJoinToken(b.Context(), s.opts.Store, td, token, now, now.Add(time.Hour))
	if err != nil {
		b.Fatal(err)
	}
	if err := s.registry.Wait(b.Context(), agent.Revision); err != nil {
		b.Fatal(err)
	}
	return peerOf(b, agent.ID.String(), agent.Handle, agent.Revision)
}

// openSync says on conn what a client says that opens a Sync stream, and lets all that
// comes lie.
func openSync(b *testing.B, conn net.Conn) {
	b.Helper()
	const window = 1 << 30
	var out, headers bytes.Buffer
	out.WriteString(http2.ClientPreface)
	fields := hpack.NewEncoder(&headers)
	for _, f := range []hpack.HeaderField{
		{Name: ":method", Value: "POST"},
		{Name: ":scheme", Value: "http"},
		{Name: ":path", Value: capb.Node_Sync_FullMethodName},
		{Name: ":authority", Value: "ca"},
		{Name: "content-type", Value: "application/grpc"},
		{Name: "te", Value: "trailers"},
	} {
		if err := fields.WriteField(f); err != nil {
			b.Fatal(err)
		}
	}
	framer := http2.NewFramer(&out, nil)
	for _, write := range []func() error{
		func() error {
			return framer.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: window})
		},
		func() error { return framer.WriteWindowUpdate(0, window) },
		func() error {
			return framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: headers.Bytes(), EndHeaders: true})
		},
		func() error { return framer.WriteData(1, false, make([]byte, 5)) }, // an empty message
	} {
		if err := write(); err != nil {
			b.Fatal(err)
		}
	}
	if _, err := conn.Write(out.Bytes()); err != nil {
		b.Fatal(err)
	}
}

// beat has each stream say that there is no news.
func (c *crowd) beat() {
	want := c.written.Load() + int64(len(c.conns))
	c.service.pulse.beatAll()
	for c.written.Load() < want {
		time.Sleep(100 * time.Microsecond)
	}
}

// beatAll is the next beat of every group, at once.
func (p *pulse) beatAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range p.groups {
		if g := &p.groups[i]; g.due != nil {
			close(g.due)
			g.due = nil
		}
	}
}

// read takes what was written.
func (c *crowd) read(b *testing.B) {
	b.Helper()
	for _, conn := range c.conns {
		for _, t := range c.tallies {
			if t.RemoteAddr().String() != conn.LocalAddr().String() {
				continue
			}
			n, err := io.CopyN(io.Discard, conn, t.bytes.Load()-t.read)
			if t.read += n; err != nil {
				b.Fatal(err)
			}
		}
	}
}
