// How small the sidecar stays: it shares its node with those it serves.

package main

import (
	"context"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	// gcPercent is how much garbage there may be beside what is used. GOGC overrides
	// it.
	gcPercent = 50
	// lullAfter is how long the collector has had nothing to do when memory goes back.
	lullAfter = 10 * time.Second
	// startTakes is when the start is over, as a rule.
	startTakes = 2 * time.Second
)

// stayingSmall has memory that the start or a busy time has left go back to the system
// when it is over, until ctx ends. Go alone keeps a tenth more than the garbage that
// would be there in another such time, and the kernel all of the program that was ever
// looked at.
func stayingSmall(ctx context.Context) {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	go func() {
		l := lull{}
		after := time.NewTimer(startTakes)
		defer after.Stop()
		for started := false; ; started = true {
			select {
			case <-after.C:
			case <-ctx.Done():
				return
			}
			if quiet := l.begins(collections()); quiet || !started {
				debug.FreeOSMemory()
				l.freed = collections()
				_ = forgetProgram() // else it is as large as it was
			}
			after.Reset(lullAfter)
		}
	}()
}

// lull tells quiet times from busy ones by how often the collector has run: it runs
// when as much was allocated as gcPercent says, or two minutes are over.
type lull struct{ before, freed uint64 }

// begins says whether nothing was collected since the last time, but was since memory
// was freed.
func (l *lull) begins(now uint64) bool {
	quiet := now == l.before
	l.before = now
	return quiet && now != l.freed
}

func collections() uint64 {
	cycles := []metrics.Sample{{Name: "/gc/cycles/total:gc-cycles"}}
	metrics.Read(cycles)
	return cycles[0].Value.Uint64()
}
