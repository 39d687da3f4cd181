// Reading: how much memory a connection holds while it says nothing, and when what has
// been read is sent on.

package http2

import (
	"io"
	"net"
	"sync"
)

const (
	// smallInput is what a connection holds while nothing comes.
	smallInput = 2 << 10
	// largeInput is read at once from a connection on which much comes.
	largeInput = 32 << 10
)

var largeInputs = sync.Pool{New: func() any { return new([largeInput]byte) }}

// input reads a connection. It is the reader's alone.
type input struct {
	nc     net.Conn
	before func() // is called before the connection is waited for
	buf    []byte // what was read is buf[r:w]
	r, w   int
	small  []byte
	large  *[largeInput]byte // nil while little comes
}

// Read implements io.Reader for the framer.
func (in *input) Read(p []byte) (int, error) {
	if in.r == in.w {
		if len(p) >= largeInput/4 { // the rest of a long frame
			in.before()
			return in.nc.Read(p)
		}
		if err := in.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(p, in.buf[in.r:in.w])
	in.r += n
	return n, nil
}

// fill reads once, with the buffer that fits what came the last time.
func (in *input) fill() error {
	switch full := in.w == len(in.buf); {
	case in.large == nil && full && in.w > 0:
		in.large = largeInputs.Get().(*[largeInput]byte)
		in.buf = in.large[:]
	case in.large != nil && in.w < smallInput:
		in.release()
	}
	if in.buf == nil {
		in.small = make([]byte, smallInput)
		in.buf = in.small
	}
	in.before()
	n, err := in.nc.Read(in.buf)
	in.r, in.w = 0, n
	if n > 0 {
		return nil
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

// release gives the large buffer back.
func (in *input) release() {
	if in.large != nil {
		largeInputs.Put(in.large)
		in.large, in.buf, in.r, in.w = nil, in.small, 0, 0
	}
}

// peek gives the next n bytes where they have been read already, and nil else. They
// are good until anything else is read.
func (in *input) peek(n int) []byte {
	if in.w-in.r < n {
		return nil
	}
	return in.buf[in.r : in.r+n]
}

func (in *input) discard(n int) { in.r += n }
