// Many agents that the harness plays, each with a key, a connection and a Sync stream
// of its own.

package faults

import (
	"context"
	"fmt"
	"hash/fnv"
	"strings"
	"sync"
	"sync/atomic"

	"merlon.dev/ca/capb"
	"merlon.dev/integration/faults/history"
)

// Herd is agents that come back as fast as they can, which ours do not.
type Herd struct {
	w       *World
	nodes   []*node
	heard   []atomic.Int64  // when each was in sync last
	reached []atomic.Uint64 // the revision that it has
	told    []atomic.Uint64 // the sum of the revocations that it was sent
	revoked uint64          // the sum of those that were answered
}

// Herd attests n agents and lets them follow.
func (w *World) Herd(n int) *Herd {
	w.tb.Helper()
	h := &Herd{w: w, nodes: make([]*node, n), heard: make([]atomic.Int64, n), reached: make([]atomic.Uint64, n), told: make([]atomic.Uint64, n)}
	var joining sync.WaitGroup
	next := make(chan int)
	for range 8 {
		joining.Go(func() {
			for i := range next {
				h.nodes[i] = w.join(fmt.Sprintf("herd-%d", i))
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	joining.Wait()
	for i, one := range h.nodes {
		one.own = w.Register(fmt.Sprintf("/ns/herd/%d", i), one.id, "uid:4500")
		one.onMessage = func(m *capb.SyncResponse) {
			if m.GetReset_() {
				h.told[i].Store(0)
			}
			for _, r := range m.GetRevocations() {
				if strings.HasPrefix(r.GetSpiffeId(), w.ID("/ns/herd/")) {
					h.told[i].Add(sum(r.GetSpiffeId(), r.GetBeforeRevision()))
				}
			}
			if m.GetSynced() {
				h.reached[i].Store(m.GetRevision())
				h.heard[i].Store(history.Now())
			}
		}
		one.follow()
	}
	w.await("the herd follows", func() error { return h.Heard(0) })
	clear(w.before) // the CA has their connections from here on
	w.measure()
	return h
}

// Heard says whether every agent but those that are banned was in sync after since.
func (h *Herd) Heard(since int64, banned ...int) error {
	return h.all("was not in sync", banned, func(i int) bool { return h.heard[i].Load() > since })
}

// Reached says whether every agent but those that are banned has a revision.
func (h *Herd) Reached(revision uint64, banned ...int) error {
	return h.all(fmt.Sprintf("has not revision %d", revision), banned, func(i int) bool { return h.reached[i].Load() >= revision })
}

func (h *Herd) all(not string, banned []int, check func(i int) bool) error {
	out := make(map[int]bool)
	for _, i := range banned {
		out[i] = true
	}
	missing, first := 0, ""
	for i, n := range h.nodes {
		if !out[i] && !check(i) {
			missing++
			first = n.id
		}
	}
	if missing > 0 {
		return fmt.Errorf("%d of %d: %s %s", missing, len(h.nodes), first, not)
	}
	return nil
}

// Ban bans one agent.
func (h *Herd) Ban(i int) (revision uint64) {
	h.w.Rec.Do("world", history.Ban, h.nodes[i].id, func(op *history.Op) (history.Outcome, error) {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		resp, err := h.w.cas[0].admin.BanAgent(ctx, &capb.BanAgentRequest{Agent: op.Key})
		op.Number = resp.GetRevocation().GetBeforeRevision()
		revision = op.Number
		return outcome(err)
	})
	return revision
}

// Revoke revokes the SPIFFE ID of one agent's workload. That it was answered is all that is
// taken from the answer but its revision: what was revoked the agents are told.
func (h *Herd) Revoke(i int) (revision uint64) {
	h.w.Rec.Do("world", history.Revoke, h.nodes[i].own.Key, func(op *history.Op) (history.Outcome, error) {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		resp, err := h.w.cas[0].admin.Revoke(ctx, &capb.RevokeRequest{Subject: &capb.RevokeRequest_SpiffeId{SpiffeId: op.Key}})
		if op.Number = resp.GetRevocation().GetBeforeRevision(); err == nil {
			h.revoked += sum(op.Key, op.Number)
			revision = op.Number
		}
		return outcome(err)
	})
	return revision
}

// sum stands for a record: equal sums of those over many records mean that they are the
// same, in whatever order they came.
func sum(spiffeID string, before uint64) uint64 {
	hash := fnv.New64a()
	fmt.Fprint(hash, spiffeID, before)
	return hash.Sum64()
}

// Told says whether every agent but those that are banned has been sent each revocation
// of a SPIFFE ID of the herd that was answered, and no other.
func (h *Herd) Told(banned ...int) error {
	return h.all("was not told exactly what was revoked", banned, func(i int) bool { return h.told[i].Load() == h.revoked })
}

// Sign has one agent ask for its workload's SVID.
func (h *Herd) Sign(i int) history.Op { return h.nodes[i].sign(h.w.Rec, h.nodes[i].own.Value) }
