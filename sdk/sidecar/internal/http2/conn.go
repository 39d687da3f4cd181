// A connection, to a caller or to an upstream: its state, how it begins and how it
// ends.

package http2

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	codec "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"merlon.dev/sdk/sidecar/internal/hop"
)

// conn is one HTTP/2 connection.
type conn struct {
	eng    *engine
	nc     net.Conn
	pool   *pool                // of a connection to an upstream; nil for an accepted one
	caller hop.Caller           // of an accepted connection
	state  *tls.ConnectionState // of one to an upstream; nil: plain

	// What pool.pick looks at: how many streams there are, and how many there may be.
	load, room atomic.Int32

	// The reader's alone.
	in    input
	fr    *codec.Framer
	dec   *hpack.Decoder
	list  fieldList
	batch batch

	calm calm
	// For the keeper, by the engine's clock; 0: not now.
	frameAt, listAt, writeAt atomic.Int64 // since when a frame, a list of fields is being read, and written
	heardAt                  atomic.Int64 // the last frame
	hungUp                   sync.Once
	writers                  sync.WaitGroup

	mu sync.Mutex
	// Guarded by mu, as is all of a stream.
	streams    map[uint32]*stream
	out        *buffer // what waits to be sent; nil: nothing
	writing    bool    // a goroutine sends
	broken     bool    // sending has failed
	enc        *hpack.Encoder
	encoded    buffer // what enc writes
	sendWindow int
	recvWindow int
	owed       int
	blocked    []*stream // with a body that waits for the connection
	peerWindow int       // of new streams
	lastID     uint32    // accepted: of the peer's last stream; else of ours
	resets     [64]uint32
	nextReset  int
	credits    []credit // to be given by unlock
	over       []*call  // of which a stream has gone; likewise
	goodbye    farewell
	lastServed uint32 // with saidLast
	closing    bool   // is closed when everything is sent
	sealed     bool   // nothing more is sent
	idleSince  int64
	pinged     bool
}

// farewell is how far a connection has come with its end.
type farewell byte

const (
	staying   farewell = iota
	announced          // the peer knows that no new streams should come; those on their way are served
	saidLast           // later streams are not served
)

// connError ends a connection.
type connError struct {
	code codec.ErrCode
	why  string
}

// Error implements error.
func (e *connError) Error() string { return fmt.Sprintf("%s: %s", e.code, e.why) }

func protocolError(why string) error { return &connError{codec.ErrCodeProtocol, why} }

const (
	headerTable = 4 << 10
	// lingerTime is how long a connection that ends may take to say why.
	lingerTime = time.Second
)

func (e *engine) newConn(nc net.Conn, p *pool) *conn {
	c := &conn{
		eng: e, nc: nc, pool: p, streams: make(map[uint32]*stream),
		sendWindow: firstWindow, recvWindow: firstWindow,
		peerWindow: firstWindow,
	}
	if t, ok := nc.(*tls.Conn); ok && p != nil {
		state := t.ConnectionState()
		c.state = &state
	}
	c.room.Store(math.MaxInt32) // unless the peer says otherwise
	c.enc = hpack.NewEncoder(&c.encoded)
	c.in = input{nc: nc, before: c.batch.flush}
	c.fr = codec.NewFramer(nil, &c.in)
	c.fr.SetMaxReadFrameSize(maxFrame)
	c.list.limit(&e.hop.Limits)
	c.dec = hpack.NewDecoder(headerTable, c.list.add)
	c.calm.start()
	now := e.clock.Load()
	c.idleSince = now
	c.heardAt.Store(now)
	return c
}

// unlock lets go of c.mu and does what must not be done while it is held, because it
// concerns other connections.
func (c *conn) unlock(b *batch) {
	if len(c.credits)+len(c.over) == 0 {
		c.mu.Unlock()
		return
	}
	var few [4]*call
	over := append(few[:0], c.over...)
	clear(c.over)
	c.over = c.over[:0]
	credits := c.credits
	c.credits = nil
	c.mu.Unlock()
	for _, k := range credits {
		k.to.credit(k.n, b)
	}
	for _, k := range over {
		k.streamGone()
	}
}

// begin sends what stands at the beginning.
func (c *conn) begin() {
	l := &c.eng.hop.Limits
	c.mu.Lock()
	defer c.unlock(&c.batch)
	list := codec.Setting{ID: codec.SettingMaxHeaderListSize, Val: uint32(l.HeadBytes)}
	if c.pool != nil {
		_, _ = io.WriteString(c.buf(), codec.ClientPreface) // into a buffer
		c.putSettings(codec.Setting{ID: codec.SettingEnablePush, Val: 0}, list)
	} else {
		c.putSettings(codec.Setting{ID: codec.SettingMaxConcurrentStreams, Val: uint32(l.Streams)}, list)
	}
	c.put32(codec.FrameWindowUpdate, 0, connWindow-firstWindow)
	c.recvWindow = connWindow
	c.written(&c.batch)
}

