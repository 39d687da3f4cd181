package decisionlog

// This file is the ring: as many places as it began with, and no lock. Each place
// has a number that says whose turn it is: of who writes there at position p while
// it is p, of who reads while it is p+1, and then of who writes a round later.

import (
	"fmt"
	"sync/atomic"
)

type ring struct {
	places []place
	mask   uint64
	_      [64]byte
	tail   atomic.Uint64 // the next position to write
	_      [64]byte
	head   uint64 // the next to read; the reader's alone
}

type place struct {
	turn atomic.Uint64
	rec  Record
}

func newRing(n int) *ring {
	if n < 2 || n&(n-1) != 0 {
		panic(fmt.Sprintf("decisionlog: a ring of %d records: the size is a power of two", n))
	}
	r := &ring{places: make([]place, n), mask: uint64(n - 1)}
	for i := range r.places {
		r.places[i].turn.Store(uint64(i))
	}
	return r
}

// begin gives the caller a place to write to; nil where all are taken. end hands it
// to the reader.
func (r *ring) begin() (*Record, uint64) {
	at := r.tail.Load()
	for {
		p := &r.places[at&r.mask]
		switch behind := int64(p.turn.Load() - at); {
		case behind < 0: // it still holds what was written a round ago
			return nil, 0
		case behind == 0 && r.tail.CompareAndSwap(at, at+1):
			return &p.rec, at
		}
		at = r.tail.Load()
	}
}

func (r *ring) end(at uint64) { r.places[at&r.mask].turn.Store(at + 1) }

// waiting says whether the oldest record is there.
func (r *ring) waiting() bool { return r.places[r.head&r.mask].turn.Load() == r.head+1 }

// next hands f the oldest record; false if there is none.
func (r *ring) next(f func(*Record)) bool {
	if !r.waiting() {
		return false
	}
	p := &r.places[r.head&r.mask]
	f(&p.rec)
	p.turn.Store(r.head + uint64(len(r.places)))
	r.head++
	return true
}
