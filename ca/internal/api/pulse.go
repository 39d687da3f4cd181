// The pulse of the Sync streams: which of them speaks when there is no news. With a
// clock of its own for each, ten thousand streams wake the process a thousand times a
// second, and most of what that costs is the waking. So they are woken in groups; and
// where there are many, less often: each message tells its agent when the next one comes
// at the latest.

package api

import (
	"sync"
	"time"
)

const (
	// heartbeat is for a CA with few agents, which learn within 15 s that its process
	// hangs (agent/internal/caclient/silence.go).
	heartbeat = 9 * time.Second
	// longestHeartbeat is as long as an agent should take to notice that. What it holds
	// grows no older than it may: an agent that has to hear more often asks.
	longestHeartbeat = 40 * time.Second
	// beatsPerSecond is how many heartbeats a second the CA says before it says them less
	// often.
	beatsPerSecond = 250
	// pulseGroups are small enough that nobody who has news waits for a beat.
	pulseGroups = 36
)

// beatEvery is how long each of so many streams waits for its next heartbeat.
func beatEvery(streams int) time.Duration {
	return min(max(heartbeat, time.Duration(streams)*time.Second/beatsPerSecond), longestHeartbeat)
}

// pulse is safe for concurrent use. Its zero value is one without streams.
type pulse struct {
	mu sync.Mutex
	// guarded by mu
	groups  [pulseGroups]group
	joined  int // streams that ever joined, which are dealt out in turn
	members int
}

// group is guarded by pulse.mu.
type group struct {
	due     chan struct{} // closed at the next beat; nil: nobody waits
	members int
	every   time.Duration // the next beat comes no later from now; 0: the group rests
}

// place is that of one stream, which is in a group.
type place struct {
	pulse *pulse
	group int
}

// join gives a stream a place; it has to be left.
func (p *pulse) join() place {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.members++
	p.joined++
	at := place{p, p.joined % pulseGroups}
	g := &p.groups[at.group]
	g.members++
	if g.every == 0 {
		g.every = beatEvery(p.members)
		// Not all groups at the same time, also where all agents came at the same time.
		p.beatIn(g.every*time.Duration(at.group+1)/pulseGroups, at.group)
	}
	return at
}

func (p *pulse) beatIn(wait time.Duration, group int) {
	time.AfterFunc(wait, func() { p.beat(group) })
}

// beat wakes a group, for as long as there are streams in it.
func (p *pulse) beat(group int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	g := &p.groups[group]
	if g.members == 0 {
		g.every = 0
		return
	}
	if g.due != nil {
		close(g.due)
		g.due = nil
	}
	g.every = beatEvery(p.members)
	p.beatIn(g.every, group)
}

// next is closed at the next beat of the stream's group, which comes within the
// duration.
func (at place) next() (<-chan struct{}, time.Duration) {
	at.pulse.mu.Lock()
	defer at.pulse.mu.Unlock()
	g := &at.pulse.groups[at.group]
	if g.due == nil {
		g.due = make(chan struct{})
	}
	return g.due, g.every
}

func (at place) leave() {
	at.pulse.mu.Lock()
	defer at.pulse.mu.Unlock()
	at.pulse.members--
	at.pulse.groups[at.group].members--
}
