// A process that is killed while it appends, rotates, saves and drops: what it
// acknowledged is there, and the log opens and verifies.

package audit

import (
	"bufio"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"go.uber.org/goleak"

	"merlon.dev/ca/internal/merkle"
	"merlon.dev/sdk/checkpoint"
)

// appending makes the test binary a process that appends to the log in its
// working directory.
const (
	appending = "MERLON_TEST_APPEND"
	killedLog = "audit.jsonl"
)

func TestMain(m *testing.M) {
	if os.Getenv(appending) != "" {
		fmt.Fprintln(os.Stderr, appendForever())
		os.Exit(1) //nolint:forbidigo // it ends by being killed
	}
	goleak.VerifyTestMain(m)
}

// killedOptions let a log of 64 KiB rotate every few groups.
func killedOptions() Options { return Options{MaxBytes: 64 << 10} }

// fixedKey is the same in each life.
func fixedKey() Key {
	private := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	return Key{
		Key:    checkpoint.Key{TrustDomain: "shop.test", Replica: "ca-1", Public: private.Public().(ed25519.PublicKey)},
		Signer: private,
	}
}

// appendForever says after each Append which record was acknowledged.
func appendForever() error {
	l, err := Open(killedLog, killedOptions())
	if err != nil {
		return err
	}
	key := fixedKey()
	key.Chain = func() ([][]byte, error) { return [][]byte{{1}}, nil } // nobody verifies it here
	if err := l.Publish(key); err != nil {
		return err
	}
	for {
		records := slices.Repeat([]Record{{Type: Issue, Serial: "a"}}, 1+rand.IntN(30))
		if err := l.Append(context.Background(), records...); err != nil {
			return err
		}
		fmt.Println(l.tree.Size())
		if err := errors.Join(l.save(), l.retain(context.Background(), time.Now())); err != nil {
			return err
		}
	}
}

func TestKilledLogHasAllThatItAcknowledged(t *testing.T) {
	path := filepath.Join(t.TempDir(), killedLog)
	key := testKey(t)
	key.Signer, key.Key = fixedKey().Signer, fixedKey().Key
	begun := uint64(1)
	for round := range 12 {
		acknowledged := killedAppend(t, path)
		l := openSigned(t, path, key, killedOptions())
		c, err := l.Checkpoint()
		if err != nil || c.Size < acknowledged {
			t.Fatalf("round %d: %d records, %v; %d were acknowledged", round, c.Size, err, acknowledged)
		}
		if begun, err = Begin(path); err != nil {
			t.Fatal(err)
		}
		checkProven(t, l, c, begun)
		closeLog(t, l)
	}
	if begun == 1 {
		t.Error("nothing was ever dropped")
	}
	// The chain of certificates is not that of the fixed key: all else is good.
	l := openSigned(t, path, key, killedOptions())
	appendRecord(t, l, Record{Type: Issue})
	closeLog(t, l)
	if n, err := verifyWithoutKey(path); err != nil {
		t.Errorf("after %d records: %v", n, err)
	}
}

// killedAppend runs a process that appends, kills it, and returns the last
// record that it acknowledged.
func killedAppend(t *testing.T, path string) (acknowledged int64) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Dir, cmd.Env = filepath.Dir(path), append(os.Environ(), appending+"=1")
	cmd.Stderr = t.Output()
	stdout, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	kill := time.AfterFunc(10*time.Second, func() { _ = cmd.Process.Kill() }) // a slow machine
	defer kill.Stop()
	lines := bufio.NewScanner(stdout)
	for n := 0; lines.Scan(); n++ {
		if acknowledged, err = strconv.ParseInt(lines.Text(), 10, 64); err != nil {
			t.Fatalf("the process says %q", lines.Text())
		}
		if n == 0 {
			time.AfterFunc(time.Duration(20+rand.IntN(150))*time.Millisecond, func() { _ = cmd.Process.Kill() })
		}
	}
	_ = cmd.Wait() // killed, as it should be
	if acknowledged == 0 {
		t.Fatal("nothing was acknowledged")
	}
	return acknowledged
}

// verifyWithoutKey walks the log as Verify does, under the checkpoint that is
// there.
func verifyWithoutKey(path string) (uint64, error) {
	_, last, err := openTree(path)
	if err != nil {
		return 0, err
	}
	v := &verifier{report: Report{Checkpoint: last}, tree: merkle.Verified(treeDir(path), last.Size, last.Root)}
	if err := v.files(path); err != nil {
		return v.report.Last, err
	}
	return v.report.Last, v.ending()
}
