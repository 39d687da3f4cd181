package api

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

func TestHeartbeatsComeLessOftenWhereThereAreMany(t *testing.T) {
	for streams, want := range map[int]time.Duration{
		0: heartbeat, 1: heartbeat, 1_000: heartbeat, 9 * beatsPerSecond: heartbeat, 15 * beatsPerSecond: 15 * time.Second,
		10_000: longestHeartbeat, 100_000: longestHeartbeat,
	} {
		if got := beatEvery(streams); got != want {
			t.Errorf("%d streams: a heartbeat every %v; want %v", streams, got, want)
		}
	}
}

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
					due, within := at.next()
					<-due
					since := time.Since(last)
					if since > within || i > 0 && since != heartbeat {
						t.Errorf("stream %d waits %v for beat %d; it was told %v, and want %v", n, since, i, within, heartbeat)
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
		if n := p.beating(); n != 0 {
			t.Errorf("%d groups beat without streams", n)
		}
	})
}

// beating is how many groups have a next beat.
func (p *pulse) beating() (n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, g := range p.groups {
		if g.every != 0 {
			n++
		}
	}
	return n
}

// However many come and go meanwhile, the next beat comes within what a stream was told.
func TestPulseKeepsWhatItSays(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		steps := rapid.SliceOfN(rapid.IntRange(-6_000, 6_000), 1, 12).Draw(rt, "come and go")
		pauses := rapid.SliceOfN(rapid.IntRange(1, 60_000), len(steps), len(steps)).Draw(rt, "after ms")
		synctest.Test(t, func(t *testing.T) {
			var p pulse
			var others []place
			var watching sync.WaitGroup
			stop := make(chan struct{})
			for range 3 {
				at := p.join()
				watching.Go(func() {
					defer at.leave()
					for {
						due, within := at.next()
						told := time.Now()
						select {
						case <-stop:
							return
						case <-due:
						}
						if took := time.Since(told); took > within {
							t.Errorf("the next beat comes after %v; the stream was told within %v", took, within)
						}
					}
				})
			}
			for i, n := range steps {
				for ; n > 0; n-- {
					others = append(others, p.join())
				}
				for ; n < 0 && len(others) > 0; n++ {
					others[0].leave()
					others = others[1:]
				}
				time.Sleep(time.Duration(pauses[i]) * time.Millisecond)
			}
			close(stop)
			watching.Wait()
			for _, at := range others {
				at.leave()
			}
			time.Sleep(longestHeartbeat)
			synctest.Wait()
			if n := p.beating(); n != 0 {
				t.Errorf("%d groups beat without streams", n)
			}
		})
	})
}

// Agents that all came at the same time are not all spoken to at the same time.
func TestPulseSpreadsAHerd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p pulse
		var moments sync.Map
		var done sync.WaitGroup
		for range 10 * pulseGroups {
			at := p.join()
			done.Go(func() {
				defer at.leave()
				due, _ := at.next()
				<-due
				moments.Store(time.Now(), true)
			})
		}
		done.Wait()
		n := 0
		moments.Range(func(any, any) bool { n++; return true })
		if n != pulseGroups {
			t.Errorf("they are spoken to at %d moments; want %d", n, pulseGroups)
		}
		time.Sleep(heartbeat)
	})
}

// A pulse that has stopped goes on with the next stream.
func TestPulseBeginsAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p pulse
		for range 3 {
			at := p.join()
			begun := time.Now()
			due, within := at.next()
			<-due
			at.leave()
			if took := time.Since(begun); took > within {
				t.Errorf("the first beat comes after %v; want at most %v", took, within)
			}
			time.Sleep(3 * heartbeat)
		}
	})
}
