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
	sets = 8192
	ways = 4
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

type set [ways]atomic.Pointer[entry]

// entry has what is looked at of every one in front: one fetch from memory.
type entry struct {
	hash    uint64
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
		e := s[i].Load()
		if e == nil || e.hash != h || e.key != string(key) {
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
	e := &entry{hash: h, key: string(key), verdict: v, until: until}
	table[h%sets].place(e).Store(e)
}

// place is where e is to be put: in the place of the same call, of none, or of one
// that was not asked for since the last was replaced.
func (s *set) place(e *entry) *atomic.Pointer[entry] {
	unused := -1
	for i := range s {
		old := s[i].Load()
		switch {
		case old == nil || old.hash == e.hash && old.key == e.key:
			return &s[i]
		case unused < 0 && !old.used.Load():
			unused = i
		}
	}
	if unused >= 0 {
		return &s[unused]
	}
	for i := range s {
		if old := s[i].Load(); old != nil {
			old.used.Store(false)
		}
	}
	return &s[e.hash/sets%ways]
}

// until is when the next grant ends.
func (c *Cache) until(at int64) int64 {
	i := sort.Search(len(c.ends), func(i int) bool { return c.ends[i] > at })
	if i == len(c.ends) {
		return math.MaxInt64
	}
	return c.ends[i]
}
