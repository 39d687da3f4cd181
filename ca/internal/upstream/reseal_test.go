// Another key-encryption key, also when the machine stops in the middle of it.

package upstream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/sdk/seal"
)

func TestResealChangesTheKeyThatOpens(t *testing.T) {
	cfg := config(t)
	before := open(t, cfg)
	phrase := phraseSource(t)
	for _, to := range []seal.Source{{File: newKEKFile(t, "kek2")}, phrase, {}} {
		from := cfg
		done, err := Reseal(t.Context(), cfg, to)
		if err != nil || done != (Resealed{Sealed: 5}) {
			t.Fatalf("Reseal = %+v, %v; want 5 keys", done, err)
		}
		if again, err := Reseal(t.Context(), cfg, to); err != nil || again != (Resealed{Already: 5}) {
			t.Fatalf("Reseal again = %+v, %v; want nothing to do", again, err)
		}
		cfg.KEK = to
		sameKeys(t, before, open(t, cfg))
		if from.KEK == (seal.Source{}) {
			if err := os.Remove(filepath.Join(filepath.Dir(cfg.Dir), seal.KeyFile)); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := Open(t.Context(), from); err == nil {
			t.Errorf("opens under %+v, which was replaced", from.KEK)
		}
	}
}

func TestResealRefusals(t *testing.T) {
	cfg := config(t)
	open(t, cfg)
	missing := config(t)
	for name, tt := range map[string]struct {
		cfg  Config
		to   seal.Source
		want string
	}{
		"same":       {cfg, seal.Source{}, "are the same"},
		"no keys":    {missing, seal.Source{File: newKEKFile(t, "kek2")}, "no such file"},
		"no new key": {cfg, seal.Source{File: "/nowhere"}, "/nowhere does not exist"},
	} {
		if _, err := Reseal(t.Context(), tt.cfg, tt.to); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: Reseal = %v; want %q", name, err, tt.want)
		}
	}
	if _, err := os.Stat(missing.Dir); !errors.Is(err, fs.ErrNotExist) {
		t.Error("Reseal made a folder")
	}
	open(t, cfg)
}

func TestOneHolderOfTheLock(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	first, err := Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Lock(dir); !errors.Is(err, ErrKeysInUse) {
		t.Errorf("second Lock = %v", err)
	}
	first.Close()
	again, err := Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
}

const resealForever = "MERLON_TEST_RESEAL"

func resealConfig(dir string) (Config, [2]seal.Source) {
	cfg := Config{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Dir: filepath.Join(dir, "keys")}
	return cfg, [2]seal.Source{{File: filepath.Join(dir, "kek-0")}, {File: filepath.Join(dir, "kek-1")}}
}

// resealBackAndForth is the process that is killed.
func resealBackAndForth(dir string) {
	cfg, sources := resealConfig(dir)
	fmt.Println("running")
	for i := 0; ; i++ {
		cfg.KEK = sources[i%2]
		if _, err := Reseal(context.Background(), cfg, sources[(i+1)%2]); err != nil {
			panic(err)
		}
	}
}

// Killed at any moment, every key opens under the old key or the new one, and the
// next run finishes.
func TestResealSurvivesKills(t *testing.T) {
	dir := t.TempDir()
	cfg, sources := resealConfig(dir)
	for i, source := range sources {
		text, err := os.ReadFile(newKEKFile(t, "kek"))
		if err != nil {
			t.Fatal(err)
		}
		writeFile(t, dir, fmt.Sprintf("kek-%d", i), string(text))
		if source.File != filepath.Join(dir, fmt.Sprintf("kek-%d", i)) {
			t.Fatal(source)
		}
	}
	cfg.KEK = sources[0]
	before := open(t, cfg)
	mixed := 0
	for range 25 {
		killReseal(t, dir)
		from, to := sources[0], sources[1]
		if rand.IntN(2) == 0 {
			from, to = to, from
		}
		cfg.KEK = from
		done, err := Reseal(t.Context(), cfg, to)
		if err != nil || done.Sealed+done.Already != 5 {
			t.Fatalf("Reseal after a kill = %+v, %v", done, err)
		}
		if done.Sealed > 0 && done.Already > 0 {
			mixed++
		}
		cfg.KEK = to
		sameKeys(t, before, open(t, cfg))
		if left, _ := filepath.Glob(filepath.Join(cfg.Dir, "*", unfinished+"*")); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	}
	if mixed == 0 {
		t.Error("no kill came between two keys")
	}
	t.Logf("%d of 25 kills came between two keys", mixed)
}

func killReseal(t *testing.T, dir string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), resealForever+"="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 64)
	n, err := out.Read(line)
	if err != nil || !bytes.Equal(line[:n], []byte("running\n")) {
		t.Fatalf("the process says %q, %v", line[:n], err)
	}
	time.Sleep(time.Duration(rand.IntN(int(30 * time.Millisecond))))
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("the process ended by itself: %v", err)
	}
}
