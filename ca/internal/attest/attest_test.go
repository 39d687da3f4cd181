// Tokens and the records of agents, over the real store.

package attest

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"

	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var td = spiffeid.RequireTrustDomainFromString("shop.test")

func openStore(t *testing.T) store.Store {
	t.Helper()
	st, err := badger.Open(t.TempDir(), badger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := st.Close(); err != nil {
			t.Error(err)
		}
	})
	return st
}

func join(t *testing.T, st store.Store, name string) string {
	t.Helper()
	token, err := CreateJoinToken(t.Context(), st, name, time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func redeem(t *testing.T, st store.Store, token string, now time.Time) (*Agent, error) {
	t.Helper()
	return RedeemJoinToken(t.Context(), st, td, token, now, now.Add(time.Hour))
}

func TestOneOfManyRedeemsAToken(t *testing.T) {
	st := openStore(t)
	token := join(t, st, "n1")
	wantOneWinner(t, func() error {
		_, err := redeem(t, st, token, time.Now())
		return err
	})
}

// wantOneWinner lets 200 redeem one token at once.
func wantOneWinner(t *testing.T, redeem func() error) {
	t.Helper()
	var wins atomic.Int32
	var wg sync.WaitGroup
	for range 200 {
		wg.Go(func() {
			switch err := redeem(); {
			case err == nil:
				wins.Add(1)
			case !errors.Is(err, ErrUnknownToken):
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if wins.Load() != 1 {
		t.Errorf("%d redeemed the token; want 1", wins.Load())
	}
}

func TestNodeKeepsItsHandleWhenItAttestsAgain(t *testing.T) {
	st := openStore(t)
	first, err := redeem(t, st, join(t, st, "n1"), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	again, err := redeem(t, st, join(t, st, "n1"), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	other, err := redeem(t, st, join(t, st, "n2"), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if again.Handle != first.Handle || again.Revision <= first.Revision {
		t.Errorf("second attestation: handle %x revision %d; first %x, %d", again.Handle, again.Revision, first.Handle, first.Revision)
	}
	if other.Handle == first.Handle || other.Handle == 0 || other.Handle >= 1<<48 {
		t.Errorf("another node's handle is %x; the first has %x", other.Handle, first.Handle)
	}
}

func TestTokenKindsDoNotMix(t *testing.T) {
	st := openStore(t)
	now := time.Now()
	reader, err := CreateReaderToken(t.Context(), st, "main", now.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := redeem(t, st, reader, now); !errors.Is(err, ErrUnknownToken) {
		t.Errorf("a reader token as join token: %v", err)
	}
	swapped := strings.Replace(reader, readerKind, joinKind, 1)
	if _, err := redeem(t, st, swapped, now); !errors.Is(err, ErrUnknownToken) {
		t.Errorf("a reader token under the other name: %v", err)
	}
	for bundle, want := range map[string]error{"main": nil, "other": ErrTokenScope} {
		if err := CheckReaderToken(t.Context(), st, reader, bundle, now); !errors.Is(err, want) {
			t.Errorf("CheckReaderToken(%s) = %v; want %v", bundle, err, want)
		}
	}
	if err := CheckReaderToken(t.Context(), st, reader, "main", now.Add(time.Hour)); !errors.Is(err, ErrExpiredToken) {
		t.Errorf("at its end: %v", err)
	}
	if err := CheckReaderToken(t.Context(), st, join(t, st, "main"), "main", now); !errors.Is(err, ErrUnknownToken) {
		t.Errorf("a join token as reader token: %v", err)
	}
}

func TestExpiredJoinTokenLeavesNoAgent(t *testing.T) {
	st := openStore(t)
	token := join(t, st, "n1")
	if _, err := redeem(t, st, token, time.Now().Add(time.Hour)); !errors.Is(err, ErrExpiredToken) {
		t.Errorf("expired token: %v", err)
	}
	if _, _, err := st.Get(t.Context(), AgentPrefix+"n1"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("the refused node has a record: %v", err)
	}
}

func TestRenewedMovesTheEndOnly(t *testing.T) {
	st := openStore(t)
	a, err := redeem(t, st, join(t, st, "n1"), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	end := time.Now().Add(5 * time.Hour).UTC()
	if err := Renewed(t.Context(), st, a.ID, SVID{Serial: "1", NotAfter: a.NotAfter}, SVID{Serial: "2", NotAfter: end}); err != nil {
		t.Fatal(err)
	}
	kv, _, err := st.Get(t.Context(), AgentPrefix+"n1")
	if err != nil {
		t.Fatal(err)
	}
	got, err := DecodeAgent(kv)
	if err != nil || !got.NotAfter.Equal(end) || got.Handle != a.Handle || !got.AttestedAt.Equal(a.AttestedAt) {
		t.Errorf("record = %+v, %v; want the new end and all else as before", got, err)
	}
	unknown := spiffeid.RequireFromPath(td, "/agent/unknown")
	if err := Renewed(t.Context(), st, unknown, SVID{Serial: "1", NotAfter: end}, SVID{Serial: "2", NotAfter: end}); !errors.Is(err, ErrUnknownAgent) {
		t.Errorf("unknown agent: %v", err)
	}
}

// interleaved runs between once, before the first read of an agent's record.
type interleaved struct {
	store.Store
	once    sync.Once
	between func()
}

func (i *interleaved) Get(ctx context.Context, key string) (store.KV, uint64, error) {
	if strings.HasPrefix(key, AgentPrefix) {
		i.once.Do(i.between)
	}
	return i.Store.Get(ctx, key)
}

// The worst moment: the token is read, then somebody else uses it up, then the
// agent's record is read, which by then is there.
func TestTokenUsedUpBetweenTheReadsIsRefused(t *testing.T) {
	st := openStore(t)
	token := join(t, st, "n1")
	racing := &interleaved{Store: st, between: func() {
		if _, err := redeem(t, st, token, time.Now()); err != nil {
			t.Error(err)
		}
	}}
	if _, err := redeem(t, racing, token, time.Now()); !errors.Is(err, ErrUnknownToken) {
		t.Errorf("second use: %v; want ErrUnknownToken", err)
	}
}

// Of two who renew with one SVID the slower is found out, whoever that is; one
// whose answers get lost is not.
func TestRenewalsShowACopiedSVID(t *testing.T) {
	start := time.Now().Add(time.Hour)
	at := func(serial string, minutes int) SVID {
		return SVID{Serial: serial, NotAfter: start.Add(time.Duration(minutes) * time.Minute)}
	}
	type step struct {
		shown, issued SVID
		want          error
	}
	for name, steps := range map[string][]step{
		"one after the other":   {{at("0", 0), at("1", 1), nil}, {at("1", 1), at("2", 2), nil}, {at("2", 2), at("3", 3), nil}},
		"answers that got lost": {{at("0", 0), at("1", 1), nil}, {at("0", 0), at("2", 2), nil}, {at("0", 0), at("3", 3), nil}, {at("3", 3), at("4", 4), nil}},
		"the thief is slower":   {{at("0", 0), at("1", 1), nil}, {at("1", 1), at("2", 2), nil}, {at("0", 0), at("3", 3), ErrCloned}},
		"the thief is faster":   {{at("0", 0), at("1", 1), nil}, {at("0", 0), at("2", 2), nil}, {at("1", 1), at("3", 3), ErrCloned}},
		"a store that took no writes": {
			{at("0", 0), at("1", 1), nil}, // 2 was issued for 1 and is not noted
			{at("2", 2), at("3", 3), nil}, {at("3", 3), at("4", 4), nil}, {at("1", 1), at("5", 5), ErrCloned},
		},
	} {
		t.Run(name, func(t *testing.T) {
			st := openStore(t)
			a, err := redeem(t, st, join(t, st, "n1"), time.Now())
			if err != nil {
				t.Fatal(err)
			}
			for i, step := range steps {
				if err := Renewed(t.Context(), st, a.ID, step.shown, step.issued); !errors.Is(err, step.want) {
					t.Fatalf("step %d: Renewed(%s for %s) = %v; want %v", i, step.issued.Serial, step.shown.Serial, err, step.want)
				}
			}
			// A node that attests anew begins anew.
			if _, err := redeem(t, st, join(t, st, "n1"), time.Now()); err != nil {
				t.Fatal(err)
			}
			if err := Renewed(t.Context(), st, a.ID, at("9", -9), at("10", 10)); err != nil {
				t.Errorf("the first renewal after it attested anew: %v", err)
			}
		})
	}
}
