package api

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// Whenever a stream joins, it is woken once in every heartbeat, together with others.
func TestPulseWakesEachStreamOnceAHeartbeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const streams, beats = 10 * pulseGroups, 5
		var p pulse
		var done sync.WaitGroup
		var moments sync.Map
		for n := range streams {
			time.Sleep(20 * time.Millisecond) // not all at the same time
			at := p.join()
			done.Go(func() {
				defer at.leave()
				last := time.Now()
				for i := range beats {
					<-at.due()
					since := time.Since(last)
					if since > heartbeat || i > 0 && since != heartbeat {
						t.Errorf("stream %d waits %v for beat %d; want %v", n, since, i, heartbeat)
					}
					last = time.Now()
					moments.Store(last, true)
				}
			})
		}
		done.Wait()
		woken := 0
		moments.Range(func(any, any) bool { woken++; return true })
		if all := streams * beats; woken > all/5 {
			t.Errorf("%d beats at %d moments; want groups", all, woken)
		}
		time.Sleep(heartbeat)
		synctest.Wait()
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.beating {
			t.Error("it beats without streams")
		}
	})
}

// A pulse that has stopped goes on with the next stream.
func TestPulseBeginsAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p pulse
		for range 3 {
			at := p.join()
			begun := time.Now()
			<-at.due()
			at.leave()
			if took := time.Since(begun); took > heartbeat {
				t.Errorf("the first beat comes after %v; want at most %v", took, heartbeat)
			}
			time.Sleep(3 * heartbeat)
		}
	})
}
