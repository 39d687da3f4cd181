// Package frames is a client of HTTP/2 that says what it is told to say, right or
// wrong, and a reader of what a client has said.
package frames

import (
	"bytes"
	"errors"
	"io"
	"net"
	"strings"

	codec "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Client speaks on one connection. It is for one goroutine.
type Client struct {
	Conn   net.Conn
	Framer *codec.Framer
	enc    *hpack.Encoder
	dec    *hpack.Decoder
	block  bytes.Buffer
}

// New says nothing yet.
func New(conn net.Conn) *Client {
	c := &Client{Conn: conn, Framer: codec.NewFramer(conn, conn), dec: hpack.NewDecoder(4096, nil)}
	c.Framer.AllowIllegalWrites = true
	c.enc = hpack.NewEncoder(&c.block)
	return c
}

// Hello sends the preface and settings. What is sent goes out at once, and what cannot be
// sent any more shows in Await.
func (c *Client) Hello(settings ...codec.Setting) {
	_, _ = io.WriteString(c.Conn, codec.ClientPreface)
	_ = c.Framer.WriteSettings(settings...)
}

// Block encodes fields, given as name, value, name, value.
func (c *Client) Block(fields ...string) []byte {
	c.block.Reset()
	for i := 0; i < len(fields); i += 2 {
		_ = c.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return bytes.Clone(c.block.Bytes())
}

// Headers sends fields in one frame.
func (c *Client) Headers(id uint32, end bool, fields ...string) {
	_ = c.Framer.WriteHeaders(codec.HeadersFrameParam{StreamID: id, EndStream: end, EndHeaders: true, BlockFragment: c.Block(fields...)})
}

// Answer is what came of a stream.
type Answer struct {
	Status  string // the last one; empty: none came
	Body    string
	Reset   bool // the stream was reset
	Over    bool // the connection has ended
	Late    bool // nothing of this came before the connection's deadline
	ErrCode codec.ErrCode
}

// Await reads until stream id or the connection has ended.
func (c *Client) Await(id uint32) (a Answer) {
	for {
		frame, err := c.Framer.ReadFrame()
		if err != nil {
			var timeout net.Error
			a.Late = errors.As(err, &timeout) && timeout.Timeout()
			a.Over = !a.Late
			return a
		}
		if f, ok := frame.(*codec.GoAwayFrame); ok {
			a.ErrCode = f.ErrCode
		}
		if f, ok := frame.(*codec.HeadersFrame); ok {
			fields, err := c.dec.DecodeFull(f.HeaderBlockFragment())
			if err != nil {
				a.Over = true
				return a
			}
			for _, field := range fields {
				if f.StreamID == id && field.Name == ":status" {
					a.Status = field.Value
				}
			}
		}
		if frame.Header().StreamID != id || id == 0 {
			continue
		}
		switch f := frame.(type) {
		case *codec.RSTStreamFrame:
			a.Reset, a.ErrCode = true, f.ErrCode
			return a
		case *codec.DataFrame:
			a.Body += string(f.Data())
		}
		if frame.Header().Flags.Has(codec.FlagDataEndStream) && frame.Header().Type <= codec.FrameHeaders { // of DATA and HEADERS alike
			return a
		}
	}
}

// Request is one that a client has made.
type Request struct {
	Fields   []hpack.HeaderField // pseudo-header fields, too
	Trailers []hpack.HeaderField
	Body     int64
	Complete bool // it has ended, and was not reset
}

// Get is the only value of a field; all of them with commas where there are several.
func (r *Request) Get(name string) string {
	var values []string
	for _, f := range r.Fields {
		if f.Name == name {
			values = append(values, f.Value)
		}
	}
	return strings.Join(values, ",")
}

// Requests are those in what a client has sent over one connection, in order.
func Requests(sent []byte) (all []*Request, err error) {
	rest, ok := bytes.CutPrefix(sent, []byte(codec.ClientPreface))
	if !ok {
		return nil, errors.New("no preface of HTTP/2")
	}
	fr := codec.NewFramer(io.Discard, bytes.NewReader(rest))
	fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	fr.MaxHeaderListSize = 1 << 20
	streams := map[uint32]*Request{}
	for {
		frame, err := fr.ReadFrame()
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF): // the connection's end may cut a frame
			return all, nil
		case err != nil:
			return all, err
		}
		r := streams[frame.Header().StreamID]
		switch f := frame.(type) {
		case *codec.MetaHeadersFrame:
			if r == nil {
				r = &Request{Fields: f.Fields}
				streams[f.StreamID] = r
				all = append(all, r)
			} else {
				r.Trailers = append(r.Trailers, f.Fields...)
			}
			r.Complete = f.StreamEnded()
		case *codec.DataFrame:
			if r != nil {
				r.Body += int64(len(f.Data()))
				r.Complete = f.StreamEnded()
			}
		case *codec.RSTStreamFrame:
			if r != nil {
				r.Complete = false
			}
		}
	}
}
