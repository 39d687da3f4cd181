package engine

// This file keeps the decisions of OPA for calls that agree in everything that the
// policy can read. It is one engine's, so of one generation; nothing in it outlives
// the end of a grant. Policies whose answer is another each time have none.

import (
	"context"
	"encoding/binary"
	"hash/maphash"
	"slices"
	"sort"
	"sync"

	"merlon.dev/policy"
	"merlon.dev/policy/engine/residual"
)

const (
	shards = 16
	// perShard is how many decisions the younger half of a shard has.
	perShard = 1024
	// maxKey is the longest key; longer calls are decided each time.
	maxKey = 1024
)

// kept are decisions by what they depend on.
type kept struct {
	reads  residual.Reads
	ends   []int64 // of grants, sorted, Unix time in nanoseconds
	seed   maphash.Seed
	shards [shards]shard
}

// shard has a younger and an older half; the older one goes when the younger is
// full, and what was asked for since is in the younger.
type shard struct {
	mu           sync.RWMutex
	young, older map[string]keptDecision
}

type keptDecision struct {
	reason policy.Reason
	ruleID string
	dryRun []string
	until  int64
}

func newKept(reads residual.Reads, ends []int64) *kept {
	slices.Sort(ends)
	k := &kept{reads: reads, ends: ends, seed: maphash.MakeSeed()}
	for i := range k.shards {
		k.shards[i].young = map[string]keptDecision{}
	}
	return k
}

// key appends what the decision about in depends on. Each text has its length in
// front, so that no two calls share a key.
func (k *kept) key(b []byte, in *policy.Input) []byte {
	text := func(s string) {
		b = binary.AppendUvarint(b, uint64(len(s)))
		b = append(b, s...)
	}
	for _, s := range [...]string{in.Source, in.Destination, string(in.Protocol), in.Method, in.Path} {
		text(s)
	}
	r := &k.reads
	for _, o := range [...]struct {
		read bool
		text string
	}{{r.Query, in.Query}, {r.Host, in.Host}, {r.SourceAddress, in.SourceAddress}, {r.DestinationAddress, in.DestinationAddress}} {
		if o.read {
			text(o.text)
		}
	}
	names := r.Headers
	if r.AllHeaders {
		names = make([]string, 0, len(in.Headers))
		for name := range in.Headers {
			names = append(names, name)
		}
		slices.Sort(names)
		b = binary.AppendUvarint(b, uint64(len(names)))
	}
	for _, name := range names {
		values, present := in.Headers[name]
		if r.AllHeaders {
			text(name)
		}
		n := uint64(0) // absent
		if present {
			n = uint64(len(values)) + 1
		}
		b = binary.AppendUvarint(b, n)
		for _, v := range values {
			text(v)
		}
	}
	return b
}

func (k *kept) shard(key []byte) *shard {
	return &k.shards[maphash.Bytes(k.seed, key)%shards]
}

func (k *kept) find(key []byte, at int64) (d keptDecision, ok bool) {
	s := k.shard(key)
	s.mu.RLock()
	d, ok = s.young[string(key)]
	if ok {
		s.mu.RUnlock()
		return d, at < d.until
	}
	d, ok = s.older[string(key)]
	s.mu.RUnlock()
	if ok && at < d.until {
		s.put(string(key), d)
		return d, true
	}
	return keptDecision{}, false
}

func (s *shard) put(key string, d keptDecision) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.young) >= perShard {
		s.older, s.young = s.young, make(map[string]keptDecision, perShard)
	}
	s.young[key] = d
}

// until is when the next grant ends.
func (k *kept) until(at int64) int64 {
	i := sort.Search(len(k.ends), func(i int) bool { return k.ends[i] > at })
	if i == len(k.ends) {
		return never
	}
	return k.ends[i]
}

// decideKept is decideByOPA with what is kept in front of it.
func (e *Engine) decideKept(ctx context.Context, in *policy.Input) (policy.Decision, answer) {
	if e.kept == nil || in == nil || in.Source == "" {
		return e.decideByOPA(ctx, in)
	}
	now := e.now()
	if !e.notAfter.IsZero() && now.After(e.notAfter) || in.Protocol != policy.TCP && policy.CheckPath(in.Path) != nil {
		return e.decideByOPA(ctx, in)
	}
	var room [maxKey]byte
	key := e.kept.key(room[:0], in)
	at := now.UnixNano()
	if d, ok := e.kept.find(key, at); ok {
		e.count(d.dryRun)
		return policy.Decision{
			Allow: d.reason == policy.Allowed, Reason: d.reason, RuleID: d.ruleID, DecisionID: policy.NewDecisionID(), Revision: e.generation,
		}, answer{dryRun: d.dryRun}
	}
	until := e.kept.until(at)
	d, a := e.decideByOPA(ctx, in)
	if a.err == nil && len(key) <= maxKey && e.now().UnixNano() < until {
		e.kept.shard(key).put(string(key), keptDecision{d.Reason, d.RuleID, a.dryRun, until})
	}
	return d, a
}

// keep prepares e.kept, unless the policy's answer is another one each time.
func (e *Engine) keep() {
	reads := residual.Reads{}
	if e.ownRego {
		var err error
		if reads, err = residual.FindReads(e.program.compiler); err != nil {
			e.unsteady = err
			return
		}
	}
	var ends []int64
	for i := range e.grants {
		if n := nativeGrant(&e.grants[i]); n.Expires != 0 {
			ends = append(ends, n.Expires)
		}
	}
	e.kept = newKept(reads, ends)
}

// Kept says whether OPA's decisions are kept for calls that agree in all that the
// policy can read, and if not why.
func (e *Engine) Kept() error { return e.unsteady }
