// Streams: who is woken by which change.

package cache

import (
	"cmp"
	"slices"
	"time"

	"merlon.dev/agent/internal/workload"
)

// Subscription is one open Workload API stream. Its methods may be called by
// one goroutine at a time.
type Subscription struct {
	c     *Cache
	woken chan struct{}

	// guarded by c.mu
	proof     workload.Proof
	slots     map[slotKey]*slot
	delivered uint64 // sequence of the trust bundle sent last; 0 for none
}

// View is what a workload may have now.
type View struct {
	// Current says whether changes arrive from the CA, and everything was read
	// that some entry asks for, so that no Entries means that no entry matches.
	Current bool
	// Entries match, in their order: the first is the default identity.
	Entries []*Entry
	// SVIDs are the valid ones, in the order of Entries and each SPIFFE ID
	// once; only with wantSVIDs.
	SVIDs []*SVID
	// Pending says that an SVID is on its way, and the workload better waits
	// than gets half an answer.
	Pending bool
	// Withheld says that there are Entries whose keys only their workload may make.
	Withheld bool
	// Trust is nil before the first trust bundle.
	Trust *Trust
	// Federated are the trust bundles of the other trust domains that Entries
	// federate with, by name.
	Federated []*Federated
}

// Subscribe registers a stream. Close the result.
func (c *Cache) Subscribe() *Subscription {
	s := &Subscription{c: c, woken: make(chan struct{}, 1), slots: map[slotKey]*slot{}}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.subs[s] = struct{}{}
	return s
}

// Woken receives when something changed that concerns the workload whose
// proof View was last called with, or it must be asked for more.
func (s *Subscription) Woken() <-chan struct{} { return s.woken }

// View returns what a workload with this proof may have. With wantSVIDs their
// SVIDs are ordered, and kept fresh until Close.
func (s *Subscription) View(proof workload.Proof, wantSVIDs bool) View {
	return s.ViewOf(proof, func(all []*Entry) []*Entry {
		if wantSVIDs {
			return all
		}
		return nil
	})
}

// ViewOf is View with the SVIDs of those entries alone that wanted returns, of
// all that match; they are kept fresh until the next call.
func (s *Subscription) ViewOf(proof workload.Proof, wanted func([]*Entry) []*Entry) View {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	v := s.look(proof)
	chosen := wanted(v.Entries)
	if len(chosen) == 0 && len(s.slots) == 0 {
		return v
	}
	used := make(map[slotKey]*slot, len(chosen))
	seen := make(map[string]bool, len(chosen))
	for _, e := range chosen {
		if !e.AgentKey {
			v.Withheld = true
			continue
		}
		if seen[e.SPIFFEID.String()] {
			continue
		}
		seen[e.SPIFFEID.String()] = true
		sl := s.use(e, nil, used)
		if sl.svid != nil {
			v.SVIDs = append(v.SVIDs, sl.svid)
		}
		v.Pending = v.Pending || sl.pending()
	}
	s.release(used)
	s.slots = used
	return v
}

// look is the part of a View that needs no SVIDs. c.mu is held.
func (s *Subscription) look(proof workload.Proof) View {
	c := s.c
	s.register(proof)
	unread := c.index.unread(proof)
	if unread != 0 {
		s.notify() // an entry came while the process was read
	}
	entries := c.match(proof.Selectors, time.Now())
	return View{Current: c.current() && unread == 0, Entries: entries, Trust: c.trust.Load(), Federated: c.federatedOf(entries)}
}

// use makes s a user of the slot of e for holder. c.mu is held.
func (s *Subscription) use(e *Entry, holder *Subscription, used map[slotKey]*slot) *slot {
	sl := s.c.slotFor(e, holder)
	sl.users[s] = struct{}{}
	used[sl.key] = sl
	s.c.turn(sl)
	return sl
}

// release gives up the slots that are not in keep. c.mu is held.
func (s *Subscription) release(keep map[slotKey]*slot) {
	for id, sl := range s.slots {
		if keep[id] != sl {
			delete(sl.users, s)
			if s.c.slots[id] == sl {
				s.c.turn(sl)
			}
		}
	}
}

