// Processes that are ended and started again, as a soak does it: each life is compared
// with its own beginning (I6), since what a process has leaked is gone with it.

package faults

import (
	"time"

	"merlon.dev/integration/faults/history"
	"merlon.dev/integration/faults/invariant"
	"merlon.dev/integration/stage"
)

// Lives follows the CA, the agents and the sidecar of a world.
type Lives struct {
	// Worth is how old a process must have become for its life to be judged. Its size is
	// measured at a third of that: its clients come back one after the other.
	Worth   time.Duration
	Growths []history.Growth

	w      *World
	begins map[string]beginning
}

// beginning is how large a process was soon after its start.
type beginning struct {
	pid      int
	at       time.Time // when it was first seen
	measured bool
	size     history.Size
}

// Lives begins to follow; the world must be in use.
func (w *World) Lives(worth time.Duration) *Lives {
	w.tb.Helper()
	l := &Lives{Worth: worth, w: w, begins: make(map[string]beginning)}
	l.Begin()
	return l
}

// living is a process that may be judged, and where it says what it has.
type living struct {
	name    string
	process *stage.Process
	health  string
}

func (l *Lives) living() []living {
	all := []living{{"agent", l.w.Agent, l.w.AgentHealth}}
	for _, ca := range l.w.cas {
		all = append(all, living{ca.name, ca.process, ca.health})
	}
	if l.w.Second != nil {
		all = append(all, living{"second agent", l.w.Second.Agent, l.w.Second.AgentHealth})
	}
	if l.w.Sidecar != nil {
		all = append(all, living{"sidecar", l.w.Sidecar, ""})
	}
	return all
}

// Begin measures who has been started since, once it is old enough. It is to be called
// often, when all works.
func (l *Lives) Begin() {
	l.w.tb.Helper()
	for _, p := range l.living() {
		b := l.begins[p.name]
		if pid := p.process.PID(); b.pid != pid {
			b = beginning{pid: pid, at: time.Now()}
		}
		if !b.measured && time.Since(b.at) >= l.Worth/3 {
			var err error
			if b.size, err = sizeOf(p.name, b.pid, p.health); err != nil {
				l.w.tb.Errorf("size of %s after its start: %v", p.name, err)
			}
			b.measured = err == nil
		}
		l.begins[p.name] = b
	}
}

// End judges processes that are about to be ended; none: all.
func (l *Lives) End(processes ...*stage.Process) {
	l.w.tb.Helper()
	chosen := make(map[*stage.Process]bool)
	for _, p := range processes {
		chosen[p] = true
	}
	for _, p := range l.living() {
		if len(chosen) > 0 && !chosen[p.process] {
			continue
		}
		begin := l.begins[p.name]
		if begin.measured && begin.pid == p.process.PID() && time.Since(begin.at) >= l.Worth {
			l.judge(p, begin)
		}
	}
}

// judge waits, as the end of a run does, until a process has the size that it had, for
// at most 15 s.
func (l *Lives) judge(p living, begin beginning) {
	l.w.tb.Helper()
	var growth history.Growth
	var err error
	for range 150 {
		growth.Before = begin.size
		growth.After, err = sizeOf(p.name, begin.pid, p.health)
		if err == nil && len(invariant.Sizes(&history.History{Growths: []history.Growth{growth}})) == 0 {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if err != nil {
		l.w.tb.Errorf("size of %s before its end: %v", p.name, err)
		return
	}
	l.Growths = append(l.Growths, growth)
}
