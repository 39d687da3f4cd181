package faults_test

// Losses of power: R2 on a disk that forgets what was not synced.

import (
	"fmt"
	"time"

	"merlon.dev/integration/faults"
	"merlon.dev/integration/stage"
)

// cutPower takes the power from the CA and its disk, again and again, also while the
// CA starts. Each second time some of what was not synced is kept, in no order.
func cutPower(r *run, w *faults.World, disk *stage.LossyDisk, times int) {
	cuts := 0
	var operations, pages, files int
	cut := func() {
		mended := w.Rec.Break("loss of power")
		defer mended()
		var lost string
		if cuts++; cuts%2 == 0 {
			lost = disk.CutSome(w.Rng.Uint64())
		} else {
			lost = disk.Cut()
		}
		w.CA.Kill()
		disk.Mount()
		var o, p, f int
		if _, err := fmt.Sscanf(lost, "%d operations on names, %d pages of %d files lost", &o, &p, &f); err != nil {
			r.Fatalf("lossyfs: %q: %v", lost, err)
		}
		operations, pages, files = operations+o, pages+p, files+f
	}
	for i := range times {
		time.Sleep(time.Duration(50+w.Rng.IntN(450)) * time.Millisecond)
		cut()
		if i%3 == 2 { // and before it is there again
			w.CA.Restart()
			time.Sleep(time.Duration(w.Rng.IntN(300)) * time.Millisecond)
			cut()
		}
		w.RestartCA(r.bound(readyWithin))
		if r.Failed() {
			return
		}
	}
	if pages+operations == 0 {
		r.Error("no loss of power took anything, so they show nothing")
	}
	r.number("losses of power", fmt.Sprintf("%d: %d operations on names, %d pages of %d files lost", cuts, operations, pages, files))
}
