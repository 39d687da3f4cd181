// Realms after a store has lost some of its past: no nested CA gets one that another
// had, whose SVIDs and revocations would be taken for its own.

package ca_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"merlon.dev/ca"
	"merlon.dev/ca/internal/offline"
)

// The audit log knows which were given; where it is lost too, some are left out.
func TestNoRealmIsGivenAgainAfterALoss(t *testing.T) {
	for name, test := range map[string]struct {
		lose func(t *testing.T, up *testCA, backup string) []func(*ca.Config)
		want uint32
	}{
		"restore": {restoreLosing, 18},
		"restore without the log": {func(t *testing.T, up *testCA, backup string) []func(*ca.Config) {
			t.Helper()
			away(t, up.dir, "audit*", "keys/log-1")
			return restoreLosing(t, up, backup)
		}, 17},
		"-accept-older-store": {func(t *testing.T, up *testCA, _ string) []func(*ca.Config) {
			t.Helper()
			replaceDir(t, filepath.Join(up.dir, "data", "store"), filepath.Join(up.dir, "snapshot"))
			return []func(*ca.Config){accepting(lastRevision(t, up.dir))}
		}, 18},
		"-new-store": {func(t *testing.T, up *testCA, _ string) []func(*ca.Config) {
			t.Helper()
			away(t, up.dir, "store")
			return []func(*ca.Config){newStore}
		}, 18},
	} {
		t.Run(name, func(t *testing.T) {
			dir := tempDir(t)
			startCA(t, dir, quick).stop()
			if err := os.CopyFS(filepath.Join(dir, "snapshot"), os.DirFS(filepath.Join(dir, "data", "store"))); err != nil {
				t.Fatal(err)
			}
			up, file := startCA(t, dir, quick), filepath.Join(dir, "backup")
			backup(t, up, file)
			startCA(t, tempDir(t), up.nestedBelow("eu")).stop()
			if realm := up.replicas()["eu"].GetRealm(); realm != 1 {
				t.Fatalf("eu is realm %d; want 1", realm)
			}
			up.stop()
			up = startCA(t, dir, append(test.lose(t, up, file), quick)...)
			startCA(t, tempDir(t), up.nestedBelow("us")).stop()
			if realm := up.replicas()["us"].GetRealm(); realm != test.want {
				t.Errorf("us is realm %d; want %d", realm, test.want)
			}
		})
	}
}

func restoreLosing(t *testing.T, up *testCA, backup string) []func(*ca.Config) {
	t.Helper()
	away(t, up.dir, "store")
	cfg := ca.Config{TrustDomain: "shop.test", DataDir: filepath.Join(up.dir, "data"), AdminSocket: filepath.Join(up.dir, "s", "a.sock")}
	_, err := offline.Restore(t.Context(), cfg, backup, offline.RestoreOptions{})
	if _, lossy := errors.AsType[*offline.LossError](err); !lossy {
		t.Fatalf("restore: %v; want a loss", err)
	}
	if _, err := offline.Restore(t.Context(), cfg, backup, offline.RestoreOptions{AcceptLoss: true}); err != nil {
		t.Fatal(err)
	}
	return nil
}
