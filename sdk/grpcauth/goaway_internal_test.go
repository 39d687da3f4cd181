// A GOAWAY is put in between two frames and nowhere else, once, and every other byte is
// as it was.

package grpcauth

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"pgregory.net/rapid"
)

// served draws what a server sends: whole frames, settings first, and how they are cut.
func served(t *rapid.T) (pieces [][]byte) {
	var out bytes.Buffer
	f := http2.NewFramer(&out, nil)
	noted := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	noted(f.WriteSettings())
	for i := range rapid.IntRange(0, 6).Draw(t, "frames") {
		id := uint32(2*i + 1)
		block := rapid.SliceOfN(rapid.Byte(), 0, 20).Draw(t, "bytes")
		switch rapid.SampledFrom([]string{"data", "headers", "split", "ping"}).Draw(t, "kind") {
		case "data":
			noted(f.WriteData(id, false, block))
		case "headers":
			noted(f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block, EndHeaders: true}))
		case "split":
			noted(f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block}))
			noted(f.WriteContinuation(id, false, block))
			noted(f.WriteContinuation(id, true, block))
		case "ping":
			noted(f.WritePing(false, [8]byte{}))
		}
	}
	for all := out.Bytes(); len(all) > 0; {
		n := rapid.IntRange(1, len(all)).Draw(t, "piece")
		pieces = append(pieces, all[:n])
		all = all[n:]
	}
	return pieces
}

// checkSent says whether got is want, with one GOAWAY where frames may be, if it had to be.
func checkSent(t *rapid.T, want, got []byte, left bool) {
	t.Helper()
	f, goAways := http2.NewFramer(io.Discard, bytes.NewReader(got)), 0
	for {
		frame, err := f.ReadFrame()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("%x: %v", got, err)
		}
		if g, ok := frame.(*http2.GoAwayFrame); ok {
			goAways++
			if g.LastStreamID != 1<<31-1 || g.ErrCode != http2.ErrCodeNo {
				t.Fatalf("GOAWAY with stream %d and %s", g.LastStreamID, g.ErrCode)
			}
		}
	}
	if wanted := map[bool]int{true: 1}[left]; goAways != wanted {
		t.Fatalf("%d GOAWAYs in %x; want %d", goAways, got, wanted)
	}
	if rest := bytes.Replace(got, goAway, nil, 1); !bytes.Equal(rest, want) {
		t.Fatalf("sent %x; want %x with a GOAWAY", got, want)
	}
}

// recorded is a connection that writes into memory and reads pieces.
type recorded struct {
	net.Conn
	out    bytes.Buffer
	pieces [][]byte
	late   bool // a Read ends by its deadline
}

func (r *recorded) Write(p []byte) (int, error) { return r.out.Write(p) }

func (r *recorded) SetReadDeadline(at time.Time) error {
	r.late = !at.IsZero()
	return nil
}

func (r *recorded) Read(p []byte) (int, error) {
	if r.late {
		return 0, os.ErrDeadlineExceeded
	}
	if len(r.pieces) == 0 {
		return 0, io.EOF
	}
	n := copy(p, r.pieces[0])
	if r.pieces[0] = r.pieces[0][n:]; len(r.pieces[0]) == 0 {
		r.pieces = r.pieces[1:]
	}
	return n, nil
}

func TestServerSaysGoodbyeBetweenFrames(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pieces := served(t)
		at := rapid.IntRange(0, len(pieces)).Draw(t, "leaves before")
		raw := &recorded{}
		c := &serverConn{Conn: raw}
		for i, p := range pieces {
			if i == at {
				c.leave()
			}
			if n, err := c.Write(p); n != len(p) || err != nil {
				t.Fatalf("Write = %d, %v", n, err)
			}
		}
		if at == len(pieces) {
			c.leave()
		}
		c.leave() // twice is once
		checkSent(t, bytes.Join(pieces, nil), raw.out.Bytes(), true)
	})
}

func TestClientHearsGoodbyeBetweenFrames(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pieces := served(t)
		want := bytes.Join(pieces, nil)
		at := rapid.IntRange(0, len(want)).Draw(t, "leaves after")
		c := &clientConn{Conn: &recorded{pieces: pieces}}
		var got []byte
		for left := false; ; {
			if !left && len(got) >= at {
				left = true
				c.leave()
			}
			p := make([]byte, rapid.IntRange(1, 40).Draw(t, "reads"))
			n, err := c.Read(p)
			got = append(got, p[:n]...)
			if errors.Is(err, io.EOF) {
				checkSent(t, want, got, left)
				return
			}
			if err != nil {
				t.Fatalf("Read: %v", err)
			}
		}
	})
}

// Whatever a server sends, a client that does not leave reads as it is, and one that
// does the same with at most one GOAWAY.
func FuzzClientConn(f *testing.F) {
	f.Add([]byte{0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 8, 6, 0}, 3)
	f.Fuzz(func(t *testing.T, all []byte, at int) {
		c := &clientConn{Conn: &recorded{pieces: [][]byte{bytes.Clone(all)}}}
		var got []byte
		for {
			if len(got) >= at {
				c.leave()
			}
			p := make([]byte, 7)
			n, err := c.Read(p)
			got = append(got, p[:n]...)
			if err != nil {
				break
			}
		}
		if !bytes.Equal(got, all) && !bytes.Equal(bytes.Replace(got, goAway, nil, 1), all) {
			t.Errorf("read %x of %x", got, all)
		}
	})
}
