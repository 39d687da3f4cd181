// What is kept on disk, and how often the CA is looked for.

package caclient

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	"merlon.dev/sdk/durable"
)

func TestFileIsReplacedInOneStepForTheAgentAlone(t *testing.T) {
	dir := t.TempDir()
	if got, err := ReadFile(dir, "x"); got != nil || err != nil {
		t.Errorf("ReadFile(nothing) = %q, %v; want nil, nil", got, err)
	}
	for _, content := range []string{"first", "second"} {
		if err := durable.WriteFile(dir, "x", []byte(content)); err != nil {
			t.Fatal(err)
		}
		if got, err := ReadFile(dir, "x"); err != nil || !bytes.Equal(got, []byte(content)) {
			t.Errorf("ReadFile() = %q, %v; want %q", got, err, content)
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("%d files are left, %v; want 1", len(entries), err)
	}
	path := filepath.Join(dir, "x")
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if got, err := ReadFile(dir, "x"); err == nil {
		t.Errorf("ReadFile(readable by the group) = %q; want an error", got)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/passwd", path); err != nil {
		t.Fatal(err)
	}
	if got, err := ReadFile(dir, "x"); err == nil {
		t.Errorf("ReadFile(a link) = %q; want an error", got)
	}
}

func TestDataDirOpenToOthersIsRefused(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	if err := MakeDataDir(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o750); err != nil {
		t.Fatal(err)
	}
	if err := MakeDataDir(dir); err == nil {
		t.Error("a data directory that the group can read was accepted")
	}
}

func TestRetriesGrowWithTheOutage(t *testing.T) {
	var away time.Duration
	for failures := range 200 {
		wait := retryIn(failures)
		if wait < firstRetry/2 || wait > lastRetry*14/10 {
			t.Fatalf("retryIn(%d) = %v", failures, wait)
		}
		// A restart that took three seconds is noticed within about one.
		if away < 3*time.Second && wait > 1500*time.Millisecond {
			t.Errorf("after %v away the pause is %v", away, wait)
		}
		away += wait
	}
}

// A crash between write and rename leaves a copy of the agent's key.
func TestUnfinishedFilesAreRemoved(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	if err := MakeDataDir(dir); err != nil {
		t.Fatal(err)
	}
	if err := durable.WriteFile(dir, svidFile, []byte("kept")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, durable.Unfinished+svidFile+"-1"), []byte("key"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := MakeDataDir(dir); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 || entries[0].Name() != svidFile {
		t.Errorf("the data directory holds %v, %v; want %s alone", entries, err, svidFile)
	}
}
