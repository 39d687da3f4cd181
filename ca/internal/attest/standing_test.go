// What an operator decided about an agent holds against whatever its node does,
// at any moment.

package attest

import (
	"context"
	"encoding/json"
	"errors"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/store"
)

func decide(t *testing.T, st store.Store, id spiffeid.ID, to Standing, from ...Standing) {
	t.Helper()
	d := Decision{From: from, To: to, Note: "because", Now: time.Now()}
	if _, err := Decide(t.Context(), st, id, d); err != nil {
		t.Fatal(err)
	}
}

func record(t *testing.T, st store.Store, name string) *Agent {
	t.Helper()
	kv, _, err := st.Get(t.Context(), AgentPrefix+name)
	if err != nil {
		t.Fatal(err)
	}
	a, err := DecodeAgent(kv)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestWhatAStandingLets(t *testing.T) {
	for name, test := range map[string]struct {
		standing    Standing
		acts, joins error
	}{
		"good":    {Good, nil, nil},
		"evicted": {Evicted, ErrEvicted, nil},
		"banned":  {Banned, ErrBanned, ErrBanned},
	} {
		t.Run(name, func(t *testing.T) {
			st := openStore(t)
			a, err := redeem(t, st, join(t, st, "n1"), time.Now())
			if err != nil {
				t.Fatal(err)
			}
			token := join(t, st, "n1") // made before the decision
			if test.standing != Good {
				decide(t, st, a.ID, test.standing, Good)
			}
			before := record(t, st, "n1")
			end := time.Now().Add(7 * time.Hour)
			if err := Renewed(t.Context(), st, a.ID, SVID{}, SVID{Serial: "2", NotAfter: end}); !errors.Is(err, test.acts) {
				t.Errorf("Renewed() = %v; want %v", err, test.acts)
			}
			if err := Acknowledged(t.Context(), st, a.ID, 99, SVID{Serial: "3", NotAfter: end}); !errors.Is(err, test.acts) {
				t.Errorf("Acknowledged() = %v; want %v", err, test.acts)
			}
			if after := record(t, st, "n1"); test.acts != nil && after.Revision != before.Revision {
				t.Errorf("what was refused wrote the record: %+v", after)
			}
			again, err := redeem(t, st, token, time.Now())
			if !errors.Is(err, test.joins) {
				t.Fatalf("RedeemJoinToken() = %v; want %v", err, test.joins)
			}
			if err == nil {
				if got := record(t, st, "n1"); got.Standing != Good || got.Handle != a.Handle || again.Revision != got.AttestedRevision {
					t.Errorf("after it attested anew: %+v; want good standing and the same handle", got)
				}
				return
			}
			if got := record(t, st, "n1"); got.Revision != before.Revision {
				t.Errorf("an attestation that was refused wrote the record: %+v", got)
			}
			// The evidence was not used up, and counts once the ban is lifted.
			decide(t, st, a.ID, Evicted, Banned)
			if _, err := redeem(t, st, token, time.Now()); err != nil {
				t.Errorf("after the ban was lifted: %v", err)
			}
		})
	}
}

// overtaken lets by happen between what a transaction was decided by and the
// transaction itself, once.
type overtaken struct {
	store.Store
	by func()
}

func (o *overtaken) Txn(ctx context.Context, cmps []store.Cmp, then, otherwise []store.Op) (store.TxnResult, error) {
	if by := o.by; by != nil {
		o.by = nil
		by()
	}
	return o.Store.Txn(ctx, cmps, then, otherwise)
}

func TestABanThatComesMeanwhileHolds(t *testing.T) {
	for name, act := range map[string]func(store.Store, *Agent, string) error{
		"attestation": func(st store.Store, _ *Agent, token string) error {
			_, err := redeem(t, st, token, time.Now())
			return err
		},
		"renewal": func(st store.Store, a *Agent, _ string) error {
			return Renewed(t.Context(), st, a.ID, SVID{}, SVID{Serial: "2", NotAfter: time.Now().Add(time.Hour)})
		},
		"acknowledgement": func(st store.Store, a *Agent, _ string) error {
			return Acknowledged(t.Context(), st, a.ID, 7, SVID{Serial: "3", NotAfter: time.Now()})
		},
	} {
		t.Run(name, func(t *testing.T) {
			st := openStore(t)
			a, err := redeem(t, st, join(t, st, "n1"), time.Now())
			if err != nil {
				t.Fatal(err)
			}
			racing := &overtaken{Store: st, by: func() { decide(t, st, a.ID, Banned, Good) }}
			if err := act(racing, a, join(t, st, "n1")); !errors.Is(err, ErrBanned) {
				t.Errorf("error = %v; want ErrBanned", err)
			}
			if got := record(t, st, "n1"); got.Standing != Banned || got.TrustSequence != 0 {
				t.Errorf("record = %+v; want it banned, and nothing acknowledged", got)
			}
		})
	}
}

func TestDecisionAndWhatBelongsToItAreOneTransaction(t *testing.T) {
	st := openStore(t)
	a, err := redeem(t, st, join(t, st, "n1"), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	decided, err := Decide(t.Context(), st, a.ID, Decision{From: []Standing{Good}, To: Banned, Now: time.Now(), With: func(a *Agent) (store.Op, error) {
		return store.Put("beside", []byte(a.ID.String())), nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	kv, _, err := st.Get(t.Context(), "beside")
	if err != nil || kv.ModRevision != decided.Revision || record(t, st, "n1").Revision != decided.Revision {
		t.Errorf("revisions of decision and what belongs to it: %d, %d, %v; want one", decided.Revision, kv.ModRevision, err)
	}
	refused := Decision{From: []Standing{Good, Evicted}, To: Evicted, Refusal: "is banned", With: func(*Agent) (store.Op, error) {
		return store.Put("more", nil), nil
	}}
	_, err = Decide(t.Context(), st, a.ID, refused)
	if e, ok := errors.AsType[*StandingError](err); !ok || e.Error() != a.ID.String()+" is banned" {
		t.Errorf("eviction of a banned agent: %v", err)
	}
	if _, _, err := st.Get(t.Context(), "more"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("a decision that was refused left something: %v", err)
	}
	if _, err := Decide(t.Context(), st, spiffeid.RequireFromPath(td, "/agent/nobody"), refused); !errors.Is(err, ErrUnknownAgent) {
		t.Errorf("decision about nobody: %v", err)
	}
}

// A Merlon that knows no standings must not take a banned agent for a good one,
// and this one not what a later one may decide.
func TestRecordsWithAStandingFailClosed(t *testing.T) {
	st := openStore(t)
	a, err := redeem(t, st, join(t, st, "n1"), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	version := func() (v struct {
		Version int `json:"v"`
	},
	) {
		kv, _, err := st.Get(t.Context(), AgentPrefix+"n1")
		if err != nil || json.Unmarshal(kv.Value, &v) != nil {
			t.Fatal(err)
		}
		return v
	}
	if v := version(); v.Version != encodingVersion {
		t.Errorf("a good record has version %d; want %d, which older ones read", v.Version, encodingVersion)
	}
	decide(t, st, a.ID, Banned, Good)
	if v := version(); v.Version != standingVersion {
		t.Errorf("a banned record has version %d; want %d, which older ones refuse", v.Version, standingVersion)
	}
	unknown := `{"v":2,"spiffe_id":"spiffe://shop.test/agent/n1","handle":1,"standing":"quarantined"}`
	if a, err := DecodeAgent(store.KV{Key: AgentPrefix + "n1", Value: []byte(unknown)}); err == nil {
		t.Errorf("DecodeAgent(%s) = %+v; want an error", unknown, a)
	}
}
