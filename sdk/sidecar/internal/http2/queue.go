// Bodies that wait for the other side: what a stream holds is bounded by the window
// that its sender was given.

package http2

import "sync"

const (
	smallChunk = 2 << 10
	largeChunk = maxFrame
)

// chunk is a piece of a body.
type chunk struct {
	next *chunk
	r, w int
	b    []byte
}

var (
	smallChunks = sync.Pool{New: func() any { return &chunk{b: make([]byte, smallChunk)} }}
	largeChunks = sync.Pool{New: func() any { return &chunk{b: make([]byte, largeChunk)} }}
)

func newChunk(n int) *chunk {
	if n <= smallChunk {
		return smallChunks.Get().(*chunk)
	}
	return largeChunks.Get().(*chunk)
}

func (c *chunk) free() {
	c.next, c.r, c.w = nil, 0, 0
	if len(c.b) == smallChunk {
		smallChunks.Put(c)
		return
	}
	largeChunks.Put(c)
}

// queue is bytes in order. The zero value is empty. Many small pieces take no more
// room than one large.
type queue struct {
	head, tail *chunk
	n          int
}

// push copies data to the end.
func (q *queue) push(data []byte) {
	q.n += len(data)
	for len(data) > 0 {
		if q.tail == nil || q.tail.w == len(q.tail.b) {
			c := newChunk(len(data))
			if q.tail == nil {
				q.head = c
			} else {
				q.tail.next = c
			}
			q.tail = c
		}
		n := copy(q.tail.b[q.tail.w:], data)
		q.tail.w += n
		data = data[n:]
	}
}

// first is some of what comes next, at most limit bytes.
func (q *queue) first(limit int) []byte {
	b := q.head.b[q.head.r:q.head.w]
	return b[:min(len(b), limit)]
}

// advance drops n bytes that first has given.
func (q *queue) advance(n int) {
	q.n -= n
	q.head.r += n
	if q.head.r < q.head.w {
		return
	}
	done := q.head
	if q.head = done.next; q.head == nil {
		q.tail = nil
	}
	done.free()
}

// drop empties the queue and says how much was in it.
func (q *queue) drop() int {
	n := q.n
	for c := q.head; c != nil; {
		next := c.next
		c.free()
		c = next
	}
	*q = queue{}
	return n
}
