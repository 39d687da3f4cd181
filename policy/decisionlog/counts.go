package decisionlog

// This file counts every decision by source, destination, rule and reason. Rows are
// made when they are first needed, up to a limit; what comes later is counted
// under "other", by reason, so that the sum of each reason is always right.

import (
	"cmp"
	"hash/maphash"
	"math/bits"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"merlon.dev/policy"
)

// Other stands for source, destination and rule of what has no row of its own. No
// SPIFFE ID is like it.
const Other = "other"

// maxRowBytes is what the texts of a row may have: two SPIFFE IDs and a rule's, which
// somebody else may have made up.
const maxRowBytes = 2*2048 + 512

// Row counts the decisions of one kind. Its texts never change.
type Row struct {
	Source, Destination, RuleID, Reason string

	other bool
	hash  uint64
	n     atomic.Uint64
	taken uint64 // of n; whoever takes counts out has it
}

// Count is a row as it stood.
type Count struct {
	Source, Destination, RuleID string
	Reason                      policy.Reason
	N                           uint64
}

// Counts is a hash table that only grows, up to about half of its slots. A slot is
// empty or has a row, for good, so it takes no lock to look or to add.
type Counts struct {
	seed  maphash.Seed
	slots []atomic.Pointer[Row]
	limit int64
	made  atomic.Int64
	// share is how many rows one destination may have, 0 for all; of has those that
	// each has, and stays empty without a share.
	share int64
	of    sync.Map // string → *atomic.Int64
	other []*Row   // by place in reasons, and one for all other reasons
}

var reasons = policy.Reasons()

func newCounts(limit, share int) *Counts {
	c := &Counts{seed: maphash.MakeSeed(), limit: int64(limit), share: int64(share), slots: make([]atomic.Pointer[Row], 1<<bits.Len(uint(2*limit-1)))}
	for _, reason := range append(slices.Clone(reasons), "UNKNOWN") {
		c.other = append(c.other, &Row{Source: Other, Destination: Other, RuleID: Other, Reason: string(reason), other: true})
	}
	return c
}

// row is the one of these texts, or that of what has none. The first call of a row
// allocates it; its texts are copied, since the caller's may be parts of something
// larger.
func (c *Counts) row(source, destination, ruleID, reason string) *Row {
	hash := c.hash(source, destination, ruleID)
	mask := uint64(len(c.slots) - 1)
	for i := range c.slots {
		slot := &c.slots[(hash+uint64(i))&mask]
		row := slot.Load()
		if row == nil {
			if c.made.Load() >= c.limit || !c.hasShare(destination) || len(source)+len(destination)+len(ruleID)+len(reason) > maxRowBytes {
				break
			}
			row = c.add(slot, &Row{
				Source: strings.Clone(source), Destination: strings.Clone(destination), RuleID: strings.Clone(ruleID), Reason: strings.Clone(reason), hash: hash,
			})
		}
		if row.hash == hash && row.Reason == reason && row.Source == source && row.Destination == destination && row.RuleID == ruleID {
			return row
		}
	}
	return c.otherOf(reason)
}

// add puts row into the slot, and returns what is there: another, if that came
// first. It is counted afterwards, so that rows which are made at the same time can
// be a few too many, but none is missed that there is room for.
func (c *Counts) add(slot *atomic.Pointer[Row], row *Row) *Row {
	if !slot.CompareAndSwap(nil, row) {
		return slot.Load()
	}
	c.made.Add(1)
	if c.share > 0 {
		n, _ := c.of.LoadOrStore(row.Destination, new(atomic.Int64))
		n.(*atomic.Int64).Add(1)
	}
	return row
}

// hasShare says whether destination may have another row.
func (c *Counts) hasShare(destination string) bool {
	if c.share == 0 {
		return true
	}
	n, ok := c.of.Load(destination)
	return !ok || n.(*atomic.Int64).Load() < c.share
}

// hash leaves the reason out: of one rule there are few.
func (c *Counts) hash(source, destination, ruleID string) uint64 {
	h := maphash.String(c.seed, source)
	h = bits.RotateLeft64(h, 17)*0x9E3779B97F4A7C15 ^ maphash.String(c.seed, destination)
	return bits.RotateLeft64(h, 17)*0x9E3779B97F4A7C15 ^ maphash.String(c.seed, ruleID)
}

func (c *Counts) otherOf(reason string) *Row {
	for i, r := range reasons {
		if string(r) == reason {
			return c.other[i]
		}
	}
	return c.other[len(reasons)]
}

// rows lists the rows for which count is not 0, the largest first.
func (c *Counts) rows(count func(*Row) uint64) []Count {
	var all []Count
	add := func(row *Row) {
		if row == nil {
			return
		}
		if n := count(row); n > 0 {
			all = append(all, Count{row.Source, row.Destination, row.RuleID, policy.Reason(row.Reason), n})
		}
	}
	for i := range c.slots {
		add(c.slots[i].Load())
	}
	for _, row := range c.other {
		add(row)
	}
	slices.SortFunc(all, func(a, b Count) int {
		return cmp.Or(-cmp.Compare(a.N, b.N), cmp.Compare(a.Source, b.Source), cmp.Compare(a.Destination, b.Destination),
			cmp.Compare(a.RuleID, b.RuleID), cmp.Compare(a.Reason, b.Reason))
	})
	return all
}
