package badger_test

// A loss of power right after Badger has made a table of its log.

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"merlon.dev/integration/stage"
)

// TestTablesOutliveALossOfPower: the manifest names a table, the log that had its content
// is gone, and the disk keeps what was synced, and of names those whose folder was.
func TestTablesOutliveALossOfPower(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a disk that loses what was not synced needs root")
	}
	disk := stage.NewLossyDisk(t)
	dir := filepath.Join(disk.Path, "store")
	c := startDiskChild(t, dir)
	c.await(t, "acknowledged writes", &c.acks, 1000) // a log is full after some 2700
	log := filepath.Join(dir, "00001.mem")
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, err := os.Stat(log); errors.Is(err, fs.ErrNotExist) {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%s is still there after %d writes", log, c.acks.Load())
		}
	}
	t.Logf("%d writes were acknowledged; lost are %s", c.acks.Load(), disk.Cut())
	c.stop(t)
	disk.Mount()
	checkNewest(t, dir, c.acknowledged)
}
