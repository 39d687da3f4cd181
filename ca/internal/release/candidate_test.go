// Candidates, promotions and rollbacks, over the real store.

package release

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"merlon.dev/ca/internal/store"
)

func publish(t *testing.T, p *Publisher, content string) *Head {
	t.Helper()
	h, err := p.Publish(t.Context(), "main", []byte(content))
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// serves holds that content is in force as generation, and not only in the cache.
func serves(t *testing.T, p *Publisher, generation uint64, content string) {
	t.Helper()
	signed, r, err := New(p.opts).Current(t.Context(), "main")
	if want := fmt.Sprintf("main %d\n%s", generation, content); err != nil || string(signed) != want || r.Generation != generation {
		t.Errorf("in force: %q, %+v, %v; want %q", signed, r, err, want)
	}
}

func TestCandidateTravelsBesideWhatIsInForce(t *testing.T) {
	p, _ := newPublisher(t)
	ctx := t.Context()
	var state *StateError
	if _, err := p.PublishCandidate(ctx, "main", []byte("new")); !errors.As(err, &state) {
		t.Fatalf("a candidate before any policy: %v", err)
	}
	publish(t, p, "old")
	h, err := p.PublishCandidate(ctx, "main", []byte("new"))
	if err != nil || h.Generation != 1 || h.Candidate.Generation != 2 || !h.Candidate.Canary.Shadow() {
		t.Fatalf("candidate: %+v, %v", h, err)
	}
	serves(t, p, 1, "old")
	if signed, r, err := p.Candidate(ctx, "main"); err != nil || string(signed) != "main 2 candidate\nnew" || r.Generation != 2 {
		t.Fatalf("Candidate = %q, %+v, %v", signed, r, err)
	}
	if h, err = p.Stage(ctx, "main", 2, Canary{PerMille: 100}); err != nil || h.Candidate.Step != 2 || h.Candidate.Canary.PerMille != 100 {
		t.Fatalf("canary: %+v, %v", h.Candidate, err)
	}
	if _, err := p.Stage(ctx, "main", 3, Canary{}); !errors.As(err, &state) {
		t.Errorf("another candidate is meant: %v", err)
	}
	if h, err = p.Promote(ctx, "main", 2); err != nil || h.Generation != 3 || h.How != Promoted || h.Of != 2 || h.Candidate != nil {
		t.Fatalf("promoted: %+v, %v", h, err)
	}
	serves(t, p, 3, "new")
	if _, _, err := p.Candidate(ctx, "main"); !errors.Is(err, ErrNone) {
		t.Errorf("the candidate after the promotion: %v", err)
	}
	for what, err := range map[string]error{
		"promote": second(p.Promote(ctx, "main", 0)), "abort": second(p.Abort(ctx, "main", 0)), "stage": second(p.Stage(ctx, "main", 0, Canary{})),
	} {
		if !errors.As(err, &state) {
			t.Errorf("%s without a candidate: %v", what, err)
		}
	}
}

func second[T any](_ T, err error) error { return err }

// Whoever saw the candidate must not find its number again.
func TestNoGenerationIsGivenOutTwice(t *testing.T) {
	p, _ := newPublisher(t)
	publish(t, p, "one")
	if _, err := p.PublishCandidate(t.Context(), "main", []byte("x")); err != nil {
		t.Fatal(err)
	}
	if h, err := p.Abort(t.Context(), "main", 2); err != nil || h.Candidate != nil || h.Generation != 1 {
		t.Fatalf("abort: %+v, %v", h, err)
	}
	if h := publish(t, p, "two"); h.Generation != 3 {
		t.Errorf("the push after it is generation %d; want 3", h.Generation)
	}
}

func TestNewPolicyEndsTheCandidate(t *testing.T) {
	p, _ := newPublisher(t)
	for what, put := range map[string]func() (*Head, error){
		"a push":     func() (*Head, error) { return p.Publish(t.Context(), "main", []byte("urgent")) },
		"a rollback": func() (*Head, error) { return p.RollBack(t.Context(), "main", 0) },
	} {
		publish(t, p, "one")
		publish(t, p, "two")
		if _, err := p.PublishCandidate(t.Context(), "main", []byte("x")); err != nil {
			t.Fatal(err)
		}
		if h, err := put(); err != nil || h.Candidate != nil {
			t.Errorf("%s: %+v, %v; want no candidate", what, h, err)
		}
	}
}

func TestRollbackIsANewGenerationOfOldContent(t *testing.T) {
	p, _ := newPublisher(t)
	ctx := t.Context()
	publish(t, p, "one")
	var state *StateError
	if _, err := p.RollBack(ctx, "main", 0); !errors.As(err, &state) {
		t.Fatalf("with nothing before: %v", err)
	}
	publish(t, p, "two")
	publish(t, p, "three")
	for _, step := range []struct {
		to, generation, of uint64
		content            string
	}{
		{0, 4, 2, "two"}, // the one before
		{0, 5, 1, "one"}, // and further back, not forward again
		{3, 6, 3, "three"},
		{4, 7, 2, "two"}, // itself a rollback: of what
	} {
		h, err := p.RollBack(ctx, "main", step.to)
		if err != nil || h.Generation != step.generation || h.Of != step.of || h.How != RolledBack {
			t.Fatalf("rollback to %d: %+v, %v; want %+v", step.to, h, err, step)
		}
		serves(t, p, step.generation, step.content)
	}
	for _, to := range []uint64{7, 99} {
		if _, err := p.RollBack(ctx, "main", to); !errors.As(err, &state) {
			t.Errorf("rollback to %d: %v", to, err)
		}
	}
	if _, err := p.RollBack(ctx, "none", 0); !errors.Is(err, ErrNone) {
		t.Errorf("of a bundle that is not there: %v", err)
	}
}

func TestTenGenerationsAreKept(t *testing.T) {
	p, _ := newPublisher(t)
	for i := range keepGenerations + 3 {
		publish(t, p, fmt.Sprint(i+1))
	}
	blobs, err := p.blobs(t.Context())
	if err != nil || len(blobs) != keepGenerations {
		t.Fatalf("%d blobs, %v; want %d", len(blobs), err, keepGenerations)
	}
	if _, err := p.RollBack(t.Context(), "main", 3); err == nil {
		t.Error("a generation that is not kept came back")
	}
	h, err := p.RollBack(t.Context(), "main", 4)
	if err != nil || h.Of != 4 {
		t.Fatalf("the oldest that is kept: %+v, %v", h, err)
	}
	serves(t, p, keepGenerations+4, "4")
	if _, r, _, err := p.Kept(t.Context(), "main", 4); err != nil || r != nil {
		t.Errorf("the eleventh is kept: %+v, %v", r, err)
	}
}

// The old content is signed again only if this CA signed it.
func TestForgedHistoryIsNotTakenUp(t *testing.T) {
	p, st := newPublisher(t)
	publish(t, p, "one")
	h := publish(t, p, "two")
	forged := []byte("nobody signed this")
	old := h.History[0]
	if err := p.writeBlob(t.Context(), "main", &old, forged); err != nil {
		t.Fatal(err)
	}
	next := *h
	next.History = []Release{old}
	put, err := next.put()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := st.Txn(t.Context(), nil, []store.Op{put}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := p.RollBack(t.Context(), "main", 0); err == nil || !strings.Contains(err.Error(), "not signed") {
		t.Errorf("rollback to what nobody signed: %v", err)
	}
	serves(t, p, 2, "two")
}

// A candidate is not what is in force, and the other way round.
func TestCandidateIsNotTakenForAnother(t *testing.T) {
	p, _ := newPublisher(t)
	publish(t, p, "one")
	h, err := p.PublishCandidate(t.Context(), "main", []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.again(t.Context(), h, &h.Candidate.Release, false, RolledBack, 2); err == nil {
		t.Error("a candidate was taken for a policy that was in force")
	}
	if _, err := p.again(t.Context(), h, &h.Release, true, Promoted, 1); err == nil {
		t.Error("a policy in force was taken for a candidate")
	}
}

func TestPauseHappensOnce(t *testing.T) {
	p, _ := newPublisher(t)
	ctx := t.Context()
	publish(t, p, "one")
	if _, err := p.PublishCandidate(ctx, "main", []byte("x")); err != nil {
		t.Fatal(err)
	}
	alarm := Alarm{At: time.Now().UTC().Truncate(time.Second), Allowed: 100, Denied: 7}
	if h, err := p.Pause(ctx, "main", 2, 1, alarm); err != nil || h != nil {
		t.Fatalf("pause of a shadow: %+v, %v", h, err)
	}
	if _, err := p.Stage(ctx, "main", 0, Canary{Destinations: []string{"spiffe://shop.test/a"}}); err != nil {
		t.Fatal(err)
	}
	for _, other := range []struct {
		generation uint64
		step       uint32
	}{{2, 1}, {2, 3}, {1, 2}} { // what was counted is of another step, or candidate
		if h, err := p.Pause(ctx, "main", other.generation, other.step, alarm); err != nil || h != nil {
			t.Fatalf("pause of %+v: %+v, %v", other, h, err)
		}
	}
	var wg sync.WaitGroup
	paused := make(chan *Head, 8)
	for range cap(paused) { // as many replicas
		wg.Go(func() {
			h, err := p.Pause(context.Background(), "main", 2, 2, alarm)
			if err != nil {
				t.Error(err)
			}
			paused <- h
		})
	}
	wg.Wait()
	close(paused)
	done := 0
	for h := range paused {
		if h != nil {
			done++
		}
	}
	h, err := p.head(ctx, "main")
	if err != nil || done != 1 || !h.Candidate.Canary.Shadow() || h.Candidate.Alarm == nil || *h.Candidate.Alarm != alarm || h.Candidate.Step != 3 || h.Generation != 1 {
		t.Errorf("%d pauses, %+v, %v", done, h.Candidate, err)
	}
	if h, err = p.Stage(ctx, "main", 0, Canary{PerMille: 1}); err != nil || h.Candidate.Alarm != nil {
		t.Errorf("the alarm after the operator went on: %+v, %v", h.Candidate, err)
	}
}

// What is renewed is renewed with its candidate, which stays newer.
func TestRenewalKeepsTheCandidate(t *testing.T) {
	p, _ := newPublisher(t)
	ctx := t.Context()
	publish(t, p, "zero")
	publish(t, p, "one")
	if _, err := p.PublishCandidate(ctx, "main", []byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Stage(ctx, "main", 0, Canary{PerMille: 5}); err != nil {
		t.Fatal(err)
	}
	renewed, err := p.Renew(ctx, time.Now().Add(validity*3/4))
	if err != nil || len(renewed) != 1 {
		t.Fatalf("Renew: %v, %v", renewed, err)
	}
	h := renewed[0]
	if h.Generation != 4 || h.Of != 2 || h.Candidate == nil || h.Candidate.Generation != 5 || h.Candidate.Canary.PerMille != 5 || h.Candidate.Step != 3 {
		t.Errorf("renewed: %+v with %+v", h, h.Candidate)
	}
	serves(t, p, 4, "one")
	if signed, _, err := p.Candidate(ctx, "main"); err != nil || string(signed) != "main 5 candidate\nx" {
		t.Errorf("candidate: %q, %v", signed, err)
	}
	if h, err := p.RollBack(ctx, "main", 0); err != nil || h.Of != 1 {
		t.Errorf("the policy before a renewed one: %+v, %v; want that of generation 1", h, err)
	}
}

// A key that is withdrawn takes nothing with it but what it signed and nobody signs
// again.
func TestResealGoesForTheCandidateToo(t *testing.T) {
	p, _ := newPublisher(t)
	ctx := t.Context()
	publish(t, p, "one")
	if _, err := p.PublishCandidate(ctx, "main", []byte("x")); err != nil {
		t.Fatal(err)
	}
	only := func(candidate bool) Unsign {
		return func(signed []byte, name string, c bool) ([]byte, error) {
			if c != candidate {
				return nil, errors.New("another key")
			}
			return p.opts.Unsign(signed, name, c)
		}
	}
	for i, candidate := range []bool{true, false} {
		renewed, err := p.Reseal(ctx, time.Now(), only(candidate))
		if err != nil || len(renewed) != 1 || renewed[0].Candidate == nil || renewed[0].Generation != uint64(3+2*i) {
			t.Errorf("candidate %v signed by the key: %+v, %v", candidate, renewed, err)
		}
	}
	if renewed, err := p.Reseal(ctx, time.Now(), func([]byte, string, bool) ([]byte, error) { return nil, errors.New("no") }); err != nil || len(renewed) != 0 {
		t.Errorf("neither signed by the key: %v, %v", renewed, err)
	}
}

// dying is a store whose process is killed before a write.
type dying struct {
	store.Store
	left *int
}

var errKilled = errors.New("killed")

func (d dying) Txn(ctx context.Context, cmps []store.Cmp, then, otherwise []store.Op) (store.TxnResult, error) {
	if *d.left--; *d.left < 0 {
		return store.TxnResult{}, errKilled
	}
	return d.Store.Txn(ctx, cmps, then, otherwise)
}

// Wherever a CA is killed while it promotes or rolls back, the policy is the one before
// or the one after, whole, and the next attempt succeeds.
func TestKilledInTheMidst(t *testing.T) {
	for what, change := range map[string]func(*Publisher) (*Head, error){
		"promote":  func(p *Publisher) (*Head, error) { return p.Promote(t.Context(), "main", 0) },
		"rollback": func(p *Publisher) (*Head, error) { return p.RollBack(t.Context(), "main", 1) },
	} {
		for writes := 0; ; writes++ {
			p, st := newPublisher(t)
			publish(t, p, "one")
			publish(t, p, "two")
			if _, err := p.PublishCandidate(t.Context(), "main", []byte("new")); err != nil {
				t.Fatal(err)
			}
			opts, left := p.opts, writes
			opts.Store = dying{st, &left}
			h, err := change(New(opts))
			after := New(p.opts) // started again
			if err == nil {
				want := map[string]string{"promote": "new", "rollback": "one"}[what]
				serves(t, after, h.Generation, want)
				if writes < 2 {
					t.Errorf("%s took %d writes; was it killed at all?", what, writes)
				}
				break
			}
			if !errors.Is(err, errKilled) {
				t.Fatal(err)
			}
			serves(t, after, 2, "two")
			if signed, _, err := after.Candidate(t.Context(), "main"); err != nil || string(signed) != "main 3 candidate\nnew" {
				t.Errorf("%s killed after %d writes: candidate %q, %v", what, writes, signed, err)
			}
			if h, err := change(after); err != nil || h.Generation != 4 {
				t.Errorf("%s again: %+v, %v", what, h, err)
			}
		}
	}
}

// Whatever is done, in whatever order: numbers rise, what is in force is whole, and
// nothing is stored that no head names.
func TestHeadsAreSound(t *testing.T) {
	p, _ := newPublisher(t)
	ctx := t.Context()
	rapid.Check(t, func(rt *rapid.T) {
		name := fmt.Sprintf("n%d", rapid.Uint64().Draw(rt, "name"))
		highest, contents := uint64(0), map[uint64]string{}
		for i := range rapid.IntRange(1, 8).Draw(rt, "steps") {
			content := fmt.Sprint(i)
			var h *Head
			var err error
			switch rapid.IntRange(0, 5).Draw(rt, "step") {
			case 0, 1:
				h, err = p.Publish(ctx, name, []byte(content))
			case 2:
				h, err = p.PublishCandidate(ctx, name, []byte(content))
			case 3:
				h, err = p.Promote(ctx, name, 0)
			case 4:
				h, err = p.RollBack(ctx, name, 0)
			case 5:
				h, err = p.Stage(ctx, name, 0, Canary{PerMille: 1})
			}
			var state *StateError
			if errors.As(err, &state) || errors.Is(err, ErrNone) {
				continue
			}
			if err != nil {
				rt.Fatal(err)
			}
			if h.Last < highest || h.Generation > h.Last || h.Candidate != nil && (h.Candidate.Generation <= h.Generation || h.Candidate.Generation > h.Last) {
				rt.Fatalf("numbers: %+v", h)
			}
			highest = h.Last
			signed, r, err := p.Current(ctx, name)
			if err != nil || r.Generation != h.Generation {
				rt.Fatalf("in force: %+v, %v", r, err)
			}
			if before, known := contents[r.Generation]; known && before != string(signed) {
				rt.Fatalf("generation %d was %q and is %q", r.Generation, before, signed)
			}
			contents[r.Generation] = string(signed)
		}
	})
	named := map[string]bool{}
	kvs, _, _, err := p.opts.Store.List(ctx, HeadPrefix, "", maxNames, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, kv := range kvs {
		h, err := DecodeHead(kv)
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range h.blobs() {
			named[b] = true
		}
	}
	blobs, err := p.blobs(ctx)
	if err != nil || slices.ContainsFunc(blobs, func(b string) bool { return !named[b] }) {
		t.Errorf("%d blobs, %d of them named, %v", len(blobs), len(named), err)
	}
}

func FuzzDecodeHead(f *testing.F) {
	f.Add([]byte(`{"v":1,"generation":2,"blob":"b","chunks":1,"history":[{"generation":1}],"candidate":{"generation":3,"step":1,"canary":{"per_mille":9}}}`))
	f.Add([]byte(`{"v":1,"generation":2,"previous":"old"}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		h, err := DecodeHead(store.KV{Key: HeadPrefix + "main", Value: raw})
		if err != nil {
			return
		}
		if c := h.Candidate; c != nil && c.Generation <= h.Generation {
			t.Errorf("candidate %d beside generation %d", c.Generation, h.Generation)
		}
		if _, err := h.put(); err != nil {
			t.Errorf("what was read cannot be written: %v", err)
		}
	})
}
