// Writing: frames are put into a buffer, and one goroutine at a time sends it. Who
// puts something there never waits for the peer.

package http2

import (
	"encoding/binary"
	"slices"
	"sync"

	codec "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

const (
	// maxFrame is the longest payload that we send and take: what every peer has to
	// take (RFC 9113 section 4.2).
	maxFrame = 16 << 10
	// maxOut is how much may wait to be sent before bodies have to wait elsewhere, and
	// with them their senders.
	maxOut = 64 << 10
	// maxControl is how much of everything else may wait, for a peer that asks and
	// does not read the answers.
	maxControl = 1 << 20
	// keptOut is the largest buffer that is used again.
	keptOut = 128 << 10
)

// buffer is a slice that a sync.Pool can take without another allocation.
type buffer struct{ b []byte }

// Write implements io.Writer for the HPACK encoder.
func (b *buffer) Write(p []byte) (int, error) {
	b.b = append(b.b, p...)
	return len(p), nil
}

var outputs = sync.Pool{New: func() any { return &buffer{make([]byte, 0, 2<<10)} }}

// batch is what one reader has written to and not sent off yet. The zero value is
// ready; nil sends at once.
type batch struct{ conns []*conn }

func (b *batch) add(c *conn) {
	if !slices.Contains(b.conns, c) {
		b.conns = append(b.conns, c)
	}
}

// flush sends off what was written.
func (b *batch) flush() {
	for i, c := range b.conns {
		c.mu.Lock()
		c.start()
		c.mu.Unlock()
		b.conns[i] = nil
	}
	b.conns = b.conns[:0]
}

// written has what is in c.out sent, at the end of b. c.mu is held.
func (c *conn) written(b *batch) {
	switch {
	case c.writing || c.waiting() == 0:
	case b == nil || c.waiting() >= maxOut/2:
		c.start()
	default:
		b.add(c)
	}
}

// waiting is how many bytes wait to be sent. c.mu is held.
func (c *conn) waiting() int {
	if c.out == nil {
		return 0
	}
	return len(c.out.b)
}

// start has a goroutine send, unless one does. c.mu is held.
func (c *conn) start() {
	if c.writing || c.sealed || c.waiting() == 0 && !c.closing {
		return
	}
	c.writing = true
	c.writers.Add(1)
	go c.write()
}

// write sends until there is nothing left.
func (c *conn) write() {
	defer c.writers.Done()
	c.mu.Lock()
	for c.waiting() > 0 && !c.broken {
		out := c.out
		c.out = nil
		c.unlock(nil)
		c.writeAt.Store(c.eng.clock.Load())
		_, err := c.nc.Write(out.b)
		c.writeAt.Store(0)
		recycle(out)
		c.mu.Lock()
		if err != nil {
			c.broken = true // the reader sees it, and does the rest
			break
		}
		c.pump()
	}
	c.writing = false
	end := c.broken || c.closing
	c.unlock(nil)
	if end {
		c.hangUp()
	}
}

func recycle(out *buffer) {
	if cap(out.b) <= keptOut {
		out.b = out.b[:0]
		outputs.Put(out)
	}
}

// buf is where to append frames. c.mu is held.
func (c *conn) buf() *buffer {
	if c.out == nil {
		c.out = outputs.Get().(*buffer)
	}
	return c.out
}

// putHeader begins a frame of n bytes. c.mu is held.
func (c *conn) putHeader(n int, t codec.FrameType, flags codec.Flags, id uint32) *buffer {
	out := c.buf()
	out.b = append(out.b, byte(n>>16), byte(n>>8), byte(n), byte(t), byte(flags))
	out.b = binary.BigEndian.AppendUint32(out.b, id)
	return out
}

// putFrame appends a whole frame. c.mu is held.
func (c *conn) putFrame(t codec.FrameType, flags codec.Flags, id uint32, payload []byte) {
	out := c.putHeader(len(payload), t, flags, id)
	out.b = append(out.b, payload...)
}

// put32 appends a frame whose payload is one number. c.mu is held.
func (c *conn) put32(t codec.FrameType, id, value uint32) {
	out := c.putHeader(4, t, 0, id)
	out.b = binary.BigEndian.AppendUint32(out.b, value)
}

func (c *conn) putReset(id uint32, code codec.ErrCode) {
	c.put32(codec.FrameRSTStream, id, uint32(code))
}

func (c *conn) putGoAway(last uint32, code codec.ErrCode, why string) {
	out := c.putHeader(8+len(why), codec.FrameGoAway, 0, 0)
	out.b = binary.BigEndian.AppendUint32(out.b, last)
	out.b = binary.BigEndian.AppendUint32(out.b, uint32(code))
	out.b = append(out.b, why...)
}

// putSettings appends a SETTINGS frame of pairs. c.mu is held.
func (c *conn) putSettings(settings ...codec.Setting) {
	out := c.putHeader(6*len(settings), codec.FrameSettings, 0, 0)
	for _, s := range settings {
		out.b = binary.BigEndian.AppendUint16(out.b, uint16(s.ID))
		out.b = binary.BigEndian.AppendUint32(out.b, s.Val)
	}
}

// field encodes one field of a list that endFields ends. c.mu is held.
func (c *conn) field(f hpack.HeaderField) {
	_ = c.enc.WriteField(f) // into a buffer of ours, which takes everything
}

// endFields frames the fields that were encoded. c.mu is held.
func (c *conn) endFields(id uint32, end bool) {
	block := c.encoded.b
	t, flags := codec.FrameHeaders, codec.Flags(0)
	if end {
		flags |= codec.FlagHeadersEndStream
	}
	for {
		n := min(len(block), maxFrame)
		if n == len(block) {
			flags |= codec.FlagHeadersEndHeaders
		}
		c.putFrame(t, flags, id, block[:n])
		if block = block[n:]; len(block) == 0 {
			break
		}
		t, flags = codec.FrameContinuation, 0
	}
	if cap(c.encoded.b) > 4<<10 { // a long one is rare
		c.encoded.b = nil
	}
	c.encoded.b = c.encoded.b[:0]
}
