// Intermediates over time: when they are replaced, and what readers see meanwhile.

package upstream

import (
	"crypto/ecdsa"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestIntermediateIsRenewedPastHalfItsLife(t *testing.T) {
	cfg := config(t)
	k := open(t, cfg)
	old := k.X509()
	now := time.Now()
	for _, tt := range []struct {
		after time.Duration
		want  bool
	}{{11 * time.Hour, false}, {13 * time.Hour, true}, {13 * time.Hour, false}, {26 * time.Hour, true}, {0, true}} { // the last: it is not valid yet
		renewed, err := k.RenewIntermediate(t.Context(), now.Add(tt.after))
		if err != nil || renewed != tt.want {
			t.Fatalf("RenewIntermediate(+%s) = %t, %v; want %t", tt.after, renewed, err, tt.want)
		}
	}
	fresh := k.X509()
	if string(fresh.Chain[0].RawSubject) == string(old.Chain[0].RawSubject) {
		t.Error("two generations have one subject")
	}
	if string(fresh.Chain[0].SubjectKeyId) == string(old.Chain[0].SubjectKeyId) {
		t.Error("two generations have one key ID")
	}
	if got := generations(t, cfg.Dir); !slices.Equal(got, []string{"intermediate-4", "jwt-1", "log-1", "policy-1", "root-1"}) {
		t.Errorf("on disk: %v; want only the newest intermediate", got)
	}
	if again := open(t, cfg); again.X509().ID() != fresh.ID() {
		t.Error("another intermediate after reopening")
	}
}

func generations(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// The intermediate never outlives the root, nor is one made below an ended root.
// One start with a clock that is ahead must not leave a CA that cannot issue.
func TestIntermediateMadeUnderAnotherClockIsReplaced(t *testing.T) {
	k := open(t, config(t))
	now := time.Now()
	for _, at := range []time.Time{now.Add(48 * time.Hour), now} {
		if renewed, err := k.RenewIntermediate(t.Context(), at); err != nil || !renewed {
			t.Fatalf("RenewIntermediate(%v) = %t, %v; want a new one", at, renewed, err)
		}
		if got := k.X509().Chain[0]; at.Before(got.NotBefore) || at.After(got.NotAfter) {
			t.Errorf("at %v the intermediate is valid from %v to %v", at, got.NotBefore, got.NotAfter)
		}
	}
}

// By a clock that is behind the root nothing is valid, and an intermediate would end
// before it begins: each look made another one.
func TestNoIntermediateIsMadeBeforeItsRoot(t *testing.T) {
	k := open(t, config(t))
	before := k.X509()
	renewed, err := k.RenewIntermediate(t.Context(), time.Now().Add(-365*24*time.Hour))
	if renewed || err == nil || !strings.Contains(err.Error(), "set the clock right") || k.X509() != before {
		t.Errorf("RenewIntermediate a year before the root = %t, %v; want an error, and the one at hand kept", renewed, err)
	}
}

func TestIntermediateEndsWithTheRoot(t *testing.T) {
	cfg := config(t)
	cfg.RootTTL = time.Hour
	k := open(t, cfg)
	if end := k.X509().Chain[0].NotAfter; end.After(k.X509().Root.NotAfter) {
		t.Errorf("the intermediate ends at %s, after the root", end)
	}
	if _, err := k.RenewIntermediate(t.Context(), time.Now().Add(2*time.Hour)); err == nil || !strings.Contains(err.Error(), "root ended") {
		t.Errorf("RenewIntermediate below an ended root = %v", err)
	}
}

func TestReadersSeeWholeAuthoritiesDuringRenewal(t *testing.T) {
	k := open(t, config(t))
	done := make(chan struct{})
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				a := k.X509()
				key, ok := a.Signer.Public().(*ecdsa.PublicKey)
				if !ok || !key.Equal(a.Chain[0].PublicKey) {
					t.Error("key and certificate are of different generations")
					return
				}
			}
		})
	}
	now := time.Now()
	for i := range 20 {
		if _, err := k.RenewIntermediate(t.Context(), now.Add(time.Duration(i)*13*time.Hour)); err != nil {
			t.Error(err)
		}
	}
	close(done)
	readers.Wait()
}