// serve reads until the connection ends, and then ends all that is under way on it.
func (c *conn) serve() {
	c.eng.add(c)
	defer c.eng.remove(c)
	err := c.preface()
	for err == nil {
		err = c.frame()
	}
	c.end(err)
	c.in.release()
	// What is left to say is said, to a peer that listens.
	patience := time.AfterFunc(lingerTime, c.hangUp)
	c.writers.Wait()
	patience.Stop()
	c.hangUp()
}

// preface reads what a client begins with, and the settings with which both sides do.
func (c *conn) preface() error {
	c.listAt.Store(c.eng.clock.Load())
	c.begin()
	if c.pool == nil {
		var got [len(codec.ClientPreface)]byte
		if _, err := io.ReadFull(&c.in, got[:]); err != nil {
			return err
		}
		if !bytes.Equal(got[:], []byte(codec.ClientPreface)) {
			return protocolError("the connection does not begin as HTTP/2 does")
		}
	}
	fh, err := c.fr.ReadFrameHeader()
	if err != nil {
		return c.readError(err)
	}
	if fh.Type != codec.FrameSettings || fh.Flags.Has(codec.FlagSettingsAck) {
		return protocolError("the first frame is not SETTINGS")
	}
	if err := c.other(fh); err != nil {
		return err
	}
	c.listAt.Store(0)
	if c.pool != nil {
		c.pool.isReady(c)
	}
	return nil
}

// end is after the reader has met err.
func (c *conn) end(err error) {
	var why *connError
	c.mu.Lock()
	if errors.As(err, &why) && !c.broken {
		last := c.lastID
		if c.pool != nil {
			last = 0
		}
		c.putGoAway(last, why.code, why.why)
	} else {
		c.broken = true
	}
	c.goodbye, c.closing = saidLast, true
	c.room.Store(0)
	if c.pool != nil {
		streams := c.all()
		c.unlock(&c.batch)
		for _, s := range streams {
			s.call.connLost(s)
		}
		c.mu.Lock()
	}
	streams := c.all()
	for _, s := range streams {
		c.forget(s)
	}
	c.start()
	c.sealed = true
	c.unlock(&c.batch)
	if c.pool != nil {
		c.pool.remove(c, err)
	}
	for _, s := range streams {
		s.call.connEnded(s, &c.batch)
	}
	c.batch.flush()
}

// all are the streams. c.mu is held.
func (c *conn) all() []*stream {
	all := make([]*stream, 0, len(c.streams))
	for _, s := range c.streams {
		all = append(all, s)
	}
	return all
}

// hangUp closes the connection below. It may block while TLS says goodbye.
func (c *conn) hangUp() {
	c.hungUp.Do(func() { _ = c.nc.Close() }) // it may be closed already
}

// drain has the peer make no new streams here, and closes the connection when the last
// stream has ended.
func (c *conn) drain() {
	c.mu.Lock()
	defer c.unlock(nil)
	c.sayGoodbye()
}

// sayGoodbye announces the end. c.mu is held.
func (c *conn) sayGoodbye() {
	if c.goodbye != staying {
		return
	}
	c.goodbye = announced
	if c.pool == nil {
		// Streams that are on their way are still served; the keeper says later which
		// was the last (RFC 9113 section 6.8).
		c.putGoAway(maxWindow, codec.ErrCodeNo, "")
		c.written(nil)
		return
	}
	c.room.Store(0)
	c.endIfDrained()
}

// sayLast is the second half of sayGoodbye. c.mu is held.
func (c *conn) sayLast() {
	if c.goodbye != announced || c.pool != nil {
		return
	}
	c.goodbye, c.lastServed = saidLast, c.lastID
	c.putGoAway(c.lastID, codec.ErrCodeNo, "")
	c.endIfDrained()
	c.written(nil)
}

// endIfDrained closes a connection that has nothing more to do. c.mu is held.
func (c *conn) endIfDrained() {
	if len(c.streams) > 0 || c.closing {
		return
	}
	if c.goodbye == saidLast || c.goodbye == announced && c.pool != nil {
		c.closing = true
		c.start() // which closes when all is sent
	}
}

// noteReset remembers a stream that we have reset: what its peer sent before it heard
// of that is no mistake. c.mu is held.
func (c *conn) noteReset(id uint32) {
	c.resets[c.nextReset%len(c.resets)] = id
	c.nextReset++
}

func (c *conn) wasReset(id uint32) bool { return slices.Contains(c.resets[:], id) }
