// Package kept keeps decisions for calls that agree in everything that a policy can
// read. A Cache belongs to one generation of one policy, and nothing in it outlives
// the end of a grant. What the policy reads, policy/engine finds; the cache itself
// links no OPA, so that services keep what their agent decided.
package kept

import (
	"hash/maphash"
	"math"
	"slices"
	"sort"
	"sync/atomic"

	"merlon.dev/policy"
	"merlon.dev/policy/program"
)

// Reads are parts of a call beside those that grants read (source, destination,
// protocol, method and path), which every decision may depend on.
type Reads struct {
	Query, Host, SourceAddress, DestinationAddress bool
	// AllHeaders is set where Headers, their names, do not say it all.
	AllHeaders bool
	Headers    []string
}

const (
	// A decision has its place in one set, by the hash of its call, and is kept in
	// one of the ways there.
	// With as many ways, a set that has too many calls for them is rare, and so is that
	// they push each other out for ever.
	sets = 4096
	ways = 8
	// maxKey is the longest key; longer calls are decided each time.
	maxKey = 1024
	// maxResponse is the most that may be sent with a decision that is kept.
	maxResponse = 1024
)

// Cache keeps decisions. It is bounded, takes no lock, and is safe for concurrent
// use.
type Cache struct {
	reads Reads
	ends  []int64                   // of grants, sorted, Unix time in nanoseconds
	seed  maphash.Seed              // so that nobody outside can foresee places
	table atomic.Pointer[[sets]set] // nil until something is kept
}

type set [ways]slot

// slot has a decision and the hash of its call, which takes no further fetch from
// memory to look at. They are not written at once: where the hash is another call's,
// the key says so.
type slot struct {
	hash  atomic.Uint64
	entry atomic.Pointer[entry]
}

type entry struct {
	key     string
	until   int64
	used    atomic.Bool // since the last of its set was replaced
	verdict program.Verdict
}

// New makes an empty cache for a policy that reads reads. ends are the Unix times
// in nanoseconds at which grants end.
func New(reads Reads, ends []int64) *Cache {
	ends = slices.Clone(ends)
	slices.Sort(ends)
	return &Cache{reads: reads, ends: ends, seed: maphash.MakeSeed()}
}

// For is what New was given. The slices are shared.
func (c *Cache) For() (Reads, []int64) { return c.reads, c.ends }

// Find is the decision about a call that the policy cannot tell from in, if one is
// kept at the Unix time at, in nanoseconds. It is shared, and not to be changed.
func (c *Cache) Find(in *policy.Input, at int64) (v *program.Verdict, ok bool) {
	table := c.table.Load()
	if table == nil {
		return nil, false
	}
	var room [256]byte
	key := c.key(room[:0], in)
	h := maphash.Bytes(c.seed, key)
	s := &table[h%sets]
	for i := range s {
		if s[i].hash.Load() != h {
			continue
		}
		e := s[i].entry.Load()
		if e == nil || e.key != string(key) {
			continue
		}
		if at >= e.until {
			return nil, false
		}
		if !e.used.Load() {
			e.used.Store(true)
		}
		return &e.verdict, true
	}
	return nil, false
}

// Put keeps the decision v about in, which was asked for at the Unix time asked and
// came at came, both in nanoseconds; unless a grant ended in between.
func (c *Cache) Put(in *policy.Input, v program.Verdict, asked, came int64) {
	until := c.until(asked)
	key := c.key(nil, in)
	if len(key) > maxKey || v.Response.Size() > maxResponse || came >= until {
		return
	}
	table := c.table.Load()
	if table == nil {
		table = new([sets]set)
		if !c.table.CompareAndSwap(nil, table) {
			table = c.table.Load()
		}
	}
	h := maphash.Bytes(c.seed, key)
	to := table[h%sets].place(h, key)
	to.entry.Store(&entry{key: string(key), verdict: v, until: until})
	to.hash.Store(h)
}

// place is where the decision about the call of this key is to be put: in the place of
// the same call, of none, or of one that was not asked for since the last was replaced.
func (s *set) place(hash uint64, key []byte) *slot {
	free, unused := -1, -1
	for i := range s {
		switch old := s[i].entry.Load(); {
		case old == nil:
			if free < 0 {
				free = i
			}
		case old.key == string(key):
			return &s[i]
		case unused < 0 && !old.used.Load():
			unused = i
		}
	}
	switch {
	case free >= 0:
		return &s[free]
	case unused >= 0:
		return &s[unused]
	}
	for i := range s {
		if old := s[i].entry.Load(); old != nil {
			old.used.Store(false)
		}
	}
	return &s[hash/sets%ways]
}

// until is when the next grant ends.
func (c *Cache) until(at int64) int64 {
	i := sort.Search(len(c.ends), func(i int) bool { return c.ends[i] > at })
	if i == len(c.ends) {
		return math.MaxInt64
	}
	return c.ends[i]
}
