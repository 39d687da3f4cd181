// JWT-SVIDs: one per entry and audience, made by the CA, used again for half
// of its life, and while the CA is away for all of it.

package cache

import (
	"container/list"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid"
)

// maxTokens bounds the JWT-SVIDs that are kept.
const maxTokens = 4096

// token is one JWT-SVID.
type token struct {
	key      string
	entryID  string
	verified *svid.JWT
	text     string
	renewAt  time.Time
	notAfter time.Time
}

// tokens keeps the JWT-SVIDs used last. It is safe for concurrent use.
type tokens struct {
	mu *sync.Mutex
	// guarded by mu
	byKey map[string]*list.Element // of *token
	order *list.List               // used last in front
	// generation rises with everything that forgets, so that a token made
	// before does not come in after.
	generation *uint64
}

func newTokens() tokens {
	return tokens{mu: new(sync.Mutex), byKey: map[string]*list.Element{}, order: list.New(), generation: new(uint64)}
}

// JWTSVID returns a JWT-SVID for e and audience, which must not be empty. Before
// the CA is asked for one, admit is. Errors carry gRPC codes if they are the
// CA's or admit's.
func (c *Cache) JWTSVID(ctx context.Context, e *Entry, audience []string, admit func() error) (string, error) {
	audience = slices.Compact(slices.Sorted(slices.Values(audience)))
	key := tokenKey(e, audience)
	held, generation := c.jwts.find(key, time.Now())
	if held != nil && time.Now().Before(held.renewAt) {
		return held.text, nil
	}
	made, err := c.signJWT(ctx, e, audience, key, admit)
	if err != nil {
		// Asked again, because it may have been forgotten meanwhile.
		if held, _ := c.jwts.find(key, time.Now()); held != nil {
			return held.text, nil
		}
		return "", err
	}
	c.jwts.add(made, generation)
	signal(c.changed)
	return made.text, nil
}

func tokenKey(e *Entry, audience []string) string {
	return fmt.Sprintf("%s %s %q", e.ID, e.SPIFFEID, audience)
}

func (c *Cache) signJWT(ctx context.Context, e *Entry, audience []string, key string, admit func() error) (*token, error) {
	if err := admit(); err != nil {
		return nil, err
	}
	text, err := c.asking.ask(ctx, &capb.SignJWTItem{EntryId: e.ID, Audience: audience})
	if err != nil {
		return nil, err
	}
	trust := c.trust.Load()
	if trust == nil {
		return nil, fmt.Errorf("no trust bundle to verify the JWT-SVID of %s with", e.SPIFFEID)
	}
	now := time.Now()
	parsed, err := svid.VerifyJWT(text, trust.Bundle, audience[:1], now)
	if err != nil {
		return nil, fmt.Errorf("verify the JWT-SVID from the CA: %w", err)
	}
	if parsed.ID != e.SPIFFEID || !sameAudience(parsed.Audience, audience) {
		return nil, fmt.Errorf("the CA signed a JWT-SVID for %s to %q, asked for was %s to %q",
			parsed.ID, parsed.Audience, e.SPIFFEID, audience)
	}
	t := &token{
		key: key, entryID: e.ID, text: text, notAfter: parsed.Expiry,
		renewAt: RenewAt(now, parsed.Expiry), verified: parsed,
	}
	if _, revoked := c.revocations.Load().ConcerningJWT(parsed); revoked {
		return nil, fmt.Errorf("the CA signed a JWT-SVID of %s that is revoked already", e.SPIFFEID)
	}
	return t, nil
}

func sameAudience(got, want []string) bool {
	return slices.Equal(slices.Sorted(slices.Values(got)), want)
}

// find returns the token under key, if it has not expired.
func (t *tokens) find(key string, now time.Time) (*token, uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	el := t.byKey[key]
	if el == nil {
		return nil, *t.generation
	}
	held := el.Value.(*token)
	if !now.Before(held.notAfter) {
		t.drop(el)
		return nil, *t.generation
	}
	t.order.MoveToFront(el)
	return held, *t.generation
}

// add keeps made, unless something was forgotten after generation.
func (t *tokens) add(made *token, generation uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if generation != *t.generation {
		return
	}
	if el := t.byKey[made.key]; el != nil {
		t.drop(el)
	}
	t.byKey[made.key] = t.order.PushFront(made)
	if t.order.Len() > maxTokens {
		t.drop(t.order.Back())
	}
}

func (t *tokens) drop(el *list.Element) {
	delete(t.byKey, t.order.Remove(el).(*token).key)
}

// forget drops the tokens for which concerned says yes.
func (t *tokens) forget(concerned func(*token) bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	*t.generation++
	for el := t.order.Front(); el != nil; {
		next := el.Next()
		if concerned(el.Value.(*token)) {
			t.drop(el)
		}
		el = next
	}
}

func (t *tokens) forgetAll() { t.forget(func(*token) bool { return true }) }

func (t *tokens) forgetEntry(id string) {
	t.mu.Lock()
	empty := len(t.byKey) == 0
	*t.generation++
	t.mu.Unlock()
	if !empty {
		t.forget(func(held *token) bool { return held.entryID == id })
	}
}

func (t *tokens) forgetRevoked(set *svid.Revocations) {
	t.forget(func(held *token) bool {
		_, revoked := set.ConcerningJWT(held.verified)
		return revoked
	})
}

// EarliestExpiry returns when the first of the held X509-SVIDs ends; zero when
// there is none.
func (c *Cache) EarliestExpiry() (first time.Time) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	for _, sl := range c.slots {
		if sl.svid != nil && (first.IsZero() || sl.svid.Peer.NotAfter.Before(first)) {
			first = sl.svid.Peer.NotAfter
		}
	}
	return first
}

// Miss is an entry that a workload does not match.
type Miss struct {
	Entry   *Entry
	Missing []string // selectors that it lacks
}

// Nearest returns the entries that proved (sorted) matches and up to limit of
// those that it does not, the one with the fewest missing selectors first. It
// looks at every entry: it is for explanations.
func (c *Cache) Nearest(proved []string, limit int) (matches []*Entry, misses []Miss) {
	now := time.Now()
	c.mu.RLock()
	matches = c.index.match(proved, now)
	for _, e := range c.entries {
		if e.Expired(now) {
			misses = append(misses, Miss{Entry: e, Missing: []string{"expired at " + e.ExpiresAt.UTC().Format(time.RFC3339)}})
		} else if missing := e.missing(proved); len(missing) > 0 {
			misses = append(misses, Miss{Entry: e, Missing: missing})
		}
	}
	c.mu.RUnlock()
	slices.SortFunc(misses, compareMisses)
	return matches, misses[:min(limit, len(misses))]
}

// compareMisses puts near misses first: few selectors missing, many met.
func compareMisses(a, b Miss) int {
	if d := len(a.Missing) - len(b.Missing); d != 0 {
		return d
	}
	if d := len(b.Entry.Selectors) - len(a.Entry.Selectors); d != 0 {
		return d
	}
	return strings.Compare(a.Entry.ID, b.Entry.ID)
}
