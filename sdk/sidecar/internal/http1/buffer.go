// What has been read of a connection and is not used yet. It is small while a
// connection is idle, and large while a body goes through.

package http1

import (
	"net"
	"sync"
)

const (
	smallBytes = 2 << 10 // most heads fit
	largeBytes = 32 << 10
)

var large = sync.Pool{New: func() any { return new([largeBytes]byte) }}

// buffer is used by one goroutine at a time.
type buffer struct {
	small [smallBytes]byte
	lent  *[largeBytes]byte // from the pool
	b     []byte            // small, lent, or one of its own for a long head
	r, w  int               // what lies between is there
}

func (b *buffer) bytes() []byte { return b.b[b.r:b.w] }

func (b *buffer) skip(n int) {
	if b.r += n; b.r == b.w {
		b.r, b.w = 0, 0
	}
}

// fill reads once from conn. It makes room by moving what is there to the front, by a
// large buffer, and beyond that up to limit bytes; errLong says that there is none.
func (b *buffer) fill(conn net.Conn, limit int) error {
	if b.b == nil {
		b.b = b.small[:]
	}
	if b.w == len(b.b) {
		b.room(limit)
	}
	if b.w == len(b.b) {
		return errLong
	}
	n, err := conn.Read(b.b[b.w:])
	b.w += n
	if n > 0 {
		return nil // an error comes again
	}
	return err
}

func (b *buffer) room(limit int) {
	if b.r > 0 {
		b.w = copy(b.b, b.bytes())
		b.r = 0
		return
	}
	switch {
	case len(b.b) < largeBytes:
		b.enlarge()
	case len(b.b) < limit:
		longer := make([]byte, min(2*len(b.b), limit))
		copy(longer, b.b[:b.w])
		b.giveBack()
		b.b = longer
	}
}

// enlarge takes a large buffer, for a body.
func (b *buffer) enlarge() {
	if len(b.b) >= largeBytes {
		return
	}
	lent := large.Get().(*[largeBytes]byte)
	b.w = copy(lent[:], b.bytes())
	b.r, b.lent, b.b = 0, lent, lent[:]
}

// shrink goes back to the small one, if what is there fits.
func (b *buffer) shrink() {
	if b.w-b.r > smallBytes || len(b.b) == 0 || &b.b[0] == &b.small[0] {
		return
	}
	n := copy(b.small[:], b.bytes())
	b.giveBack()
	b.b, b.r, b.w = b.small[:], 0, n
}

func (b *buffer) giveBack() {
	if b.lent != nil {
		large.Put(b.lent)
		b.lent = nil
	}
}

// release ends the use of b.
func (b *buffer) release() {
	b.giveBack()
	b.b, b.r, b.w = nil, 0, 0
}
