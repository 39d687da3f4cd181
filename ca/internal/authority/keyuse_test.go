// Whose a key is, compared with a model that forgets nothing.

package authority

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"
)

func numbered(n int) (k KeyID) {
	binary.BigEndian.PutUint32(k[:], uint32(n))
	return k
}

func owner(n int) KeyOwner {
	return KeyOwner{ID: spiffeid.RequireFromString(fmt.Sprintf("spiffe://example.org/w%d", n%3)), Agent: uint64(n / 3)}
}

// A key is its first owner's until the last of his claims ends, to the minute, and
// nobody's after that.
func TestKeysBelongToWhoProvedThemFirst(t *testing.T) {
	type held struct {
		owner KeyOwner
		until time.Time
	}
	rapid.Check(t, func(rt *rapid.T) {
		u, model := NewKeyUse(1000), map[KeyID]held{}
		now := time.Unix(1_800_000_000, 0)
		for range rapid.IntRange(1, 60).Draw(rt, "steps") {
			now = now.Add(time.Duration(rapid.IntRange(0, 1800).Draw(rt, "later")) * time.Second)
			key, who := numbered(rapid.IntRange(0, 5).Draw(rt, "key")), owner(rapid.IntRange(0, 8).Draw(rt, "owner"))
			until := now.Add(time.Duration(rapid.IntRange(1, 7200).Draw(rt, "ttl")) * time.Second)
			was, is := model[key]
			err := u.Claim(key, who, until, now)
			switch {
			case is && was.owner != who && !now.After(was.until):
				if _, ok := errors.AsType[*InvalidError](err); !ok {
					rt.Fatalf("%v takes a key that is %v's for %s more: %v", who, was.owner, was.until.Sub(now), err)
				}
				continue
			case is && was.owner != who && now.Sub(was.until) < 2*time.Minute && err != nil:
				continue // the minute is not over
			case err != nil:
				rt.Fatalf("%v is refused a key: %v; it was %+v", who, err, was)
			case is && was.owner == who && was.until.After(until):
				until = was.until
			}
			model[key] = held{who, until}
			if !u.Held(key, now) || u.Held(numbered(99), now) {
				rt.Fatal("Held does not say what is")
			}
		}
		if later := now.Add(3 * time.Hour); u.Held(numbered(0), later) || len(u.uses)+len(u.ending) > 0 {
			rt.Fatalf("%d keys and %d minutes are kept after their end", len(u.uses), len(u.ending))
		}
		if u.Forgotten() != 0 {
			rt.Fatal("keys were forgotten")
		}
	})
}

func TestKeysThatEndFirstAreForgottenFirst(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	u := NewKeyUse(100)
	claim := func(n, who int, ttl time.Duration) error { return u.Claim(numbered(n), owner(who), now.Add(ttl), now) }
	for i := range 100 {
		if err := claim(i, 0, time.Duration(100-i)*time.Minute); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 1000 {
		if err := claim(1000+i, 0, time.Hour*2); err != nil || len(u.uses) > 100 {
			t.Fatalf("%d keys, %v", len(u.uses), err)
		}
		if i == 0 && (u.Held(numbered(99), now) || !u.Held(numbered(98), now) || !u.Held(numbered(0), now) || u.Forgotten() != 1) {
			t.Fatalf("not the key that ends first was forgotten; %d were", u.Forgotten())
		}
	}
	if u.Forgotten() < 900 {
		t.Errorf("%d were forgotten", u.Forgotten())
	}
	if err := claim(0, 1, time.Hour); err != nil {
		t.Error(err) // what is forgotten is free: the promise ends here, and the metric says so
	}
}

// A clock that was an hour ahead, and a year.
func TestKeyUseSurvivesAClockThatJumps(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	for _, jump := range []time.Duration{time.Hour, 365 * 24 * time.Hour, -time.Hour} {
		u := NewKeyUse(3)
		for i, at := range []time.Time{now, now.Add(jump), now, now.Add(time.Minute), now.Add(2 * time.Minute)} {
			if err := u.Claim(numbered(i), owner(0), at.Add(10*time.Minute), at); err != nil {
				t.Fatal(err)
			}
		}
		if err := u.Claim(numbered(4), owner(1), now.Add(time.Hour), now.Add(2*time.Minute)); err == nil {
			t.Errorf("after a jump of %s a key changed its owner", jump)
		}
	}
}

// BenchmarkClaim fills the memory and goes on claiming.
func BenchmarkClaim(b *testing.B) {
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	u, now := NewKeyUse(MaxKeys), time.Now()
	claim := func(n int) {
		if err := u.Claim(numbered(n), owner(0), now.Add(time.Duration(n%60)*time.Minute), now); err != nil {
			b.Fatal(err)
		}
	}
	for n := range MaxKeys {
		claim(n)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	b.ReportAllocs()
	for n := 0; b.Loop(); n++ {
		claim(MaxKeys + n)
	}
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/MaxKeys, "B/key")
}
