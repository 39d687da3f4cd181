package decisionlog

// This file hands lines to outputs. An output that hangs or fails holds up nobody,
// nor the other outputs: its lines wait in bounded memory, and what has no room
// there is counted.

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// maxQueued is how many bytes wait for one output.
	maxQueued = 8 << 20
	// flushTime is how long the outputs may take at the end.
	flushTime = 2 * time.Second
	// The pause after a failure, which doubles.
	minRetry = 100 * time.Millisecond
	maxRetry = 10 * time.Second
)

// Output takes lines, each without its end. Write is called by one goroutine.
type Output interface {
	// Write takes lines in order. written of them are out, refused of those that
	// follow will never be, and the rest are to be tried again. err says why not all
	// are written.
	Write(ctx context.Context, lines [][]byte) (written, refused int, err error)
	Close() error
}

// Target is an output, and how it is used.
type Target struct {
	Name   string
	Output Output
	// Gather is how long lines are gathered before a Write.
	Gather time.Duration
}

// Stats are what became of the lines for one target.
type Stats struct {
	// Dropped had no room to wait, and Refused the other side does not take.
	Written, Dropped, Refused uint64
}

// Lines hands lines to outputs. It is safe for concurrent use. Use NewLines, then
// Run.
type Lines struct {
	log    *slog.Logger
	queues []*queue
}

// NewLines is for targets.
func NewLines(log *slog.Logger, targets ...Target) *Lines {
	l := &Lines{log: log}
	for _, t := range targets {
		l.queues = append(l.queues, &queue{target: t, log: log, wake: make(chan struct{}, 1)})
	}
	return l
}

// put lets lines wait for each output, as far as there is room.
func (l *Lines) put(lines [][]byte) {
	for _, q := range l.queues {
		q.put(lines)
	}
}

// TryPut lets lines wait for the outputs, all of them, or none: false where one of
// the outputs is too far behind.
func (l *Lines) TryPut(lines [][]byte) bool {
	size := 0
	for _, line := range lines {
		size += len(line)
	}
	for _, q := range l.queues {
		if !q.hasRoom(size) {
			return false
		}
	}
	l.put(lines)
	return true
}

// Stats are those of the target called name.
func (l *Lines) Stats(name string) Stats {
	for _, q := range l.queues {
		if q.target.Name == name {
			return Stats{q.written.Load(), q.dropped.Load(), q.refused.Load()}
		}
	}
	return Stats{}
}

// Run writes until ctx ends, then what is there by then, for 2 s at most, and
// closes the outputs. An output that hangs beyond that is left behind: its
// goroutine ends with its Write.
func (l *Lines) Run(ctx context.Context) {
	outputs, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	var running sync.WaitGroup
	for _, q := range l.queues {
		running.Go(func() { q.run(outputs) })
	}
	<-ctx.Done()
	for _, q := range l.queues {
		q.end()
	}
	done := make(chan struct{})
	go func() { running.Wait(); close(done) }()
	late := time.NewTimer(flushTime)
	defer late.Stop()
	select {
	case <-done:
		return
	case <-late.C:
	}
	stop() // what obeys a context ends now
	select {
	case <-done:
	case <-time.After(flushTime / 4):
		l.log.LogAttrs(ctx, slog.LevelError, "decision log not written out in time")
	}
}

// queue has the lines that wait for one target.
type queue struct {
	target Target
	log    *slog.Logger
	wake   chan struct{}

	written, dropped, refused atomic.Uint64

	mu sync.Mutex
	// guarded by mu
	lines [][]byte
	bytes int
	ended bool
}

// put lets lines wait, as far as there is room.
func (q *queue) put(lines [][]byte) {
	q.mu.Lock()
	for _, line := range lines {
		if q.bytes+len(line) > maxQueued {
			q.dropped.Add(1)
			continue
		}
		q.lines = append(q.lines, line)
		q.bytes += len(line)
	}
	q.mu.Unlock()
	q.poke()
}

func (q *queue) hasRoom(size int) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.bytes+size <= maxQueued
}

func (q *queue) poke() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// end says that nothing more will come.
func (q *queue) end() {
	q.mu.Lock()
	q.ended = true
	q.mu.Unlock()
	q.poke()
}

// peek is what waits; it stays until it is done with.
func (q *queue) peek() (lines [][]byte, ended bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.lines, q.ended
}

// done forgets the first n lines.
func (q *queue) done(n int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, line := range q.lines[:n] {
		q.bytes -= len(line)
	}
	rest := q.lines[n:]
	q.lines = append(make([][]byte, 0, len(rest)), rest...) // the lines that are done with are free
}

// run writes what comes until there is nothing more, or ctx ends.
func (q *queue) run(ctx context.Context) {
	defer q.close(ctx)
	retry, bad := minRetry, false
	for {
		lines, ended := q.peek()
		if len(lines) == 0 {
			if ended {
				return
			}
			select {
			case <-ctx.Done():
				return
			case <-q.wake:
			}
			q.pause(ctx, q.target.Gather)
			continue
		}
		written, refused, err := q.target.Output.Write(ctx, lines)
		q.written.Add(uint64(written))
		q.refused.Add(uint64(refused))
		q.done(written + refused)
		if (err == nil) == bad { // said once, not each time
			q.say(ctx, err)
			bad = err != nil
		}
		if err == nil {
			retry = minRetry
			continue
		}
		if ended && written+refused == 0 || !q.pause(ctx, retry) { // at the end one try is all
			return
		}
		retry = min(2*retry, maxRetry)
	}
}

func (q *queue) say(ctx context.Context, err error) {
	name := slog.String("output", q.target.Name)
	if err == nil {
		q.log.LogAttrs(ctx, slog.LevelInfo, "decision log is written again", name, slog.Uint64("dropped", q.dropped.Load()), slog.Uint64("refused", q.refused.Load()))
		return
	}
	q.log.LogAttrs(ctx, slog.LevelError, "decision log not written; what finds no room to wait is lost", name, slog.Any("err", err))
}

// pause waits for d, or less where the end comes; false where ctx ends.
func (q *queue) pause(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return true
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-timer.C:
			return true
		case <-q.wake:
			if _, ended := q.peek(); ended {
				return true
			}
		}
	}
}

// close counts what is left behind.
func (q *queue) close(ctx context.Context) {
	lines, _ := q.peek()
	q.dropped.Add(uint64(len(lines)))
	q.done(len(lines))
	if err := q.target.Output.Close(); err != nil {
		q.log.LogAttrs(ctx, slog.LevelError, "decision log not closed", slog.String("output", q.target.Name), slog.Any("err", err))
	}
}
