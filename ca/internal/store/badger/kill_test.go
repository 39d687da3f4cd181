package badger_test

// Tests that need a second process: the test binary runs itself again.

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
)

const childDir = "MERLON_TEST_STORE_DIR"

// childOptions has a history so short that the child is compacting when it is
// killed.
var childOptions = badger.Options{KeepRevisions: 700}

// runChild is the whole life of a child process: 32 writers report every write
// that was acknowledged to them, until they are killed. Elsewhere it returns.
func runChild() {
	dir := os.Getenv(childDir)
	if dir == "" {
		return
	}
	s, err := badger.Open(dir, childOptions)
	if err == nil {
		writeForever(s)
	}
	fmt.Fprintln(os.Stderr, "child:", err)
	os.Exit(1) //nolint:forbidigo // the main of a child process
}

func writeForever(s *badger.Store) {
	fmt.Println("open")
	var wg sync.WaitGroup
	for w := range 32 {
		wg.Go(func() {
			for i := 0; ; i++ {
				key := fmt.Sprintf("%d/%d/%d", os.Getpid(), w, i)
				res, err := s.Txn(context.Background(), nil, []store.Op{
					store.Put(key, []byte(key)),
					store.Put(fmt.Sprintf("last/%d", w), []byte(key)),
				}, nil)
				if err != nil {
					fmt.Fprintln(os.Stderr, err)
					return
				}
				fmt.Printf("%s %d\n", key, res.Revision)
			}
		})
	}
	wg.Wait()
}

// child is a running child process.
type child struct {
	cmd   *exec.Cmd
	lines *bufio.Scanner
}

func startChild(t testing.TB, dir string) *child {
	t.Helper()
	return startChildWith(t, childDir+"="+dir)
}

// startChildWith starts the child that env, NAME=VALUE, asks for.
func startChildWith(t testing.TB, env string) *child {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), env)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c := &child{cmd, bufio.NewScanner(out)}
	t.Cleanup(func() { c.kill(t) })
	if !c.lines.Scan() || c.lines.Text() != "open" {
		t.Fatalf("child said %q", c.lines.Text())
	}
	return c
}

// kill sends SIGKILL and returns what the child had still said. A second call
// does nothing.
func (c *child) kill(t testing.TB) (lines []string) {
	t.Helper()
	if c.cmd.ProcessState != nil {
		return nil
	}
	if err := c.cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	for c.lines.Scan() {
		lines = append(lines, c.lines.Text())
	}
	if _, ok := errors.AsType[*exec.ExitError](c.cmd.Wait()); !ok {
		t.Error("child ended by itself")
	}
	return lines
}

// TestAcknowledgedWritesSurviveSIGKILL shows that nothing is acknowledged
// before it left the process. It shows nothing about power loss: the kernel
// still has all pages.
func TestAcknowledgedWritesSurviveSIGKILL(t *testing.T) {
	dir := t.TempDir()
	acknowledged := make(map[string]string) // key → revision
	for range 3 {
		c := startChild(t, dir)
		for n := 500 + rand.IntN(1500); n > 0 && c.lines.Scan(); n-- {
			key, revision, _ := strings.Cut(c.lines.Text(), " ")
			acknowledged[key] = revision
		}
		for _, line := range c.kill(t) {
			if key, revision, ok := strings.Cut(line, " "); ok {
				acknowledged[key] = revision
			}
		}
		checkAcknowledged(t, dir, acknowledged)
	}
	if len(acknowledged) < 1500 {
		t.Errorf("only %d writes were acknowledged", len(acknowledged))
	}
}

func checkAcknowledged(t *testing.T, dir string, acknowledged map[string]string) {
	t.Helper()
	s := open(t, dir, childOptions)
	defer s.Close()
	for key, revision := range acknowledged {
		kv, _, err := s.Get(t.Context(), key)
		if err != nil || string(kv.Value) != key || fmt.Sprint(kv.ModRevision) != revision {
			t.Fatalf("acknowledged write of %s at revision %s: found %+v, %v", key, revision, kv, err)
		}
	}
	checkLatest(t, s, acknowledged)
	checkLog(t, s)
}

// checkLatest holds the last write of each writer against its own report.
func checkLatest(t *testing.T, s *badger.Store, acknowledged map[string]string) {
	t.Helper()
	kvs, _, _, err := s.List(t.Context(), "last/", "", 100, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, kv := range kvs {
		own, _, err := s.Get(t.Context(), string(kv.Value))
		if err != nil || own.ModRevision != kv.ModRevision {
			t.Fatalf("half a transaction: %+v beside %+v, %v", kv, own, err)
		}
		if revision, ok := acknowledged[own.Key]; ok && revision != fmt.Sprint(kv.ModRevision) {
			t.Fatalf("%s was acknowledged at revision %s; found %+v", own.Key, revision, kv)
		}
	}
}

// checkLog watches the whole log that is kept: no revision is missing.
func checkLog(t *testing.T, s *badger.Store) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	last, err := s.Revision(ctx)
	if err != nil {
		t.Fatal(err)
	}
	from := max(1, int(last)-int(childOptions.KeepRevisions))
	ch, err := s.Watch(ctx, "", uint64(from))
	if err != nil {
		t.Fatal(err)
	}
	for want := uint64(from) + 1; want <= last; want++ {
		if b := <-ch; b.Revision != want || len(b.Events) != 2 {
			t.Fatalf("revision log has %+v where revision %d should be", b, want)
		}
	}
	cancel()
	for range ch {
	}
}

func TestSecondProcessIsRefused(t *testing.T) {
	dir := t.TempDir()
	c := startChild(t, dir)
	_, err := badger.Open(dir, badger.Options{})
	want := fmt.Sprintf("data_dir in use by another merlon-ca (pid %d)", c.cmd.Process.Pid)
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Fatalf("Open = %v; want %q", err, want)
	}
	c.kill(t)
	open(t, dir, childOptions).Close()
}

func TestSecondStoreInOneProcessIsRefused(t *testing.T) {
	dir := t.TempDir()
	defer open(t, dir, badger.Options{}).Close()
	if _, err := badger.Open(dir, badger.Options{}); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Fatalf("Open = %v", err)
	}
}
