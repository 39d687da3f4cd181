// What a crash leaves on the disk is a policy, and nothing older than was in use.

package policyfeed

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"

	"merlon.dev/agent/internal/datadir"
	"merlon.dev/sdk/seal"
)

func TestCrashWhilePolicyIsKeptLeavesAPolicy(t *testing.T) {
	a := newAuthority(t, "orders")
	path := filepath.Join(t.TempDir(), "data")
	dir, err := datadir.Open(path, "shop.test", seal.Source{}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	kept := func(name string) []byte {
		t.Helper()
		content, err := dir.Read(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		return content
	}
	keep := func(name string, content []byte) {
		t.Helper()
		if err := dir.Write(name, content); err != nil {
			t.Fatal(err)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		run := func(generation uint64) {
			t.Helper()
			f, end := a.feed(t, dir)
			a.publishes(generation)
			f.Announce(a.announced(generation))
			synctest.Wait()
			if f.Generation() != generation {
				t.Fatalf("generation %d is in use; want %d", f.Generation(), generation)
			}
			end()
		}
		starts := func(when string, want, seen uint64) {
			t.Helper()
			f, end := a.feed(t, dir)
			if f.Generation() != want || f.Seen() != seen {
				t.Errorf("%s: an agent that starts without its CA has generation %d, and has seen %d; want %d and %d", when, f.Generation(), f.Seen(), want, seen)
			}
			end()
		}
		run(1)
		first, noted := kept(bundleFile), kept(stateFile)
		// The second cannot be noted: what is on the disk then is what a crash leaves there.
		f, end := a.feed(t, dir)
		place := filepath.Join(path, stateFile+".sealed")
		if err := errors.Join(os.Remove(place), os.Mkdir(place, 0o700)); err != nil {
			t.Fatal(err)
		}
		a.publishes(2)
		f.Announce(a.announced(2))
		synctest.Wait()
		if f.Generation() != 1 {
			t.Errorf("generation %d is in use, and not noted", f.Generation())
		}
		end()
		if err := os.Remove(place); err != nil {
			t.Fatal(err)
		}
		keep(stateFile, noted)
		starts("a crash before the second was noted", 2, 2)
		run(2)
		starts("in order", 2, 2)
		keep(bundleFile, first)
		starts("the first is put back", 0, 2)
	})
}
