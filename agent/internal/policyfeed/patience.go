// What is wrong for a moment and mends itself. Entries come and go at the CA and here a
// moment apart, so while they keep changing some share or other always lacks a service;
// that must not keep a policy from being in force for all the others. And a replica of
// the CA may be behind the one that was asked before.

package policyfeed

import (
	"errors"
	"fmt"
	"time"

	"merlon.dev/policy/engine"
)

// patience is how long that may be so before it is a fault. The CA is asked again
// meanwhile; calls to a service that the share lacks are denied.
const patience = 5 * time.Second

// passing is an error that is no fault yet: of each of these no sooner than patience
// after it was met first.
type passing interface {
	error
	since() []string
}

// lackingError reports a share that was loaded, and is not for every destination.
type lackingError struct {
	generation   uint64
	destinations []string // at least one
}

func (e *lackingError) Error() string {
	return fmt.Sprintf("the CA's share of generation %d for this node has nothing about %s yet", e.generation, e.destinations[0])
}

func (e *lackingError) since() []string { return e.destinations }

// olderError reports a CA that announces an older policy than was active, and has none
// that is newer. One whose announcements are late serves what was active, or newer: its
// store was not set back.
type olderError struct {
	announced, seen uint64
	err             error
}

func (e *olderError) Error() string {
	return fmt.Sprintf("generation %d is announced, but generation %d was active before: the CA's store was set back, or somebody replays an old policy: %v", e.announced, e.seen, e.err)
}

func (e *olderError) Unwrap() error { return e.err }

func (e *olderError) since() []string { return []string{"an older policy"} } // which is no destination

// covers says which destinations e lacks that were on the node when it was asked for,
// and are there still.
func (f *Feed) covers(want *announcement, e *engine.Engine) error {
	lacking := make(map[string]bool)
	for _, d := range want.destinations {
		if !e.For(d) {
			lacking[d] = true
		}
	}
	if len(lacking) == 0 {
		return nil
	}
	var still []string
	for _, d := range f.cfg.Destinations() {
		if lacking[d] {
			still = append(still, d)
		}
	}
	if len(still) == 0 {
		return nil
	}
	return &lackingError{e.Generation(), still}
}

// faults are those of errs that are faults.
func (f *Feed) faults(errs ...error) error {
	before, now := f.waits, time.Now()
	f.waits = make(map[string]time.Time)
	for i, err := range errs {
		waiting, ok := errors.AsType[passing](err)
		if !ok {
			continue
		}
		errs[i] = nil
		for _, what := range waiting.since() {
			since, known := before[what]
			if !known {
				since = now
			}
			if f.waits[what] = since; now.Sub(since) >= patience {
				errs[i] = err
			}
		}
	}
	return errors.Join(errs...)
}
