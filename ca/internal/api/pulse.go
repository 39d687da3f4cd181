// The pulse of the Sync streams: which of them speaks when there is no news. With a
// clock of its own for each, ten thousand streams wake the process a thousand times a
// second, and most of what that costs is the waking. So they are woken in groups.

package api

import (
	"sync"
	"time"
)

const (
	// heartbeat stays below the 15 s that node.proto promises, and below the 10 s of
	// silence after which an agent asks whether the CA's process lives.
	heartbeat = 9 * time.Second
	// pulseGroups are small enough that nobody who has news waits for a beat.
	pulseGroups = 36
)

// pulse is safe for concurrent use. Its zero value is one without streams.
type pulse struct {
	mu sync.Mutex
	// guarded by mu
	groups  [pulseGroups]chan struct{} // each closed at its next beat; nil: nobody waits
	joined  int                        // streams that ever joined, which are dealt out in turn
	members int
	beating bool
	next    int // the group whose turn it is
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
	if !p.beating {
		p.beating = true
		time.AfterFunc(heartbeat/pulseGroups, p.beat)
	}
	return place{p, p.joined % pulseGroups}
}

// beat wakes the next group, for as long as there are streams.
func (p *pulse) beat() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.beating = p.members > 0; !p.beating {
		return
	}
	if due := p.groups[p.next]; due != nil {
		close(due)
		p.groups[p.next] = nil
	}
	p.next = (p.next + 1) % pulseGroups
	time.AfterFunc(heartbeat/pulseGroups, p.beat)
}

// due is closed at the next beat of the stream's group.
func (at place) due() <-chan struct{} {
	at.pulse.mu.Lock()
	defer at.pulse.mu.Unlock()
	group := &at.pulse.groups[at.group]
	if *group == nil {
		*group = make(chan struct{})
	}
	return *group
}

func (at place) leave() {
	at.pulse.mu.Lock()
	defer at.pulse.mu.Unlock()
	at.pulse.members--
}
