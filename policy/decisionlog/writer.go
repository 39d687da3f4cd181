package decisionlog

// This file takes records out of the ring and writes each as a line.

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

const (
	// takePause is the least time between two looks into the ring.
	takePause = 20 * time.Millisecond
	// takeLimit is how many records are written before the outputs get them.
	takeLimit = 256
)

// Writer writes a decision log. Use NewWriter, then Run.
type Writer struct {
	*Lines
	recorder *Recorder
	format   Format
	told     uint64 // of the recorder's drops, those that some event tells of
}

// NewWriter makes a writer of what recorder keeps.
func NewWriter(recorder *Recorder, format Format, log *slog.Logger, targets ...Target) *Writer {
	return &Writer{Lines: NewLines(log, targets...), recorder: recorder, format: format}
}

// Run writes until ctx ends, and then what is there by then, as Lines does.
func (w *Writer) Run(ctx context.Context) {
	lines, end := context.WithCancel(context.WithoutCancel(ctx))
	var running sync.WaitGroup
	running.Go(func() { w.Lines.Run(lines) })
	w.drainUntil(ctx)
	end()
	running.Wait()
}

// drainUntil hands records on until ctx ends, and once more.
func (w *Writer) drainUntil(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			for w.drain() > 0 {
			}
			return
		case <-w.recorder.Woken():
		}
		for w.drain() == takeLimit {
		}
		select { // so that a steady stream costs a look at times, and not one a call
		case <-ctx.Done():
		case <-time.After(takePause):
		}
	}
}

// drain hands on what is there, up to takeLimit records.
func (w *Writer) drain() int {
	var lines [][]byte
	n := w.recorder.Take(takeLimit, func(rec *Record) {
		all := w.recorder.Dropped()
		lines = append(lines, w.format.Line(rec, all-w.told))
		w.told = all
	})
	w.put(lines)
	return n
}