// register indexes s under what it proved, and what it was not asked. c.mu is
// held.
func (s *Subscription) register(proof workload.Proof) {
	s.unregister()
	s.proof = proof
	for _, sel := range proof.Selectors {
		enter(s.c.bySel, sel, s)
	}
	for kind := workload.Kinds(1); kind < workload.AllKinds; kind <<= 1 {
		if proof.Read&kind == 0 {
			enter(s.c.blind, kind, s)
		}
	}
}

func (s *Subscription) unregister() {
	for _, sel := range s.proof.Selectors {
		leave(s.c.bySel, sel, s)
	}
	for kind := workload.Kinds(1); kind < workload.AllKinds; kind <<= 1 {
		leave(s.c.blind, kind, s)
	}
}

// enter puts s into the set under key.
func enter[K comparable](sets map[K]map[*Subscription]struct{}, key K, s *Subscription) {
	if sets[key] == nil {
		sets[key] = map[*Subscription]struct{}{}
	}
	sets[key][s] = struct{}{}
}

// leave takes s out of the set under key.
func leave[K comparable](sets map[K]map[*Subscription]struct{}, key K, s *Subscription) {
	delete(sets[key], s)
	if len(sets[key]) == 0 {
		delete(sets, key)
	}
}

// Delivered says that the workload was sent the trust bundle with this
// sequence number.
func (s *Subscription) Delivered(sequence uint64) {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	s.setDelivered(sequence)
}

func (s *Subscription) setDelivered(sequence uint64) {
	if s.delivered == sequence {
		return
	}
	if s.delivered != 0 {
		if s.c.behind[s.delivered]--; s.c.behind[s.delivered] == 0 {
			delete(s.c.behind, s.delivered)
		}
	}
	if s.delivered = sequence; sequence != 0 {
		s.c.behind[sequence]++
	}
	signal(s.c.served)
}

// Close ends the subscription.
func (s *Subscription) Close() {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	s.unregister()
	s.release(nil)
	s.setDelivered(0)
	delete(s.c.subs, s)
}

// Ack is what every open stream has been sent: the revision that is held and
// the oldest trust bundle that some stream still has. While something is served
// that a tainted authority signed (ownTainted: to the agent itself), the trust
// bundle that taints it does not count.
func (c *Cache) Ack(ownTainted bool) (revision, trustSequence uint64) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if t := c.trust.Load(); t != nil {
		trustSequence = t.Sequence
		if ownTainted || c.servesTainted(t) {
			trustSequence = min(trustSequence, c.clean)
		}
	}
	for sequence := range c.behind {
		trustSequence = min(trustSequence, sequence)
	}
	return c.revision, trustSequence
}

// Served receives when Ack may have changed.
func (c *Cache) Served() <-chan struct{} { return c.served }

func (s *Subscription) notify() { signal(s.woken) }

func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// notifyAll wakes every stream. c.mu is held.
func (c *Cache) notifyAll() {
	for s := range c.subs {
		s.notify()
	}
	signal(c.served)
}

// notifyMatching wakes the streams of the workloads that e is for. One that was
// not read for a kind, because no entry asked for it, may have any selector of
// that kind: it is woken too, and looked at again. c.mu is held.
func (c *Cache) notifyMatching(e *Entry) {
	if len(e.Selectors) == 0 {
		return
	}
	// Whoever satisfies e satisfies the selector that concerns the fewest.
	rarest := slices.MinFunc(e.Selectors, func(a, b string) int { return cmp.Compare(c.concerned(a), c.concerned(b)) })
	for _, candidates := range []map[*Subscription]struct{}{c.bySel[rarest], c.blind[workload.KindOf(rarest)]} {
		for s := range candidates {
			if s.maySatisfy(e) {
				s.notify()
			}
		}
	}
}

// concerned is how many streams have a selector, or may have it.
func (c *Cache) concerned(selector string) int {
	return len(c.bySel[selector]) + len(c.blind[workload.KindOf(selector)])
}

func (s *Subscription) maySatisfy(e *Entry) bool {
	for _, missing := range e.missing(s.proof.Selectors) {
		if workload.KindOf(missing)&^s.proof.Read == 0 {
			return false
		}
	}
	return true
}
